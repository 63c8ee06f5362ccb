"""What a patch did to the last prompt, as a text table and as HTML for notebooks."""

from __future__ import annotations

import base64
import html as escaping
import io
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .core.cost import TextCost, looks
from .core.method import Stage
from .core.result import Last
from .hf.vit_last import VitLast

if TYPE_CHECKING:
    from .handle import Handle

PICTURES = 4  # images that a notebook shows


def summary(handle: Handle, cost: TextCost | None) -> str:
    """`Handle.summary`. cost: of the LLM, where it is known."""
    last = handle.last
    lines = [repr(handle)]
    if last is None:
        return "\n".join([*lines, "no prompt with visual tokens has run yet"])
    lines += text(last).splitlines()
    if isinstance(last, Last) and cost is not None and last.lengths:
        lines += saved(cost, last, handle.stages)
    return "\n".join(lines)


def text(last: Last | VitLast) -> str:
    """The table of what one pass left, with its notes."""
    if isinstance(last, VitLast):
        lines = [f"{'block':<10}{'rows':>8}", f"{'(input)':<10}{last.n:>8}"]
        lines += [f"{where:<10}{rows:>8}" for where, rows in _runs(last.lengths)]
        return "\n".join(lines + [f"note: {note}" for note in last.notes])
    lines = [f"{'image':<16}{'row':>4}{'tokens':>8}{'kept':>8}{'share':>8}"]
    for number, (unit, idx) in enumerate(zip(last.images, last.kept())):
        name = f"{number} ({unit.modality})"
        lines.append(f"{name:<16}{unit.row:>4}{unit.n:>8}{len(idx):>8}{len(idx) / max(1, unit.n):>8.1%}")
    for modality, lengths in last.tower_lengths.items():
        lines += _by_layer(f"tower, {modality}", lengths, max(lengths, default=0))
    lines += _by_layer("LLM", last.lengths, last.src.shape[1])
    lines.append(f"selector: {1000 * last.seconds:.1f} ms")
    return "\n".join(lines + [f"note: {note}" for note in last.notes])


def _by_layer(name: str, lengths: Sequence[int], before: int) -> list[str]:
    """A line for each run of layers of one length. before: the most they could have run on."""
    return [f"{name}, layers {where}: {n} of {before} tokens" for where, n in _runs(lengths)]


def _runs(lengths: Sequence[int]) -> list[tuple[str, int]]:
    """[4, 4, 2] -> [("0-1", 4), ("2", 2)]."""
    found, start = [], 0
    for length, group in groupby(lengths):
        end = start + len(list(group)) - 1
        found.append((str(start) if end == start else f"{start}-{end}", length))
        start = end + 1
    return found


def saved(cost: TextCost, last: Last, stages: Sequence[Stage]) -> list[str]:
    """FLOPs of the LLM's prefill, and bytes of the keys and values that it leaves, of all rows of the batch."""
    rows, length = last.src.shape
    dense, now = cost.prefill(length), cost.prefill(last.lengths) + looks(cost, stages, [length, *last.lengths])
    bytes_dense, bytes_now = cost.kv_bytes(length), cost.kv_bytes(last.lengths)
    return [
        f"FLOPs of the LLM's prefill: {rows * now / 1e9:.4g} of {rows * dense / 1e9:.4g} G "
        f"({1 - now / dense:.1%} saved)",
        f"keys and values: {rows * bytes_now / 2**20:.4g} of {rows * bytes_dense / 2**20:.4g} MiB "
        f"({1 - bytes_now / bytes_dense:.1%} saved)",
    ]


def html(last: Last | VitLast | None, told: str | None = None) -> str:
    """A table and, of a few images, the kept tokens on an empty picture. told: what stands in place of the table."""
    parts = [f"<pre>{escaping.escape(told or (text(last) if last else ''))}</pre>"]
    if isinstance(last, Last):
        parts += [f'<img src="data:image/png;base64,{png}"/>' for png in _pictures(last)]
    return "".join(parts)


def _pictures(last: Last) -> list[str]:
    """The kept tokens of the first images as PNG in base64; none of those that form no known grid."""
    from PIL import Image

    from .panels import kept_units, rasters
    from .show import overlay

    found = []
    for number, unit in enumerate(kept_units(last)[:PICTURES] if last.images else ()):
        try:
            _, h, w = rasters(unit)[-1].grid
        except ValueError:
            continue
        buffer = io.BytesIO()
        overlay(Image.new("RGB", (16 * w, 16 * h), "lightsteelblue"), unit, f"image {number}").save(buffer, "PNG")
        found.append(base64.b64encode(buffer.getvalue()).decode())
    return found
