"""Parity cases of the methods inside vision transformers; imported by `parity`, which runs them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vtprune
from vtprune.kernels import page_rank
from vtprune.methods.in_vit import diffrate, ssm_keep, zero_tprune
from vtprune.methods.in_vit.tome import per_block
from vtprune.reduction import Reduction, Tokens
from vtprune.registry import create
from vtprune.vit import VitLast

from .parity import Arrays, Mismatch, agree, case, close, real, same


def _t(arrays: Arrays, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(arrays[name]))


def _pairs(what: str, ours: tuple[Tensor, Tensor], stored: tuple[Any, Any]) -> None:
    """Rows hold the same (source, destination) pairs, whatever their order."""
    a = [sorted(zip(x, y)) for x, y in zip(*(t.tolist() for t in ours))]
    b = [sorted(zip(x, y)) for x, y in zip(*(np.asarray(t).tolist() for t in stored))]
    if a != b:
        raise Mismatch(f"{what}: pairs differ, ours {a[0][:3]}, stored {b[0][:3]}")


@case("tome_bsm_")
def tome_bsm(arrays: Arrays, folder: Path) -> str:
    """One round and a second with sizes: order of what is left, pairs, features, sizes, where each token went."""
    x, prefix = _t(arrays, "x"), int(arrays["class_token"]) + int(arrays["distill_token"])
    size = x.new_ones(x.shape[:2])
    one = _tome_round(arrays, "metric", "", x, size, prefix)
    out = one.apply(x)
    worst = [close("features", out, arrays["x_wavg"])]
    # With a distillation token the official unmerge forgets that it put that token second.
    laid, left = out, arrays["unm_idx"].shape[1]
    if prefix == 2:
        laid = torch.cat([out[:, :1], out[:, left : left + 1], out[:, 1:left], out[:, left + 1 :]], 1)
    worst.append(close("unmerged", VitLast(x.shape[1], prefix, steps=[(0, one)]).unmerge(laid), arrays["x_unmerged"]))
    resized = one.resize(size)
    assert resized is not None
    worst.append(close("sizes", resized, arrays["size"]))
    two = _tome_round(arrays, "metric2", "2", out, resized, prefix)
    worst.append(close("features, second round", two.apply(out), arrays["x_wavg2"]))
    last = two.resize(resized)
    assert last is not None
    worst.append(close("sizes, second round", last, arrays["size2"]))
    same("slots, second round", VitLast(x.shape[1], prefix, steps=[(0, one), (1, two)]).slots, arrays["assign2"])  # type: ignore[arg-type]
    rule = "; official unmerge as it is, with rows misplaced" if prefix == 2 else ""
    return f"order, pairs and slots of two rounds; features within {max(worst):.1g}{rule}"


def _tome_round(arrays: Arrays, metric: str, tag: str, x: Tensor, size: Tensor, prefix: int) -> Reduction:
    r, asked = int(arrays["r_effective"] if not tag else arrays["r2"]), int(arrays["r2" if tag else "r"])
    agree("tokens merged", min(asked, (x.shape[1] - prefix) // 2), r)
    method = create("tome", r=int(arrays["r"] if not tag else arrays["r2"]))
    n = x.shape[1] - prefix
    (left,) = method.counts(n, 1, None)  # type: ignore[attr-defined]
    if n - left != r:
        raise Mismatch(f"{n - left} tokens merge, not {r}")
    step = method.reduce(Tokens(x, prefix, size, {"mean_keys": _t(arrays, metric)}), left)  # type: ignore[attr-defined]
    unmerged, b = x.shape[1] - r - x.shape[1] // 2, x.shape[1] // 2
    _pairs(
        f"pairs {tag}",
        ((step.src // 2), step.dst - unmerged if prefix != 2 else _distilled(step.dst, unmerged)),
        (arrays[f"src_idx{tag}"], arrays[f"dst_idx{tag}"]),
    )
    kept = step.index if prefix != 2 else torch.cat([step.index[:, :1], step.index[:, 2:]], 1)
    same(f"order of what is left {tag}", kept[:, :unmerged] // 2, arrays[f"unm_idx{tag}"])
    if not tag:
        same("slots", step.slots(x.shape[1]), arrays["assign"])
    if step.index.shape[1] - unmerged != b:
        raise Mismatch(f"{step.index.shape[1] - unmerged} odd places left, not {b}")
    return step


def _distilled(dst: Tensor, unmerged: int) -> Tensor:
    """Slots [CLS, distillation, other even places, other odd ones] as numbers of odd places, distillation 0."""
    return torch.where(dst == 1, 0, dst - unmerged)


@case("tome_kth")
def tome_kth(arrays: Arrays, folder: Path) -> str:
    """Not a method of ours: every k-th token takes its neighbours in similarity, and trailing tokens are lost."""
    metric, x, k = _t(arrays, "metric"), _t(arrays, "x"), int(arrays["k"])
    n = x.shape[1] // k * k
    places = torch.arange(n).view(-1, k)
    index, src = (p.expand(len(x), -1) for p in (places[:, -1], places[:, :-1].flatten()))
    unit = torch.nn.functional.normalize(metric, dim=-1)
    dst = (unit[:, src[0]] @ unit[:, index[0]].mT).argmax(-1)
    same("destinations", dst, arrays["dst_idx"])
    agree("tokens left out", x.shape[1] - n, arrays["note_dropped"])
    count = torch.ones(index.shape).scatter_add_(1, dst, torch.ones(dst.shape))
    step = Reduction(index, src, dst, 1 / count.gather(1, dst))
    worst = close("mean", step.apply(x), arrays["x_mean"])
    worst = max(worst, close("unmerged", VitLast(n, 0, steps=[(0, step)]).unmerge(step.apply(x)), arrays["x_unmerged"]))
    return f"as a Reduction, {x.shape[1] - n} trailing tokens left out; features within {worst:.1g}"


@case("tome_parse_r")
def tome_parse_r(arrays: Arrays, folder: Path) -> str:
    """Schedules of r: a name says the depth, the slope in a word, and r, as in L12_dec13."""
    slopes = {"const": None, "dec": -1.0, "inc": 1.0, "half": 0.5, "neg": -0.3}
    for name in arrays:
        found = re.fullmatch(r"L(\d+)_(list|[a-z]+)(\d*)", name)
        if found is None or (found[2] not in slopes and found[2] != "list"):
            raise Mismatch(f"{name}: no such schedule, L<layers>_<{'|'.join(slopes)}><r> or L<layers>_list")
        slope = slopes.get(found[2])
        r: Any = [5, 0, 3] if found[2] == "list" else int(found[3]) if slope is None else (int(found[3]), slope)
        same(name, torch.tensor(per_block(r, int(found[1]))), arrays[name])
    return f"{len(list(arrays))} schedules"


@case("tome_propattn_")
def tome_propattn(arrays: Arrays, folder: Path) -> str:
    """timm's own attention with log size as a mask; the mean of keys from a hook on what it computes."""
    from timm.layers.attention import Attention

    x, size, heads = _t(arrays, "x"), _t(arrays, "size"), int(arrays["num_heads"])
    attention = Attention(x.shape[-1], heads, qkv_bias=True).eval()
    names = {"qkv.weight": "qkv_w", "qkv.bias": "qkv_b", "proj.weight": "proj_w", "proj.bias": "proj_b"}
    attention.load_state_dict({name: _t(arrays, stored).float() for name, stored in names.items()})
    keys: list[Tensor] = []
    hook = attention.k_norm.register_forward_hook(lambda module, args, out: keys.append(out))
    with torch.no_grad():
        worst = [
            close("without sizes", attention(x), arrays["out_nosize"]),
            close("with sizes", attention(x, attn_mask=size.log()[:, None, None]), arrays["out"]),
            close("mean keys", keys[0].mean(1), arrays["metric_kmean"]),
        ]
    hook.remove()
    return f"attention and mean keys within {max(worst):.1g}"


def _timm(arrays: Arrays, kind: str = "cls") -> Any:
    import timm

    image, patch, width, depth, heads, classes = arrays["cfg"].tolist()
    plain = timm.models.VisionTransformer
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "cls": (plain, {}),
        "gap": (plain, {"class_token": False, "global_pool": "avg"}),
        "mae": (plain, {"global_pool": "avg"}),
        "dist": (timm.models.deit.VisionTransformerDistilled, {}),
    }
    cls, options = kinds[kind]
    model = cls(
        img_size=image, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=classes, **options
    ).eval()
    model.load_state_dict({name[3:]: _t(arrays, name).float() for name in arrays if name.startswith("w::")})
    return model


@case("tome_e2e_")
@torch.no_grad()
def tome_e2e(arrays: Arrays, folder: Path) -> str:
    """Stock timm models, patched: logits, tokens left by every block, sizes, where each token went, in order."""
    kind = str(arrays["kind"])
    model, image = _timm(arrays, kind), _t(arrays, "img")
    worst = [close("unpatched", model(image), arrays["logits_unpatched"])]
    tags = sorted({name.split("__")[0] for name in arrays if "__" in name})
    pooling = "plain" if kind == "gap" else "weighted"
    for tag in tags:
        r = arrays[f"{tag}__r_list"].tolist()
        with vtprune.patch(model, "tome", r=r, proportional=bool(arrays["prop_attn"]), pooling=pooling) as handle:
            logits = model(image)
        last = handle.last
        same(f"{tag}: tokens", torch.tensor(last.lengths), arrays[f"{tag}__ntok"])
        same(f"{tag}: slots", last.slots, arrays[f"{tag}__assign"])
        worst.append(close(f"{tag}: sizes", last.size, arrays[f"{tag}__size"]))
        worst.append(close(f"{tag}: logits", logits, arrays[f"{tag}__logits"]))
    return f"{', '.join(tags)}: tokens, slots in order, sizes; logits within {max(worst):.1g}"


@case("diffrate_merge_")
def diffrate_merge(arrays: Arrays, folder: Path) -> str:
    """Sources of a sorted sequence into its first rows."""
    x, size, kept = _t(arrays, "x"), _t(arrays, "size"), int(arrays["kept"])
    places = torch.arange(x.shape[1]).expand(len(x), -1)
    step = diffrate.merge_into(x, size, places[:, :kept], places[:, kept:], int(arrays["class_token"]))
    same("destinations", step.dst, arrays["dst_idx"])  # type: ignore[arg-type]
    sizes = step.resize(size)
    assert sizes is not None
    worst = close("features", step.apply(x), arrays["x_merged"]), close("sizes", sizes, arrays["size_merged"])
    return f"destinations; features and sizes within {max(worst):.1g}"


@case("diffrate_e2e_")
@torch.no_grad()
def diffrate_e2e(arrays: Arrays, folder: Path) -> str:
    """A stock timm model, patched; ours keeps raster order, so slots are compared as groups of tokens."""
    model, image = _timm(arrays), _t(arrays, "img")
    n = model.patch_embed.num_patches + 1
    lists = {name: arrays[f"{name}_kept"].tolist() for name in ("prune", "merge")}
    worst = [close("unpatched", model(image), arrays["logits_unpatched"])]
    with vtprune.patch(model, "diffrate", tokens=n, **lists) as handle:
        logits = model(image)
    last = handle.last
    same("tokens", torch.tensor(last.lengths), arrays["ntok"])
    stays, stored = last.slots >= 0, arrays["merged_any"].astype(bool)
    same("tokens that live on", stays, stored)
    for row, (ours, theirs) in enumerate(zip(last.slots, _t(arrays, "assign").long())):
        _groups(f"row {row}", ours[stays[row]], theirs[stays[row]])
        sizes = last.size[row][ours[stays[row]]], arrays["size"][row][theirs[stays[row]]]
        worst.append(close("sizes", *sizes))
    worst.append(close("logits", logits, arrays["logits"]))
    return f"tokens and groups; sizes and logits within {max(worst):.1g}"


def _groups(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Two labellings that put the same tokens together."""
    pairs = {(a, b) for a, b in zip(ours.tolist(), theirs.tolist())}
    if not len(pairs) == len(set(ours.tolist())) == len(set(theirs.tolist())):
        raise Mismatch(f"{what}: tokens are grouped differently")


@case("zerotprune_spec_")
def zerotprune(arrays: Arrays, folder: Path) -> str:
    """PageRank by steps, head filter, importance, the S-stage's pairs and what I'-S-I keeps (from the formulas)."""
    q, k, prefix = _t(arrays, "q"), _t(arrays, "k"), int(arrays["prefix"])
    n, scaling, worst = q.shape[2], q.shape[-1] ** -0.5, []
    agree("heads", q.shape[1], arrays["num_heads"])
    for name in arrays:
        if name.startswith("s_iter") and name[6:].isdigit():
            worst.append(close(name, page_rank(q, k, None, scaling, int(name[6:])), arrays[name]))
    limits = real(arrays["v_min"]), real(arrays["v_max"])
    for tag, steps in (("", int(arrays["iters"])), ("_first", int(arrays["iters_first"]))):
        scores = page_rank(q, k, None, scaling, steps)
        passed = zero_tprune.heads(scores[..., prefix:] * n, *limits)
        same(f"heads{tag}", passed, arrays[f"head_mask{tag}"].astype(bool))
        worst.append(
            close(f"importance{tag}", zero_tprune.root_mean_square(scores, passed), arrays[f"importance{tag}"])
        )
    first = _t(arrays, "importance_first")[:, prefix:]
    gone, partner = zero_tprune.similar_pairs(k.mean(1)[:, prefix:], first, int(arrays["r_s"]))
    same("S-stage: dropped", gone + prefix, arrays["s_pruned"])
    same("S-stage: partners", partner + prefix, arrays["s_partner"])
    share, patches = real(arrays["keep_ratio"]), n - prefix
    left = _kept(arrays, q, k, gone.shape[1], ceil(share * (patches - gone.shape[1])))
    same("I'-S-I: kept", left, arrays["keep_final"])
    only = _kept(arrays, q, k, 0, ceil(share * patches))
    same("I alone: kept", only[:, prefix:], arrays["keep_I_only"])
    return f"scores, heads, pairs and tokens kept; within {max(worst):.1g}"


def _kept(arrays: Arrays, q: Tensor, k: Tensor, similar: int, left: int) -> Tensor:
    n, prefix = q.shape[2], int(arrays["prefix"])
    total = n - prefix - left
    steps: Sequence[int] = [int(arrays["iters"])] * 3
    method = create(
        "zero_tprune", similar=(similar + 0.5 * (similar > 0)) / total, steps=tuple(steps), cls_start="uniform",
        first_steps=int(arrays["iters_first"]), v_min=real(arrays["v_min"]), v_max=real(arrays["v_max"]),
    )  # fmt: skip
    x = q.new_zeros(len(q), n, 1)
    tokens = Tokens(x, prefix, None, {"queries": q, "keys": k}, scaling=q.shape[-1] ** -0.5)
    return method.reduce(tokens, left).index  # type: ignore[attr-defined]


@case("topvim_prune_")
def topvim(arrays: Arrays, folder: Path) -> str:
    """Tokens kept at every layer by the first item of the batch (others keep CLS twice in the official code)."""
    score = ssm_keep.official_scores(_t(arrays, "xai_b"))[:1]
    hidden, residual, total = _t(arrays, "hidden")[:1], _t(arrays, "residual")[:1], []
    agree("layers", len(arrays["layers"]), sum(name.endswith("_hidden") for name in arrays))
    for step in range(len(arrays["layers"])):
        n = hidden.shape[1]
        kept = ssm_keep.keep(score[:, :n], real(arrays["keep_ratio"]), cls=n // 2)
        hidden, residual = (x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])) for x in (hidden, residual))
        close(f"hidden {step}", hidden, arrays[f"step{step}_hidden"][:1])
        close(f"residual {step}", residual, arrays[f"step{step}_residual"][:1])
        total.append(str(kept.shape[1]))
    return f"{arrays['hidden'].shape[1]} -> {' -> '.join(total)} tokens, CLS in the middle; first item of the batch"


@case("ssm_scan_")
def ssm_scan(arrays: Arrays, folder: Path) -> str:
    """The scan over all tokens, over kept ones only, and with the hidden state carried over removed ones."""
    u, delta, a, b, c, d, bias = (_t(arrays, name) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    kept = _t(arrays, "keep").long().expand(len(u), -1)
    worst = []
    for name, state, index, aligned in (
        ("y_full", "last_full", None, False),
        ("y_compact", "last_compact", kept, False),
        ("y_zeroinput_at_kept", "last_zeroinput", kept, True),
    ):
        y, last = ssm_keep.scan(u, delta, a, b, c, d, bias, index, aligned=aligned)
        worst += [close(name, y, arrays[name]), close(state, last, arrays[state])]
    return f"outputs and last states, {kept.shape[1]} of {u.shape[-1]} tokens; within {max(worst):.1g}"
