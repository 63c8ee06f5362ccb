"""Signals of decoder layers: what the prompt's last token looks at, what tokens receive, and how they change."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import page_rank as walk
from .product import ROWS, LayerAttention, LayerPass, Prompt, at_first
from .row import signal

SHARPNESS, STEPS = 10, 5  # of the PageRank in AIM (https://arxiv.org/abs/2412.03248)
EPS = 1e-8  # norms below it count as this, as in torch.cosine_similarity


@signal("last_row", shape="[N]", where=("llm",), asks="last")
def last_row(a: LayerAttention) -> Tensor:
    """The softmax row of the prompt's last query restricted to the unit's tokens, mean over heads.

    At decode it is the row of the new token, over all that the layer shows.
    """
    return a.last_rows().mean(1)


@signal("last_visual", shape="[N]", where=("llm",), asks="last")
def last_visual(a: LayerAttention) -> Tensor:
    """The prompt's last softmax row over the visual tokens only, so that each head's sums to 1, mean over heads."""
    return _among_visual(a, a.last_rows()).mean(1)


@signal("last_value", shape="[N]", where=("llm",))
def last_value(a: LayerAttention) -> Tensor:
    """The softmax of v_last . v_j / sqrt(d) over the visual tokens j of the sample, mean over heads."""
    by_values = replace(a, q=a.values, k=a.all_values, scaling=a.values.shape[-1] ** -0.5)
    return _among_visual(a, by_values.last_rows()).mean(1)


@signal("value_logsum", shape="[N, G]", where=("llm",))
def value_logsum(a: LayerAttention) -> Tensor:
    """The logarithm of the sum of exp(v . v_j / sqrt(d)) over all tokens j of this call, of every key-value head."""
    values = a.values.float()
    real, parts = a.words.real().to(values.device)[:, None, None], []
    for some in values.split(ROWS, dim=2):
        logits = some @ values.mT * values.shape[-1] ** -0.5
        parts.append(logits.masked_fill(~real, -torch.inf).logsumexp(-1))
    return torch.cat(parts, dim=2).transpose(1, 2)


@signal("rope_cos", shape="[N]", where=("llm",), source="rotary")
def rope_cos(cos: Tensor, sin: Tensor, prompt: Prompt) -> Tensor:
    """The mean over channels of the cosines of a token's rotary embedding, as if no padding stood before the row."""
    first = at_first(cos, sin, prompt)
    return (cos.float() * first[0] + sin.float() * first[1]).mean(-1)


@signal("rope_sin", shape="[N]", where=("llm",), source="rotary")
def rope_sin(cos: Tensor, sin: Tensor, prompt: Prompt) -> Tensor:
    """The mean over channels of the sines of a token's rotary embedding, as if no padding stood before the row."""
    first = at_first(cos, sin, prompt)
    return (sin.float() * first[0] - cos.float() * first[1]).mean(-1)


@signal("page_rank", shape="[N]", where=("llm",))
def page_rank(a: LayerAttention) -> Tensor:
    """Five steps of PageRank among the tokens of this call on softmax(10 q.k / sqrt(d)); root mean square of heads."""
    n, mask, real = a.n, a.mask, a.words.real().to(a.q.device)
    if mask is not None and mask.shape[-2] == n:
        mask = mask[..., a.past : a.past + n]
    else:  # causal, with no mask or (flash attention) one that knows padding only
        allowed = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
        mask = allowed[None, None] & real[:, None, None]
    start = real.float() / real.sum(1, keepdim=True)
    return walk(a.q, a.keys, mask, SHARPNESS * a.scaling, STEPS, start[:, None]).square().mean(1).sqrt()


@signal("received_so_far", shape="[N]", where=("llm",), so_far=True)
def received_so_far(a: LayerAttention) -> Tensor:
    """The softmax weight that all queries of this call gave to a token, in this layer and all before it.

    It is summed over queries and layers, as far as they still were there, and the mean over heads is taken.
    """
    return a.given_by(a.words.real().to(a.q.device))


@signal("transition", shape="[N]", where=("llm",), source="modules")
def transition(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """How much a layer turns and stretches a token: the sum over its attention and its MLP of what follows.

    With `in` the module's normalised input and `out` what it adds: |out| / |in| times the softmax of 1 - cos(in, out)
    over the tokens of the sample. It is of layers that ran before only.
    """
    x, y = before.float(), after.float()
    entered, added = (torch.linalg.vector_norm(states, dim=-1) for states in (x, y))
    ratio: Tensor = added / entered.clamp(min=torch.finfo(x.dtype).tiny)
    # The norms are there, so the cosine takes one more pass; torch.cosine_similarity would take five.
    turned: Tensor = 1 - (x * y).sum(-1) / (entered.clamp(min=EPS) * added.clamp(min=EPS))
    return ratio.masked_fill(~real, 0) * turned.masked_fill(~real, -torch.inf).softmax(-1)


@signal("layer_change", shape="[N]", where=("llm",), source="layer")
def layer_change(run: LayerPass) -> Tensor:
    """The L2 norm of the difference between what leaves the layer and what enters it."""
    size: Tensor = (run.after.float() - run.before.float()).norm(dim=-1)
    return size


@signal("final_states", shape="[N, C]", where=("llm",), source="layer")
def final_states(run: LayerPass) -> Tensor:
    """What leaves the layer, through the norm that stands behind the last layer, in the model's dtype."""
    return run.norm(run.after)


@signal("key_size", shape="[N]", where=("llm",), rope=True)
def key_size(a: LayerAttention) -> Tensor:
    """The L1 norm of the keys of a token, heads concatenated, turned as if no padding stood before the row."""
    return a.keys_from_start.abs().sum((1, 3))


@signal("head_output", shape="[H]", where=("llm",), source="heads", so_far=True)
def head_output(out: Tensor, real: Tensor) -> Tensor:
    """The sum of |output| of a head before the output projection, in this layer and all before it.

    The sum runs over the head's channels, the tokens of this call, and the layers.
    """
    return (out.float().abs().sum(-1) * real[..., None]).sum(1)


def _among_visual(a: LayerAttention, rows: Tensor) -> Tensor:
    """Softmax rows [B, H, n] as if only the visual tokens of this call had been there."""
    rows = rows * a.words.visual().to(rows.device)[:, None]
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
