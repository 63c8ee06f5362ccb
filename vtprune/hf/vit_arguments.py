"""The arguments of a block of a vision transformer, for the patches that are left."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UnsupportedCall
from ..model_adapters.vit_blocks import ROPE, Given
from .vit_run import VitRun, first_rows

MASKS = ("attn_mask", "attention_mask", "is_causal", "k_x", "v_x")


def cut_arguments(run: VitRun, given: Given, drop_mask: bool) -> Given:
    """The block's further arguments for the tokens that are left; masks are refused.

    drop_mask: its attention mask hides nothing but padding, which is hidden otherwise.
    """
    if drop_mask:
        given = {name: value for name, value in given.items() if name != "attention_mask"}
    for name in MASKS:
        if given.get(name) is not None and given[name] is not False:
            raise UnsupportedCall(f"{name} hides tokens, which a reduction would have to follow: call without it")
    given = {name: value for name, value in given.items() if name not in MASKS}
    for name in ROPE:
        rope = given.get(name)
        if rope is not None and run.origin is not None:
            tables = tuple(_rope_of_patches(t, run.origin) for t in (rope if isinstance(rope, tuple) else (rope,)))
            given[name] = tables if isinstance(rope, tuple) else tables[0]
    return given


def key_bias(run: VitRun, x: Tensor, weighs: bool) -> Tensor | None:
    """[B, N] to add to the logits of every key of x [B, N, C]: log sizes, and the lowest number for padding.

    weighs: a method lets merged tokens attract attention by their size.
    """
    bias = run.size.log().to(x.dtype) if run.size is not None and weighs else None
    if run.now is None or min(run.now) + run.last.prefix == x.shape[1]:
        return bias
    pads = ~first_rows(run.now, run.last.prefix, x)
    return (x.new_zeros(pads.shape) if bias is None else bias).masked_fill(pads, torch.finfo(x.dtype).min)


def _rope_of_patches(rope: Tensor, origin: Tensor) -> Tensor:
    """A table [N, d] of rotary positions -> [B, 1, n, d] for the patches that are left, origin [B, n]."""
    if rope.dim() != 2:
        raise UnsupportedCall(f"rotary positions of shape {list(rope.shape)}: one table [N, d] is supported")
    return rope[origin][:, None]
