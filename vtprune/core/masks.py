"""Attention masks: which tokens they show, and how they are cut, hidden and made anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import UnsupportedCall


def tensor_mask(mask: object) -> Tensor:
    """`mask` if it is a tensor; block masks of flex attention and the like are refused."""
    if not isinstance(mask, Tensor):
        raise UnsupportedCall(
            f"attention masks of type {type(mask).__name__} cannot be cut; load the model with "
            "attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
        )
    return mask


def allowed(mask: Tensor) -> Tensor:
    """bool of the same shape: who may attend to whom by a mask that is bool or additive."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def visible(mask: Tensor) -> Tensor:
    """[B, L] bool: which tokens are no padding, by a mask [B, H, L, L] (bool or additive) among themselves.

    Some other token attends to them; or, as nobody comes behind, they attend to others. Hidden tokens and padding may
    attend to themselves, as some masks have it to keep softmax rows from being empty.
    """
    seen = allowed(mask).any(1)
    places = torch.arange(seen.shape[-1], device=seen.device)
    others = seen & (places[:, None] != places)
    behind = torch.nn.functional.pad(reach_back(seen)[:, 1:], (0, 1), value=len(places))
    last = seen.diagonal(dim1=-2, dim2=-1) & others.any(-1) & (behind > places)
    return others.any(1) | last


def reach_back(seen: Tensor) -> Tensor:
    """[B, L] int64: the first token that any from there on attends to. seen: [B, L, L] bool."""
    places = torch.arange(seen.shape[-1], device=seen.device)
    first = torch.where(seen.any(-1), seen.to(torch.int8).argmax(-1), places)
    return first.flip(1).cummin(1).values.flip(1)


def hidden_like(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Columns nobody may attend to, in the dtype of `mask`."""
    value = torch.finfo(mask.dtype).min if mask.is_floating_point() and mask.dim() == 4 else 0
    return torch.full(tuple(shape), value, dtype=mask.dtype, device=mask.device)


def hide(mask: Tensor, valid: Tensor) -> Tensor:
    """Mask the columns where valid [B, K] is False; mask is [B, K] or [B, 1, Q, K], bool, int or additive."""
    valid = valid.to(mask.device)
    if mask.dim() == 4:
        valid = valid[:, None, None, :]
        if mask.is_floating_point():
            return mask.masked_fill(~valid, torch.finfo(mask.dtype).min)
    return mask * valid.to(mask.dtype) if mask.dtype != torch.bool else mask & valid


def causal_mask(valid: Tensor, queries: int, dtype: torch.dtype | None) -> Tensor:
    """[B, 1, Q, K] causal mask over K keys of which the last Q are the queries; bool, or additive in `dtype`."""
    keys = valid.shape[1]
    rows = torch.arange(keys - queries, keys, device=valid.device)[:, None]
    allowed = (torch.arange(keys, device=valid.device)[None] <= rows)[None, None] & valid[:, None, None, :]
    return allowed if dtype is None else _additive(allowed, dtype)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def mask_of(allowed: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """allowed [B, 1, Q, K] bool, as a layer takes it that is no flash kernel."""
    return _additive(allowed, dtype) if attention == "eager" else allowed


def mask_for(attention: str, valid: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """What a layer is given over padded keys, valid [B, K]: flash kernels the padding, others a causal 4-D mask."""
    if "flash" in attention:
        return valid.long()
    return causal_mask(valid, queries, dtype if attention == "eager" else None)


def in_window(sliding: Tensor, full: Tensor | None, window: int) -> Tensor:
    """A cut sliding-window mask [B, 1, Q, K] whose window counts kept tokens, as the cache does at decode.

    sliding: cut from a window that counted dropped tokens too. full: the same without a window, of at least K columns
    (ending with the same key); None if it is causal and no more.
    """
    queries, keys = sliding.shape[-2:]
    ahead = (
        torch.arange(keys, device=sliding.device)[None]
        - torch.arange(keys - queries, keys, device=sliding.device)[:, None]
    )
    near = (ahead <= 0) & (ahead > -window)
    if full is not None:
        full = full[..., -keys:]
        near = near & (full if full.dtype == torch.bool else full == 0)
    if sliding.dtype == torch.bool:
        return sliding | near
    return sliding.masked_fill(near, 0)
