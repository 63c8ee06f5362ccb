"""Synthetic 64 x 64 scenes: one to eight flat shapes and, in some, a printed two-digit number.

Everything is drawn from a `random.Random` that the caller seeds with `training_rng` or `heldout_rng`; the two
hash different names, so a held-out scene is never a training scene.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np

SIDE = 64
PATCH = 4
GRID = SIDE // PATCH
SHAPES = ("circle", "rectangle", "triangle")
# The eight colours of easy-VQA with the values its images use.
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
COLOR_NAMES = tuple(COLORS)
MAX_COUNT = 6  # the largest answer to a "how many" question; scenes hold up to 8 shapes
DIGIT_OWNER = 100  # `Scene.owner` of the first digit; the second digit is one more

_FONT = (
    "01110100011001110101110011000101110",
    "00100011000010000100001000010001110",
    "01110100010000100010001000100011111",
    "11111000100010000010000011000101110",
    "00010001100101010010111110001000010",
    "11111100001111000001000011000101110",
    "00110010001000011110100011000101110",
    "11111000010001000100010000100001000",
    "01110100011000101110100011000101110",
    "01110100011000101111000010001001100",
)
_GLYPHS = [np.kron(np.array([int(c) for c in g]).reshape(7, 5), np.ones((2, 2), int)).astype(bool) for g in _FONT]
_YY, _XX = np.mgrid[0:SIDE, 0:SIDE]


@dataclass(frozen=True)
class Item:
    """One drawn shape: indices into `SHAPES` and `COLOR_NAMES`, centre in pixels, box (x0, y0, x1, y1)."""

    shape: int
    color: int
    cx: float
    cy: float
    box: tuple[int, int, int, int]


@dataclass
class Scene:
    """`pixels` uint8 [64, 64, 3]; `owner` uint8 [64, 64]: 0 background, i + 1 item i, 100 and 101 digits."""

    pixels: np.ndarray
    owner: np.ndarray
    items: list[Item] = field(default_factory=list)
    number: str | None = None


def words_for(item: Item) -> tuple[str, str]:
    """(shape word, colour word)."""
    return SHAPES[item.shape], COLOR_NAMES[item.color]


def place_words(item: Item) -> tuple[str | None, str | None]:
    """("top" | "bottom", "left" | "right"), None where the centre is within 3 px of the midline."""
    mid = (SIDE - 1) / 2
    row = None if abs(item.cy - mid) < 3 else ("top" if item.cy < mid else "bottom")
    column = None if abs(item.cx - mid) < 3 else ("left" if item.cx < mid else "right")
    return row, column


def training_rng(seed: int, step: int) -> random.Random:
    """The generator of one training batch."""
    return random.Random(f"vtprune-tiny/train/{seed}/{step}")


def heldout_rng(seed: int) -> random.Random:
    """The generator of an evaluation set; no training batch ever uses its stream."""
    return random.Random(f"vtprune-tiny/heldout/{seed}")


def silhouette(rng: random.Random, shape: int, r: int) -> tuple[float, float]:
    """Half width and half height of a shape of radius `r`."""
    if shape != 1:
        return r, r
    return rng.choice(((0.9 * r, 0.9 * r), (r, 0.6 * r), (0.6 * r, r)))


def stencil(shape: int, turn: int, dx: np.ndarray, dy: np.ndarray, hw: float, hh: float) -> np.ndarray:
    """Which of the pixels at offsets (`dx`, `dy`) from its centre a shape covers; `turn` is where a triangle points."""
    if shape == 0:
        return dx * dx + dy * dy <= hw * hw
    inside = (abs(dx) <= hw) & (abs(dy) <= hh)
    if shape == 1:
        return inside
    if turn == 0:  # tip up
        return inside & (2 * abs(dx) <= dy + hh)
    if turn == 1:  # tip down
        return inside & (2 * abs(dx) <= hh - dy)
    return inside & (2 * abs(dy) <= hw - dx)  # tip to the right


def _free(boxes: list[tuple[int, int, int, int]], box: tuple[int, int, int, int]) -> bool:
    x0, y0, x1, y1 = box
    return all(x0 > b[2] + 2 or b[0] > x1 + 2 or y0 > b[3] + 2 or b[1] > y1 + 2 for b in boxes)


def _place(scene: Scene, rng: random.Random, kind: tuple[int, int], radii: tuple[int, int], boxes: list) -> bool:
    """Draw one shape of `kind` (shape, colour) where it touches nothing; False after 30 failed tries."""
    shape, color = kind
    for attempt in range(30):
        r = rng.randint(radii[0], radii[1] if attempt < 10 else min(radii[1], 6))
        hw, hh = silhouette(rng, shape, r)
        cx = rng.randint(math.ceil(hw), SIDE - 1 - math.ceil(hw))
        cy = rng.randint(math.ceil(hh), SIDE - 1 - math.ceil(hh))
        box = (math.floor(cx - hw), math.floor(cy - hh), math.ceil(cx + hw), math.ceil(cy + hh))
        if not _free(boxes, box):
            continue
        window = (slice(max(box[1], 0), box[3] + 1), slice(max(box[0], 0), box[2] + 1))
        mask = stencil(shape, rng.randrange(3), _XX[window] - cx, _YY[window] - cy, hw, hh)
        rgb = [min(255, max(0, c + rng.randint(-14, 14))) for c in COLORS[COLOR_NAMES[color]]]
        scene.pixels[window][mask] = rgb
        scene.items.append(Item(shape, color, cx, cy, box))
        scene.owner[window][mask] = len(scene.items)
        boxes.append(box)
        return True
    return False


def _write_number(scene: Scene, rng: random.Random, boxes: list) -> None:
    scene.number = str(rng.randint(10, 99))
    x, y = rng.randint(1, SIDE - 23), rng.randint(1, SIDE - 15)
    ink = rng.randint(0, 40)
    for i, digit in enumerate(scene.number):
        window = (slice(y, y + 14), slice(x + 12 * i, x + 12 * i + 10))
        mask = _GLYPHS[int(digit)]
        scene.pixels[window][mask] = ink
        scene.owner[window][mask] = DIGIT_OWNER + i
    boxes.append((x, y, x + 21, y + 13))


def _counted_kinds(rng: random.Random, limit: int) -> list[tuple[int, int]]:
    """Kinds built from a wanted answer: k shapes that share one attribute, the rest without it."""
    wanted = rng.randint(1, min(MAX_COUNT, limit))
    others = rng.randint(0, min(3, limit - wanted))
    axis = rng.randrange(2)
    value = rng.randrange((len(SHAPES), len(COLOR_NAMES))[axis])
    kinds = []
    for i in range(wanted + others):
        kind = [rng.randrange(len(SHAPES)), rng.randrange(len(COLOR_NAMES))]
        if i < wanted:
            kind[axis] = value
        else:
            while kind[axis] == value:
                kind[axis] = rng.randrange((len(SHAPES), len(COLOR_NAMES))[axis])
        kinds.append((kind[0], kind[1]))
    rng.shuffle(kinds)
    return kinds


def _varied_kinds(rng: random.Random, n: int) -> list[tuple[int, int]]:
    """Kinds that leave something to refer to: distinct colours, a dominant attribute, or anything."""
    u = rng.random()
    deck = rng.sample(range(len(COLOR_NAMES)), len(COLOR_NAMES))
    main_shape, main_color, share = rng.randrange(3), rng.randrange(8), rng.choice((0.7, 1.0, 1.0))
    kinds: list[tuple[int, int]] = []
    for i in range(n):
        shape, color = rng.randrange(3), rng.randrange(8)
        if u < 0.5 and rng.random() < 0.8:
            color = deck[i]
        elif 0.5 <= u < 0.68 and rng.random() < share:
            color = main_color
        elif 0.68 <= u < 0.86 and rng.random() < share:
            shape = main_shape
        if u < 0.2 and i and rng.random() < 0.8:
            shape = rng.choice([s for s in range(3) if s != kinds[0][0]])
        kinds.append((shape, color))
    return kinds


def make_scene(rng: random.Random, easy: bool = False, counted: float = 0.35) -> Scene:
    """Draw one scene. `easy`: at most 3 shapes; `counted`: share of scenes built from a per-kind count."""
    noise = np.random.default_rng(rng.getrandbits(63))
    pixels = np.empty((SIDE, SIDE, 3), np.int16)
    pixels[:] = [rng.randint(225, 255) for _ in range(3)]
    scene = Scene(pixels, np.zeros((SIDE, SIDE), np.uint8))
    boxes: list[tuple[int, int, int, int]] = []
    if rng.random() < 0.10:
        _place(scene, rng, (rng.randrange(3), rng.randrange(8)), (9, 20), boxes)
    else:
        if rng.random() < counted:
            kinds = _counted_kinds(rng, 3 if easy else 8)
        else:
            kinds = _varied_kinds(rng, rng.randint(1, 3) if easy else rng.choice((1, 2, 2, 3, 3, 4, 5, 6, 6)))
        if len(kinds) <= 6 and rng.random() < 0.45:
            _write_number(scene, rng, boxes)
        for kind in kinds:
            _place(scene, rng, kind, (4, 7 if len(kinds) <= 4 else 6), boxes)
    pixels += noise.integers(-6, 7, pixels.shape, dtype=np.int16)
    scene.pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return scene
