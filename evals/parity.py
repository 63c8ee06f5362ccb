"""Compare our methods with stored outputs of the official codes: `python -m vtprune.evals.parity DIRECTORY`.

Every `*.npz` file of the directory is one case; the part of its name before the first match in the table below says
which method it belongs to. A method's case is a function marked `@case("prefix")`: it gets the arrays, runs our
method on the stored inputs and compares with the stored outputs. Every setting is read from the file; a file that lacks
one that its case needs has failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vtprune.kernels import attention_received

from ..registry import create
from ..types import Assignment, Method, Signal, Span, Visual

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from ..handle import Handle

Arrays = Mapping[str, Any]
Runner = Callable[[Arrays, Path], str]
TOLERANCE = 1e-4
INPUTS = ("model_",)  # files that cases read, no cases themselves
_runners: dict[str, Runner] = {}


class Mismatch(Exception):
    """Our result differs from the stored one; the message says where."""


@dataclass(frozen=True)
class Row:
    """One file: status is "passed", "failed" or "unknown"; detail says what was compared or what differs."""

    case: str
    status: str
    detail: str
    seconds: float


def case(prefix: str) -> Callable[[Runner], Runner]:
    """Run the decorated function on files that start with `prefix`; it returns a summary or raises `Mismatch`."""

    def add(runner: Runner) -> Runner:
        if prefix in _runners:
            raise ValueError(f"@case({prefix!r}): the prefix is taken by {_runners[prefix].__name__}")
        _runners[prefix] = runner
        return runner

    return add


def same(what: str, ours: Tensor, stored: Any) -> None:
    """Raise `Mismatch` unless two index sequences are equal, order included."""
    a, b = ours.tolist(), np.asarray(stored).tolist()
    if a != b:
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        raise Mismatch(
            f"{what}: {len(a)} against {len(b)} stored; at {at} ours {a[at : at + 3]}, stored {b[at : at + 3]}"
        )


def close(what: str, ours: Tensor, stored: Any) -> float:
    """Largest absolute difference; `Mismatch` if it exceeds the tolerance."""
    expected = torch.as_tensor(np.asarray(stored))
    if ours.shape != expected.shape:
        raise Mismatch(f"{what}: shape {tuple(ours.shape)} against {tuple(expected.shape)} stored")
    worst = float((ours.float() - expected.float()).abs().max())
    if not worst <= TOLERANCE:
        raise Mismatch(f"{what}: differs by {worst:.2g}, allowed {TOLERANCE:g}")
    return worst


def real(value: Any) -> float:
    """The Python float that a stored number was meant to be: files hold float32, counts are cut off in float64.

    >>> real(np.float32(0.29)), real(np.float32(5 / 6))
    (0.29, 0.8333333333333334)
    """
    stored: Any = np.asarray(value)[()]
    if stored.dtype != np.float32:
        return float(stored)
    short = np.format_float_scientific(stored)  # the shortest decimal number that rounds to it
    simple = Fraction(float(stored)).limit_denominator(1000)
    if len(short.split("e")[0].replace("-", "")) <= 7 or np.float32(float(simple)) != stored:
        return float(short)
    return float(simple)


def agree(what: str, ours: Any, stored: Any) -> None:
    """Raise `Mismatch` unless a setting, or what follows from it, is the stored one."""
    if np.asarray(ours).tolist() != np.asarray(stored).tolist():
        raise Mismatch(f"{what}: {np.asarray(ours).tolist()} by the settings, {np.asarray(stored).tolist()} stored")


@case("divprune_")
def divprune(arrays: Arrays, folder: Path) -> str:
    """Picks in order.

    The official code does not mask picked tokens, so repeated rows can come out twice: from the first repeat on, the
    rule is only that our picks are distinct; with repeated rows that is also checked with nothing dropped.
    """
    x = torch.from_numpy(arrays["features"])
    method = create("divprune")
    budgets = arrays["budgets"].tolist()
    cut = 0
    if arrays["grid"].any() if "grid" in arrays else False:
        _grid(arrays, x.shape[0])
    if "ratios" in arrays:
        agree("budgets", [round(real(share) * x.shape[0]) for share in arrays["ratios"]], budgets)
    if "duplicate_rows" in arrays:
        agree("different rows", len(x[arrays["duplicate_rows"]].unique(dim=0)), 1)
    for k in budgets:
        ours = _ordered(method(Visual(x, k)))
        official = arrays[f"order_{k}"]
        distinct = _before_repeat(official)
        same(f"order at {k}", ours[:distinct], official[:distinct])
        if len(set(ours.tolist())) != k:
            raise Mismatch(f"order at {k}: {len(set(ours.tolist()))} distinct tokens")
        if distinct == k:
            same(f"kept at {k}", ours.sort().values, arrays[f"kept_{k}"])
        cut += distinct < k
    rule = f"; {cut} compared up to the first repeated official pick" if cut else ""
    if "duplicate_rows" in arrays:
        if len(set(_ordered(method(Visual(x, x.shape[0]))).tolist())) != x.shape[0]:
            raise Mismatch(f"a token is picked twice when all {x.shape[0]} are asked for")
        rule += f"; all {x.shape[0]} distinct despite {len(arrays['duplicate_rows'])} equal rows"
    return f"picks and order at {_list(budgets)} of {x.shape[0]}{rule}"


def _before_repeat(picks: np.ndarray) -> int:
    """Length of the longest start of `picks` without a repeated index."""
    repeats = np.setdiff1d(np.arange(len(picks)), np.unique(picks, return_index=True)[1])
    return int(repeats[0]) if len(repeats) else len(picks)


@case("todre_spec_")
def todre(arrays: Arrays, folder: Path) -> str:
    """Pivot and picks in order, both objectives; the pivot is looked for among the thumbnail's tokens."""
    x = torch.from_numpy(arrays["features"])
    n, thumbnail = x.shape[0], int(arrays["thumbnail_tokens"])
    parts = [(0, thumbnail), (thumbnail, n)] if thumbnail < n else [(0, n)]
    spans = tuple(Span(start, (1, 1, stop - start)) for start, stop in parts)
    signals = {Signal("cls", -1): torch.from_numpy(arrays["cls_attention"])}
    for objective in ("maxsum", "kcenter"):
        method = create("todre", objective=objective)
        for k in arrays["budgets"].tolist():
            answer = method(Visual(x, k, spans=spans, signals=signals))
            same(f"{objective} pivot", _ordered(answer)[:1], arrays["pivot"].reshape(1))
            same(f"{objective} order at {k}", _ordered(answer), arrays[f"order_{objective}_k{k}"])
            same(f"{objective} kept at {k}", answer.idx, arrays[f"keep_{objective}_k{k}"])
    return f"pivot, picks and order at {_list(arrays['budgets'].tolist())} of {n}, maxsum and kcenter"


@case("hiprune_")
def hiprune(arrays: Arrays, folder: Path) -> str:
    """Scores from queries and keys; tokens kept by the official edges, each crop on its own share of the total."""
    scores, grid, of_each = _hiprune_qwen(arrays) if "window_index" in arrays else _hiprune_llava(arrays)
    worst = max(close(name, ours, arrays[name]) for name, ours in zip(("shallow_score", "deep_score"), scores))
    crops, n = scores[0].view(-1, grid[0] * grid[1] * grid[2]).shape
    fewer = []
    for j, (budget, alpha) in enumerate(zip(of_each, map(real, arrays["alpha"]), strict=True)):
        stored = arrays[f"keep_mask_{j}"] if f"keep_mask_{j}" in arrays else _mask(arrays[f"kept_{j}"], n)
        for crop, mask in enumerate(stored.reshape(crops, n)):
            for exact in (True, False):
                method = create("hiprune", alpha=alpha, edges="clamp_flat", exact_budget=exact)
                signals = {need: score.view(crops, n)[crop] for need, score in zip(method.needs, scores)}
                ours = method(Visual(torch.zeros(n, 1), budget, grid=grid, signals=signals)).idx
                if exact and len(ours) != budget:
                    raise Mismatch(f"run {j}, crop {crop}: {len(ours)} tokens kept, not {budget}")
                if "window_index" not in arrays:
                    agree(f"run {j}, crop {crop}: tokens", mask.sum(), budget)
                if exact and mask.sum() < budget:  # the official count falls short: ours holds all of those and more
                    ours = ours[torch.from_numpy(mask)[ours]]
                    fewer.append(f"{mask.sum()} of {budget}")
                elif not exact and "window_index" not in arrays:
                    continue
                same(f"run {j}, crop {crop}, exact_budget={exact}", ours, np.flatnonzero(mask))
    rule = f"; official short counts {', '.join(fewer)} repeated by exact_budget=False" if fewer else ""
    return f"tokens at {_list(of_each)} of {n}, {crops} crop(s); scores within {worst:.1g}{rule}"


def _hiprune_llava(arrays: Arrays) -> tuple[list[Tensor], tuple[int, int, int], list[int]]:
    """Attention received in both layers [crops, N], the grid, and the tokens of one crop per run."""
    q, k = (torch.from_numpy(arrays[name]) for name in "qk")
    scores = [attention_received(q[i], k[i], None, q.shape[-1] ** -0.5)[:, 1:] for i in (0, 1)]
    height, width = arrays["grid"].tolist()
    return scores, (1, height, width), [total // q.shape[1] for total in arrays["retention"].tolist()]


def _hiprune_qwen(arrays: Arrays) -> tuple[list[Tensor], tuple[int, int, int], list[int]]:
    """Sums over queries per merged token [N] in raster order; the object layer may attend within windows."""
    frames, height, width = arrays["grid_thw"].tolist()
    merge = int(arrays["spatial_merge_size"])
    grid, order = (frames, height // merge, width // merge), torch.from_numpy(arrays["window_index"])
    side = int(arrays["window_size"]) // int(arrays["patch_size"]) // merge
    lengths = [
        min(side, grid[1] - top) * min(side, grid[2] - left) * merge**2
        for top in range(0, grid[1], side)
        for left in range(0, grid[2], side)
    ] * frames
    scores = []
    for layer, whole in enumerate((bool(arrays["shallow_full_attention"]), True)):
        q, k = (torch.from_numpy(arrays[f"{name}_window_order"][layer])[None] for name in "qk")
        cuts = [q.shape[2]] if whole else lengths
        parts = zip(q.split(cuts, 2), k.split(cuts, 2))
        sums = [attention_received(a, b, None, q.shape[-1] ** -0.5)[0] * a.shape[2] for a, b in parts]
        scores.append(torch.cat(sums).view(-1, merge**2).mean(1)[order.argsort()])
    return scores, grid, [round(len(order) * real(share)) for share in arrays["retain_ratio"]]


def _mask(kept: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    mask[kept] = True
    return mask


@case("visionzip_")
def visionzip(arrays: Arrays, folder: Path) -> str:
    """Dominant tokens in pick order, contextual places and merged features, CLS kept and official order.

    The positional order must hold the same rows at the places of their tokens.
    """
    hidden = torch.from_numpy(arrays["hidden"])
    cls = torch.nn.functional.pad(torch.from_numpy(arrays["cls_attn"]).mean(1)[:, 1:], (1, 0))
    keys = torch.from_numpy(arrays["key_metric"])
    worst = []
    _grid(arrays, hidden.shape[1] - 1)
    for dominant, contextual, tag in _visionzip_budgets(arrays):
        outputs, orders = [], []
        for x, score, key in zip(hidden, cls, keys):
            method: Any = create("visionzip", contextual=contextual, order="official", cls="keep")
            signals = dict(zip((method.needs[0], method.needs[-1]), (score, key)))
            answer = method(Visual(x, dominant + contextual, signals=signals))
            plain = replace(method, order="positional")(Visual(x, dominant + contextual, signals=signals))
            shown = torch.cat([_ordered(answer)[:dominant].sort().values, _ordered(answer)[dominant:]])
            same("positional tokens", plain.idx, shown.sort().values)
            worst.append(close("positional order", plain.apply(x), answer.apply(x)[shown.argsort()]))
            outputs.append(answer.apply(x))
            orders.append(_ordered(answer))
        features, order = torch.stack(outputs), torch.stack(orders)
        stored = "per_crop_features" if "assembled" in arrays else f"features_{tag}"
        worst.append(close(stored, features, arrays[stored]))
        topk = "per_crop_topk" if "assembled" in arrays else f"topk_order_{tag}"
        same("dominant tokens", order[:, :dominant], arrays[topk])
        if "assembled" in arrays:
            whole = _visionzip_mosaic(features, order[:, :dominant].sort(dim=1).values, arrays)
            worst.append(close("assembled mosaic", whole, arrays["assembled"]))
        else:
            same("contextual places", order[:, dominant:], arrays[f"contextual_pos_{tag}"])
    rule = ", mosaic of crops" if "assembled" in arrays else ""
    budgets = _list([d + c for d, c, _ in _visionzip_budgets(arrays)])
    return f"tokens and places at {budgets} of {hidden.shape[1]}{rule}; features within {max(worst):.1g}"


def _visionzip_budgets(arrays: Arrays) -> list[tuple[int, int, str]]:
    pairs = arrays["budgets"] if "budgets" in arrays else [(arrays["dominant"], arrays["contextual"])]
    return [(int(d), int(c), f"{d}_{c}") for d, c in pairs]


def _visionzip_mosaic(features: Tensor, dominant: Tensor, arrays: Arrays) -> Tensor:
    """The base view, then all crops: patches in raster order of the mosaic, CLS tokens, contextual tokens.

    features: [crops, tokens, C] in official order. dominant: [crops, D] ascending, CLS at 0.
    """
    columns, (height, width) = int(arrays["crops_w"]), _grid(arrays, arrays["hidden"].shape[1] - 1)
    tiles, places = features[1:], dominant[1:, 1:] - 1
    agree("tiles", columns * int(arrays["crops_h"]), len(tiles))
    crop = torch.arange(len(tiles))[:, None]
    row, column = crop // columns * height + places // width, crop % columns * width + places % width
    raster = (row * columns * width + column).flatten().argsort()
    patches = tiles[:, 1 : dominant.shape[1]].flatten(0, 1)[raster]
    return torch.cat([features[0], patches, tiles[:, 0], tiles[:, dominant.shape[1] :].flatten(0, 1)])


def _grid(arrays: Arrays, n: int) -> tuple[int, int]:
    """Rows and columns of n tokens: as stored, or a square."""
    side = round(n**0.5)
    height, width = (int(size) for size in arrays["grid"][-2:]) if "grid" in arrays else (side, side)
    agree("tokens of the grid", height * width, n)
    return height, width


@case("recoverable_")
def recoverable(arrays: Arrays, folder: Path) -> str:
    """The adaptive rule with all official quirks, fed with the stored text similarities; features in official order."""
    q, k = (torch.from_numpy(arrays[name])[0] for name in ("q_proj_out", "k_proj_out"))
    x, text = torch.from_numpy(arrays["hidden"])[0, 1:], torch.from_numpy(arrays["text_similarity"]).flatten()
    row = (q[0] @ k.T / q.shape[1] ** 0.5).softmax(0)[1:]
    _grid(arrays, len(x))
    method = create(
        "recoverable",
        faithful=True,
        text_similarity=lambda _: text,
        text_weight=float(arrays["text_weight"]),
        neighbours=tuple(arrays["lof_neighbors"].tolist()),
        nearest=int(arrays["knn_k"]),
    )
    answer = method(Visual(x, None, signals={Signal("cls_full", -1): row, Signal("keys", -1): k[1:]}))
    order, main, centres = _ordered(answer), arrays["kept_main"], arrays["center_local_idx"]
    rest = np.setdiff1d(np.arange(len(x)), main)
    same("main tokens", order[: len(main)], main)
    same("merge centres", order[len(main) : len(main) + len(centres)], rest[centres])
    worst = close("features", answer.apply(x)[torch.searchsorted(answer.idx, order)], arrays["features"][0])
    return f"{len(main)} main tokens, {len(centres)} centres and one of the rest; features within {worst:.1g}"


@case("video_llava_pool")
def llava_pool(arrays: Arrays, folder: Path) -> str:
    """The two fixed-stride poolings of LLaVA's video models, features only; the stride is 2 if the file names none."""
    x = torch.from_numpy(arrays["x"])
    frames, n, channels = x.shape
    height, width = _grid(arrays, n)
    stride, worst = int(arrays["stride"]) if "stride" in arrays else 2, []
    for mode in ("average", "bilinear"):
        answer = create("average_pool", mode=mode, stride=stride)(
            Visual(x.reshape(-1, channels), None, grid=(frames, height, width))
        )
        pooled = answer.apply(x.reshape(-1, channels)).reshape(frames, -1, channels)
        worst.append(close(mode, pooled, arrays[f"out_{mode}"]))
    return f"{frames} frames of {height}x{width}, average and bilinear: features within {max(worst):.1g}"


@case("fastv_prefill")
def fastv(arrays: Arrays, folder: Path) -> str:
    """The whole path: a stock LLaVA with the stored decoder weights, patched, one prefill."""
    from ..handle import patch

    model, inputs = _fastv_model(arrays, folder)
    full = close("unpruned states", _run(model, inputs).last_hidden_state[0], arrays["last_hidden_state_full"])
    with patch(model, "fastv", layer=int(arrays["K"]), keep=int(arrays["keep"])) as handle:
        worst, _ = _fastv_prefill(model, inputs, arrays, handle)
    kept, length = len(arrays["kept_indices"]), inputs["input_ids"].shape[1]
    return f"stock LLaVA, {kept} of {length} tokens kept; scores and states within {max(full, worst):.1g}"


@case("fastv_kvcache_decode")
def fastv_decode(arrays: Arrays, folder: Path) -> str:
    """Prefill and one decode step on the returned cache: its lengths, the keys of layer K, the new token's states."""
    from ..handle import patch

    model, inputs = _fastv_model(arrays, folder)
    with patch(model, "fastv", layer=int(arrays["K"]), keep=_left(arrays)) as handle:
        worst, out = _fastv_prefill(model, inputs, arrays, handle)
        keys = close("keys of layer K", out.past_key_values.layers[int(arrays["K"])].keys[0], arrays["keys_layer_K"])
        decoded, cached = _decode(model, out, arrays)
    agree("id of the decoded token", inputs["input_ids"].shape[1], arrays["decode_position_id"])
    return f"stock LLaVA, {cached} tokens; all within {max(worst, keys, *decoded):.1g}"


def _left(arrays: Arrays) -> int:
    """What stays if the share R of the visual tokens goes."""
    left = round(int(arrays["vis_len"]) * (1 - real(arrays["R"])))
    agree("tokens that stay", left, arrays["keep"])
    return left


def _fastv_model(arrays: Arrays, folder: Path) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    return stock_llava(np.load(folder / "model_llama.npz"), torch.from_numpy(arrays["inputs_embeds"]), _visual(arrays))


def _visual(arrays: Arrays) -> slice:
    """Where the visual tokens stand in the prompt."""
    before, n, behind = (int(arrays[f"{part}_len"]) for part in ("sys", "vis", "text"))
    agree("tokens of the prompt", before + n + behind, len(arrays["inputs_embeds"]))
    return slice(before, before + n)


def _fastv_prefill(
    model: LlavaForConditionalGeneration, inputs: dict[str, Any], arrays: Arrays, handle: Handle
) -> tuple[float, Any]:
    """Largest difference of scores and states, and the output; kept tokens must be equal."""
    out = _run(model, inputs)
    last = handle.last
    assert last is not None
    scores = last.units[0].scores
    assert scores is not None
    same("kept", last.index[0], arrays["kept_indices"])
    states = out.last_hidden_state[0, last.index[0]]
    return max(
        close("scores", scores, arrays["score_visual"]), close("states", states, arrays["last_hidden_state"])
    ), out


@case("holitom_inner_")
def holitom_inner(arrays: Arrays, folder: Path) -> str:
    """The merge on the stored states; the whole path where the official run was causal, else its scores only."""
    from ..handle import patch

    embeds, visual = torch.from_numpy(arrays["inputs_embeds"]), _visual(arrays)
    model, inputs = stock_llava(np.load(folder / "model_qwen2.npz"), embeds, visual)
    causal, before, after = (
        bool(arrays["layer_Km1_is_causal"]),
        *(torch.from_numpy(arrays[f"hidden_{at}"]) for at in ("before_merge", "after_merge_and_drop")),
    )
    agree("layer K - 1 is causal", _is_causal(model, inputs, int(arrays["K"]), before), causal)
    with patch(model, "holitom_inner", layer=int(arrays["K"]), keep=_left(arrays)) as handle:
        out = _run(model, inputs)
        agree("cached tokens per layer", _cached(out), arrays["kv_lengths_after_prefill"])
        last, decoded = handle.last, _decode(model, out, arrays) if causal else None
    assert last is not None
    (unit,) = last.units
    assert unit.scores is not None
    same("order of the kept", _ordered(unit.assignment) + visual.start, arrays["topk_order"])
    same("kept", last.index[0], arrays["kept_indices"])
    worst = [close("scores", unit.scores, arrays["score_visual"])]
    signals = {need: torch.from_numpy(arrays["score_visual"]) for need in create("holitom_inner").needs}
    merged = create("holitom_inner")(Visual(before[visual], len(unit.idx), signals=signals)).apply(before[visual])
    worst.append(close("merged states", merged, after[visual.start : visual.start + len(merged)]))
    if decoded is None:  # the official slip: that layer looked ahead
        return f"order and tokens kept; scores and merge within {max(worst):.1g}; the rest is of a layer without mask"
    worst.append(close("states", out.last_hidden_state[0, last.index[0]], arrays["last_hidden_state"]))
    return f"stock LLaVA with Qwen2, order and {decoded[1]} tokens; all within {max(worst + decoded[0]):.1g}"


def _is_causal(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], k: int, stored: Tensor) -> bool:
    """True if the stored states that enter layer k are those of the unpruned model, whose layers are causal."""
    seen: list[Tensor] = []
    see = lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    with model.get_decoder().layers[k].register_forward_pre_hook(see, with_kwargs=True):
        _run(model, inputs)
    return bool((seen[0][0] - stored).abs().max() <= TOLERANCE)


@case("video_holitom_inner")
def video_holitom_inner(arrays: Arrays, folder: Path) -> str:
    """Kept tokens, where each dropped one goes, and the merged states."""
    hidden, row = torch.from_numpy(arrays["hidden"])[0], torch.from_numpy(arrays["attn_last"])[0].mean(0)
    start, n = int(arrays["img_start"]), int(arrays["img_len"])
    x, method, worst, counts = hidden[start : start + n], create("holitom_inner"), [], []
    for tag in sorted({name.split("_")[0] for name in arrays if name.startswith("b")}):
        keep = arrays[f"{tag}_keep"]
        inside = keep[(keep >= start) & (keep < start + n)]
        budget = round(n * (1 - real(arrays[f"{tag}_r"])))
        answer = method(Visual(x, budget, signals=dict.fromkeys(method.needs, row[start : start + n])))
        assert answer.src is not None
        assert answer.dst is not None
        same(f"kept of {tag}", answer.idx + start, inside)
        same(f"merged of {tag}", answer.src[budget:] + start, arrays[f"{tag}_merged_src"])
        same(f"targets of {tag}", answer.idx[answer.dst[budget:]] + start, arrays[f"{tag}_merged_dst"])
        whole = torch.cat([hidden[:start], answer.apply(x), hidden[start + n :]])
        worst.append(close(f"states of {tag}", whole[None], arrays[f"{tag}_hidden"]))
        counts.append(budget)
    return f"tokens and targets at {_list(counts)} of {n}; states within {max(worst):.1g}"


@case("sparsevlm_rank")
def sparsevlm_rank(arrays: Arrays, folder: Path) -> str:
    """The rank rule of the first release, and that of the video branch, from the raters' rows."""
    from ..methods.in_llm.sparsevlm import RELEVANCE, ROWS

    rows, n = torch.from_numpy(arrays["attn_mean_heads_rater_rows"]), int(arrays["vis_len"])
    agree("visual tokens", rows.shape[1], n)
    agree("rank", int(torch.linalg.matrix_rank(rows)), arrays["rank"])
    relevance = torch.cat([torch.ones(len(rows)), torch.zeros(1)])  # one more text token, which is no rater
    signals = {ROWS: torch.cat([rows.T, torch.ones(n, 1)], dim=1), RELEVANCE: relevance}
    x, counts = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), []
    for tag, scale, bias in (("v1", real(arrays["v1_scale"]), real(arrays["v1_bias"])), ("video", 1.0, 0.0)):
        answer = create("sparsevlm", scale=scale, bias=bias)(Visual(x, None, signals=signals))
        stored = np.flatnonzero(arrays[f"{tag}_keep_mask"])
        kept = n if int(arrays["rank"]) == n else min(int(int(arrays["rank"]) * scale + bias), n - 1)
        agree(f"tokens by {tag}", kept, len(stored))
        recycled = (int(0.3 * (n - kept)) + 1) // 10 + 1 if kept < n else 0
        agree(f"tokens of {tag} with merged ones", len(answer.idx), kept + recycled)
        same(f"kept by {tag}", _ordered(answer)[: len(stored)].sort().values, stored)
        if (len(answer.idx) > len(stored)) != bool(arrays[f"{tag}_merge_flag"]):
            raise Mismatch(f"{tag}: {len(answer.idx) - len(stored)} merged tokens, stored flag says otherwise")
        assert answer.scores is not None
        worst = close("scores", answer.scores, arrays["score_visual"])
        counts.append(len(stored))
    return f"tokens by rank {int(arrays['rank'])}: {_list(counts)} of {n}; scores within {worst:.1g}"


@case("sparsevlm_")
def sparsevlm(arrays: Arrays, folder: Path) -> str:
    """The whole path: scores and kept tokens of every stage, merged states, prefill, cache and one decode step."""
    from ..handle import patch

    plus = "stage0_merge_output" not in arrays
    heads = arrays["num_heads"]
    weights = dict(np.load(folder / "model_llama.npz"), num_heads=heads, num_kv_heads=heads)
    visual = _visual(arrays)
    model, inputs = stock_llava(weights, torch.from_numpy(arrays["inputs_embeds"]), visual)
    layers, counts = tuple(arrays["pruning_layers"].tolist()), tuple(arrays["keep_list"].tolist())
    version = {"version": "plus", "heads": 14} if plus else {"version": "v1"}
    with patch(model, "sparsevlm", layers=layers, counts=counts, order="official", **version) as handle:
        out = _run(model, inputs)
        last, states = handle.last, out.last_hidden_state[0]
        worst, cached = _decode(model, out, arrays)
    assert last is not None
    agree("layers", [unit.where for unit in last.units], [layer + 1 for layer in layers])
    for i, unit in enumerate(last.units):
        assert unit.scores is not None
        stored = arrays[f"stage{i}_score_visual"]
        agree(f"tokens before stage {i}", unit.n, arrays[f"stage{i}_vis_before"])
        if not plus:
            agree(f"merged at stage {i}", len(unit.idx) - counts[i], arrays[f"stage{i}_merge_cluster_num"])
        # Division by nearly zero rotary weights amplifies rounding.
        loose = TOLERANCE / (1e-3 + 1e-3 * torch.from_numpy(stored).abs()) if plus else torch.ones(unit.n)
        worst.append(close(f"scores of stage {i}", unit.scores * loose, torch.from_numpy(stored) * loose))
        kept = _ordered(unit.assignment)[: counts[i]].sort().values
        same(f"kept at stage {i}", kept, np.flatnonzero(arrays[f"stage{i}_keep_mask"]))
    worst.append(close("states", states[last.index[0]], arrays["last_hidden_state"]))
    return f"stock LLaVA, tokens of {len(counts)} stages, {cached} tokens; all within {max(worst):.1g}"


def _cached(out: Any) -> list[int]:
    """Tokens that each layer of a cache holds."""
    return [layer.keys.shape[2] for layer in out.past_key_values.layers]


def _decode(model: LlavaForConditionalGeneration, out: Any, arrays: Arrays) -> tuple[list[float], str]:
    """One decode step on the returned cache: [difference of its state], and the cached tokens per layer in words."""
    stored = torch.tensor(_cached(out))
    same("cached tokens per layer", stored, arrays["kv_lengths_after_prefill"])
    step = {"inputs_embeds": torch.from_numpy(arrays["decode_embed"])[None], "past_key_values": out.past_key_values}
    state = _run(model, step).last_hidden_state[0]
    worst = close("decoded state", state, arrays["decode_last_hidden_state"].reshape(1, -1))
    return [worst], f"cache of {_list(stored.tolist())}"


@case("pyramiddrop_")
def pyramiddrop(arrays: Arrays, folder: Path) -> str:
    """The stages of a stock LLaVA at the stored layers and shares: scores, tokens, ids, then one decode step."""
    return _renumbering(arrays, folder, "pyramiddrop", {})


@case("transprune_")
def transprune(arrays: Arrays, folder: Path) -> str:
    """As PyramidDrop, with transitions of the stored layers."""
    layers = tuple(arrays["accumulating_layer_list"].tolist())
    for i, stage in enumerate(arrays["layer_list"].tolist()):
        agree(f"layers summed at stage {i}", sum(a <= stage for a in layers), len(arrays[f"stage{i}_ttv_list"]))
    return _renumbering(arrays, folder, "transprune", {"accumulating": layers})


def _renumbering(arrays: Arrays, folder: Path, method: str, options: dict[str, Any]) -> str:
    """A schedule of stages that renumber positions, against the stored run of its official code."""
    from ..handle import patch

    model, inputs = _fastv_model(arrays, folder)
    ids: list[Tensor] = []
    see = lambda module, args, kwargs: ids.append(kwargs["position_ids"][0])  # noqa: E731
    layers = arrays["layer_list"].tolist()
    options = {"layers": tuple(layers), "ratios": tuple(map(real, arrays["ratio_list"])), **options}
    with patch(model, method, **options) as handle:
        watched = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in model.get_decoder().layers]
        out = _run(model, inputs)
        last, cache = handle.last, out.past_key_values
        step = {"inputs_embeds": torch.from_numpy(arrays["decode_embed"])[None], "past_key_values": cache}
        stored = torch.tensor([layer.keys.shape[2] for layer in cache.layers])
        decoded = _run(model, step).last_hidden_state[0]
        for hook in watched:
            hook.remove()
    assert last is not None
    same("layers of the stages", torch.tensor([unit.where for unit in last.units]), arrays["layer_list"])
    worst = []
    text = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    text[_visual(arrays)] = False
    for i, unit in enumerate(last.units):
        assert unit.scores is not None
        agree(f"tokens kept at stage {i}", len(unit.idx), arrays[f"stage{i}_keep"])
        worst.append(close(f"scores of stage {i}", unit.scores, arrays[f"stage{i}_score_visual"]))
        kept = torch.cat([text.nonzero().flatten(), unit.positions]).sort().values
        same(f"kept at stage {i}", kept, arrays[f"stage{i}_kept_indices"])
        same(f"ids behind stage {i}", ids[layers[i]], arrays[f"stage{i}_position_ids"])
    same("kept at the end", last.index[0], arrays["final_kept_indices"])
    same("cached tokens per layer", stored, arrays["kv_lengths_after_prefill"])
    same("ids of the decoded token", torch.cat(ids[len(stored) :]), arrays["decode_position_id_per_layer"])
    worst.append(close("states", out.last_hidden_state[0, last.index[0]], arrays["last_hidden_state"]))
    worst.append(close("decoded state", decoded, arrays["decode_last_hidden_state"]))
    counts = _list([len(unit.idx) for unit in last.units])
    return f"stock LLaVA, {counts} tokens kept, ids renumbered, one decode step; all within {max(worst):.1g}"


@case("aim_inllm")
def aim_inllm(arrays: Arrays, folder: Path) -> str:
    """Importance and tokens of the first stage; with the stored choices, dropping must give what masking gave.

    Later choices of ours may differ: a masked token still hands out its start in the next PageRank, a dropped one does
    not.
    """
    from ..handle import patch
    from ..methods.in_llm.withdraw import Withdraw
    from ..types import Stage

    visual, embeds = _visual(arrays), torch.from_numpy(arrays["inputs_embeds"])
    model, inputs = stock_llava(np.load(folder / "model_qwen2_28l.npz"), embeds, visual)
    shown = _shown_importance(arrays)
    agree("tau, iters, damping of the whole path", [0.1, 5, 0.0], [real(arrays["tau"]), *_iterations(arrays)])
    with patch(model, "aim_inllm", rates=tuple(map(real, arrays["retain_rate"]))) as handle:
        _run(model, inputs)
        last = handle.last
    assert last is not None
    places = [unit.where for unit in last.units if isinstance(unit.where, int)]
    masks = {place: arrays["keep_mask_after_layer"][place - 1, visual].astype(bool) for place in places}
    first = last.units[0]
    assert first.scores is not None
    worst = [*shown, close("importance", first.scores, arrays["importance_all_layers"][places[0] - 1, visual])]
    same("kept at the first stage", first.idx, np.flatnonzero(masks[places[0]]))
    counts = [len(unit.idx) for unit in last.units]
    same("tokens per stage", torch.tensor(counts), [int(mask.sum()) for mask in masks.values()])
    behind = [int((visual.stop - visual.start) * real(share)) for share in arrays["retain_rate"]]
    agree("tokens behind every layer", behind, arrays["keep_mask_after_layer"][:, visual].sum(1, dtype=int))
    stages, before = [], np.ones_like(masks[places[0]])
    for place in places:
        chosen = torch.from_numpy(np.flatnonzero(masks[place][before]))
        stages.append(Stage(place, Chosen(chosen), len(chosen)) if len(chosen) else Stage(place, Withdraw(None)))
        before = masks[place]
    with patch(model, stages) as handle:
        out = _run(model, inputs)
        left = handle.last
        step = {"inputs_embeds": torch.from_numpy(arrays["decode_embed"])[None], "past_key_values": out.past_key_values}
        decoded = _run(model, step).last_hidden_state[0]
    assert left is not None
    worst.append(close("states", out.last_hidden_state[0, left.index[0]], arrays["last_hidden_state"][left.index[0]]))
    worst.append(close("decoded state", decoded, arrays["decode_last_hidden_state"].reshape(1, -1)))
    return f"stock LLaVA with Qwen2, {_list(counts)} tokens; on the stored choices all within {max(worst):.1g}"


def _iterations(arrays: Arrays) -> tuple[int, float]:
    return int(arrays["iters"]), real(arrays["damping"])


def _shown_importance(arrays: Arrays) -> list[float]:
    """Differences of the importance from logits [H, N, N] of single layers, where a file has some."""
    names = [name for name in arrays if name.startswith("logits_layer")]
    return [
        close(name, _importance(arrays[name], None, arrays), arrays[name.replace("logits", "importance")])
        for name in names
    ]


def _importance(logits: Any, seen: Tensor | None, arrays: Arrays) -> Tensor:
    """[N] from masked logits [H, N, N]; seen [N]: keys that are not masked. Settings the file lacks: as published."""
    from ..kernels import page_rank

    z = torch.from_numpy(logits)[None]
    mask = z > torch.finfo(z.dtype).min / 2
    mask = mask if seen is None else mask & seen
    keys = torch.eye(z.shape[-1]).expand(z.shape)  # so that q.k are the stored logits
    sharpness = 1 / real(arrays["tau"]) if "tau" in arrays else 10.0
    steps, damping = _iterations(arrays) if "iters" in arrays else (5, 0.0)
    scores = page_rank(z.masked_fill(~mask, 0), keys, mask, sharpness, steps, damping=damping)
    return scores[0].square().mean(0).sqrt()


@case("spatten_llm_kv")
def spatten_llm_kv(arrays: Arrays, folder: Path) -> str:
    """Slots that every head of every layer keeps between two turns of a chat, and the caches they leave."""
    from ..methods.in_llm.spatten_heads import most_important

    logits = torch.from_numpy(arrays["pre_softmax_logits"]).sum((1, 3))  # [L, H, S]
    names = ("start_size", "important_size", "recent_size", "num_coming")
    first, count, recent, coming = (int(arrays[name]) for name in names)
    kept = most_important(logits, count, first, recent - coming)
    same("slots", kept.flatten(), arrays["kept_indices_per_layer_head"].reshape(-1))
    for name in ("key_cache", "value_cache"):
        held = torch.from_numpy(arrays[name])[:, 0]
        cut = held.gather(2, kept[..., None].expand(*kept.shape, held.shape[-1]))
        close(name, cut, arrays[f"pruned_{name}"][:, 0])
    layers, heads, slots = logits.shape
    return f"{kept.shape[-1]} of {slots} slots of {heads} heads in {layers} layers, keys and values"


class Chosen(Method):
    """Keeps what a stored run kept: idx among the tokens that are there."""

    per = "sample"

    def __init__(self, idx: Tensor) -> None:
        self.idx = idx

    def __call__(self, v: Visual) -> Assignment:
        return Assignment(self.idx)


@case("video_aim_prune")
def video_aim_prune(arrays: Arrays, folder: Path) -> str:
    """Importance of every stored layer, masked tokens left in as officially, and the tokens kept behind it."""
    start, stop, n = arrays["bounds"].tolist()
    method, worst, counts = create("aim_inllm"), [], []
    masks, text = torch.from_numpy(arrays["mask_after_layer"]), n - (stop - start)
    shares = [real(share) for share in arrays["retain_rate"]]
    agree("layers", len(shares), len(masks))
    for layer, logits, stored in zip(arrays["layers"].tolist(), arrays["logits"], arrays["importance"], strict=True):
        seen = masks[layer - 1] if layer else torch.ones(n, dtype=torch.bool)
        score = _importance(logits, seen, arrays)
        worst.append(close(f"importance at layer {layer}", score, stored))
        there = seen[start:stop].nonzero().flatten()
        kept = int((stop - start) * shares[layer] + text) - text
        agree(f"tokens behind layer {layer}", kept, int(masks[layer, start:stop].sum()))
        if 0 < kept < len(there):
            signals = {method.needs[0]: score[start:stop][there]}
            answer = method(Visual(torch.zeros(len(there), 1), kept, signals=signals))
            same(f"kept behind layer {layer}", there[answer.idx], np.flatnonzero(masks[layer, start:stop]))
        counts.append(kept)
    return f"{_list(counts)} of {stop - start} tokens behind {len(counts)} layers; importance within {max(worst):.1g}"


class Stored(torch.nn.Module):
    """Stands in for a projector: whatever the vision tower says, the visual tokens are the stored ones."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, _: Tensor) -> Tensor:
        features: Tensor = self.features  # type: ignore[assignment]
        return features


def stock_llava(
    weights: Arrays, embeds: Tensor, visual: slice
) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    """A stock LLaVA whose decoder has stored weights (Qwen2 if q has a bias, else LLaMA), and inputs that embed so.

    The vocabulary rows are the text rows of embeds [L, D], one token each; the projector returns embeds[visual].
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    image = embeds[visual]
    text = torch.cat([embeds[: visual.start], embeds[visual.stop :]])
    image_token, side = text.shape[0], round(image.shape[0] ** 0.5)
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    decoder: dict[str, Any] = {
        "vocab_size": image_token + 1,
        "hidden_size": int(weights["hidden_size"]),
        "intermediate_size": int(weights["intermediate_size"]),
        "num_hidden_layers": int(weights["num_layers"]),
        "num_attention_heads": int(weights["num_heads"]),
        "num_key_value_heads": int(weights["num_kv_heads"]),
        "rms_norm_eps": float(weights["rms_norm_eps"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(weights["rope_theta"])},
    }
    whole: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**small, patch_size=1, image_size=side),
        "text_config": (Qwen2Config if "layers.0.self_attn.q_proj.bias" in weights else LlamaConfig)(**decoder),
        "image_token_id": image_token,
        "vision_feature_layer": -1,
    }
    config = LlavaConfig(**whole)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.multi_modal_projector = Stored(image[None])
    vocabulary = torch.cat([text, torch.zeros(1, text.shape[1])])
    stored = {name: torch.from_numpy(weights[name]) for name in weights if weights[name].ndim}
    model.get_decoder().load_state_dict({"embed_tokens.weight": vocabulary, **stored})
    ids = torch.full((1, embeds.shape[0]), image_token)
    ids[0, : visual.start] = torch.arange(visual.start)
    ids[0, visual.stop :] = torch.arange(visual.start, image_token)
    return model, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, side, side)}


@torch.no_grad()
def _run(model: LlavaForConditionalGeneration, inputs: dict[str, Any]) -> Any:
    """Output of the base model, its hidden states after the final norm."""
    return model.model(**inputs, use_cache=True)


@case("dycoke_kv_")
def dycoke_kv(arrays: Arrays, folder: Path) -> str:
    """Prefill and decode steps of a stock LLaVA; the official code sees all tokens where a step is like the last."""
    from ..cache import NAME, state
    from ..handle import patch

    visual, layer = _visual(arrays), int(arrays["L"])
    model, inputs = stock_llava(np.load(folder / "model_qwen2.npz"), torch.from_numpy(arrays["inputs_embeds"]), visual)
    keep = _dycoke_count(visual.stop - visual.start, arrays["prune_ratio"])
    worst, seen, threshold = [], [], real(arrays["similarity_threshold"])
    with patch(model, "dycoke_kv", layer=layer, keep=keep, threshold=threshold, similar="all") as handle:
        out = _run(model, inputs)
        worst.append(close("prefill states", out.last_hidden_state[0], arrays["prefill_last_hidden_state"]))
        length, cache = inputs["input_ids"].shape[1], out[NAME]
        for t, embed in enumerate(torch.from_numpy(arrays["decode_embeds"])):
            states = _run(model, {"inputs_embeds": embed[None, None], NAME: cache}).last_hidden_state[0]
            assert handle.last is not None
            text = [*range(visual.start), *range(visual.stop, length + t + 1)]
            agree(f"pruned at step {t}", len(handle.last.recalled[layer][0]) == keep, bool(arrays[f"step{t}_pruned"]))
            kept = torch.cat([handle.last.recalled[layer][0], torch.tensor(text)]).sort().values
            same(f"tokens seen at step {t}", kept, arrays[f"step{t}_kept_sorted"])
            worst.append(close(f"states of step {t}", states, arrays[f"step{t}_last_hidden_state"]))
            memory: Any = state(cache, layer)
            row = memory.recall.memory[0]["row"]
            worst.append(close(f"attention of step {t}", row, arrays[f"step{t}_image_attention"]))
            seen.append(len(kept))
    return f"stock LLaVA, layers from {layer} on see {_list(seen)} tokens; all within {max(worst):.1g}"


@case("video_dycoke_kv_")
def video_dycoke_kv(arrays: Arrays, folder: Path) -> str:
    """The method on the stored rows, step by step."""
    start, n = int(arrays["start"]), int(arrays["img_len"])
    budgets = sorted(name.split("_")[0] for name in arrays if name.endswith("_similarity"))
    for b in budgets:
        state: dict[str, Any] = {}
        for t in range(int(arrays["n_steps"])):
            heads = torch.from_numpy(arrays[f"attn_step{t}"])
            rows = heads.mean(0)[start : start + n]
            keep = _dycoke_count(n, arrays[f"{b}_p"])
            view = Visual(rows.new_zeros(n, 0), keep, signals={Signal("last_row", -1): rows}, state=state)
            chosen = create("dycoke_kv", similar="all")(view).idx + start
            agree(f"{b} pruned at step {t}", len(chosen) < n, bool(arrays[f"{b}_pruned"][t]))
            rest = [*range(start), *range(start + n, heads.shape[1])]
            agree(f"tokens at step {t}", heads.shape[1], start + n + int(arrays["tail"]) + t + 1)
            same(f"{b}, step {t}", torch.cat([chosen, torch.tensor(rest)]).sort().values, arrays[f"{b}_keep{t}"])
    return f"{n} visual tokens, {len(budgets)} ratios, {int(arrays['n_steps'])} steps: tokens seen"


def _dycoke_count(n: int, ratio: Any) -> int:
    """What the official code keeps of n tokens, in its float64 arithmetic."""
    return int(n * (1 - real(ratio)))


@case("flowcut_")
def flowcut(arrays: Arrays, folder: Path) -> str:
    """The whole tower: a stock LLaVA whose CLIP encoder has the stored weights, patched, one prefill for all crops."""
    from ..handle import patch

    if "cls_attn_0" in arrays:
        return _flowcut_functions(arrays)
    embeddings, depth = torch.from_numpy(arrays["embeddings"]), int(arrays["num_layers"])
    batch, n = embeddings.shape[0], embeddings.shape[1] - 1
    model, inputs, shown = _flowcut_llava(arrays, embeddings)
    _grid(arrays, n)
    agree("layers", depth, len(arrays["w_layer_norm1_weight"]))
    worst = []
    for t in arrays["target_num"].tolist():
        with patch(model, "flowcut", keep=t, count="batch") as handle:
            _run(model, inputs)
            last = handle.last
        assert last is not None
        stored = arrays[f"kept_{t}"]
        for crop in range(batch):
            mine = [unit for unit in last.tower_units if unit.image == crop]
            same(f"kept of crop {crop} at {t}", mine[-1].positions, stored[crop])
            scores = mine[0].scores
            assert scores is not None
            worst.append(close(f"scores of block 0 at {t}", scores, arrays[f"cumscore_layer0_{t}"][crop]))
            features = shown.seen[crop].index_select(0, mine[-1].positions)
            worst.append(close(f"features of crop {crop} at {t}", features, arrays[f"features_{t}"][crop]))
        lengths = torch.tensor(last.tower_lengths["image"])
        same(f"tokens per block at {t}", lengths[1:], arrays[f"tokens_after_layer_{t}"][: depth - 1])
    kept = _list(arrays["target_num"].tolist())
    return f"stock LLaVA, {batch} crops, {kept} of {n}: tokens per block; scores and features within {max(worst):.1g}"


def _flowcut_functions(arrays: Arrays) -> str:
    """Scores and prune counts from given attention rows, one block at a time."""
    from ..methods.in_vit.flowcut import CLS, CLS_VALUE, VALUE_NORM

    cases, worst = sum(name.startswith("cls_attn_") for name in arrays), []
    for i in range(cases):
        row, value = torch.from_numpy(arrays[f"cls_attn_{i}"]), torch.from_numpy(arrays[f"semantic_attn_{i}"])
        norm, signals = torch.from_numpy(arrays[f"value_{i}"]).abs().sum(-1), (CLS, CLS_VALUE, VALUE_NORM)
        left, target, n = int(arrays[f"rpl_{i}"]), int(arrays[f"target_{i}"]), row.shape[1]
        given = [dict(zip(signals, rows)) for rows in zip(row, value, norm)]
        units = [Visual(torch.zeros(n, 1), target, signals=rows, block=(0, left)) for rows in given]
        answers = create("flowcut", count="batch").batch(units)
        for b, answer in enumerate(answers):
            assert answer.scores is not None
            worst.append(close(f"scores {i}", answer.scores, arrays[f"score_{i}"][b]))
            same(f"pruned {i}", torch.tensor([n - len(answer.idx)]), arrays[f"prune_num_{i}"].reshape(1))
    return f"{cases} blocks: counts equal, scores within {max(worst):.1g}"


class Shown(torch.nn.Module):
    """Stands in for a projector and remembers what it was given."""

    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def _small_text(family: str, width: int, tokens: int, **extra: Any) -> dict[str, Any]:
    """Options of a decoder that nobody reads."""
    size = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 1}
    return {"model_type": family, "vocab_size": tokens, "num_key_value_heads": 1, "head_dim": width, **size, **extra}


def _flowcut_llava(arrays: Arrays, embeddings: Tensor) -> tuple[Any, dict[str, Tensor], Shown]:
    """A stock LLaVA whose tower starts from `embeddings` [B, N+1, D] with the stored layers; its projector."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    batch, n, width = embeddings.shape[0], embeddings.shape[1] - 1, embeddings.shape[2]
    depth = int(arrays["num_layers"])
    tower = {
        "model_type": "clip_vision_model", "hidden_size": width, "num_hidden_layers": depth, "hidden_act": "gelu",
        "num_attention_heads": int(arrays["num_heads"]), "intermediate_size": arrays["w_mlp_0_weight"].shape[1],
        "patch_size": 1, "image_size": 2,
    }  # fmt: skip
    options: dict[str, Any] = {"image_token_id": 1, "vision_feature_layer": int(arrays["select_layer"]) - depth}
    config: Any = AutoConfig.for_model(
        "llava", vision_config=tower, text_config=_small_text("llama", width, 2), **options
    )
    model = LlavaForConditionalGeneration(config).eval()
    vision: Any = model.model.vision_tower
    vision.embeddings.forward, vision.pre_layrnorm = lambda *_, **__: embeddings, torch.nn.Identity()
    shown = model.model.multi_modal_projector = Shown()
    _load_layers(vision.encoder.layers, arrays, {"mlp_0": "mlp.fc1", "mlp_2": "mlp.fc2"})
    ids = torch.tensor([[0, *[1] * n, 0]]).expand(batch, -1)
    return model, {"input_ids": ids, "pixel_values": torch.zeros(batch, 3, 2, 2)}, shown


def _load_layers(layers: torch.nn.ModuleList, arrays: Arrays, names: dict[str, str]) -> None:
    """Stored weights `w_{part}_{weight or bias}` [L, ...] into the layers; names: what a part is called there."""
    parts = [name[2:].rsplit("_", 1) for name in arrays if name.startswith("w_")]
    for i, layer in enumerate(layers):
        known = {name.replace(".", "_"): name for name, _ in layer.named_modules()} | names
        state = {f"{known[part]}.{kind}": torch.from_numpy(arrays[f"w_{part}_{kind}"][i]) for part, kind in parts}
        layer.load_state_dict(state)


@case("flowcutqwen_")
def flowcut_qwen(arrays: Arrays, folder: Path) -> str:
    """A stock Qwen2-VL tower with the stored blocks; every patch is a token (merge size 1), as in the official code."""
    from ..handle import patch

    model, inputs, shown = _flowcut_qwen(arrays)
    worst, n = [], arrays["hidden"].shape[0]
    for t in arrays["visual_target_num"].tolist():
        with patch(model, "flowcut", keep=4 * t, end="after") as handle:
            _run(model, inputs)
            last = handle.last
        assert last is not None
        same(f"kept at {t}", last.tower_units[-1].positions, arrays[f"kept_patches_{t}"])
        # The official code notes lengths at blocks that may prune: an even number of blocks before the end.
        lengths = [len(unit.idx) for unit in last.tower_units][::-2][::-1]
        same(f"tokens per prune at {t}", torch.tensor(lengths), arrays[f"tokens_after_prune_{t}"])
        features = shown.seen.index_select(0, last.tower_units[-1].positions)
        worst.append(close(f"features at {t}", features, arrays[f"features_{t}"]))
    kept = _list([4 * t for t in arrays["visual_target_num"].tolist()])
    return f"stock Qwen2-VL tower, {kept} of {n} patches: tokens per prune; features within {max(worst):.1g}"


def _flowcut_qwen(arrays: Arrays) -> tuple[Any, dict[str, Tensor], Shown]:
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    hidden = torch.from_numpy(arrays["hidden"])
    n, width = hidden.shape
    tower = {
        "model_type": "qwen2_vl_vision", "depth": int(arrays["num_layers"]), "embed_dim": width, "hidden_size": width,
        "num_heads": int(arrays["num_heads"]), "mlp_ratio": arrays["w_mlp_0_weight"].shape[1] // width,
        "hidden_act": "gelu", "spatial_merge_size": 1,
    }  # fmt: skip
    third = width // 6
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [width // 2 - 2 * third, third, third]}
    text = _small_text("qwen2_vl_text", width, 4, rope_parameters=rope)
    ids = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3}
    config: Any = AutoConfig.for_model("qwen2_vl", vision_config=tower, text_config=text, **ids)
    model = Qwen2VLForConditionalGeneration(config).eval()
    vision: Any = model.model.visual
    half = torch.from_numpy(arrays["rotary_pos_emb"])
    angles = torch.cat([half, half], dim=-1)
    vision.patch_embed = Stored(hidden)
    vision.rotary_pos_emb.forward = lambda *_, **__: (angles.cos(), angles.sin())
    shown = vision.merger = Shown()
    _load_layers(vision.blocks, arrays, {"mlp_0": "mlp.fc1", "mlp_2": "mlp.fc2"})
    for block in vision.blocks:
        block.norm1.eps = block.norm2.eps = real(arrays["ln_eps"])
    return (
        model,
        {
            "input_ids": torch.tensor([[3, *[1] * n, 0]]),
            "pixel_values": torch.zeros(n, 3),
            "image_grid_thw": torch.tensor([[1, *arrays["grid"].tolist()]]),
            "mm_token_type_ids": torch.tensor([[0, *[1] * n, 0]]),
        },
        shown,
    )


def _ordered(answer: Assignment) -> Tensor:
    assert answer.order is not None
    return answer.order


def _list(budgets: Sequence[int]) -> str:
    return "/".join(map(str, budgets))


def _load() -> None:
    """Register the cases that live in modules of their own."""
    from . import parity_video, parity_vit  # noqa: F401


def run(directory: Path, only: Sequence[str] = ()) -> list[Row]:
    """One row per file, by name; a case that raises is a failed case, not the end of the run."""
    _load()
    rows = []
    for path in sorted(directory.glob("*.npz")):
        if path.name.startswith(INPUTS) or not path.name.startswith(tuple(only or ("",))):
            continue
        prefix = max((p for p in _runners if path.name.startswith(p)), key=len, default=None)
        if prefix is None:
            rows.append(Row(path.stem, "unknown", "no case for this prefix", 0.0))
            continue
        start = time.perf_counter()
        try:
            with np.load(path) as arrays:
                status, detail = "passed", _runners[prefix](arrays, directory)
        except Exception as error:  # whatever a method does wrong belongs into its row
            kind = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
            status, detail = "failed", f"{kind}{error}"
        rows.append(Row(path.stem, status, detail, time.perf_counter() - start))
    return rows


def show(rows: Sequence[Row]) -> None:
    """A table, one line per case."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = {"passed": "green", "failed": "red", "unknown": "yellow"}
    table = Table("case", "result", "compared", "seconds", title="Parity with stored outputs")
    for row in rows:
        mark = Text(row.status, style=colour[row.status])
        table.add_row(Text(row.case), mark, Text(row.detail), f"{row.seconds:.2f}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if at least one case ran and none failed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m vtprune.evals.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of *.npz files")
    parser.add_argument("--only", nargs="+", default=[], metavar="PREFIX", help="only files that start so")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    rows = run(options.directory, options.only)
    count = {status: sum(row.status == status for row in rows) for status in ("passed", "failed", "unknown")}
    if options.json:
        print(json.dumps({**count, "cases": [asdict(row) for row in rows]}, indent=1))
    else:
        show(rows)
        print(", ".join(f"{n} {status}" for status, n in count.items()))
    ran = count["passed"] + count["failed"]
    if not ran:
        known = ", ".join(sorted(_runners))
        print(f"no case ran in {options.directory}; known prefixes: {known}", file=sys.stderr)
    return 1 if count["failed"] or not ran else 0


if __name__ == "__main__":  # cases of other modules register with the imported module, not with this copy of it
    from vtprune.evals import parity

    sys.exit(parity.main())
