"""Signals of the vision tower: of one layer's attention among all tokens of an image, CLS token and all.

They are of what the attention product sees, that is behind rotary embedding and norms where the tower has any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import attention_received, attention_rows
from .product import LayerAttention, shown
from .row import signal


@signal("cls", shape="[N]", where=("tower", "vit"), of_cls=True, vit="attention")
def cls(a: LayerAttention) -> Tensor:
    """The CLS token's softmax row, mean over heads."""
    return a.row(0).mean(1)[:, 0, 1:]


@signal("cls_full", shape="[N]", where=("tower",), of_cls=True)
def cls_full(a: LayerAttention) -> Tensor:
    """The CLS token's softmax row of one head as wide as the tower: softmax of q.k / sqrt(C)."""
    query, keys = a.q[:, :, :1].transpose(1, 2).flatten(2), a.k.transpose(1, 2).flatten(2)
    row = a.row_mask(0)
    row = row[:, :1] if row is not None and row.dim() == 4 else row
    return attention_rows(query[:, None], keys[:, None], row, query.shape[-1] ** -0.5)[:, 0, 0, 1:]


@signal("cls_logits", shape="[N]", where=("tower",), of_cls=True)
def cls_logits(a: LayerAttention) -> Tensor:
    """The CLS token's row before the softmax, scaling * q.k, mean over heads; of a masked token, too."""
    keys = a.k.repeat_interleave(a.q.shape[1] // a.k.shape[1], dim=1)
    return ((a.q[:, :, :1].float() * a.scaling) @ keys.float().mT)[:, :, 0, 1:].mean(1)


@signal("cls_value", shape="[N]", where=("tower",), of_cls=True)
def cls_value(a: LayerAttention) -> Tensor:
    """The softmax of v_CLS . v_j, not scaled, over all tokens j, mean over heads."""
    return attention_rows(a.values[:, :, :1], a.values, a.row_mask(0), 1.0).mean(1)[:, 0, 1:]


@signal("received", shape="[N]", where=("tower", "vit"), over_queries=True, vit="attention")
def received(a: LayerAttention) -> Tensor:
    """The mean softmax weight that each token receives from all queries, mean over heads.

    Padding neither gives nor receives: the mean is over the real queries only.
    """
    real = a.real()
    if real is None:
        return attention_received(a.q, a.k, None, a.scaling, a.block)
    weights = real.float() / real.sum(1, keepdim=True).clamp(min=1)  # padded queries compute garbage
    return attention_received(a.q, a.k, a.mask, a.scaling, a.block, weights=weights)


@signal("mean_query", shape="[N]", where=("tower",), over_queries=True)
def mean_query(a: LayerAttention) -> Tensor:
    """The softmax row of the mean of each head's real queries, mean over heads.

    Where the mask keeps several images apart, it is that of each image's own, weighted by its share of the queries.
    """
    if a.mask is not None and a.mask.shape[-2] > 1:
        return _mean_query_of_images(a)
    real = a.real()
    query = a.q.float().mean(2, keepdim=True) if real is None else _mean_of(a.q, real)
    return attention_rows(query, a.k, None if real is None else real[:, None, None], a.scaling).mean(1)[:, 0]


@signal("queries", shape="[N, C]", where=("tower",))
def queries(a: LayerAttention) -> Tensor:
    """The queries, heads concatenated, in the model's dtype."""
    return a.q.transpose(1, 2).flatten(2)


@signal("keys", shape="[N, C]", where=("tower", "vit"), vit="keys")
def keys(a: LayerAttention) -> Tensor:
    """The keys, heads concatenated, in the model's dtype."""
    return a.keys.transpose(1, 2).flatten(2)


@signal("mean_keys", shape="[N, d]", where=("tower", "vit"), vit="mean_keys")
def mean_keys(a: LayerAttention) -> Tensor:
    """The mean of the keys over heads; a plain vision transformer takes it before rotary embedding."""
    return a.keys.float().mean(1)


@signal("values", shape="[N, C]", where=("tower", "llm"))
def values(a: LayerAttention) -> Tensor:
    """The values, heads concatenated, in the model's dtype."""
    return a.values.transpose(1, 2).flatten(2)


@signal("value_norm", shape="[N]", where=("tower", "llm"))
def value_norm(a: LayerAttention) -> Tensor:
    """The L1 norm of the values' mean over heads."""
    return a.values.float().mean(1).abs().sum(-1)


@signal("hidden", shape="[N, C]", where=("tower",), source="states")
def hidden(states: Tensor) -> Tensor:
    """The states of the tower that the projector reads, before it; `Signal.layer` has to be None."""
    return states


@signal("kept", shape="[N]", where=(), source="carried")
def kept(_: object) -> Tensor:
    """Which tokens stages in the vision tower left: 1 kept, 0 dropped, -1 a newline. The engine carries it."""
    raise AssertionError("the engine brings this signal; nothing reads it")


def _mean_of(q: Tensor, real: Tensor) -> Tensor:
    """q [B, H, N, d] -> [B, H, 1, d] float32: the mean over the tokens that are real [B, N]."""
    weight = real[:, None, :, None].float()
    return (q.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)


def _mean_query_of_images(a: LayerAttention) -> Tensor:
    """[B, N]: tokens that see the same first token are one image, whose mean query attends to that image alone."""
    assert a.mask is not None
    real = a.real()
    assert real is not None
    b, h, n, _ = a.q.shape
    block = shown(a.mask).any(1).to(torch.int8).argmax(-1).expand(b, -1)  # [B, N]
    share = real.float() / real.sum(1, keepdim=True).clamp(min=1)
    count = torch.zeros(b, n, device=a.q.device).scatter_add(1, block, real.float())
    at = block[:, None, :, None].expand_as(a.q)
    mean = torch.zeros_like(a.q, dtype=torch.float32).scatter_add(2, at, a.q.float() * real[:, None, :, None])
    mean = (mean / count.clamp(min=1)[:, None, :, None]).gather(2, at)  # of its own image, at every token
    logits = (mean * a.k.float().repeat_interleave(h // a.k.shape[1], dim=1)).sum(-1) * a.scaling  # [B, H, N]
    logits, of = logits.masked_fill(~real[:, None], -torch.inf), block[:, None].expand(-1, h, -1)
    most = torch.full_like(logits, -torch.inf).scatter_reduce(2, of, logits, "amax").gather(2, of)
    weight = (logits - most).exp().masked_fill(~real[:, None], 0)
    total = torch.zeros_like(weight).scatter_add(2, of, weight).gather(2, of)
    of_image = torch.zeros_like(share).scatter_add(1, block, share).gather(1, block)
    return (weight / total.clamp(min=torch.finfo(total.dtype).tiny)).mean(1) * of_image
