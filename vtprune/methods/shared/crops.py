"""Which crop each token of a unit belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.visual import Span, Visual


def crops(v: Visual) -> tuple[Tensor, list[int]]:
    """Number [N] (int64, on the unit's device) of every token's crop, and how many tokens each crop has.

    A crop is a frame of a span, or of a mosaic whose tiles are known a tile. A unit without spans is its grid; without
    either it is one crop. Newlines and separators come last, as one more "crop", which may have no tokens.

    >>> crops(Visual(torch.zeros(7, 8), None, spans=(Span(0, (1, 1, 2)), Span(3, (1, 2, 1), newline=True))))
    (tensor([0, 0, 2, 1, 2, 1, 2]), [2, 2, 3])
    """
    sizes: list[int] = []
    runs = []
    for span in v.spans or (Span(0, v.grid or (1, 1, v.n)),):
        t, h, w = span.grid
        heights, widths = span.tiles or ((h,), (w,))
        tile = numbered(heights, v.x.device)[:, None] * len(widths) + numbered(widths, v.x.device)
        frame = len(sizes) + len(heights) * len(widths) * torch.arange(t, device=v.x.device)[:, None, None]
        rows = torch.nn.functional.pad(frame + tile, (0, int(span.newline)), value=-1)
        runs.append((span.start, rows.flatten()))
        sizes += t * [height * width for height in heights for width in widths]
    number = torch.full((v.n,), len(sizes), device=v.x.device)
    for start, run in runs:
        number[start : start + len(run)] = torch.where(run < 0, len(sizes), run)
    return number, [*sizes, v.n - sum(sizes)]


def numbered(sizes: Sequence[int], device: torch.device) -> Tensor:
    """The number of the run that each place is in, of runs of these sizes: (2, 3) -> [0, 0, 1, 1, 1], on the device."""
    return torch.cat([torch.full((size,), i, device=device) for i, size in enumerate(sizes)])
