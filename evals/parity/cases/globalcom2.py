"""GlobalCom2: the overview shares the budget out over the crops of an any-resolution image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune.evals.parity.compare import agree, listed, ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Span, Visual

HALF = 2e-3  # the stored features went through float16, relative to the largest


@case("leaders_globalcom2_")
def globalcom2(arrays: Arrays, folder: Path) -> str:
    """Shares of the crops, the overview in order, and all features; newlines stand where the official code has them."""
    from vtprune.evals.parity.compare import Mismatch
    from vtprune.methods.shared.quota import shares_of_cells

    x, logits = torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["cls_logits"])
    side = round(x.shape[1] ** 0.5)
    agree("tokens of a crop", side * side, x.shape[1])
    columns, rows = arrays["crops_wh"].tolist()
    top, bottom, left, right = _box(arrays["image_size_wh"].tolist(), columns * side, rows * side)
    heights, widths = _within(top, bottom, side, rows), _within(left, right, side, columns)
    mosaic = _mosaic(x[1:], rows, columns)[top:bottom, left:right]
    scores = _mosaic(logits[1:, :, None], rows, columns)[top:bottom, left:right, 0]
    spans = (Span(0, (1, side, side)), Span(side * side, (1, *scores.shape), tiles=(heights, widths)))
    tokens = torch.cat([x[0], mosaic.flatten(0, 1)])
    worst, counts, options = 0.0, [], {}
    if "temperature" in arrays:
        options["temperature"] = real(arrays["temperature"])
    ratios = [real(ratio) for ratio in arrays["retention"]]
    for j, ratio in enumerate(ratios):
        method: Any = create("globalcom2", ratio=ratio, order="official", **options)
        signals = {method.needs[0]: torch.cat([logits[0], scores.flatten()])}
        answer = method(Visual(tokens, None, spans=spans, signals=signals))
        shares = shares_of_cells(logits[0].view(side, side).double(), (rows, columns), method.temperature)
        found = (ratio * shares).clamp(max=1) - torch.from_numpy(arrays[f"scales_{j}"])
        if not float(found.abs().max()) < 1e-5:
            raise Mismatch(f"shares of run {j} differ by {float(found.abs().max()):.2g}")
        overview = int((answer.idx < side * side).sum())
        same(f"overview of run {j}", ordered(answer)[:overview], arrays[f"thumb_index_{j}"])
        places = _rows(ordered(answer)[overview:] - side * side, heights, widths, side)
        features = _with_newlines(answer.apply(tokens), overview, places, rows * side, arrays["newline"])
        stored = torch.from_numpy(arrays[f"features_{j}"]).float()
        agree(f"tokens of run {j}", features.shape, stored.shape)
        off = float((features - stored).abs().max() / stored.abs().max())
        if not off < HALF:
            raise Mismatch(f"features of run {j} differ by {off:.2g} of the largest, allowed {HALF:g}")
        worst = max(worst, off)
        counts.append(len(answer.idx))
    return f"{rows} x {columns} crops, {listed(counts)} of {len(tokens)} tokens; features within {worst:.1g} (float16)"


def _box(image: list[int], width: int, height: int) -> tuple[int, int, int, int]:
    """Rows and columns of the stitched grid that are no padding, as LLaVA finds them."""
    w, h = image
    if w / h > width / height:
        pad = (height - int(h * (width / w))) // 2
        return pad, height - pad, 0, width
    pad = (width - int(w * (height / h))) // 2
    return 0, height, pad, width - pad


def _within(start: int, stop: int, side: int, parts: int) -> tuple[int, ...]:
    """How much of each of `parts` crops lies between start and stop."""
    return tuple(max(0, min(stop, (i + 1) * side) - max(start, i * side)) for i in range(parts))


def _mosaic(crops: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns, n, D] -> [rows * side, columns * side, D]."""
    side = round(crops.shape[1] ** 0.5)
    return crops.view(rows, columns, side, side, -1).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _rows(at: Tensor, heights: tuple[int, ...], widths: tuple[int, ...], side: int) -> list[int]:
    """The row of the stitched grid where the official code writes each token: by its number within its crop."""
    found = []
    for position in at.tolist():
        y, x = divmod(position, sum(widths))
        row, column = 0, 0
        while y >= heights[row]:
            y, row = y - heights[row], row + 1
        while x >= widths[column]:
            x, column = x - widths[column], column + 1
        found.append(row * side + (y * widths[column] + x) // side)
    return found


def _with_newlines(features: Tensor, overview: int, places: list[int], rows: int, newline: Any) -> Tensor:
    """The overview, then row by row of the grid its tokens and a newline, also in rows that keep nothing."""
    end = torch.from_numpy(newline)
    out = list(features[:overview])
    for row in range(rows):
        out += [x for x, place in zip(features[overview:], places) if place == row]
        out.append(end)
    return torch.stack(out)
