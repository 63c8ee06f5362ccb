"""What a signal may ask: `LayerAttention` and `LayerPass` of one layer, and `Prompt`, what stands where in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import UnsupportedCall
from ..kernels import attention_received, attention_rows, to_device

ROWS = 64  # softmax rows held at a time
MASKED = 1 << 22  # entries of a mask, or of softmax rows, made for some of the queries


class Prompt(Protocol):
    """Which of the n tokens that a decoder layer runs on are what, for B rows; the engine has one.

    "That text" is the text behind a row's first visual token, or its last token where nothing stands behind.
    """

    @property
    def batch(self) -> int:
        """B, how many rows the batch has."""

    def real(self) -> Tensor:
        """[B, n] bool: tokens of the prompt; the others are padding, or stand behind its end."""

    def last(self, n: int) -> Tensor:
        """[B] int64: where the last token of the prompt stands."""

    def visual(self) -> Tensor:
        """[B, n] bool: visual tokens."""

    def visual_slots(self, row: int) -> Tensor:
        """[V] int64: where the row's visual tokens stand, image by image."""

    def text_slots(self, row: int, device: torch.device) -> Tensor:
        """[T] int64: where the row's tokens of that text stand; none in a row without visual tokens."""

    def text_is_seen(self, row: int) -> bool:
        """False if no visual token stands behind the first token of that text, so that none can attend to it."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer: softmax(scaling * q.k) over what the mask shows, times v.

    q: [B, H, M, d]. k, v: [B, G, past + M, d] or longer, G the groups of heads; all after rotary embedding and norms.
    mask: None, or broadcastable to [B, H, M, keys], boolean (True = attend) or additive; a vision tower without a mask
        lets every token see all, and a decoder layer those up to itself. scaling: the factor on q.k.
    past: tokens of earlier calls among the keys, which a prompt continues. prompt: inside the LLM, who is who.
    block: queries handled at a time where all are asked; None chooses by memory.
    rope: for signals that ask for it, (cos, sin) [B or 1, n, d'] that turned the first d' channels of queries and keys;
        None where there is no rotary embedding of a single axis.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Tensor | None
    scaling: float
    past: int = 0
    prompt: Prompt | None = None
    block: int | None = None
    rope: tuple[Tensor, Tensor] | None = None

    @property
    def n(self) -> int:
        """How many tokens a signal is about: those of this call inside the LLM, all keys in a tower."""
        return self.k.shape[2] if self.prompt is None else self.q.shape[2]

    @property
    def keys(self) -> Tensor:
        """[B, G, n, d]: those of this call's tokens."""
        return self.k if self.prompt is None else self.k[:, :, self.past : self.past + self.n]

    @property
    def keys_from_start(self) -> Tensor:
        """[B, G, n, d] float32: those of this call's tokens as if positions began with 0 at a row's first real token.

        Without padding they do, and products of queries and keys do not tell the difference.
        """
        keys = self.keys.float()
        if self.rope is None:
            return keys
        cos, sin = (x[:, None] for x in at_first(*self.rope, self.words))
        length, width = (cos.square() + sin.square()).sqrt(), cos.shape[-1]
        low, high = keys[..., :width].chunk(2, dim=-1)
        turned = (keys[..., :width] * cos - torch.cat([-high, low], dim=-1) * sin) / length
        return torch.cat([turned, keys[..., width:]], dim=-1)

    @property
    def all_values(self) -> Tensor:
        """v [B, G, past + n, d] or longer; UnsupportedCall where a plain vision transformer does not show it."""
        if self.v is None:
            raise UnsupportedCall("a plain vision transformer shows queries and keys of its blocks, and no values")
        return self.v

    @property
    def values(self) -> Tensor:
        """[B, G, n, d]: those of this call's tokens; UnsupportedCall as for `all_values`."""
        return self.all_values if self.prompt is None else self.all_values[:, :, self.past : self.past + self.n]

    @property
    def words(self) -> Prompt:
        """The prompt; UnsupportedCall in a vision tower, which has none."""
        if self.prompt is None:
            raise UnsupportedCall("a vision tower has no prompt that a signal could ask for")
        return self.prompt

    def of(self, row: int) -> LayerAttention:
        """A single row of the batch."""
        one = slice(row, row + 1)
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[one]
        v = None if self.v is None else self.v[one]
        return replace(self, q=self.q[one], k=self.k[one], v=v, mask=mask)

    def rows(self, slots: Tensor) -> Tensor:
        """Softmax rows [B, H, R, n] of the queries at slots [B, R], over the tokens of this call, inside the LLM."""
        batch, heads, n, width = self.q.shape
        queries = self.q.gather(2, slots[:, None, :, None].expand(batch, heads, slots.shape[1], width))
        keys = self.k[:, :, : self.past + n]
        bias = bias_of(self.mask, slots, n, keys.shape[2])
        return attention_rows(queries, keys, bias, self.scaling)[..., self.past :]

    def row(self, query: int) -> Tensor:
        """Softmax row [B, H, 1, keys] of one query, by its place, which is the same in all rows of the batch."""
        return attention_rows(self.q[:, :, query].unsqueeze(2), self.k, self.row_mask(query), self.scaling)

    def row_mask(self, query: int) -> Tensor | None:
        """The mask of one query, [.., 1, N]."""
        if self.mask is None or self.mask.shape[-2] == 1:
            return self.mask
        return self.mask[..., query, :].unsqueeze(-2)

    def last_rows(self) -> Tensor:
        """Softmax rows [B, H, n] of each row's last query: the last of the prompt, or the new token at decode."""
        if self.prompt is None:
            return self.row(-1)[:, :, 0]
        last = to_device(self.prompt.last(self.n), self.q.device)
        return self.rows(last[:, None])[:, :, 0]

    def real(self) -> Tensor | None:
        """[B, N] bool: the tokens of a tower that somebody may attend to; the others are padding. None: all of them."""
        if self.mask is None:
            return None
        return shown(self.mask).any(dim=-2).any(dim=1).expand(self.q.shape[0], -1)

    def given_by(self, real: Tensor) -> Tensor:
        """[B, n] what each token of this call gets from all its queries that are real [B, n], inside the LLM.

        It is a sum over queries and a mean over heads.
        """
        batch, _, n, _ = self.q.shape
        out, weights = self.q.new_zeros(batch, n, dtype=torch.float32), real.float()
        slots = torch.arange(n, device=self.q.device).expand(batch, -1)
        step = max(ROWS, MASKED // (batch * (self.past + n)))
        for some in (slice(start, start + step) for start in range(0, n, step)):
            bias = bias_of(self.mask, slots[:, some], n, self.past + n)
            causal = self.mask is None or self.mask.shape[-2] != n
            end = min(some.stop, n) if causal else n  # the keys behind get nothing
            seen, weight = self.past + end, weights[:, some]
            given = attention_received(
                self.q[:, :, some], self.k[:, :, :seen], bias[..., :seen], self.scaling, weights=weight
            )
            out[:, :end] += given[:, self.past :]
        return out


@dataclass(frozen=True)
class LayerPass:
    """What one decoder layer does to the tokens of this call.

    before, after: [B, n, D] what enters and what leaves it. norm: the norm behind the last layer, [.., D] -> [.., D].
    words: who is who.
    """

    before: Tensor
    after: Tensor
    norm: Callable[[Tensor], Tensor]
    words: Prompt


def bias_of(mask: Tensor | None, slots: Tensor, queries: int, keys: int) -> Tensor:
    """What masks the queries at slots [B, R] of all that there are, over so many keys: [B, 1 or H, R, keys].

    mask: [.., queries, >= keys], or causal, with no mask or (flash attention) one [.., 1, keys] of what is no padding.
    """
    batch, count = slots.shape
    if mask is not None and mask.shape[-2] == queries:
        mask = mask[..., :keys].expand(batch, -1, -1, -1)
        return mask.gather(2, slots[:, None, :, None].expand(batch, mask.shape[1], count, keys))
    allowed = torch.arange(keys, device=slots.device) <= (slots + keys - queries)[:, :, None]
    if mask is not None:
        allowed = allowed & mask.reshape(batch, -1)[:, None, :keys].bool()
    return allowed[:, None]


def at_first(cos: Tensor, sin: Tensor, words: Prompt) -> tuple[Tensor, Tensor]:
    """(cos, sin) [B, 1, d] float32 at the first real token of each row, of tables [B or 1, n, d]."""
    first = words.real().to(cos.device).to(torch.int8).argmax(1)[:, None, None]
    cos, sin = (x.float().expand(len(first), -1, -1) for x in (cos, sin))
    return tuple(x.gather(1, first.expand(-1, 1, x.shape[-1])) for x in (cos, sin))  # type: ignore[return-value]


def shown(mask: Tensor) -> Tensor:
    """bool of the same shape: what a mask (boolean or additive) lets a query see."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def padded(rows: list[Tensor]) -> Tensor:
    """Rows of a batch whose last dimensions differ, stacked, with zeros at their ends."""
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[-1])) for row in rows])
