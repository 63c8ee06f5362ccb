"""What a method sees of the tokens at one block of a vision transformer: states, sizes and signals."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ..core.errors import UnsupportedModel
from ..core.reduction import Reads, Reducer, Tokens
from ..kernels import attention_received, attention_rows
from ..model_adapters.vit_blocks import Given, Vit
from ..model_adapters.vit_signals import Attention, Part
from ..signals import LayerAttention, kind_of
from .vit_run import VitRun


def tokens_at(
    vit: Vit,
    run: VitRun,
    k: int,
    x: Tensor,
    method: Reducer,
    part: Part,
    n0: int,
    given: Given,
    seen: dict[str, Tensor],
    weighs: bool,
) -> Tokens:
    """The tokens of the images of `part` at block k.

    x: [B, N, C]. n0: patches that each of these images had. given: arguments of the block. seen: what the modules of
    its attention put out. weighs: sizes of merged tokens bias attention.
    """
    attention = Attention(vit, k, seen, given, part)
    size = None if run.size is None else part.of(run.size)
    bias = size.log().to(x.dtype) if size is not None and weighs else None
    return Tokens(
        x=part.of(x),
        prefix=vit.prefix,
        size=size,
        signals={what: _signal(vit, run, attention, what, bias) for what in method.reads},
        block=(k, len(vit.blocks)),
        n0=n0,
        has_cls=vit.has_cls,
        scaling=attention.scaling,
    )


def _signal(vit: Vit, run: VitRun, seen: Attention, what: str, bias: Tensor | None) -> Tensor:
    """One of the quantities that a `Reducer` reads, or any signal that a vision transformer shows."""
    mask = None if bias is None else bias[:, None, None, :]
    if what not in get_args(Reads):
        return _registered(vit, what, LayerAttention(seen.queries(), seen.keys(), None, mask, seen.scaling))
    if what != "attention":
        quantity: Tensor = getattr(seen, what)()
        return quantity
    if vit.has_cls:
        return attention_rows(seen.queries()[:, :, :1], seen.keys(), mask, seen.scaling).mean(1)[:, 0]
    run.note("the model has no CLS token, the attention every token receives is used instead")
    return attention_received(seen.queries(), seen.keys(), mask, seen.scaling)


def _registered(vit: Vit, name: str, attention: LayerAttention) -> Tensor:
    """A signal that is none of the quantities a `Reducer` reads, [B, N, ...]; 0 at a CLS token it leaves out."""
    kind = kind_of(name)
    if kind.of_cls and not vit.has_cls:
        raise UnsupportedModel(f"signal {kind.name!r} is that of a CLS token, and this model has none")
    x: Tensor = kind(attention)
    return torch.cat([torch.zeros_like(x[:, :1]), x], 1) if kind.of_cls else x
