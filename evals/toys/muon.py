"""Muon for the matrices inside transformer layers, AdamW for the rest, float32 masters and their average.

Muon: Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(updates: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a stack of matrices [n, rows, columns] towards 1 (Newton-Schulz)."""
    a, b, c = _QUINTIC
    tall = updates.shape[1] > updates.shape[2]
    x = (updates.transpose(1, 2) if tall else updates).to(torch.bfloat16)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Optimiser:
    """Steps bfloat16 parameters through float32 masters and keeps an exponential average of the masters.

    Parameters whose name contains `slow` take `slow_scale` times the rates; frozen ones are left out, and those without
    a gradient stay.
    """

    def __init__(self, module: nn.Module, slow: str, decay: float = 0.02) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.slow = [slow in name for name in self.names]
        # A low-rank factor is no matrix of its own: what counts is its product with the other one.
        self.matrix = [
            p.dim() == 2 and "lora_" not in name and (".layers." in name or ".blocks." in name) for name, p in named
        ]
        self.decay = decay
        self.masters = [p.detach().float().clone() for p in self.params]
        self.average = [m.clone() for m in self.masters]
        self.restart()

    def restart(self) -> None:
        """Continue from the averaged weights with empty moments: the start of a stage."""
        for master, mean in zip(self.masters, self.average, strict=True):
            master.copy_(mean)
        self.first = [torch.zeros_like(m) for m in self.masters]
        self.second = [
            torch.zeros(()) if muon else torch.zeros_like(m) for m, muon in zip(self.masters, self.matrix, strict=True)
        ]
        self.age = [0] * len(self.masters)
        self.steps = 0
        self.load(self.masters)

    def load(self, values: list[Tensor]) -> None:
        """Copy float32 values (`masters` or `average`) into the parameters."""
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.params), values)

    @torch.no_grad()
    def step(self, muon: float, adam: float, slow_scale: float) -> None:
        """One update from the parameters' gradients, clipped to global norm 1, which are then cleared."""
        grads = {i: p.grad.float() for i, p in enumerate(self.params) if p.grad is not None}
        norm = torch.stack(torch._foreach_norm(list(grads.values()))).norm()
        torch._foreach_mul_(list(grads.values()), (1.0 / (norm + 1e-6)).clamp(max=1.0))
        shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i in grads:
            rate = (muon if self.matrix[i] else adam) * (slow_scale if self.slow[i] else 1.0)
            self.masters[i].mul_(1 - rate * self.decay)
            if self.matrix[i]:
                shapes[tuple(grads[i].shape)].append(i)
            else:
                self._adam(i, grads[i], rate)
        for shape, members in shapes.items():
            self._muon(shape, members, grads, muon, slow_scale)
        self.steps += 1
        rate = min(0.998, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.masters, 1 - rate)
        self.load(self.masters)
        for p in self.params:
            p.grad = None

    def _adam(self, i: int, grad: Tensor, rate: float) -> None:
        self.age[i] += 1
        self.first[i].lerp_(grad, 0.1)
        self.second[i].lerp_(grad * grad, 0.02)
        mean = self.first[i] / (1 - 0.9 ** self.age[i])
        spread = (self.second[i] / (1 - 0.98 ** self.age[i])).sqrt_().add_(1e-8)
        self.masters[i].addcdiv_(mean, spread, value=-rate)

    def _muon(
        self, shape: tuple[int, ...], members: list[int], grads: dict[int, Tensor], rate: float, slow: float
    ) -> None:
        for i in members:
            self.first[i].mul_(0.95).add_(grads[i])
        nesterov = torch.stack([grads[i] + 0.95 * self.first[i] for i in members])
        updates = orthogonalise(nesterov)
        scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
        for i, update in zip(members, updates, strict=True):
            self.masters[i].add_(update, alpha=-scale * (slow if self.slow[i] else 1.0))

    def state(self) -> dict[str, Any]:
        """Everything needed to continue bit by bit."""
        keys = ("masters", "average", "first", "second", "age", "steps")
        return {key: getattr(self, key) for key in keys}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        for key, value in state.items():
            setattr(self, key, value)
        self.load(self.masters)
