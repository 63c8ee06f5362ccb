"""What the video methods compute, restated slowly and plainly in float64; nothing here calls vtprune.

x: [T][P] rows of float64 each; answers are flat positions t * P + p.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import torch
from oracles import cosine, middles, top
from torch import Tensor


def flat(x: Tensor) -> Tensor:
    return x.double().flatten(0, 1)


def changes(x: Tensor, t: int, before: int) -> list[float]:
    """1 - cosine of every token of frame t with the same place of frame `before`."""
    x = x.double()
    return [1 - cosine(a, b) for a, b in zip(x[t], x[before])]


def from_mean(x: Tensor, t: int) -> list[float]:
    """1 - cosine of every token of frame t with the mean of the frame."""
    frame = x[t].double()
    return [1 - cosine(a, frame.mean(0)) for a in frame]


def evs_fair(x: Tensor, count: int) -> list[int]:
    """Below the official count: every frame's best token first, then the best of all; frame 0 against its own mean."""
    frames, p = x.shape[:2]
    scores = from_mean(x, 0) + [c for t in range(1, frames) for c in changes(x, t, t - 1)]
    best = [t * p + top(torch.tensor(scores[t * p : t * p + p]), 1)[0] for t in range(frames)]
    ranked = sorted(range(frames * p), key=lambda i: (i not in best, -scores[i], i))
    return sorted(ranked[:count])


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


def dycoke_fair(x: Tensor, budget: int) -> list[int]:
    """Below the official count: a third for every fourth frame by the distance to its mean, the rest for others."""
    frames, p = x.shape[:2]
    firsts = [t for t in range(frames) if t % 4 == 0]
    others = [t for t in range(frames) if t % 4 != 0]
    fits = [
        own
        for own in range(min(budget, len(firsts) * p) + 1)
        if budget - own <= len(others) * p and (budget < frames or (own >= len(firsts) and budget - own >= len(others)))
    ]
    own = min(fits, key=lambda count: abs(count - budget // 3))
    kept = []
    for group, total in ((firsts, own), (others, budget - own)):
        for i, t in enumerate(group):
            count = (i + 1) * total // len(group) - i * total // len(group)
            scores = from_mean(x, t) if t % 4 == 0 else changes(x, t, t - 1 if t % 4 == 3 else t - t % 4)
            kept += [t * p + i for i in top(torch.tensor(scores), count)]
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


def dp_segments(same: list[list[bool]]) -> list[tuple[int, int]]:
    """Windows that save most tokens, cell by cell. same[t][p]: place p is the same in frames t and t + 1."""
    frames = len(same) + 1

    def saved(a: int, b: int) -> int:
        return (b - a) * sum(all(same[t][p] for t in range(a, b)) for p in range(len(same[0]))) if b > a else 0

    best, width = [0], []
    for i in range(frames):
        value, w = best[i], 1
        for size in range(2, i + 2):
            other = best[i + 1 - size] + saved(i + 1 - size, i)
            if other > value:
                value, w = other, size
        best.append(value)
        width.append(w)
    found, last = [], frames - 1
    while last >= 0:
        found.append((last - width[last] + 1, last))
        last -= width[last]
    return found[::-1]


def peaks(points: Tensor, count: int, neighbours: int) -> list[int]:
    """Density peaks: the `count` points of highest density times distance to a denser one, ascending."""
    n, d = points.shape
    far = [[float((a - b).norm()) / math.sqrt(d) for b in points] for a in points]
    rho = [-sum(f * f for f in sorted(row)[:neighbours]) / neighbours for row in far]
    most = max(max(row) for row in far)
    score = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if (rho[j], -j) > (rho[i], -i)]
        reach = min([*denser, most])
        score.append(rho[i] + (math.log(reach) if reach > 0 else -math.inf))
    return sorted(sorted(range(n), key=lambda i: (-score[i], i))[:count])


def cluster(points: Tensor, count: int, exactly: int | None = None, most: int = 7) -> dict[int, list[int]]:
    """Each centre with the points that go to it; of `exactly` neighbours, or of `most` but at most `count`."""
    if not count:
        return {}
    centres = peaks(points, count, exactly or min(most, count))
    out: dict[int, list[int]] = {c: [] for c in centres}
    for i in range(len(points)):
        if i not in out:
            out[min(centres, key=lambda c: (float((points[i] - points[c]).norm()), c))].append(i)
    return out


def holitom(
    x: Tensor, seen: Tensor, tau: float, beta: float | None, ratio: float | None, budget: int | None, k: int = 7
):
    """https://arxiv.org/abs/2505.21334 before the LLM: {position: feature}; `ratio` as published, or a budget."""
    x, seen = x.double(), seen.double()
    frames, p = x.shape[:2]
    same = [[cosine(a, b) > tau for a, b in zip(x[t], x[t + 1])] for t in range(frames - 1)]
    segments = dp_segments(same) if frames > 1 else [(0, 0)]
    still = [[i for i in range(p) if b > a and all(same[t][i] for t in range(a, b))] for a, b in segments]
    windows = [(s, places) for s, places in zip(segments, still) if s[1] > s[0]]
    moving = {
        t: [i for i in range(p) if i not in places] for (a, b), places in zip(segments, still) for t in range(a, b + 1)
    }
    sizes = [len(places) for _, places in windows] + [len(moving[t]) for t in range(frames)]
    spare = 0
    if budget is None:
        assert ratio is not None
        r = min(1.0, ratio / (sum(sizes) / (frames * p)))
        shares = [round(s * r) for s in sizes[: len(windows)]] + [math.ceil(s * r) for s in sizes[len(windows) :]]
    else:
        spare = max(0, budget - sum(sizes))
        shares = largest_remainder(budget - spare, sizes)
    loose = [(t, i) for (a, b), places in windows for t in range(a + 1, b + 1) for i in places]
    alone = sorted(sorted(loose, key=lambda c: (-float(seen[c]), c))[:spare])
    out = {t * p + i: x[t, i] for t, i in alone}
    for ((a, b), places), count in zip(windows, shares):
        if not places:
            continue
        frames_of = {i: [t for t in range(a, b + 1) if (t, i) not in alone] for i in places}
        means = {i: torch.stack([x[t, i] for t in frames_of[i]]).mean(0) for i in places}
        points = torch.stack([x[a : b + 1, i].mean(0) for i in places])
        for centre, members in cluster(points, count, most=k).items():
            rows = [means[places[m]] for m in members]
            own = means[places[centre]]
            if rows and beta is not None:
                own = beta * own + (1 - beta) * torch.stack(rows).mean(0)
            elif rows:
                own = torch.stack([own, *rows]).mean(0)
            out[a * p + places[centre]] = own
    for t, count in zip(range(frames), shares[len(windows) :]):
        for i in sorted(moving[t], key=lambda i: (-float(seen[t, i]), i))[:count]:
            out[t * p + i] = x[t, i]
    return out


def largest_remainder(total: int, sizes: list[int]) -> list[int]:
    """Shares of `total` in proportion to sizes: cut off, then one more for the largest remainders, the first first."""
    exact = [Fraction(total * s, max(1, sum(sizes))) for s in sizes]
    given = [math.floor(e) for e in exact]
    for i in sorted(range(len(sizes)), key=lambda i: (given[i] - exact[i], i))[: total - sum(given)]:
        given[i] += 1
    return given


def aim(frame: Tensor, metric: Tensor, count: int) -> dict[int, Tensor]:
    """https://arxiv.org/abs/2412.03248: one frame [P, D] merged pairwise to `count` tokens, {place: feature}."""
    left = [(i, x, m) for i, (x, m) in enumerate(zip(frame.double(), metric.double()))]
    while len(left) > count:
        q = min(len(left) // 2, len(left) - count)
        even, odd = left[::2], left[1::2]
        likest = [max(range(len(odd)), key=lambda j: (cosine(a[2], odd[j][2]), -j)) for a in even]
        rank = sorted(range(len(even)), key=lambda i: (-cosine(even[i][2], odd[likest[i]][2]), i))
        groups = [[b, *(even[i] for i in rank[:q] if likest[i] == j)] for j, b in enumerate(odd)]
        means = [(g[0][0], *(torch.stack([one[k] for one in g]).mean(0) for k in (1, 2))) for g in groups]
        left = [*(even[i] for i in rank[q:]), *means]
    return {place: x for place, x, _ in left}


def prunevid_scenes(x: Tensor, share: float, k: int = 7) -> list[tuple[int, int]]:
    """https://arxiv.org/abs/2412.16117: scenes, by clustering the mean tokens of the frames."""
    frames = x.double().mean(1)
    groups = cluster(frames, max(1, int(len(frames) * share)), exactly=min(k, len(frames)))
    label = [next(c for c, members in groups.items() if t == c or t in members) for t in range(len(frames))]
    runs: list[list[int]] = []
    for t in range(len(frames)):
        if t and label[t] == label[t - 1]:
            runs[-1].append(t)
        else:
            runs.append([t])
    most = {c: max(len(run) for run in runs if label[run[0]] == c) for c in set(label)}
    stay = [run for run in runs if len(run) > 1 and len(run) == most[label[run[0]]]]
    if not stay:
        return [(0, len(frames) - 1)]
    home = {}
    for t in range(len(frames)):
        before = [run for run in stay if run[0] <= t]
        after = [run for run in stay if run[-1] >= t]
        left, right = (before[-1] if before else None), (after[0] if after else None)
        home[t] = id(left if right is None or (left is not None and len(left) >= len(right)) else right)
        for run in stay:
            if t in run:
                home[t] = id(run)
    found: list[list[int]] = []
    for t in range(len(frames)):
        if t and home[t] == home[t - 1]:
            found[-1].append(t)
        else:
            found.append([t])
    return [(run[0], run[-1]) for run in found]


def prunevid(
    x: Tensor, tau: float, share: float, ratio: float | None, budget: int | None, k: int = 7
) -> dict[int, Tensor]:
    """The merging before the LLM: {position: feature}; `ratio` as published, or a budget."""
    x = x.double()
    frames, p = x.shape[:2]
    found = prunevid_scenes(x, share, k)

    def still(a: int, b: int) -> list[int]:
        pairs = [(s, t) for s in range(a, b + 1) for t in range(a, b + 1) if s != t]
        return [i for i in range(p) if pairs and sum(cosine(x[s, i], x[t, i]) for s, t in pairs) / len(pairs) > tau]

    places = {(a, b): still(a, b) for a, b in found}
    windows = [(s, places[s]) for s in found if s[1] > s[0]]
    moving = {t: [i for i in range(p) if i not in places[a, b]] for a, b in found for t in range(a, b + 1)}
    sizes = [len(q) for _, q in windows] + [len(moving[t]) for t in range(frames)]
    spare = 0
    if budget is None:
        assert ratio is not None
        counts = [n if n <= 14 else int(n * ratio) for n in sizes]
    else:
        spare = max(0, budget - sum(sizes))
        counts = largest_remainder(budget - spare, sizes)
    loose = [(t, i) for (a, b), q in windows for t in range(a + 1, b + 1) for i in q]
    scene = {t: s for s in found for t in range(s[0], s[1] + 1)}
    unlike = {(t, i): 1 - cosine(x[t, i], x[scene[t][0] : scene[t][1] + 1, i].mean(0)) for t, i in loose}
    alone = sorted(loose, key=lambda c: (-unlike[c], c))[:spare]
    out = {t * p + i: x[t, i] for t, i in alone}

    def merge(rows: dict[int, Tensor], points: Tensor, count: int, start: int) -> None:
        at = list(rows)
        for centre, members in cluster(points, count, exactly=min(k, len(at))).items() if at else ():
            out[start + at[centre]] = torch.stack([rows[at[i]] for i in (centre, *members)]).mean(0)

    for ((a, b), q), count in zip(windows, counts):
        rows = {i: torch.stack([x[t, i] for t in range(a, b + 1) if (t, i) not in alone]).mean(0) for i in q}
        merge(rows, torch.stack([x[a : b + 1, i].mean(0) for i in q]) if q else x[0, :0], count, a * p)
    for t, count in zip(range(frames), counts[len(windows) :]):
        merge({i: x[t, i] for i in moving[t]}, x[t, moving[t]], count, t * p)
    return out


def fastvid_scenes(x: Tensor, c: int, tau: float) -> tuple[list[float], list[tuple[int, int]]]:
    """Cosines of neighbouring frames, and the scenes: cut at the c - 1 lowest and wherever one is below tau."""
    means = x.double().mean(1)
    similar = [cosine(a, b) for a, b in pairwise(means)]
    low = sorted(range(len(similar)), key=lambda i: (similar[i], i))[: c - 1]
    ends = sorted({i for i in range(len(similar)) if i in low or similar[i] < tau})
    return similar, list(zip([0, *(e + 1 for e in ends)], [*ends, len(x) - 1]))


def fastvid(
    x: Tensor,
    seen: Tensor,
    variant: str,
    ratio: float | None,
    budget: int | None,
    c: int = 8,
    tau: float | None = None,
    d: float = 0.4,
    period: int = 4,
    beta: float = 0.6,
    knn: int = 4,
    alike: float = 0.95,
) -> dict[int, Tensor]:
    """https://arxiv.org/abs/2503.11187, frames compared by their mean token: {position: feature}."""
    x, seen = x.double(), seen.double()
    frames, p = x.shape[:2]
    similar, found = fastvid_scenes(x, c, tau or (0.84 if variant == "qwen" else 0.9))
    n = int(p * ratio) if ratio is not None else int(p * (budget or 0) / (frames * p))
    salient, merged = [0] * frames, [0] * frames
    for a, b in found:
        length = b - a + 1
        takers = [t for t in range(a, b + 1) if variant != "qwen" or t == b or similar[t] < alike]
        anchors = [t for i, t in enumerate(takers) if (len(takers) - 1 - i) % period == 0]
        if variant == "ov":
            context = int(n * d)
            for t in takers:
                salient[t] = n - context
            for t in anchors:
                merged[t] = min(context * length // len(anchors), p - salient[t])
            continue
        total = n * length
        context = min(total, max(1, int(total * d))) if variant == "qwen" else int(total * d)
        for i, t in enumerate(reversed(anchors)):
            merged[t] = context // len(anchors) + (i < context % len(anchors))
            merged[t] = min(merged[t], p // 2) if variant == "qwen" else merged[t]
        for i, t in enumerate(takers):
            salient[t] = (total - context) // len(takers) + (i < (total - context) % len(takers))
            salient[t] = min(salient[t], p - merged[t]) if variant == "qwen" else salient[t]
            merged[t] = min(merged[t], p - salient[t])
    if budget == frames * p:
        return {t * p + i: x[t, i] for t in range(frames) for i in range(p)}
    if budget is not None:
        some = [t for t in range(frames) if salient[t] + merged[t]]
        for group in (some, [t for t in range(frames) if t not in some]):
            room = [p - salient[t] - merged[t] for t in group]
            rest = min(sum(room), budget - sum(salient) - sum(merged))
            for t, more in zip(group, largest_remainder(rest, room)):
                salient[t] += more
    looked = {t: top(seen[t], salient[t]) for t in range(frames)}
    out = {t * p + i: x[t, i] for t in range(frames) for i in looked[t]}
    for a, b in found:
        for t in range(a, b + 1):
            free = [i for i in range(p) if i not in looked[t]]
            if not merged[t]:
                continue
            centres = [free[at] for at in peaks(x[t, free], merged[t], min(knn, len(free)))]
            joined: dict[int, list[Tensor]] = {at: [] for at in centres}
            for s in range(a, b + 1):
                for i in range(p):
                    if i not in looked[s] and (variant == "ov" or s != t or i not in centres):
                        joined[max(centres, key=lambda at: (cosine(x[s, i], x[t, at]), -at))].append(x[s, i])
            for at, rows in joined.items():
                weight = max(1 / (len(rows) + 1), beta) if rows else 1.0
                own = x[t, at]
                out[t * p + at] = weight * own + (1 - weight) * (torch.stack(rows).mean(0) if rows else 0 * own)
    return out
