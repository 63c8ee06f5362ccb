"""Where a unit's tokens lie in the image: rasters of positions, even spacing over them, resampling of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...core.visual import Visual

Mode = Literal["average", "bilinear"]


def blocks(v: Visual) -> list[Tensor]:
    """Split the positions 0..N-1 of a unit into rasters [t, h, w], int64 on the CPU.

    Every span gives its raster; its newline column, and each run of separators between spans, is a raster of one
    row. A unit without spans is its grid, or one row of N tokens if it has none.
    """
    spans = v.spans
    if not spans:
        return [torch.arange(v.n).reshape(v.grid or (1, 1, v.n))]
    found: list[Tensor] = []
    end = 0
    for span in sorted(spans, key=lambda s: s.start):
        found.append(_row(end, span.start))
        t, h, w = span.grid
        end = span.start + len(span)
        raster = torch.arange(span.start, end).reshape(t, h, w + span.newline)
        found.append(raster[:, :, :w])
        found.append(raster[:, :, w:].reshape(1, 1, -1))
    found.append(_row(end, v.n))
    return [block for block in found if block.numel()]


def views(v: Visual, x: Tensor) -> list[Tensor]:
    """The raster of every span as a view [t, h, w, ...] into x [N, ...], newlines left out; [] if none is known."""
    if not v.spans:
        return [] if v.grid is None else [x.unflatten(0, v.grid)]
    found = []
    for span in v.spans:
        t, h, w = span.grid
        found.append(x[span.start : span.start + len(span)].unflatten(0, (t, h, w + span.newline))[:, :, :w])
    return found


def _row(start: int, stop: int) -> Tensor:
    return torch.arange(start, max(start, stop)).reshape(1, 1, -1)


def evenly(count: int, n: int, device: torch.device | None = None) -> Tensor:
    """The middles of `count` equal parts of 0..n-1, [count] int64: distinct, ascending; count <= n.

    >>> evenly(3, 9)
    tensor([1, 4, 7])
    """
    return (2 * torch.arange(count, device=device) + 1) * n // (2 * max(1, count))


class Taps(NamedTuple):
    """Sparse resampling: out[dst] += w * in[src]; the input token `centre[i]` stands for output i."""

    src: Tensor
    dst: Tensor
    w: Tensor
    centre: Tensor


def resample(raster: Tensor, size: tuple[int, int], mode: Mode) -> Taps:
    """Resample every frame of a raster [t, h, w] of positions to [t, *size]; dst counts from 0 in raster order."""
    t, h, w = raster.shape
    rows, columns = _axis(h, size[0], mode), _axis(w, size[1], mode)
    frames = torch.arange(t)[:, None, None]

    def flat(row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
        return ((frames * height + row[:, None]) * width + column).flatten()

    positions = raster.flatten()
    return Taps(
        src=positions[flat(rows.src, columns.src, h, w)],
        dst=flat(rows.dst, columns.dst, *size),
        w=(rows.w[:, None] * columns.w).flatten().repeat(t),
        centre=positions[flat(rows.centre, columns.centre, h, w)],
    )


def _axis(n: int, m: int, mode: Mode) -> Taps:
    """Resample n samples to m <= n; a centre is the sample nearest to the middle of its cell, the lower of two."""
    if mode == "average":
        src = torch.arange(n)
        dst = src * m // n
        length = torch.bincount(dst, minlength=m)
        return Taps(src, dst, 1.0 / length.double()[dst], length.cumsum(0) - 1 - length // 2)
    dst = torch.arange(m)
    at = (dst.double() + 0.5) * n / m - 0.5
    low = at.long()
    part = at - low
    taps = torch.cat([low, (low + 1).clamp_max(n - 1)])
    return Taps(taps, torch.cat([dst, dst]), torch.cat([1 - part, part]), low + (part > 0.5))


def square_border(v: Visual, size: tuple[int, int], name: str, patch: int = 14) -> Tensor:
    """[N] bool: which tokens of a square unit lie wholly in the border that squares a picture of `size`.

    size: height and width of the picture, which was padded to a square on both sides alike and then resized. patch:
    pixels along a token. Raises ValueError for a unit that is no single square raster.
    """
    t, side, other = v.grid or (0, 0, 0)
    if t != 1 or side != other or min(size) < 1:
        raise ValueError(
            f"padding={size}: {name} knows the border of a picture of height and width >= 1 that was padded to a "
            f"square raster of tokens, not of a unit of grid {v.grid}; pass a function unit -> [N] bool, or None"
        )
    pixels = side * patch
    border = (pixels - round(pixels * min(size) / max(size))) // 2 // patch
    at = torch.arange(side, device=v.x.device)
    outside = (at < border) | (at >= side - border)
    wide = size[1] > size[0]
    return (outside[:, None] if wide else outside[None]).expand(side, side).flatten()
