"""Signals of decoder layers between the visual tokens and the text behind a row's first one, of T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import attention_rows
from .product import ROWS, LayerAttention, LayerPass, Prompt, padded
from .row import signal


@signal("from_text", shape="[N]", where=("llm",), asks="words")
def from_text(a: LayerAttention) -> Tensor:
    """The mean of the softmax rows of all that text, mean over heads."""
    return torch.stack([_from_text(a.of(row), row) for row in range(a.words.batch)])


@signal("to_text", shape="[N]", where=("llm",))
def to_text(a: LayerAttention) -> Tensor:
    """The share of its attention that a visual token gives to that text, mean over heads; 0 where it comes later."""
    return torch.stack([_to_text(a.of(row), row) for row in range(a.words.batch)])


@signal("text_rows", shape="[N, T]", where=("llm",), asks="words")
def text_rows(a: LayerAttention) -> Tensor:
    """The softmax row of each token of that text, mean over heads."""
    return padded([_text_rows(a.of(row), row, mean=True) for row in range(a.words.batch)])


@signal("text_rows_by_head", shape="[N, H, T]", where=("llm",), asks="words")
def text_rows_by_head(a: LayerAttention) -> Tensor:
    """The softmax row of each token of that text, of every head."""
    return padded([_text_rows(a.of(row), row, mean=False) for row in range(a.words.batch)])


@signal("rope_weight", shape="[N, T]", where=("llm",), source="rotary")
def rope_weight(cos: Tensor, sin: Tensor, prompt: Prompt) -> Tensor:
    """q.k / sqrt(d) that rotary positions alone give to queries of ones, at that text, and keys of ones."""
    cos, sin = cos.float(), sin.float()
    half = cos.shape[-1] // 2
    ones = torch.cat([(cos - sin)[..., :half], (cos + sin)[..., half:]], dim=-1).expand(prompt.batch, -1, -1)
    return padded(
        [x @ x.index_select(0, prompt.text_slots(row, x.device)).T / (2 * half) ** 0.5 for row, x in enumerate(ones)]
    )


@signal("relevance", shape="[T]", where=("llm",), source="embeddings")
def relevance(x: Tensor, prompt: Prompt) -> list[Tensor]:
    """The mean over the row's visual tokens of softmax(x . x_t) over that text, of the embeddings entering the LLM."""
    found = []
    for row in range(prompt.batch):
        visual = x[row].index_select(0, prompt.visual_slots(row))
        text = x[row].index_select(0, prompt.text_slots(row, x.device)).float()
        total = text.new_zeros(len(text))
        for some in visual.split(ROWS):
            total = total + (some.float() @ text.T).softmax(1).sum(0)
        found.append(total / max(1, len(visual)))
    return found


@signal("value_rows", shape="[N, T]", where=("llm",))
def value_rows(a: LayerAttention) -> Tensor:
    """The softmax of v_t . v_j / sqrt(d) of each token of that text over all tokens j of this call, mean over heads.

    There is no causal mask, and the heads are those of the values.
    """
    real, out = a.words.real().to(a.values.device), []
    for row, values in enumerate(a.values):
        texts = a.words.text_slots(row, values.device)
        parts = [values.new_zeros(0, a.n, dtype=torch.float32)]
        for some in texts.split(ROWS) if len(texts) else ():
            queries, scale = values.index_select(1, some)[None], values.shape[-1] ** -0.5
            parts.append(attention_rows(queries, values[None], real[row, None, None, None], scale)[0].mean(0))
        out.append(torch.cat(parts).T)
    return padded(out)


@signal("text_key_size", shape="[T]", where=("llm",), rope=True)
def text_key_size(a: LayerAttention) -> list[Tensor]:
    """The L1 norm of the keys of each token of that text, heads concatenated, turned as for "key_size"."""
    sizes = a.keys_from_start.abs().sum((1, 3))
    return [size.index_select(0, a.words.text_slots(row, size.device)) for row, size in enumerate(sizes)]


@signal("text_final_states", shape="[T, C]", where=("llm",), source="layer")
def text_final_states(run: LayerPass) -> list[Tensor]:
    """What leaves the layer at that text, through the norm that stands behind the last layer."""
    x = run.after
    return [run.norm(x[row].index_select(0, run.words.text_slots(row, x.device))) for row in range(run.words.batch)]


def _from_text(a: LayerAttention, row: int) -> Tensor:
    texts = a.words.text_slots(row, a.q.device)
    total = a.q.new_zeros(a.n, dtype=torch.float32)
    if not len(texts):  # a row without visual tokens
        return total
    for some in texts.split(ROWS):
        total = total + a.rows(some[None]).mean(1)[0].sum(0)
    return total / len(texts)


def _to_text(a: LayerAttention, row: int) -> Tensor:
    out = a.q.new_zeros(a.n, dtype=torch.float32)
    if not a.words.text_is_seen(row):
        return out
    texts, visual = a.words.text_slots(row, a.q.device), a.words.visual_slots(row)
    for slots in visual.split(ROWS) if len(visual) else ():
        out[slots] = a.rows(slots[None]).mean(1)[0].index_select(1, texts).sum(1)
    return out


def _text_rows(a: LayerAttention, row: int, mean: bool) -> Tensor:
    """[n, T] what every token gets from each token of that text, mean over heads; else [n, H, T]."""
    texts, heads = a.words.text_slots(row, a.q.device), a.q.shape[1]
    if not len(texts):  # a row without visual tokens
        return a.q.new_zeros((a.n, 0) if mean else (a.n, heads, 0), dtype=torch.float32)
    parts = [a.rows(some[None])[0] for some in texts.split(ROWS)]
    if mean:
        return torch.cat([part.mean(0) for part in parts]).T
    return torch.cat(parts, dim=1).permute(2, 0, 1)
