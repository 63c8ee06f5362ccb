"""The arguments of a tower's attention modules, cut to the patches that are left."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tower_run import TowerRun

SEQUENCE_LENGTHS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


def cut_arguments(run: TowerRun, implementation: str | None, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments `call` of an attention module, for the rows that `run.cut` leaves.

    Hidden states are cut already. implementation: that of the tower's attention, by transformers' name.
    """
    cut, call = run.cut, dict(call)
    assert cut is not None
    if "position_embeddings" in call:
        rotary = call["position_embeddings"]
        call["position_embeddings"] = run.once(rotary, lambda: tuple(cut.cut(t, -2) for t in rotary))
    for name in SEQUENCE_LENGTHS:
        if call.get(name) is not None:
            call[name] = run.once(call[name], partial(_shorter, call[name], run))
    mask = call.get("attention_mask")
    if mask is not None:
        call["attention_mask"] = run.once(mask, lambda: cut.cut_mask(mask, 0))
    elif cut.valid is not None:
        call["attention_mask"] = _padding(cut.valid, implementation, call["hidden_states"])
    if run.bias is not None:
        call["attention_mask"] = _with_bias(call.get("attention_mask"), run.bias, call["hidden_states"])
    return call


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args)), **kwargs}


def _shorter(lengths: Tensor, run: TowerRun) -> Tensor:
    """Cumulative segment lengths [S + 1] of a packed tower after the cut; segments with nothing left go."""
    assert run.cut is not None
    keep = torch.zeros(run.shape[1], dtype=lengths.dtype, device=lengths.device)
    keep[run.cut.index[0].to(lengths.device)] = 1
    return F.pad(keep.cumsum(0, dtype=lengths.dtype), (1, 0))[lengths.long()].unique_consecutive()


def _padding(valid: Tensor, attention: str | None, hidden: Tensor) -> Tensor:
    """The mask that hides the pads of shorter rows, valid [T, n], as the attention implementation wants it."""
    valid, dtype = valid.to(hidden.device), hidden.dtype
    if "flash" in (attention or ""):
        return valid.long()
    if attention != "eager":
        return valid[:, None, None, :]
    blocked = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, torch.finfo(dtype).min)
    return blocked[:, None, None, :]


def _with_bias(mask: Tensor | None, bias: Tensor, hidden: Tensor) -> Tensor:
    """An attention mask (None, bool or additive, [T, 1, .., n]) and a bias on keys [T, n], as one additive mask."""
    bias = bias.to(hidden.device, hidden.dtype)[:, None, None, :]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.expand(torch.broadcast_shapes(bias.shape, mask.shape)).masked_fill(
            ~mask, torch.finfo(hidden.dtype).min
        )
    return torch.maximum(mask + bias, mask.new_tensor(torch.finfo(mask.dtype).min))
