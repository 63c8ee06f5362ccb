"""What every signal of an attention product is, restated from its docstring in float64; nothing here calls vtprune.

A case is one product with its softmax weights; prompts of decoder layers have two rows, `VISUAL`, `TEXT` and `LAST`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

B, N, PAST, D, G = 2, 9, 3, 4, 2
VISUAL, TEXT = [[1, 2, 3, 4], [2, 3]], [[5, 6, 7, 8], [4, 5, 6, 7]]  # by row; the second row ends with a pad
LAST = [8, 7]


class Words:
    """A prompt of two rows."""

    batch = B

    def real(self) -> Tensor:
        real = torch.ones(B, N, dtype=torch.bool)
        real[1, 8] = False
        return real

    def last(self, n: int) -> Tensor:
        return torch.tensor(LAST)

    def visual(self) -> Tensor:
        return torch.tensor([[slot in row for slot in range(N)] for row in VISUAL])

    def visual_slots(self, row: int) -> Tensor:
        return torch.tensor(VISUAL[row])

    def text_slots(self, row: int, device: torch.device) -> Tensor:
        return torch.tensor(TEXT[row])

    def text_is_seen(self, row: int) -> bool:
        return True


@dataclass
class Case:
    """One attention product and its softmax weights [B, H, N, N] float64 among the tokens of the call."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor  # [B, N, past + N] bool
    past: int = 0
    causal: bool = False
    ran: Tensor | None = None  # the weights of a model that ran

    @property
    def logits(self) -> Tensor:
        return self.q.double() @ self.k.double().repeat_interleave(self.heads // self.k.shape[1], 1).mT

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self.seen[:, None], -math.inf).softmax(-1)[..., self.past :]

    @property
    def weights(self) -> Tensor:
        return self.softmax(self.logits * self.scaling) if self.ran is None else self.ran.double()

    @property
    def scaling(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """Keys and values of this call, in float64."""
        return self.k[:, :, self.past :].double(), self.v[:, :, self.past :].double()

    @property
    def asked(self) -> Tensor:
        """[B, N] float64: the queries that count."""
        return (Words().real() if self.causal else self.seen.any(1)).double()

    def at_last(self, rows: Tensor) -> Tensor:
        return torch.stack([rows[b, :, last] for b, last in enumerate(LAST)])


def _among_visual(rows: Tensor) -> Tensor:
    rows = rows * Words().visual()[:, None]
    return (rows / rows.sum(-1, keepdim=True)).mean(1)


def _alike_values(c: Case) -> Tensor:
    """[B, G, N, N]: products of values, without the columns of padding."""
    logits = c.own[1] @ c.own[1].mT * D**-0.5
    return logits.masked_fill(~c.asked.bool()[:, None, None], -math.inf)


def _walk(c: Case) -> Tensor:
    steps = c.logits[..., c.past :] * 10 * D**-0.5
    steps = steps.masked_fill(~c.seen[:, None, :, c.past :], -math.inf).softmax(-1)
    score = (c.asked / c.asked.sum(1, keepdim=True))[:, None].expand(-1, c.heads, -1)
    for _ in range(5):
        score = torch.einsum("bhi,bhij->bhj", score, steps)
    return score.square().mean(1).sqrt()


def _mean_query(c: Case) -> Tensor:
    """Tokens that see the same ones are an image; each image's mean query, by its share of all queries."""
    out = torch.zeros(c.seen.shape[:2]).double()
    for b, seen in enumerate(c.seen):
        real = seen.any(0)
        for image in seen[real].unique(dim=0):
            mine = real & (seen == image).all(1)
            query = c.q[b, :, mine].double().mean(1, keepdim=True)
            logits = (query @ c.k[b].double().mT)[:, 0, image] * c.scaling
            out[b, image] += logits.softmax(1).mean(0) * mine.sum() / real.sum()
    return out


def _flat(x: Tensor) -> Tensor:
    return x.double().transpose(1, 2).flatten(2)


def _wide(c: Case) -> Tensor:
    logits = _flat(c.q)[:, 0, None] @ _flat(c.k).mT / (c.heads * c.q.shape[-1]) ** 0.5
    return logits.masked_fill(~c.seen[:, :1], -math.inf).softmax(-1)[:, 0, 1:]


def _by_text(c: Case, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the rows [H, T, N] of that text."""
    return torch.stack([rows(c.weights[b][:, TEXT[b]]) for b in range(B)])


def _to_text(c: Case) -> Tensor:
    out = torch.zeros(B, N).double()
    for b in range(B):
        out[b, VISUAL[b]] = c.weights[b].mean(0)[VISUAL[b]][:, TEXT[b]].sum(1)
    return out


# Of signals read of an attention product: what their docstrings say, in float64 and without a loop over blocks.
ORACLES: dict[str, Callable[[Case], Tensor]] = {
    "cls": lambda c: c.weights.mean(1)[:, 0, 1:],
    "cls_full": _wide,
    "cls_logits": lambda c: (c.logits * c.scaling).mean(1)[:, 0, 1:],
    "cls_value": lambda c: c.softmax(c.own[1] @ c.own[1].mT).mean(1)[:, 0, 1:],
    "received": lambda c: (c.weights * c.asked[:, None, :, None]).sum(2).mean(1) / c.asked.sum(1, keepdim=True),
    "mean_query": _mean_query,
    "queries": lambda c: _flat(c.q),
    "keys": lambda c: _flat(c.own[0]),
    "values": lambda c: _flat(c.own[1]),
    "mean_keys": lambda c: c.own[0].sum(1) / c.own[0].shape[1],
    "value_norm": lambda c: (c.own[1].sum(1) / c.own[1].shape[1]).norm(p=1, dim=-1),
    "key_size": lambda c: _flat(c.own[0]).abs().sum(-1),
    "text_key_size": lambda c: torch.stack([_flat(c.own[0])[b, TEXT[b]].abs().sum(-1) for b in range(B)]),
    "last_row": lambda c: c.at_last(c.weights).mean(1),
    "last_visual": lambda c: _among_visual(c.at_last(c.weights)),
    "last_value": lambda c: _among_visual(c.at_last(c.softmax(c.own[1] @ c.v.double().mT * D**-0.5))),
    "value_logsum": lambda c: _alike_values(c).logsumexp(-1).transpose(1, 2),
    "value_rows": lambda c: torch.stack([_alike_values(c)[b].softmax(-1).mean(0)[TEXT[b]].T for b in range(B)]),
    "page_rank": _walk,
    "received_so_far": lambda c: (c.weights * c.asked[:, None, :, None]).sum(2).mean(1),
    "from_text": lambda c: _by_text(c, lambda rows: rows.mean((0, 1))),
    "to_text": _to_text,
    "text_rows": lambda c: _by_text(c, lambda rows: rows.mean(0).T),
    "text_rows_by_head": lambda c: _by_text(c, lambda rows: rows.permute(2, 0, 1)),
}
