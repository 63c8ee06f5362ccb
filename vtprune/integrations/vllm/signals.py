"""Signals of a vision tower that vLLM runs: its attention modules show what the attention product sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UnsupportedModel
from ...core.signal import Signal
from ...hf.tower_signals import TowerSignals


class EngineSignals(TowerSignals):
    """`TowerSignals` of a tower that another engine runs.

    base: the model of transformers without weights, which tells the layers and how patches become visual tokens.
    attentions: the engine's modules of the attention product, first layer first.
    Raises UnsupportedModel where a signal is of a layer that the engine has not loaded.
    """

    def __init__(self, base: nn.Module, modality: Any, needs: Iterable[Signal], attentions: list[nn.Module]) -> None:
        super().__init__(base, modality, needs)
        self.attentions = attentions
        for signal, index in self.index.items():
            if index >= len(attentions):
                raise UnsupportedModel(
                    f"the recipe reads {signal}, and vLLM loads the first {len(attentions)} of the {len(self.layers)} "
                    "layers of this vision tower, up to the one that feeds the projector: set the method's layer to "
                    "one of these, or choose a method that reads none"
                )

    def install(self) -> list[Callable[[], None]]:
        """Put a hook on each module whose layer is read; the returned functions take them off."""
        undo: list[Callable[[], None]] = []
        for signal, index in self.index.items():
            hook = partial(self._read, signal)
            undo.append(self.attentions[index].register_forward_pre_hook(hook, with_kwargs=True).remove)
        return undo

    def _read(self, signal: Signal, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read one signal of the product that is about to run, image by image where many stand in a row."""
        if not self.busy():
            return
        given = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
        q, k, v = (_by_head(x, module.head_size) for x in given[:3])
        ends = args[3] if len(args) > 3 else kwargs.get("cu_seqlens")
        if ends is None:
            self._read_product(signal, module, q, k, v, None, module.scale)
            return
        sizes = torch.diff(ends).tolist()
        for one, its_k, its_v in zip(q.split(sizes, dim=2), k.split(sizes, dim=2), v.split(sizes, dim=2)):
            self._read_product(signal, module, one, its_k, its_v, None, module.scale)


def _by_head(x: Tensor, size: int) -> Tensor:
    """[B, N, H * d] or [B, N, H, d] -> [B, H, N, d]."""
    x = x.detach()
    return (x if x.dim() == 4 else x.unflatten(-1, (-1, size))).transpose(1, 2)
