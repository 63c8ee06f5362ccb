"""Packed rows: several samples in one row, found in the arguments of a call and laid out as rows of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedCall
from ..core.masks import allowed, causal_mask, hide, reach_back
from ..model_adapters.base import Adapter
from . import cache as kv
from .arguments import OF_THE_HEAD
from .prefill import replaced

# What collators say of samples in a row (transformers' FlashAttentionKwargs and `seq_idx`).
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Arguments of base models that have the rows and columns of the prompt.
TOKENS = ("input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Samples:
    """S samples of packed rows [B, L], padded on the left to the longest, m.

    source: [S, m] int64, the place of each token among the B * L; at pads that of some word. valid: [S, m] bool, False
    at pads. home: [B * L] int64, the place of each token among the S * m; hidden tokens, which are in no sample, take
    that of another. length: L.
    """

    source: Tensor
    valid: Tensor
    home: Tensor
    length: int

    @classmethod
    def of(cls, starts: Tensor, real: Tensor, word: int) -> Samples:
        """From where samples start and which tokens are real, both [B, L] bool; word: the place of some word."""
        device, flat = starts.device, real.flatten().nonzero().flatten()
        number = starts.flatten().cumsum(0).index_select(0, flat)
        sizes = number.unique_consecutive(return_counts=True)[1]
        most = int(sizes.max())
        sample = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        column = torch.arange(len(flat), device=device) - (sizes.cumsum(0) - most).index_select(0, sample)
        source = torch.full((len(sizes), most), word, device=device)
        valid = torch.zeros_like(source, dtype=torch.bool)
        source[sample, column], valid[sample, column] = flat, True
        home = torch.zeros(real.numel(), dtype=torch.int64, device=device)
        home[flat] = sample * most + column
        return cls(source, valid, home, real.shape[1])

    def unpack(self, x: Tensor, dim: int = 0) -> Tensor:
        """[.., B, L, ..] -> [.., S, m, ..]; dim is that of B."""
        flat = x.flatten(dim, dim + 1)
        source = self.source.to(x.device)
        return flat.index_select(dim, source.flatten()).unflatten(dim, source.shape)

    def pack(self, x: Tensor) -> Tensor:
        """[S, m, ..] -> [B, L, ..]."""
        return x.flatten(0, 1).index_select(0, self.home.to(x.device)).unflatten(0, (-1, self.length))

    def unpack_mask(self, mask: Tensor) -> Tensor:
        """[B or 1, H, L, L] (bool or additive) -> [S, H, m, m], pads hidden."""
        source = self.source.to(mask.device)
        columns, row = source % self.length, source[:, -1:, None] // self.length  # samples end with a real token
        mask = mask.expand(-(-self.home.shape[0] // self.length), -1, -1, -1)
        cut = mask[row, :, columns[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return hide(cut, self.valid)


def find(call: dict[str, Any], code: Tensor, adapter: Adapter, *, caches: bool) -> Samples | None:
    """The samples of a call of the base model whose rows hold several; None if every row is one sample.

    code: [B, L], 1 at words. caches: keys and values are stored, so that transformers itself looks for no gaps.
    """
    starts, real = _starts(call, code, adapter, caches)
    if starts is None:
        return None
    starts = starts.clone()
    starts[:, 0] = True
    real = real & ~_padding(call, starts, adapter)
    number = starts.flatten().cumsum(0).view_as(starts)
    first = torch.where(real, number, number.numel() + 1).amin(1)
    last = torch.where(real, number, 0).amax(1)
    if not bool((last > first).any()):
        return None
    return Samples.of(starts, real, int((code == 1).flatten().to(torch.int8).argmax()))


def _starts(call: dict[str, Any], code: Tensor, adapter: Adapter, caches: bool) -> tuple[Tensor | None, Tensor]:
    """[B, L] bool: where the arguments say that a sample starts, or None; and which tokens anybody sees."""
    (batch, length), device = code.shape, code.device
    found, mask = [], call.get("attention_mask")
    real = torch.ones(batch, length, dtype=torch.bool, device=device)
    ids, sums, numbers = call.get("position_ids"), call.get("cu_seq_lens_q"), call.get("seq_idx")
    if mask is None and torch.is_tensor(ids) and ids.shape[-1] == length:
        found.append(_restarts(ids.to(device), adapter.mrope, caches).expand(batch, -1))
    if torch.is_tensor(sums) and sums.numel() > 2:
        flat = torch.zeros(batch * length + 1, dtype=torch.bool, device=device)
        flat[sums.to(device).long().clamp(0, batch * length)] = True
        found.append(flat[:-1].view(batch, length))
    if torch.is_tensor(numbers) and numbers.shape == code.shape:
        found.append(torch.nn.functional.pad(numbers.to(device).diff(dim=1) != 0, (1, 0)))
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if torch.is_tensor(mask) and mask.dim() == 2:
        real = mask[:, -length:].to(device) != 0
    elif torch.is_tensor(mask) and mask.dim() == 4 and mask.shape[-2:] == (length, length):
        seen = allowed(mask).any(1).to(device).expand(batch, -1, -1)
        real = seen.any(1)
        found.append(_blocks(seen))
    return (torch.stack(found).any(0) if found else None), real


def _restarts(ids: Tensor, mrope: bool, caches: bool) -> Tensor:
    """[B, L] bool: where position ids [B, L] or [P, B, L] start anew.

    Where transformers itself tells samples by gaps in the ids of words (no mask, no cache), so is it here. Else an id
    has to fall; it may fall behind a row's first ids, all alike, which padding has.
    """
    words = ids.dim() == 2 or len(ids) == 4  # else the first axis is time, which rests within an image
    line = ids if ids.dim() == 2 else ids[0]
    step = line.diff(dim=1)
    if words and not caches and not (mrope and ids.dim() == 2):
        starts = step != 1
    else:
        starts = (step < 0) & (line != line[:, :1])[:, :-1]
    return torch.nn.functional.pad(starts, (1, 0))


def _blocks(seen: Tensor) -> Tensor:
    """[B, L] bool: where no token from there on sees one before, and none before sees one from there on."""
    places = torch.arange(seen.shape[-1], device=seen.device)
    ahead = places[-1] - reach_back(seen.flip(1, 2)).flip(1)
    return (reach_back(seen) >= places) & (torch.nn.functional.pad(ahead, (1, 0), value=-1)[:, :-1] < places)


def _padding(call: dict[str, Any], starts: Tensor, adapter: Adapter) -> Tensor:
    """[B, L] bool: samples made of nothing but the padding token."""
    ids, pad = call.get("input_ids"), adapter.pad_id
    if ids is None or pad is None:
        return torch.zeros_like(starts)
    number = starts.flatten().cumsum(0) - 1
    words = torch.zeros_like(number).index_add_(0, number, (ids != pad).flatten().to(number))
    return (words == 0).index_select(0, number).view_as(starts)


def unpack(call: dict[str, Any], samples: Samples, shape: tuple[int, int], linear: bool) -> dict[str, Any]:
    """The same call with every sample in a row of its own. linear: the model has layers that know padding only."""
    new = {name: value for name, value in call.items() if name not in LENGTHS}
    for name, value in new.items():
        if not torch.is_tensor(value) or name in OF_THE_HEAD or name == "attention_mask":
            continue
        if name == "position_ids":
            ids = value.expand(*value.shape[:-2], *shape)
            new[name] = samples.unpack(ids, ids.dim() - 2)
        elif name in TOKENS:
            new[name] = samples.unpack(value)
        elif tuple(value.shape[:2]) == shape:
            raise UnsupportedCall(
                f"this call packs several samples into a row, and nothing is known of how to tell apart {name!r} of "
                f"shape {tuple(value.shape)}: pass one sample a row, left-padded"
            )
    new["attention_mask"] = _mask(call.get("attention_mask"), samples, linear)
    return new


def _mask(mask: Any, samples: Samples, linear: bool) -> Any:
    """The mask of unpacked rows: [S, m] where every sample is read causally, else what was given, block by block."""
    valid = samples.valid
    if isinstance(mask, dict):
        cut: Any = {name: samples.unpack_mask(part) for name, part in mask.items() if part is not None}
        plain = False
    elif torch.is_tensor(mask) and mask.dim() == 4:
        cut = samples.unpack_mask(mask)
        open_ = cut if cut.dtype == torch.bool else cut == 0
        causal = causal_mask(valid, valid.shape[1], None).to(open_.device)
        # A mask is plain where it shows every real token of a sample exactly the real tokens up to itself.
        plain = bool(((open_ == causal) & (allowed(cut) == causal) | ~valid.to(cut.device)[:, None, :, None]).all())
    else:
        return valid.long()
    if plain:
        return valid.long()
    if linear and not bool(valid.all()):
        raise UnsupportedCall(
            "this call packs several samples into a row under a mask of its own making, which linear-attention layers "
            "do not take: pass one sample a row, left-padded"
        )
    return cut


def pack_output(output: Any, samples: Samples) -> Any:
    """The output of the base model, with its last hidden states [S, m, D] back in packed rows [B, L, D]."""
    return replaced(output, samples.pack(output[0]))


def refuse_cache(samples: Samples) -> None:
    """Raise UnsupportedCall: the cache would continue each packed row as if it were one sample."""
    raise UnsupportedCall(
        f"this call packs {len(samples.source)} samples into {samples.home.shape[0] // samples.length} rows, and a "
        f"{kv.NAME} would go on as if each row were one: pass use_cache=False, or one sample a row, left-padded"
    )
