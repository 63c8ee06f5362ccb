"""ToMe: single rounds, schedules, and stock timm models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune import patch
from vtprune.evals.parity.compare import Mismatch, agree, close, same, tensor
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.stock_vit import stock_timm
from vtprune.hf.vit_last import VitLast
from vtprune.methods.in_vit.tome import per_block
from vtprune.reduction import Reduction, Tokens
from vtprune.registry import create


@case("tome_bsm_")
def tome_bsm(arrays: Arrays, folder: Path) -> str:
    """One round and a second with sizes: order of what is left, pairs, features, sizes, where each token went."""
    x, prefix = tensor(arrays, "x"), int(arrays["class_token"]) + int(arrays["distill_token"])
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
    slots = VitLast(x.shape[1], prefix, steps=[(0, one), (1, two)]).slots
    assert slots is not None
    same("slots, second round", slots, arrays["assign2"])
    rule = "; official unmerge as it is, with rows misplaced" if prefix == 2 else ""
    return f"order, pairs and slots of two rounds; features within {max(worst):.1g}{rule}"


def _pairs(what: str, ours: tuple[Tensor, Tensor], stored: tuple[Any, Any]) -> None:
    """Rows hold the same (source, destination) pairs, whatever their order."""
    a = [sorted(zip(x, y)) for x, y in zip(*(t.tolist() for t in ours))]
    b = [sorted(zip(x, y)) for x, y in zip(*(np.asarray(t).tolist() for t in stored))]
    if a != b:
        raise Mismatch(f"{what}: pairs differ, ours {a[0][:3]}, stored {b[0][:3]}")


def _tome_round(arrays: Arrays, metric: str, tag: str, x: Tensor, size: Tensor, prefix: int) -> Reduction:
    r, asked = int(arrays["r_effective"] if not tag else arrays["r2"]), int(arrays["r2" if tag else "r"])
    agree("tokens merged", min(asked, (x.shape[1] - prefix) // 2), r)
    method = create("tome", r=int(arrays["r"] if not tag else arrays["r2"]))
    n = x.shape[1] - prefix
    (left,) = method.counts(n, 1, None)  # type: ignore[attr-defined]
    if n - left != r:
        raise Mismatch(f"{n - left} tokens merge, not {r}")
    step = method.reduce(Tokens(x, prefix, size, {"mean_keys": tensor(arrays, metric)}), left)  # type: ignore[attr-defined]
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
    metric, x, k = tensor(arrays, "metric"), tensor(arrays, "x"), int(arrays["k"])
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

    x, size, heads = tensor(arrays, "x"), tensor(arrays, "size"), int(arrays["num_heads"])
    attention = Attention(x.shape[-1], heads, qkv_bias=True).eval()
    names = {"qkv.weight": "qkv_w", "qkv.bias": "qkv_b", "proj.weight": "proj_w", "proj.bias": "proj_b"}
    attention.load_state_dict({name: tensor(arrays, stored).float() for name, stored in names.items()})
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


@case("tome_e2e_")
@torch.no_grad()
def tome_e2e(arrays: Arrays, folder: Path) -> str:
    """Stock timm models, patched: logits, tokens left by every block, sizes, where each token went, in order."""
    kind = str(arrays["kind"])
    model, image = stock_timm(arrays, kind), tensor(arrays, "img")
    worst = [close("unpatched", model(image), arrays["logits_unpatched"])]
    tags = sorted({name.split("__")[0] for name in arrays if "__" in name})
    pooling = "plain" if kind == "gap" else "weighted"
    for tag in tags:
        r = arrays[f"{tag}__r_list"].tolist()
        with patch(model, "tome", r=r, proportional=bool(arrays["prop_attn"]), pooling=pooling) as handle:
            logits = model(image)
        last = handle.last
        same(f"{tag}: tokens", torch.tensor(last.lengths), arrays[f"{tag}__ntok"])
        same(f"{tag}: slots", last.slots, arrays[f"{tag}__assign"])
        worst.append(close(f"{tag}: sizes", last.size, arrays[f"{tag}__size"]))
        worst.append(close(f"{tag}: logits", logits, arrays[f"{tag}__logits"]))
    return f"{', '.join(tags)}: tokens, slots in order, sizes; logits within {max(worst):.1g}"
