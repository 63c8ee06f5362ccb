"""One forward pass of a patched vision transformer: how many patches each image has and keeps, and which are left."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedCall
from ..core.reduction import Reducer
from ..kernels import recorded
from ..model_adapters.vit_blocks import Given, Vit
from ..model_adapters.vit_pooling import real_tokens
from .vit_last import VitLast

Plan = list[tuple[Reducer | None, int]]


@dataclass
class VitRun:
    """One forward pass.

    plans: (method, patches left) of every block; one for all images, or one each where padding makes them differ.
    real, now: patches each image had, and has, where there is one plan each. size: [B, M] float32, for how many tokens
    each row stands; None: one each. origin: [B, n] places of the patches left.
    full, short: of dense outputs, all rows as they were handed out, and the rows that go on.
    """

    plans: list[Plan]
    last: VitLast
    real: list[int]
    now: list[int] | None = None
    size: Tensor | None = None
    origin: Tensor | None = None
    full: Tensor | None = None
    short: Tensor | None = None

    def note(self, text: str) -> None:
        """Remember a sentence for the user, once."""
        if text not in self.last.notes:
            self.last.notes.append(text)

    def valid(self) -> Tensor | None:
        """[B, M] bool: which rows are real where images are padded to one length; None: all."""
        if self.now is None or not self.last.steps:
            return None
        return first_rows(self.now, self.last.prefix, self.last.steps[-1][1].index)


class VitLocal(threading.local):
    """Per-thread state of one patched model; a copy starts empty."""

    run: VitRun | None = None
    last: VitLast | None = None
    seen: dict[str, Tensor] | None = None
    dense = False
    masked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> VitLocal:
        return VitLocal()

    def __reduce__(self) -> Any:
        return VitLocal, ()


def patches_of_images(vit: Vit, n: int, given: Given) -> tuple[list[int], bool]:
    """How many patches the images have, of n rows with the prefix; and whether that is told image by image.

    given: the arguments of the first block. Raises UnsupportedCall where the blocks run twice, where a recording would
    keep the counts of its example, and where an image has no patches.
    """
    if vit.checkpointing():
        raise UnsupportedCall(
            "gradient checkpointing runs blocks a second time, out of order: turn it off "
            "(set_grad_checkpointing(False) in timm, activation_checkpointing_disable() in transformers, "
            "gradient_checkpointing_disable() in older ones)"
        )
    mask = given.get("attention_mask") if vit.parts.pads else None
    if mask is not None and recorded():
        raise UnsupportedCall(
            f"{type(vit.root).__name__} is told by a mask how many patches an image has, and torch.export, "
            "torch.onnx and torch.jit would record the counts of this one: export it unpatched"
        )
    real = [n] if mask is None else real_tokens(mask, n)
    if min(real) <= vit.prefix:
        raise UnsupportedCall("attention_mask hides all patches of an image: leave that image out")
    return [count - vit.prefix for count in real], mask is not None


def check_rows(run: VitRun, k: int, x: Tensor) -> None:
    """Refuse rows that somebody else made of those the block before put out."""
    before = run.last.lengths[-1] if run.last.lengths else run.last.n
    if x.shape[1] != before and run.last.steps:
        raise UnsupportedCall(
            f"block {k} is given {x.shape[1]} rows, but {before} are left behind block {k - 1}: a hook or a module "
            "between the blocks made others of them, which a reduction cannot follow; take it off, or unpatch"
        )


def first_rows(counts: list[int], prefix: int, x: Tensor) -> Tensor:
    """[B, N] bool of x [B, N, ...]: the prefix and the first counts[b] patches of every image."""
    return torch.arange(x.shape[1], device=x.device) < torch.tensor(counts, device=x.device)[:, None] + prefix


def all_rows(run: VitRun, x: Tensor) -> Tensor:
    """The rows x [B, M, C] that are left -> [B, N, C]: every token the row that holds it, dropped ones their last."""
    slots = run.last.slots
    assert slots is not None
    assert run.full is not None
    out = x.gather(1, slots.clamp(min=0)[..., None].expand(*slots.shape, x.shape[2]))
    return torch.where((slots < 0)[..., None], run.full, out)
