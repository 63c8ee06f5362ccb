"""Synthetic clips of 16 frames of 48 x 48: one to four flat shapes that appear one after another; some move.

As for the pictures of the tiny LLaVA, everything is drawn from a `random.Random` that `training_rng` or
`heldout_rng` seeds; the two hash different names, so a held-out clip is never a training clip.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from vtprune.evals.toys.image.scenes import COLORS, SHAPES, silhouette, stencil

SIDE = 48
FRAMES = 16
FPS = 8.0
PATCH = 4
MERGE = 2
SLOT = 2  # frames that one visual token spans
SLOTS = FRAMES // SLOT
GRID = SIDE // (PATCH * MERGE)  # visual tokens along one side
COLOR_NAMES = ("red", "green", "blue", "black", "yellow", "teal")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # word -> step (x, y)
MAX_EVENTS = 4
_TRIES = 60


@dataclass(frozen=True)
class Event:
    """One shape of the clip: indices into `SHAPES` and `COLOR_NAMES`, first and past-the-end slot, way it moves."""

    shape: int
    color: int
    start: int
    stop: int
    way: str | None


@dataclass
class Clip:
    """`frames` uint8 [16, 48, 48, 3]; `owner` uint8 [16, 48, 48]: 0 background, i + 1 event i, in order of start."""

    frames: np.ndarray
    owner: np.ndarray
    events: list[Event]


def training_rng(seed: int, step: int) -> random.Random:
    """The generator of one training batch."""
    return random.Random(f"vtprune-tiny-video/train/{seed}/{step}")


def heldout_rng(seed: int) -> random.Random:
    """The generator of an evaluation set; no training batch ever uses its stream."""
    return random.Random(f"vtprune-tiny-video/heldout/{seed}")


def make_clip(rng: random.Random) -> Clip:
    """Draw one clip with one to four shapes of different colours, each appearing in a slot of its own."""
    noise = np.random.default_rng(rng.getrandbits(63))
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.int16)
    frames[:] = [rng.randint(225, 255) for _ in range(3)]
    owner = np.zeros((FRAMES, SIDE, SIDE), np.uint8)
    # More are wanted the more often, because a full clip finds no place for some of them.
    wanted = rng.choices(range(1, MAX_EVENTS + 1), weights=range(1, MAX_EVENTS + 1))[0]
    starts = sorted(rng.sample(range(SLOTS - 1), wanted))
    events: list[Event] = []
    taken: list[tuple[Event, tuple[int, int, int, int]]] = []
    for start, color in zip(starts, rng.sample(range(len(COLOR_NAMES)), wanted), strict=True):
        stop = SLOTS if rng.random() < 0.5 else rng.randint(start + 2, SLOTS)
        way = rng.choice(tuple(WAYS)) if rng.random() < 0.6 else None
        event = Event(rng.randrange(len(SHAPES)), color, start, stop, way)
        if _draw(event, len(events) + 1, rng, frames, owner, taken):
            events.append(event)
    frames += noise.integers(-6, 7, (1, SIDE, SIDE, 3), dtype=np.int16)  # the ground keeps its grain
    frames += noise.integers(-2, 3, frames.shape, dtype=np.int16)
    return Clip(np.clip(frames, 0, 255).astype(np.uint8), owner, events)


def _draw(
    event: Event,
    number: int,
    rng: random.Random,
    frames: np.ndarray,
    owner: np.ndarray,
    taken: list[tuple[Event, tuple[int, int, int, int]]],
) -> bool:
    """Paint `event` where its whole path touches no shape of the same time; False if it finds no place."""
    first, last = event.start * SLOT, event.stop * SLOT
    for attempt in range(_TRIES):
        r = rng.randint(5, 7 if attempt < 20 else 5)
        hw, hh = silhouette(rng, event.shape, r)
        pace = 2 if last - first <= 8 and rng.random() < 0.5 else 1
        dx, dy = (pace * step for step in (WAYS[event.way] if event.way else (0, 0)))
        reach = last - first - 1
        # Half extents rounded up keep every pixel of the shape inside the frame along the whole path.
        left, right = math.ceil(hw) + max(0, -dx * reach), SIDE - 1 - math.ceil(hw) - max(0, dx * reach)
        top, bottom = math.ceil(hh) + max(0, -dy * reach), SIDE - 1 - math.ceil(hh) - max(0, dy * reach)
        if left > right or top > bottom:
            continue
        x, y = rng.randint(left, right), rng.randint(top, bottom)
        ends = ((x, x + dx * reach), (y, y + dy * reach))
        box = (
            min(ends[0]) - math.ceil(hw),
            min(ends[1]) - math.ceil(hh),
            max(ends[0]) + math.ceil(hw),
            max(ends[1]) + math.ceil(hh),
        )
        if not all(_apart(event, box, *other) for other in taken):
            continue
        h, w = math.ceil(hh), math.ceil(hw)
        ys, xs = np.mgrid[-h : h + 1, -w : w + 1]
        mask = stencil(event.shape, rng.randrange(3), xs, ys, hw, hh)
        rgb = [min(255, max(0, c + rng.randint(-14, 14))) for c in COLORS[COLOR_NAMES[event.color]]]
        for i in range(reach + 1):
            cx, cy = x + dx * i, y + dy * i
            window = (first + i, slice(cy - h, cy + h + 1), slice(cx - w, cx + w + 1))
            frames[window][mask] = rgb
            owner[window][mask] = number
        taken.append((event, box))
        return True
    return False


def _apart(event: Event, box: tuple[int, int, int, int], other: Event, there: tuple[int, int, int, int]) -> bool:
    if event.start >= other.stop or other.start >= event.stop:
        return True
    gap = 2
    return box[0] > there[2] + gap or there[0] > box[2] + gap or box[1] > there[3] + gap or there[1] > box[3] + gap
