"""What the video methods compute, restated slowly and plainly in float64; nothing here calls vtprune.

x: [T][P] rows of float64 each; answers are flat positions t * P + p.
"""

from __future__ import annotations

import math

import torch
from oracles import cosine, middles, top
from torch import Tensor


def flat(x: Tensor) -> Tensor:
    return x.double().flatten(0, 1)


def changes(x: Tensor, t: int, before: int) -> list[float]:
    """1 - cosine of every token of frame t with the same place of frame `before`."""
    x = x.double()
    return [1 - cosine(a, b) for a, b in zip(x[t], x[before])]


def evs(x: Tensor, count: int) -> list[int]:
    """https://arxiv.org/abs/2510.14624: the first frame, then whatever changed most since the frame before."""
    frames, p = x.shape[:2]
    if count < p:
        return middles(count, p)
    scores = [math.inf] * p + [c for t in range(1, frames) for c in changes(x, t, t - 1)]
    return sorted(top(torch.tensor(scores, dtype=torch.float64), count))


def dycoke(x: Tensor, budget: int) -> list[int]:
    """https://arxiv.org/abs/2411.15024, section 4.1, in its corrected form at a budget."""
    frames, p = x.shape[:2]
    firsts = [t for t in range(frames) if t % 4 == 0]
    others = [t for t in range(frames) if t % 4 != 0]
    kept = []
    if budget < len(firsts) * p:
        for i, t in enumerate(firsts):
            count = (i + 1) * budget // len(firsts) - i * budget // len(firsts)
            chosen = middles(count, p) if t == 0 else top(torch.tensor(changes(x, t, t - 4)), count)
            kept += [t * p + i for i in chosen]
        return sorted(kept)
    rest = budget - len(firsts) * p
    kept = [t * p + i for t in firsts for i in range(p)]
    for i, t in enumerate(others):
        count = (i + 1) * rest // len(others) - i * rest // len(others)
        reference = t - 1 if t % 4 == 3 else t - t % 4
        kept += [t * p + i for i in top(torch.tensor(changes(x, t, reference)), count)]
    return sorted(kept)


def dycoke_official(x: Tensor, k: float) -> list[int]:
    """The same as published, pair by pair: in output order, an odd last frame lost."""
    frames, p = x.shape[:2]
    m = int((1 - k) * p)
    out: dict[int, list[int]] = {}
    for i in range(0, frames - 1, 2):
        out[i] = list(range(p))
        out[i + 1] = top(torch.tensor(changes(x, i + 1, i)), m)
    for i in range(0, frames - 4, 4):
        if i + 2 in out:
            out[i + 2] = top(torch.tensor(changes(x, i + 2, i)), m)
    return [t * p + i for t in sorted(out) for i in out[t]]


def vidcom2(x: Tensor, ratio: float) -> tuple[list[int], list[float]]:
    """https://arxiv.org/abs/2505.14454: tokens kept with every frame rounding on its own, and each token's score."""
    frames, p, d = x.shape
    rows = flat(x)
    variance = [float(((rows[:, c] - rows[:, c].mean()) ** 2).mean()) for c in range(d)]
    calm = sorted(sorted(range(d), key=lambda c: (variance[c], c))[: d // 2])
    f = [row[calm] / (row[calm].norm() or 1.0) for row in rows]
    video = torch.stack(f).mean(0)

    def closeness(a: Tensor, b: Tensor) -> float:
        far = float(((a - b) ** 2).sum())
        return sum(math.exp(-far / (2 * alpha)) for alpha in (0.125, 0.25, 0.5, 1.0, 2.0))

    of_frame = [f[t * p : (t + 1) * p] for t in range(frames)]
    centres = [torch.stack(frame).mean(0) for frame in of_frame]
    to_video = [[closeness(a, video) for a in frame] for frame in of_frame]
    scores = [[v + closeness(a, c) for a, v in zip(g, vs)] for g, c, vs in zip(of_frame, centres, to_video)]
    unlike = [-sum(vs) / p for vs in to_video]
    lifted = [math.exp((u - max(unlike)) / 0.01) for u in unlike]
    kept = []
    for t, one in enumerate(lifted):
        share = min(1.0, ratio * (1 + one / sum(lifted) - 1 / frames))
        count = max(1, round(share * p))
        kept += [t * p + i for i in sorted(top(-torch.tensor(scores[t], dtype=torch.float64), count))]
    return kept, [s for frame in scores for s in frame]
