"""Signals of the decoder: what is kept of one layer's attention product, for the slots of this call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.clock import Clock
from ..kernels import attention_received, attention_rows, page_rank, recording, to_device
from ..model_adapters.entries import runs_of
from ..tap import MASKED, bias_of
from .prefill import Prefill
from .slots import last_slots, prompt_slots, text_behind, visual_slots, word_slots

ROWS = 64  # softmax rows held at a time
SHARPNESS, STEPS = 10, 5  # of the PageRank in AIM (https://arxiv.org/abs/2412.03248)


@dataclass(frozen=True)
class AttentionProduct:
    """One layer's attention product: q [B, H, n, d], k and v [B, G, past + n, d] or longer, and what masks it."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scaling: float
    past: int

    def of(self, row: int) -> AttentionProduct:
        """A single sample."""
        one = slice(row, row + 1)
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[one]
        return replace(self, q=self.q[one], k=self.k[one], v=self.v[one], mask=mask)

    @property
    def new_values(self) -> Tensor:
        """[B, G, n, d]: the values of this call."""
        return self.v[:, :, self.past : self.past + self.q.shape[2]]

    def rows(self, slots: Tensor) -> Tensor:
        """Softmax rows [B, H, R, n] of the queries at slots [B, R], over the slots of this call."""
        batch, heads, n, width = self.q.shape
        queries = self.q.gather(2, slots[:, None, :, None].expand(batch, heads, slots.shape[1], width))
        keys = self.k[:, :, : self.past + n]
        bias = bias_of(self.mask, slots, n, keys.shape[2])
        return attention_rows(queries, keys, bias, self.scaling)[..., self.past :]

    def received(self, real: Tensor) -> Tensor:
        """[B, n] what each slot of this call gets from all its queries that are real [B, n]: sum, mean over heads."""
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

    def page_rank(self, real: Tensor) -> Tensor:
        """Importance [B, H, n] of the slots of this call among themselves; real [B, n] are no padding."""
        n, mask = self.q.shape[2], self.mask
        if mask is not None and mask.shape[-2] == n:
            mask = mask[..., self.past : self.past + n]
        else:  # causal, with no mask or (flash attention) one that knows padding only
            allowed = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
            mask = allowed[None, None] & real[:, None, None]
        start = real.float() / real.sum(1, keepdim=True)
        keys = self.k[:, :, self.past : self.past + n]
        return page_rank(self.q, keys, mask, SHARPNESS * self.scaling, STEPS, start[:, None])


def read_rows(prefill: Prefill, kind: str, layer: int, product: AttentionProduct) -> None:
    """Keep what a signal needs of this layer's attention, mean over heads: [B, n, ..] for the slots of this call."""
    state, rows, q = prefill.prompt, prefill.readings.rows, product.q
    clock, batch = Clock(q.device), range(len(q))
    with recording(state.kernels):
        if kind == "value_norm":
            found = product.new_values.float().mean(1).abs().sum(-1)
        elif kind.startswith("last"):
            found = _last(prefill, kind, product)
        elif kind == "page_rank":
            found = product.page_rank(prompt_slots(prefill).to(q.device)).square().mean(1).sqrt()
        elif kind == "received_so_far":
            found = product.received(prompt_slots(prefill).to(q.device))
            before = rows.pop((kind, layer - 1), None)  # read by now, if a stage stands at this layer
            found = found if before is None else found + before.to(q.device)
        elif kind.startswith("text_rows"):
            mean = kind == "text_rows"
            found = _padded([_text_rows(prefill, row, product.of(row), mean) for row in batch])
        else:
            read = _from_text if kind == "from_text" else _to_text
            found = torch.stack([read(prefill, row, product.of(row)) for row in batch])
        rows[kind, layer] = found
    state.clocks.append(clock.stop())


def _last(prefill: Prefill, kind: str, product: AttentionProduct) -> Tensor:
    """[B, n] what the last token of the prompt looks at, mean over heads."""
    if kind == "last_value":
        values, width = product.new_values, product.v.shape[-1]
        product = replace(product, q=values, k=product.v, scaling=width**-0.5)
    last = to_device(last_slots(prefill, product.q.shape[2]), product.q.device)
    rows = product.rows(last[:, None])[:, :, 0]
    if kind != "last_row":  # as if only the visual tokens of this call had been there
        rows = rows * visual_slots(prefill, rows.device)[:, None]
        rows = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows.mean(1)


def _from_text(prefill: Prefill, row: int, product: AttentionProduct) -> Tensor:
    """[n] attention that each slot gets from the text behind the first visual token, mean over its queries."""
    q = product.q
    texts = word_slots(prefill, row, q.device)
    if not len(texts):  # a row without visual tokens
        return q.new_zeros(q.shape[2], dtype=torch.float32)
    parts = (product.rows(part[None]).mean(1)[0].sum(0) for part in texts.split(ROWS))
    return sum(parts) / len(texts)  # type: ignore[return-value]


def _text_rows(prefill: Prefill, row: int, product: AttentionProduct, mean: bool) -> Tensor:
    """[n, T] what every slot gets from each token of that text, mean over heads; else [n, H, T]."""
    q = product.q
    texts, n, heads = word_slots(prefill, row, q.device), q.shape[2], q.shape[1]
    if not len(texts):  # a row without visual tokens
        return q.new_zeros((n, 0) if mean else (n, heads, 0), dtype=torch.float32)
    parts = [product.rows(part[None])[0] for part in texts.split(ROWS)]
    if mean:
        return torch.cat([part.mean(0) for part in parts]).T
    return torch.cat(parts, dim=1).permute(2, 0, 1)


def _to_text(prefill: Prefill, row: int, product: AttentionProduct) -> Tensor:
    """[n] share of each visual token's attention that goes to that text; 0 wherever it comes later."""
    q, state = product.q, prefill.prompt
    out = q.new_zeros(q.shape[2], dtype=torch.float32)
    behind, seen = text_behind(prefill, row), runs_of(prefill.token_kind_on_host[row] > 1)
    if not seen or not behind or behind[0][0] > seen[-1][0]:
        return out
    texts = word_slots(prefill, row, q.device)
    visual = torch.cat([group.positions for group in state.groups if group.row == row])
    for slots in state.slots(row, visual).split(ROWS) if len(visual) else ():
        out[slots] = product.rows(slots[None]).mean(1)[0].index_select(1, texts).sum(1)
    return out


def read_transition(prefill: Prefill, layer: int, before: Tensor, after: Tensor) -> None:
    """Add what one module of a layer does to its tokens, before and after [B, n, D]."""
    clock, real, rows = Clock(before.device), prompt_slots(prefill).to(before.device), prefill.readings.rows
    x, y = before.float(), after.float()
    ratio = y.norm(dim=-1) / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
    turned = 1 - torch.cosine_similarity(x, y, dim=-1)
    share = ratio.masked_fill(~real, 0) * turned.masked_fill(~real, -torch.inf).softmax(-1)
    key = ("transition", layer)
    rows[key] = rows[key] + share if key in rows else share
    prefill.prompt.clocks.append(clock.stop())


def read_relevance(prefill: Prefill, x: Tensor) -> None:
    """Keep how much each word behind the images has to do with them: x [B, n, D] enters the first layer."""
    state = prefill.prompt
    prefill.readings.relevance = []
    for row in range(len(x)):
        mine = [group.positions for group in state.groups if group.row == row]
        visual = x[row].index_select(0, state.slots(row, torch.cat(mine) if mine else x.new_zeros(0).long()))
        text = x[row].index_select(0, word_slots(prefill, row, x.device)).float()
        total = text.new_zeros(len(text))
        for some in visual.split(ROWS):
            total = total + (some.float() @ text.T).softmax(1).sum(0)
        prefill.readings.relevance.append(total / max(1, len(visual)))


def read_rope_weight(prefill: Prefill, layer: int, rope: tuple[Tensor, Tensor]) -> None:
    """Keep what rotary embeddings (cos, sin) [B or 1, n, d] alone contribute to the attention of that text."""
    cos, sin = (part.float() for part in rope)
    half, batch = cos.shape[-1] // 2, len(prefill.token_kind)
    ones = torch.cat([(cos - sin)[..., :half], (cos + sin)[..., half:]], dim=-1).expand(batch, -1, -1)
    prefill.readings.rows["rope_weight", layer] = _padded(
        [x @ x.index_select(0, word_slots(prefill, row, x.device)).T / (2 * half) ** 0.5 for row, x in enumerate(ones)]
    )


def _padded(rows: list[Tensor]) -> Tensor:
    """Rows of a batch whose last dimensions differ, with zeros at their ends."""
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[-1])) for row in rows])
