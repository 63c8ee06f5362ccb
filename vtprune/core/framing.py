"""Which images of a row are the frames of one clip, where a family's prompt writes frames as images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from .errors import UnsupportedCall
from .units import Unit

Words = Sequence[int]


def clips_told(units: Sequence[Unit], rows: int, clips: Sequence[int]) -> list[int]:
    """The clip of every unit, by the numbers of frames that the user counted over the rows of the batch.

    Where `generate` repeats rows (beams), each copy has the clips of its row. Raises UnsupportedCall where the counts
    do not fit the images of the call, row by row.
    """
    counts = [sum(u.row == row for u in units) for row in range(rows)]
    repeat, rest = divmod(len(units), sum(clips))
    left, numbers, clip = list(clips), [], 0
    fits = not rest and repeat > 0 and rows % repeat == 0
    for first in range(0, rows, repeat) if fits else ():
        mine: list[int] = []
        while left and sum(mine) < counts[first]:
            mine.append(left.pop(0))
        for row in range(first, first + repeat):
            fits = fits and sum(mine) == counts[row]
            for frames in mine:
                numbers += [clip] * frames
                clip += 1
    if not fits or left:
        raise UnsupportedCall(
            f"clips={tuple(clips)} counts {sum(clips)} frames, but the rows of this call hold {counts} images and "
            "videos: give the number of frames of every clip, row by row and in order (1 for an image or a video)"
        )
    return numbers


def clips_seen(units: Sequence[Unit], words: Sequence[Words]) -> list[int]:
    """The clip of every unit, by what stands between images. words: ids of each row, as far as they are text.

    Images of one size are frames of one clip where only the processor's separator stands between them: what stands
    between most of them, in which no more than its label (a number, a timestamp) may change. A new clip begins where
    other words stand, and where a label comes again after others: "Frame1" behind "Frame8". A video is one by itself.
    """
    numbers: list[int] = []
    clip = -1
    for row in dict.fromkeys(u.row for u in units):
        mine = [u for u in units if u.row == row]
        for starts in _starts(mine, words[row]):
            clip += starts
            numbers.append(clip)
    return numbers


def _starts(units: Sequence[Unit], words: Words) -> list[bool]:
    """Whether each unit of a row begins a clip."""
    lead = list(words[: units[0].ranges[0][0]])
    gaps = [list(words[sum(a.ranges[-1]) : b.ranges[0][0]]) for a, b in pairwise(units)]
    lengths = Counter(map(len, gaps))
    usual = next((gap for gap in gaps if lengths[len(gap)] == max(lengths.values())), [])
    separators = [gap for gap in gaps if _alike(gap, usual)]
    head = min((_common(gap, usual) for gap in separators), default=0)
    tail = min((_common(gap[head:][::-1], usual[head:][::-1]) for gap in separators), default=0)
    labelled = any(gap != usual for gap in separators)
    starts, before = [True], [lead]
    for a, b, gap in zip(units, units[1:], gaps):
        frames = a.modality == b.modality == "image" and a.n == b.n and a.spans == b.spans and _alike(gap, usual)
        again = [_same(gap, text, head, tail) for text in before] if frames and labelled else []
        starts.append(not frames or (any(again) and not again[-1]))
        before = [gap] if starts[-1] else [*before, gap]
    return starts


def _common(a: Words, b: Words) -> int:
    """How many words two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _alike(a: Words, b: Words) -> bool:
    """Whether two texts differ in a stretch that is no longer than what they have in common around it."""
    head = _common(a, b)
    same = head + _common(a[head:][::-1], b[head:][::-1])
    return max(len(a), len(b)) - same <= same


def _same(gap: Words, text: Words, head: int, tail: int) -> bool:
    """Whether a separator has the label of an earlier one, or that with which the text before a clip ends."""
    label = gap[head:]
    if len(label) <= tail:
        return False
    same = text[-len(label) :] == label
    return same and (len(text) == len(gap) or text[:head] != gap[:head])
