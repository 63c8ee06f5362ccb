"""`Compaction`: which tokens of a batch stay, and how to cut and restore everything that has their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.compact.reference import places
from .types import UnsupportedCall


@dataclass(frozen=True)
class Compaction:
    """Rows of L tokens shortened to n, left-padded where rows keep different counts.

    index: [B, n] int64, the original position of each kept token (at pads: any position).
    valid: [B, n] bool, False at pads; None when every row keeps n tokens.
    src: [B, L] int64, the slot that answers for each original position: its own if kept, else that of the last kept
        token before it (the first kept one, if there is none before).
    """

    index: Tensor
    valid: Tensor | None
    src: Tensor

    @classmethod
    def of(cls, keep: Tensor, counts: Sequence[int]) -> Compaction:
        """From a mask [B, L] (bool, True = stays) and its row sums, which the host knows: no device sync."""
        return cls(*places(keep, counts))

    @property
    def kept(self) -> Tensor:
        """[B, L] bool: which of the original positions stay."""
        kept = self.index.gather(1, self.src) == torch.arange(self.length, device=self.src.device)
        return kept if self.valid is None else kept & self.valid.gather(1, self.src)

    @property
    def n(self) -> int:
        """Kept tokens per row, pads included."""
        return self.index.shape[1]

    @property
    def length(self) -> int:
        """Tokens per row before."""
        return self.src.shape[1]

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """Shorten dimension `dim` (size L) to n; the dimension before it is the batch (size B or 1)."""
        dim = dim % x.dim()
        index = self.index.to(x.device)
        if index.shape[0] == 1:
            return x.index_select(dim, index[0])
        batch = dim - 1
        if x.shape[batch] == 1:
            x = x.expand(*x.shape[:batch], index.shape[0], *x.shape[dim:])
        shape = [1] * x.dim()
        shape[batch], shape[dim] = index.shape
        size = list(x.shape)
        size[dim] = self.n
        return x.gather(dim, index.view(shape).expand(size))

    def restore(self, h: Tensor) -> Tensor:
        """[B, n, ...] -> [B, L, ...]: every original position gets the state that answers for it."""
        src = self.src.to(h.device)
        if src.shape[0] == 1:
            return h.index_select(1, src[0])
        return h.gather(1, src.view(*src.shape, *[1] * (h.dim() - 2)).expand(*src.shape, *h.shape[2:]))

    def then(self, after: Compaction) -> Compaction:
        """This cut followed by `after` (which counts in slots of this one), as one cut of the original rows."""
        return Compaction(self.index.gather(1, after.index), after.valid, after.src.gather(1, self.src))

    def cut_mask(self, mask: Tensor, past: int) -> Tensor:
        """Shorten an attention mask whose columns are [past | L new tokens | room of a static cache].

        mask: [B, K] (1 = real token) or [B or 1, 1, L, K] (bool, True = may attend; or additive float).
        The room of a static cache grows by what is dropped, so that its width stays K.
        """
        length, tail = self.length, mask.shape[-1] - past - self.length
        index = self.index.to(mask.device)
        if mask.dim() == 4:
            batch, heads = max(index.shape[0], mask.shape[0]), mask.shape[1]
            index, mask = index.expand(batch, -1), mask.expand(batch, *mask.shape[1:])
            rows = index[:, None, :, None].expand(batch, heads, self.n, mask.shape[-1])
            mask = mask.gather(2, rows)
            index = index[:, None, None, :].expand(batch, heads, self.n, self.n)
        new = mask[..., past : past + length].gather(-1, index)
        if self.valid is not None:
            new = hide(new, self.valid)
        parts = [mask[..., :past], new]
        if tail > 0:
            parts += [mask[..., past + length :], hidden_like(mask, (*new.shape[:-1], length - self.n))]
        return torch.cat(parts, dim=-1)


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
