"""What every kernel and method computes, restated slowly and plainly in float64; nothing here calls vtprune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors; 0 if either is zero."""
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else 0.0


def cosines(x: Tensor) -> list[list[float]]:
    x = x.double()
    return [[cosine(a, b) for b in x] for a in x]


def most_isolated(x: Tensor) -> int:
    """The token whose nearest other token is farthest; the lower index if several are."""
    c = cosines(x)
    nearest = [max((c[i][j] for j in range(len(c)) if j != i), default=0.0) for i in range(len(c))]
    return nearest.index(min(nearest))


def diverse(x: Tensor, k: int, objective: str, first: int | None = None) -> list[int]:
    """Greedy picks: "maxmin" looks at the most similar picked token, "maxsum" at the sum over all picked ones."""
    c = cosines(x)
    picked = [most_isolated(x) if first is None else first]
    while len(picked) < k:
        rest = [j for j in range(len(c)) if j not in picked]
        combine = max if objective == "maxmin" else math.fsum
        score = {j: combine(c[j][i] for i in picked) for j in rest}
        picked.append(min(rest, key=lambda j: (score[j], j)))
    return picked


def divprune(x: Tensor, k: int) -> list[int]:
    """https://arxiv.org/abs/2503.02175, with picked tokens excluded."""
    return diverse(x, k, "maxmin")


def todre_pivot(x: Tensor, pivot: str, candidates: Sequence[int], cls: Tensor | None = None) -> int:
    """https://arxiv.org/abs/2505.18757: first pick among the thumbnail's tokens."""
    if pivot == "cls" and cls is not None:
        return max(candidates, key=lambda i: (float(cls[i]), -i))
    rows = [x[i].double() / (x[i].double().norm() or 1.0) for i in candidates]
    mean = torch.stack(rows).mean(0)
    sign = -1 if pivot == "farthest" else 1
    score = [sign * float(row @ mean) for row in rows]
    return candidates[score.index(max(score))]


def top(scores: Tensor, k: int) -> list[int]:
    """The k largest, the lower index first among equals (FastV, https://arxiv.org/abs/2403.06764)."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k]


def middles(count: int, n: int) -> list[int]:
    """Cells under the middles of `count` equal parts of a line of n cells."""
    return [math.floor((Fraction(2 * i + 1, 2)) * Fraction(n, count)) for i in range(count)]


def lattice(grid: tuple[int, int, int], k: int) -> list[int]:
    """`uniform` on one raster: even frames, even rows, even columns."""
    t, h, w = grid

    def share(count: int, parts: int) -> list[int]:
        return [(i + 1) * count // parts - i * count // parts for i in range(parts)]

    kept = []
    frames = middles(min(k, t), t)
    for frame, count in zip(frames, share(k, len(frames))):
        rows = max(math.ceil(count / w), min(round(math.sqrt(count * h / w)), h, count), 1)
        for row, in_row in zip(middles(rows, h), share(count, rows)):
            kept += [(frame * h + row) * w + column for column in middles(in_row, w)]
    return kept


def pool(x: Tensor, grid: tuple[int, int, int], cells: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """Mean of the tokens of every cell of every frame, and the position of the cell's centre token."""
    t, h, w = grid
    a, b = cells
    means, centres = [], []
    for frame in range(t):
        for i in range(a):
            for j in range(b):
                rows = [r for r in range(h) if r * a // h == i]
                columns = [c for c in range(w) if c * b // w == j]
                at = [(frame * h + r) * w + c for r in rows for c in columns]
                means.append(torch.stack([x[p].double() for p in at]).mean(0))
                middle = rows[(len(rows) - 1) // 2], columns[(len(columns) - 1) // 2]
                centres.append((frame * h + middle[0]) * w + middle[1])
    return torch.stack(means), centres


def attention(q: Tensor, k: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """[B, H, M, N] softmax weights, one query at a time; a query with nothing to attend to gets zeros."""
    batch, heads, rows, _ = q.shape
    share = heads // k.shape[1]
    out = torch.zeros(batch, heads, rows, k.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                logits = k[b, h // share].double() @ q[b, h, r].double() * scaling
                if bias is not None:
                    logits = logits + bias.double().expand(batch, heads, rows, -1)[b, h, r]
                if not torch.isneginf(logits).all():
                    out[b, h, r] = (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()
    return out


def volume_coverage(
    x: Tensor,
    k: int,
    weights: Sequence[float] | None = None,
    ridge: float = 0.01,
    covered: Sequence[int] | None = None,
) -> list[int]:
    """Greedy picks of the largest d c w, by determinants and sums over all rows; of near ties the lower index.

    d is how many times the pick enlarges the determinant of the picked rows' cosines with the ridge on the diagonal, c
    the mean gain of the covered rows (None: all) in likeness to the nearest pick, at least 1e-6.
    """
    c = torch.tensor(cosines(x), dtype=torch.float64)
    n = len(c)
    kernel = c + ridge * torch.eye(n, dtype=torch.float64)
    w = [1.0] * n if weights is None else [max(float(v) / max(map(float, weights)), 1e-20) for v in weights]
    rows = range(n) if covered is None else covered
    picked: list[int] = []
    while len(picked) < k:
        before = float(torch.linalg.det(kernel[picked][:, picked])) if picked else 1.0
        best = [max([0.0, *(float(c[i][p]) for p in picked)]) for i in rows]
        score = {}
        for j in [j for j in range(n) if j not in picked]:
            more = [*picked, j]
            d = float(torch.linalg.det(kernel[more][:, more])) / before
            gain = math.fsum(max(float(c[i][j]) - b, 0.0) for i, b in zip(rows, best)) / len(rows)
            score[j] = d * max(gain, 1e-6) * w[j]
        top = max(score.values())
        picked.append(min(j for j, s in score.items() if s >= top * (1 - 1e-5)))
    return picked


def facility_matrix(
    x: Tensor | None, rows: Tensor | None = None, temperature: float | None = None, scale: float = 1.0
) -> Tensor:
    """[M, N] float64: cosines of x [N, D], or their softmax, and further rows behind them."""
    parts = []
    if x is not None:
        s = torch.tensor(cosines(x), dtype=torch.float64)
        if temperature is not None:
            e = (s / temperature).exp()
            s = e / e.sum(1, keepdim=True) / len(s)
        parts.append(scale * s)
    if rows is not None:
        parts.append(rows.double())
    return torch.cat(parts)


def facility(
    m: Tensor,
    k: int,
    weights: list[float] | None = None,
    combine: str = "multiply",
    excluded: Sequence[int] = (),
    slack: float = 0.0,
) -> list[int]:
    """Greedy coverage of the rows of m, every gain summed again at every step; excluded columns only when none is left.

    Scores within 3e-7 of the best, and slack, tie, and the first of them wins.
    """
    picks: list[int] = []
    n = m.shape[1]
    while len(picks) < k:
        best = m[:, picks].amax(1).clamp(min=0) if picks else torch.zeros(len(m), dtype=torch.float64)
        free = [j for j in range(n) if j not in picks]
        free = [j for j in free if j not in excluded] or free
        scores = {}
        for j in free:
            gain = float((m[:, j] - best).clamp(min=0).sum())
            weight = (1.0 if combine == "multiply" else 0.0) if weights is None else weights[j]
            scores[j] = gain * weight if combine == "multiply" else gain + weight
        top = max(scores.values())
        picks.append(min(j for j in free if scores[j] >= top - 3e-7 * abs(top) - slack))
    return picks
