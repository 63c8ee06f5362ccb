"""The parity tool on files made here: plain restatements of the official codes at other layers, shares and sizes."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import oracles_decoder as decoder
import oracles_video as oracle
import pytest
import torch
from oracles import cosine, top
from torch import Tensor

from vtprune.evals import parity

Arrays = dict[str, Any]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def check(folder: Path, name: str, arrays: Arrays, **weights: Arrays) -> None:
    """The file passes under its name."""
    for model, values in weights.items():
        np.savez(folder / f"{model}.npz", **values)
    np.savez(folder / f"{name}.npz", **arrays)
    (row,) = parity.run(folder)
    assert row.status == "passed", row.detail


def differ(n: int, share: float) -> bool:
    """True where cutting off gives another count than rounding and rounding up."""
    return int(n * share) != round(n * share) and int(n * share) != ceil(n * share)


@pytest.mark.parametrize(
    ("depth", "sizes", "layers", "ratios"),
    [
        (5, (3, 21, 4), (1, 3), (0.7, 0.37)),  # 14.7, 7.77
        (6, (1, 35, 2), (0, 2, 3, 5), (0.85, 5 / 7, 0.62, 0.22)),  # 29.75, 25, 21.7, 7.7
        (4, (5, 50, 6), (2,), (0.31,)),  # 15.5, which round() takes up
        (4, (2, 100, 5), (1, 2), (0.57, 0.29)),  # 56.99.. and 28.99.. in float64
    ],
)
def test_pyramiddrop(depth: int, sizes: Any, layers: Any, ratios: Any, tmp_path: Path) -> None:
    assert any(differ(sizes[1], share) for share in ratios)
    weights = decoder.weights(depth, depth)
    arrays = decoder.renumbering(weights, decoder.prompt(1, 32, *sizes), layers, ratios)
    check(tmp_path, "pyramiddrop_made", arrays, model_llama=weights)


@pytest.mark.parametrize(
    ("depth", "sizes", "layers", "ratios", "ttv"),
    [
        (6, (3, 21, 4), (2, 4), (0.7, 0.37), (1, 2, 3, 4)),  # from a layer before the one before the first stage
        (6, (1, 35, 2), (3, 4, 5), (0.85, 0.62, 0.22), (1, 3, 5)),  # with gaps
        (5, (2, 30, 5), (2, 3), (0.93, 0.29), (2, 3)),  # the default
        (5, (2, 30, 5), (2, 3), (0.93, 0.29), (1, 4, 5)),  # layers behind the last stage
    ],
)
def test_transprune(depth: int, sizes: Any, layers: Any, ratios: Any, ttv: Any, tmp_path: Path) -> None:
    assert any(differ(sizes[1], share) for share in ratios)
    weights = decoder.weights(depth + 10, depth)
    arrays = decoder.renumbering(weights, decoder.prompt(2, 32, *sizes), layers, ratios, ttv)
    check(tmp_path, "transprune_made", arrays, model_llama=weights)


@pytest.mark.parametrize(
    ("sizes", "layer", "gone"),
    [((3, 21, 4), 1, 0.5), ((1, 35, 2), 3, 0.7), ((2, 30, 5), 2, 0.85), ((4, 7, 3), 2, 1 / 3)],
)
def test_fastv(sizes: Any, layer: int, gone: float, tmp_path: Path) -> None:
    weights = decoder.weights(layer, 4, heads=2, kv=2)
    arrays = decoder.fastv(weights, decoder.prompt(3, 32, *sizes), layer, gone)
    check(tmp_path, "fastv_prefill_made", arrays, model_llama=weights)
    (tmp_path / "fastv_prefill_made.npz").unlink()
    check(tmp_path, "fastv_kvcache_decode_made", arrays)


@pytest.mark.parametrize(
    ("sizes", "rates"),
    [
        ((3, 21, 4), (1.0, 0.7, 0.7, 0.37, 0.1)),
        ((1, 35, 2), (0.85, 0.62, 0.22, 0.0, 0.0, 0.0)),
        ((2, 30, 5), (1.0, 1.0, 5 / 6, 1 / 3)),
    ],
)
def test_aim_inllm(sizes: Any, rates: Any, tmp_path: Path) -> None:
    weights = decoder.weights(len(rates), len(rates), kv=2, bias=True, scale=0.5)
    arrays = decoder.aim(weights, decoder.prompt(4, 32, *sizes), rates)
    check(tmp_path, "aim_inllm_made", arrays, model_qwen2_28l=weights)


def clip(seed: int, t: int, h: int, w: int, width: int = 12) -> Tensor:
    """[T, P, D] scenes of a background that stands still, under places that flicker."""
    g = torch.Generator().manual_seed(seed)
    x, back = torch.empty(t, h * w, width), torch.empty(0)
    for i in range(t):
        if i % 5 == 0:
            back = torch.randn(h * w, width, generator=g)
        flicker = (torch.rand(h * w, 1, generator=g) < 0.4).float()
        x[i] = back + (0.05 + flicker) * torch.randn(h * w, width, generator=g)
    return x


def video_file(x: Tensor, h: int, w: int, **more: Any) -> Arrays:
    """Arrays of a video case; Python numbers as the stored files have them."""
    given = {k: np.float32(v) if isinstance(v, float) else np.asarray(v) for k, v in more.items()}
    return {"feat": x.numpy(), "grid": np.array([len(x), h, w]), **given}


def numpy(rows: Any) -> np.ndarray:
    return torch.stack(list(rows)).float().numpy()


SIZES = [(11, 3, 5), (9, 7, 9), (10, 4, 6)]  # 15, 63 and 24 tokens a frame


@pytest.mark.parametrize(("t", "h", "w"), SIZES)
def test_dycoke(t: int, h: int, w: int, tmp_path: Path) -> None:
    x, ks = clip(t, t, h, w), (0.3, 0.34, 0.9)  # 1 - 0.9 and 1 - 0.3 are no tenths in float64
    assert any(differ(h * w, 1 - k) for k in ks)
    made = {f"b{j}_k": k for j, k in enumerate(ks)}
    made |= {f"b{j}_src_index": np.array(oracle.dycoke_official(x, k)) for j, k in enumerate(ks)}
    check(tmp_path, "video_dycoke_ttm_made", video_file(x, h, w, **made))


def aim_rounds(frame: Tensor, metric: Tensor, rounds: list[int]) -> tuple[Tensor, list[int]]:
    """One frame [P, D] merged round by round: its tokens in official order, and the row that each token ended in."""
    left = [([i], x, m) for i, (x, m) in enumerate(zip(frame.double(), metric.double()))]
    for asked in rounds:
        even, odd, q = left[::2], left[1::2], min(asked, len(left) // 2)
        likest = [max(range(len(odd)), key=lambda j: (cosine(a[2], odd[j][2]), -j)) for a in even]
        rank = sorted(range(len(even)), key=lambda i: (-cosine(even[i][2], odd[likest[i]][2]), i))
        groups = [[b, *(even[i] for i in rank[:q] if likest[i] == j)] for j, b in enumerate(odd)]
        means = [
            ([i for one in g for i in one[0]], *(torch.stack([o[k] for o in g]).mean(0) for k in (1, 2)))
            for g in groups
        ]
        left = [*(even[i] for i in rank[q:]), *means]
    row = {i: r for r, (members, _, _) in enumerate(left) for i in members}
    return torch.stack([x for _, x, _ in left]), [row[i] for i in range(len(frame))]


@pytest.mark.parametrize(("t", "h", "w"), SIZES)
def test_aim_merging(t: int, h: int, w: int, tmp_path: Path) -> None:
    """63 halves to 31, 15 and 7 in official rounds, where half of what is there would be 31, 16 and 8."""
    x, p = clip(t + 1, t, h, w), h * w
    lists = [[p // 2, p // 4, p // 8], [p // 3], [p // 2, 1, 2]]
    made: Arrays = {}
    for j, rounds in enumerate(lists):
        frames = [aim_rounds(frame, frame, rounds) for frame in x]
        made |= {f"b{j}_rounds": len(rounds), f"b{j}_r_list": rounds, f"b{j}_group": [group for _, group in frames]}
        made |= {f"b{j}_tokens": numpy(tokens for tokens, _ in frames)}
    check(tmp_path, "video_aim_merge_made", video_file(x, h, w, **made))


@pytest.mark.parametrize("n", [50, 63])
def test_aim_image(n: int, tmp_path: Path) -> None:
    x, keys, made = torch.randn(n, 6), torch.randn(n, 8), {}
    for j, rounds in enumerate(([n // 2], [n // 3, 3], [5, 4, 3])):
        made |= {f"b{j}_r_list": np.array(rounds), f"b{j}_tokens": aim_rounds(x, keys, rounds)[0].float().numpy()[None]}
    check(tmp_path, "video_aim_image_made", {"x": x[None].numpy(), "key": keys[None].numpy(), **made})


@pytest.mark.parametrize(("t", "h", "w"), SIZES)
@pytest.mark.parametrize("mode", ["grid", "one_token"])
def test_holitom(t: int, h: int, w: int, mode: str, tmp_path: Path) -> None:
    x, p, newline = clip(t + 2, t, h, w), h * w, torch.randn(12)
    seen, beta, k, made = torch.rand(t, p), 0.7, 4, {}
    sim = torch.tensor([[cosine(a, b) for a, b in zip(x[i].double(), x[i + 1].double())] for i in range(t - 1)])
    for j, (tau, ratio, plain) in enumerate(((0.8, 0.17, 0), (0.9, 0.33, 1), (0.6, 0.08, 0))):
        same = (sim > tau).tolist()
        found = oracle.dp_segments(same)
        still = [(sum(all(same[s][i] for s in range(a, b)) for i in range(p)), b - a) for a, b in found if b > a]
        saved = sum(n * width for n, width in still)
        tokens = oracle.holitom(x, seen, tau, None if plain else beta, ratio, None, k)
        at = sorted(tokens)
        rows = []
        for i in at:
            rows.append(tokens[i])
            if mode == "grid" and not any(i < other < (i // w + 1) * w for other in at):
                rows.append(newline)
        rows += [newline] * (mode == "one_token")
        made |= {f"b{j}_tau": tau, f"b{j}_retain_ratio": ratio, f"b{j}_no_beta": plain, f"b{j}_segments": found}
        made |= {f"b{j}_n_static": [n for n, _ in still], f"b{j}_total_reduced": float(saved), f"b{j}_src_index": at}
        made |= {f"b{j}_adj_ratio": min(1.0, ratio / ((t * p - saved) / (t * p))), f"b{j}_tokens": numpy(rows)}
    common = {"attn": seen.numpy(), "newline": newline.numpy(), "newline_mode": mode, "beta": beta, "K": k}
    check(
        tmp_path,
        "video_holitom_outer_made",
        video_file(x, h, w, sim=sim.float().numpy(), n_budgets=3, **common, **made),
    )


@pytest.mark.parametrize(("t", "h", "w"), SIZES)
@pytest.mark.parametrize("variant", ["ov", "lv", "qwen"])
def test_fastvid(t: int, h: int, w: int, variant: str, tmp_path: Path) -> None:
    x, p, start, behind = clip(t + 3, t, h, w), h * w, 3, 4
    seen, newline, made = torch.rand(t, p), torch.randn(12), {}
    settings = {"c": 4, "tau": 0.7, "d": 0.55, "period": 3, "beta": 0.45, "knn": 3, "alike": 0.97}
    similar, found = oracle.fastvid_scenes(x, 4, 0.7)
    for j, ratio in enumerate((0.19, 0.31)):
        tokens = oracle.fastvid(x, seen, variant, ratio, None, **settings)
        at, rows, places = sorted(tokens), [], []
        step = w + (variant == "lv")
        for i in at:
            rows.append(tokens[i])
            places.append(i // w * step + i % w)
            if variant == "lv" and not any(i < other < (i // w + 1) * w for other in at):
                rows.append(newline)
                places.append(i // w * step + w)
        end = start + t * h * step
        kept = [*range(start), *(start + i for i in places), *range(end, end + behind)]
        made |= {f"b{j}_retention_ratio": ratio, f"b{j}_keep_positions": kept, f"b{j}_tokens": numpy(rows)}
    stored = {"c": 4, "dyseg_tau": 0.7, "d": 0.55, "p": 3, "beta": 0.45, "knn": 3, "start": start, "n_after": behind}
    stored |= {"qwen": {"dyseg_ignore": 0.97}, "lv": {"newline": newline.numpy()}, "ov": {}}[variant]
    if variant != "qwen":
        stored["frame_global"] = x.mean(1).numpy()
    scenes = {"segment_sizes": [b - a + 1 for a, b in found], "frame_sim": np.array(similar, np.float32)}
    check(tmp_path, "video_fastvid_made", video_file(x, h, w, attn=seen.numpy(), **stored, **scenes, **made))


@pytest.mark.parametrize(("t", "h", "w"), SIZES)
def test_prunevid(t: int, h: int, w: int, tmp_path: Path) -> None:
    x, tau, share, k, made = clip(t + 4, t, h, w), 0.7, 0.35, 3, {}
    found = oracle.prunevid_scenes(x, share, k)
    for j, ratio in enumerate((0.21, 0.47)):
        tokens = oracle.prunevid(x, tau, share, ratio, None, k)
        made |= {f"b{j}_cluster_ratio": ratio, f"b{j}_tokens": numpy(tokens.values())}
    labels = [i for i, (a, b) in enumerate(found) for _ in range(a, b + 1)]
    scenes = {"segment_lengths": [b - a + 1 for a, b in found], "frame_labels_refined": labels}
    common = {"tau": tau, "temporal_segment_ratio": share, "k": k}
    check(tmp_path, "video_prunevid_made", video_file(x, h, w, **common, **scenes, **made))


@pytest.mark.parametrize(("t", "h", "w"), SIZES)
@pytest.mark.parametrize("model", ["llava_ov", "llava_vid"])
def test_vidcom2(t: int, h: int, w: int, model: str, tmp_path: Path) -> None:
    x, made, score = clip(t + 5, t, h, w), {}, []
    for j, ratio in enumerate((0.13, 0.37)):
        kept, score = oracle.vidcom2(x, ratio)
        per_frame = [sum(i // (h * w) == f for i in kept) for f in range(t)]
        if model == "llava_vid":
            rows = [[i // w * (w + 1) + i % w for i in kept if i // (h * w) == f] for f in range(t)]
            kept = [i for f in range(t) for i in rows[f] + [(f * h + r) * (w + 1) + w for r in range(h)]]
        made |= {f"b{j}_R": ratio, f"b{j}_k_per_frame": per_frame, f"b{j}_out_index": kept}
    scores = np.array(score, np.float32).reshape(t, h * w)
    check(tmp_path, "video_vidcom2_made", video_file(x, h, w, model=model, score=scores, **made))


@pytest.mark.parametrize(("n", "gone"), [(21, (0.5, 0.3)), (37, (0.85, 1 / 3)), (50, (0.71, 0.29))])
def test_holitom_inner(n: int, gone: Any, tmp_path: Path) -> None:
    """Half-way counts go to the even one; later sources weigh more."""
    start, behind, made = 3, 4, {}
    hidden, rows = torch.randn(start + n + behind, 8), torch.rand(2, start + n + behind)
    score = rows.double().mean(0)[start : start + n]
    for j, r in enumerate(gone):
        x, kept = hidden.double().clone(), top(score, round(n * (1 - r)))
        src = [i for i in range(n) if i not in kept]
        dst = [max(kept, key=lambda c: (cosine(hidden[start + i], hidden[start + c]), score[c])) for i in src]
        for i, c in zip(src, dst):
            x[start + c] = (x[start + c] + hidden[start + i].double()) / 2
        at = [*range(start), *(start + c for c in sorted(kept)), *range(start + n, start + n + behind)]
        made |= {f"b{j}_r": np.float32(r), f"b{j}_keep": np.array(at), f"b{j}_hidden": x[at].float().numpy()[None]}
        made |= {f"b{j}_merged_src": np.array(src) + start, f"b{j}_merged_dst": np.array(dst) + start}
    common = {"hidden": hidden[None].numpy(), "attn_last": rows[None].numpy(), "img_start": start, "img_len": n}
    check(tmp_path, "video_holitom_inner_made", {k: np.asarray(v) for k, v in {**common, **made}.items()})


def test_dycoke_at_decode(tmp_path: Path) -> None:
    """int(140 * (1 - 0.8)) is 27."""
    start, n, tail, steps, made = 5, 140, 3, 4, {}
    rows = [torch.rand(2, start + n + tail + t + 1) ** 4 for t in range(steps)]
    rows[2][:, : start + n] = rows[1][:, : start + n] * 1.01  # a step like the one before
    for j, p in enumerate((0.8, 0.37)):
        before, pruned = None, []
        for t, heads in enumerate(rows):
            now = heads.double().mean(0)[start : start + n]
            alike = before is not None and cosine(now, before) >= 0.9
            kept = range(n) if alike else sorted(top(now, int(n * (1 - p))))
            rest = [*range(start), *range(start + n, heads.shape[1])]
            made[f"b{j}_keep{t}"] = np.array(sorted([*rest, *(start + i for i in kept)]))
            pruned.append(not alike)
            before = now
        made |= {f"b{j}_p": np.float32(p), f"b{j}_pruned": np.array(pruned), f"b{j}_similarity": np.zeros(steps)}
    sizes = {"start": start, "img_len": n, "tail": tail, "n_steps": steps}
    attention = {f"attn_step{t}": heads.numpy() for t, heads in enumerate(rows)}
    check(tmp_path, "video_dycoke_kv_made", {k: np.asarray(v) for k, v in {**sizes, **attention, **made}.items()})


@pytest.mark.parametrize(("sizes", "rates"), [((3, 21, 4), (1.0, 0.7, 0.37, 0.1)), ((2, 35, 3), (0.9, 0.55, 0.0))])
def test_aim_on_logits(sizes: Any, rates: Any, tmp_path: Path) -> None:
    start, v, _ = sizes
    n = sum(sizes)
    logits = torch.randn(len(rates), 2, n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf) / 4
    seen, masks, importance = [True] * n, [], []
    for z, rate in zip(logits, rates):
        gone = [i for i in range(n) if not seen[i]]
        z = z.double().clone()
        z[:, :, gone] = -torch.inf
        importance.append(decoder.sharp_rank(z))
        left = [i for i in range(start, start + v) if seen[i]]
        best = {left[j] for j in top(importance[-1][left], int(v * rate + n - v) - (n - v))}
        seen = [i in best or not start <= i < start + v for i in range(n)]
        masks.append(seen)
    arrays = {
        **{"layers": np.arange(len(rates)), "logits": logits.numpy(), "bounds": np.array([start, start + v, n])},
        **{"retain_rate": np.array(rates, np.float32), "mask_after_layer": np.array(masks)},
        "importance": torch.stack(importance).float().numpy(),
    }
    check(tmp_path, "video_aim_prune_made", arrays)


@pytest.mark.parametrize(("n", "alpha"), [(25, (0.1, 0.5, 1.0)), (24, (0.3, 0.7, 0.0))])
def test_hiprune(n: int, alpha: Any, tmp_path: Path) -> None:
    """round(25 * 0.1 / 5) is 0, and one more would be read from a float32 alpha; a total is cut off to crops."""
    crops, (h, w), total = 3, {25: (5, 5), 24: (4, 6)}[n], [25 * 3 + 2, 11 * 3 + 1, 7 * 3]
    total = [min(t, n * crops) for t in total]
    q, k = torch.randn(2, crops, 2, n + 1, 4), torch.randn(2, crops, 2, n + 1, 4)
    maps = (q.double() @ k.double().transpose(-1, -2) / 2).softmax(-1).mean(2)
    shallow, deep = maps.mean(2)[..., 1:]
    made: Arrays = {}
    for j, (budget, a) in enumerate(zip((t // crops for t in total), alpha)):
        mask = np.zeros((crops, n), bool)
        for c in range(crops):
            anchors = top(shallow[c], round(budget * a / 5))
            near = {min(max(i + s, 0), n - 1) for i in anchors for s in (-1, 1, -w, w)} - set(anchors)
            chosen = (anchors + [i for i in top(deep[c], n) if i in near])[:budget]
            rest = [i for i in top(deep[c], n) if i not in chosen]
            mask[c, chosen + rest[: budget - len(chosen)]] = True
        made[f"keep_mask_{j}"] = mask
    settings = {"grid": np.array([h, w]), "retention": np.array(total), "alpha": np.array(alpha, np.float32)}
    scores = {"shallow_score": shallow.float().numpy(), "deep_score": deep.float().numpy()}
    check(tmp_path, "hiprune_llava_made", {"q": q.numpy(), "k": k.numpy(), **settings, **scores, **made})


@pytest.mark.parametrize(("n", "prefix", "share", "gone"), [(31, 1, 0.71, 3), (44, 2, 0.55, 7)])
def test_zero_tprune(n: int, prefix: int, share: float, gone: int, tmp_path: Path) -> None:
    """Counts of kept patches are rounded up."""
    heads, d, steps, first, limits = 3, 6, 4, 2, (0.001, 50.0)
    q, k = torch.randn(2, heads, n, d), torch.randn(2, heads, n, d)
    assert ceil((n - prefix) * share) != round((n - prefix) * share)

    def rank(a: Tensor, count: int) -> Tensor:
        s = torch.full((heads, len(a[0])), 1 / len(a[0]), dtype=torch.float64)
        for _ in range(count):
            s = torch.stack([row @ one for row, one in zip(s, a)])
        return s

    def importance(s: Tensor) -> tuple[Tensor, list[bool]]:
        spread = [float((len(row) * row[prefix:]).var(correction=0)) for row in s]
        passed = [limits[0] <= v <= limits[1] for v in spread]
        passed = passed if any(passed) else [True] * heads
        return (s[passed].square().mean(0)).sqrt(), passed

    made: dict[str, list[Any]] = {}
    for b in range(2):
        a = (q[b].double() @ k[b].double().transpose(1, 2) / d**0.5).softmax(-1)
        guide, first_heads = importance(rank(a, first))
        whole, passed = importance(rank(a, steps))
        order = [prefix + i for i in top(guide[prefix:], n - prefix)]
        half = (len(order) + 1) // 2
        upper, lower = sorted(order[:half]), sorted(order[half:])
        key = k[b].double().mean(0)
        pairs = [(i, max(upper, key=lambda u: (cosine(key[i], key[u]), -u))) for i in lower]
        pairs = sorted(pairs, key=lambda pair: (-cosine(key[pair[0]], key[pair[1]]), pair[0]))[:gone]
        left = [i for i in range(n) if i not in {i for i, _ in pairs}]
        cut = a[:, left][:, :, left]
        second, _ = importance(rank(cut / cut.sum(-1, keepdim=True), steps))
        best = [left[prefix + i] for i in top(second[prefix:], ceil(share * (n - prefix - gone)))]
        only = [prefix + i for i in top(whole[prefix:], ceil(share * (n - prefix)))]
        for name, value in (
            *(("importance", whole.tolist()), ("importance_first", guide.tolist()), ("head_mask", passed)),
            *(("head_mask_first", first_heads), ("s_pruned", [i for i, _ in pairs])),
            *(("s_partner", [u for _, u in pairs]), ("keep_final", [*range(prefix), *sorted(best)])),
            *(("keep_I_only", sorted(only)), ("s_iter3", rank(a, 3).tolist())),
        ):
            made.setdefault(name, []).append(value)
    settings = {"prefix": prefix, "num_heads": heads, "iters": steps, "iters_first": first, "r_s": gone}
    floats = {"v_min": limits[0], "v_max": limits[1], "keep_ratio": share}
    arrays = {name: np.array(value) for name, value in {**settings, **made}.items()}
    arrays |= {name: np.float32(value) for name, value in floats.items()}
    check(tmp_path, "zerotprune_spec_made", {"q": q.numpy(), "k": k.numpy(), **arrays})


def test_schedules_of_tome(tmp_path: Path) -> None:
    """Cut off towards 0 from r (1 - f) to r (1 + f)."""
    made = {}
    for depth in (5, 7):
        for word, f in (("dec", -1.0), ("inc", 1.0), ("half", 0.5), ("neg", -0.3)):
            for r in (7, 11):
                low = int(r * (1 - f))
                step = (2 * r - 2 * low) / (depth - 1)
                made[f"L{depth}_{word}{r}"] = np.array([int(low + step * i) for i in range(depth)])
        made[f"L{depth}_const6"] = np.array([6] * depth)
    check(tmp_path, "tome_parse_r_made", made)
    np.savez(tmp_path / "tome_parse_r_made.npz", L5_odd3=np.array([3] * 5))
    (row,) = parity.run(tmp_path)
    assert row.status == "failed"
    assert "no such schedule" in row.detail


@pytest.mark.parametrize(("n", "share"), [(31, 0.83), (40, 0.7)])
def test_topvim(n: int, share: float, tmp_path: Path) -> None:
    """Rounded up, and one more where the count with CLS would be even; CLS stays in the middle."""
    score, x, y = torch.randn(1, 4, n), torch.randn(1, n, 3), torch.randn(1, n, 3)
    arrays: Arrays = {"xai_b": score.numpy(), "hidden": x.numpy(), "residual": y.numpy(), "layers": np.array([5, 10])}
    for step in range(2):
        count = x.shape[1]
        cls, total = count // 2, score[0, :, :count].double().sum(0)
        k = ceil(share * (count - 1))
        k += k % 2 == 0
        best = sorted([i for i in top(total, count) if i != cls][: k - 1])
        kept = [*best[: k // 2], cls, *best[k // 2 :]]
        x, y = x[:, kept], y[:, kept]
        arrays |= {f"step{step}_hidden": x.numpy(), f"step{step}_residual": y.numpy()}
    check(tmp_path, "topvim_prune_made", {**arrays, "keep_ratio": np.float32(share)})


@pytest.mark.parametrize(("n", "texts", "scale", "bias"), [(40, 5, 2.3, 0.0), (60, 7, 3.9, 4.4)])
def test_sparsevlm_by_rank(n: int, texts: int, scale: float, bias: float, tmp_path: Path) -> None:
    rows = torch.rand(texts, n).softmax(-1)
    score, counts = rows.double().mean(0), {"v1": int(texts * scale + bias), "video": texts}
    made: Arrays = {}
    for tag, count in counts.items():
        mask = np.zeros(n, np.uint8)
        mask[top(score, count)] = 1
        made |= {f"{tag}_keep_mask": mask, f"{tag}_merge_flag": np.array(1)}
    settings = {"rank": texts, "vis_len": n, "v1_scale": np.float32(scale), "v1_bias": np.float32(bias)}
    arrays = {"attn_mean_heads_rater_rows": rows.numpy(), "score_visual": score.float().numpy(), **settings, **made}
    check(tmp_path, "sparsevlm_rank_made", {name: np.asarray(value) for name, value in arrays.items()})


def test_spatten_between_turns(tmp_path: Path) -> None:
    first, important, recent, coming, slots = 3, 9, 8, 2, 31
    logits, cache = torch.randn(2, 1, 3, 1, slots), torch.randn(2, 2, 1, 3, slots, 4)
    end = slots - recent + coming
    kept = [
        [
            sorted([*range(first), *(first + i for i in top(row[0, first:end], important)), *range(end, slots)])
            for row in layer
        ]
        for layer in logits[:, 0]
    ]
    names = ("key_cache", "value_cache")
    pruned = [
        torch.stack([torch.stack([c[0, h, kept[i][h]] for h in range(3)])[None] for i, c in enumerate(one)])
        for one in cache
    ]
    sizes = {"start_size": first, "important_size": important, "recent_size": recent, "num_coming": coming}
    arrays = {"pre_softmax_logits": logits.numpy(), "kept_indices_per_layer_head": np.array(kept)}
    arrays |= {name: one.numpy() for name, one in zip(names, cache)}
    arrays |= {f"pruned_{name}": one.numpy() for name, one in zip(names, pruned)}
    check(tmp_path, "spatten_llm_kv_made", {**arrays, **{name: np.array(value) for name, value in sizes.items()}})
