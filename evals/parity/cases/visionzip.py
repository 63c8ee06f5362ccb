"""VisionZip: dominant and contextual tokens, also of a mosaic of crops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune.evals.parity.compare import agree, close, grid_of, listed, ordered, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("visionzip_")
def visionzip(arrays: Arrays, folder: Path) -> str:
    """Dominant tokens in pick order, contextual places and merged features, CLS kept and official order.

    The positional order must hold the same rows at the places of their tokens.
    """
    hidden = torch.from_numpy(arrays["hidden"])
    cls = torch.nn.functional.pad(torch.from_numpy(arrays["cls_attn"]).mean(1)[:, 1:], (1, 0))
    keys = torch.from_numpy(arrays["key_metric"])
    worst = []
    grid_of(arrays, hidden.shape[1] - 1)
    for dominant, contextual, tag in _visionzip_budgets(arrays):
        outputs, orders = [], []
        for x, score, key in zip(hidden, cls, keys):
            method: Any = create("visionzip", contextual=contextual, order="official", cls="keep")
            signals = dict(zip((method.needs[0], method.needs[-1]), (score, key)))
            answer = method(Visual(x, dominant + contextual, signals=signals))
            plain = replace(method, order="positional")(Visual(x, dominant + contextual, signals=signals))
            shown = torch.cat([ordered(answer)[:dominant].sort().values, ordered(answer)[dominant:]])
            same("positional tokens", plain.idx, shown.sort().values)
            worst.append(close("positional order", plain.apply(x), answer.apply(x)[shown.argsort()]))
            outputs.append(answer.apply(x))
            orders.append(ordered(answer))
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
    budgets = listed([d + c for d, c, _ in _visionzip_budgets(arrays)])
    return f"tokens and places at {budgets} of {hidden.shape[1]}{rule}; features within {max(worst):.1g}"


def _visionzip_budgets(arrays: Arrays) -> list[tuple[int, int, str]]:
    pairs = arrays["budgets"] if "budgets" in arrays else [(arrays["dominant"], arrays["contextual"])]
    return [(int(d), int(c), f"{d}_{c}") for d, c in pairs]


def _visionzip_mosaic(features: Tensor, dominant: Tensor, arrays: Arrays) -> Tensor:
    """The base view, then all crops: patches in raster order of the mosaic, CLS tokens, contextual tokens.

    features: [crops, tokens, C] in official order. dominant: [crops, D] ascending, CLS at 0.
    """
    columns, (height, width) = int(arrays["crops_w"]), grid_of(arrays, arrays["hidden"].shape[1] - 1)
    tiles, places = features[1:], dominant[1:, 1:] - 1
    agree("tiles", columns * int(arrays["crops_h"]), len(tiles))
    crop = torch.arange(len(tiles))[:, None]
    row, column = crop // columns * height + places // width, crop % columns * width + places % width
    raster = (row * columns * width + column).flatten().argsort()
    patches = tiles[:, 1 : dominant.shape[1]].flatten(0, 1)[raster]
    return torch.cat([features[0], patches, tiles[:, 0], tiles[:, dominant.shape[1] :].flatten(0, 1)])
