"""Pictures of 224 x 224: shapes and handwritten digits on a pale photograph, or a two by two table of things.

Everything is drawn from a `random.Random` that the caller seeds with `training_rng` or `heldout_rng`; the two hash
different names and the content they draw from differs as well.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vtprune.evals.toys.mid.content import DIGITS, GARMENTS, Content

SIDE, PATCH = 224, 14
GRID = SIDE // PATCH
MID = (SIDE - 1) / 2
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (225, 25, 25),
    "green": (25, 150, 45),
    "blue": (30, 60, 225),
    "yellow": (250, 220, 20),
    "purple": (135, 35, 160),
    "orange": (250, 135, 15),
    "black": (15, 15, 15),
}
COLOR_NAMES = tuple(COLORS)
MAX_COUNT = 6
CELLS = ("top left", "top right", "bottom left", "bottom right")
_YY, _XX = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
_SPOKES = zip(np.pi / 2 + np.arange(10) * np.pi / 5, [1.15, 0.5] * 5)  # angle and length of a star's corners
_STAR = np.array([(np.cos(angle) * length, -np.sin(angle) * length) for angle, length in _SPOKES])


@dataclass(frozen=True)
class Item:
    """One thing: `kind` is "shape", "digit" or "garment", `value` its class, `color` an index where it is a shape."""

    kind: str
    value: int
    color: int
    cx: float
    cy: float

    @property
    def word(self) -> str:
        return {"shape": SHAPES, "digit": DIGITS, "garment": GARMENTS}[self.kind][self.value]

    @property
    def color_word(self) -> str:
        return COLOR_NAMES[self.color]


@dataclass
class Scene:
    """`pixels` uint8 [224, 224, 3]; `owner` uint8 [224, 224]: 0 background, i + 1 the pixels of item i.

    `table`: the things stand in the four quarters of the picture, at most one in each.
    """

    pixels: np.ndarray
    owner: np.ndarray
    items: list[Item] = field(default_factory=list)
    table: bool = False

    def of(self, kind: str) -> list[Item]:
        return [item for item in self.items if item.kind == kind]


def place_words(item: Item) -> tuple[str | None, str | None]:
    """("top" | "bottom", "left" | "right"), None where the centre is within 12 px of the midline."""
    row = None if abs(item.cy - MID) < 12 else ("top" if item.cy < MID else "bottom")
    column = None if abs(item.cx - MID) < 12 else ("left" if item.cx < MID else "right")
    return row, column


def training_rng(seed: int, step: int) -> random.Random:
    """The generator of one training batch."""
    return random.Random(f"vtprune-mid/train/{seed}/{step}")


def heldout_rng(seed: int) -> random.Random:
    """The generator of an evaluation set; no training batch ever uses its stream."""
    return random.Random(f"vtprune-mid/heldout/{seed}")


def _background(rng: random.Random, content: Content) -> np.ndarray:
    """A crop of a photograph, paled so that things stand out; one picture in five is plain."""
    pale = np.array([rng.randint(215, 255) for _ in range(3)], np.float32)
    if rng.random() < 0.2:
        return np.broadcast_to(pale, (SIDE, SIDE, 3)).copy()
    photo = rng.choice(content.photos)
    height, width = photo.shape[:2]
    side = rng.randint(min(100, height, width), min(height, width))
    y, x = rng.randint(0, height - side), rng.randint(0, width - side)
    crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    share = rng.uniform(0.15, 0.5)
    return np.asarray(crop, np.float32) * share + pale * (1 - share)


def stencil(shape: int, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Which pixels at offsets (`dx`, `dy`) from its centre a shape of radius `r` covers."""
    if shape == 0:
        return dx * dx + dy * dy <= r * r
    if shape == 1:
        return np.maximum(abs(dx), abs(dy)) <= 0.88 * r
    if shape == 2:
        return (2 * abs(dx) <= (dy + r) * 1.1) & (dy <= 0.8 * r)
    inside = np.zeros(dx.shape, bool)  # a point is inside if a ray from it crosses the outline an odd number of times
    corners = _STAR * r
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0)):
        crosses = (y0 > dy) != (y1 > dy)
        inside ^= crosses & (dx < (x1 - x0) * (dy - y0) / (y1 - y0 + 1e-9) + x0)
    return inside


def _stamp(scene: Scene, item: Item, mask: np.ndarray, ink: np.ndarray) -> None:
    """Blend `ink` [h, w, 3] over the picture by `mask` [h, w] in 0..1 around the item's centre."""
    h, w = mask.shape
    y, x = round(item.cy - h / 2), round(item.cx - w / 2)
    top, left = max(0, -y), max(0, -x)
    window = slice(max(y, 0), min(y + h, SIDE)), slice(max(x, 0), min(x + w, SIDE))
    mask = mask[top : top + window[0].stop - window[0].start, left : left + window[1].stop - window[1].start]
    ink = ink[top : top + mask.shape[0], left : left + mask.shape[1]]
    scene.pixels[window] = scene.pixels[window] * (1 - mask[..., None]) + ink * mask[..., None]
    scene.items.append(item)
    scene.owner[window][mask > 0.3] = len(scene.items)


def _draw_shape(scene: Scene, rng: random.Random, item: Item, r: float) -> None:
    size = 2 * int(np.ceil(1.2 * r)) + 1
    yy, xx = _YY[:size, :size] - size // 2, _XX[:size, :size] - size // 2
    mask = stencil(item.value, xx, yy, r).astype(np.float32)
    ink = np.array([min(255, max(0, c + rng.randint(-15, 15))) for c in COLORS[item.color_word]], np.float32)
    _stamp(scene, item, mask, np.broadcast_to(ink, (size, size, 3)))


def _scaled(picture: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR), np.float32)


def _draw_thing(scene: Scene, rng: random.Random, content: Content, item: Item, size: int) -> None:
    """A digit in ink, or a garment as the photograph on black that it is."""
    pool = content.digits if item.kind == "digit" else content.garments
    picture = _scaled(pool[item.value][rng.randrange(len(pool[item.value]))], size)
    if item.kind == "digit":
        ink = np.array([rng.randint(0, 70) for _ in range(3)], np.float32)
        _stamp(scene, item, np.clip(picture / 200, 0, 1), np.broadcast_to(ink, (size, size, 3)))
    else:
        _stamp(scene, item, np.ones((size, size), np.float32), np.repeat(picture[..., None], 3, 2))


def _free(taken: list[tuple[float, float, float]], cx: float, cy: float, r: float) -> bool:
    return all(max(abs(cx - x), abs(cy - y)) > r + other + 3 for x, y, other in taken)


def _place(rng: random.Random, taken: list[tuple[float, float, float]], r: float) -> tuple[float, float] | None:
    for _ in range(40):
        cx, cy = rng.uniform(r + 2, SIDE - r - 2), rng.uniform(r + 2, SIDE - r - 2)
        if _free(taken, cx, cy, r):
            taken.append((cx, cy, r))
            return cx, cy
    return None


def _kinds(rng: random.Random, limit: int) -> list[tuple[int, int]]:
    """(shape, colour) of the shapes of a picture: some share an attribute so that counting kinds has every answer."""
    n = rng.randint(1, limit)
    if rng.random() < 0.45:
        axis, share = rng.randrange(2), rng.randint(1, n)
        value = rng.randrange((len(SHAPES), len(COLORS))[axis])
        kinds = []
        for i in range(n):
            kind = [rng.randrange(len(SHAPES)), rng.randrange(len(COLORS))]
            while (kind[axis] == value) != (i < share):
                kind[axis] = value if i < share else rng.randrange((len(SHAPES), len(COLORS))[axis])
            kinds.append((kind[0], kind[1]))
        rng.shuffle(kinds)
        return kinds
    deck = rng.sample(range(len(COLORS)), len(COLORS))
    shapes = [rng.randrange(len(SHAPES)) for _ in range(n)]
    if n > 1 and rng.random() < 0.5:
        shapes[1:] = [rng.choice([s for s in range(len(SHAPES)) if s != shapes[0]]) for _ in shapes[1:]]
    return list(zip(shapes, deck))


def _shapes(scene: Scene, rng: random.Random, content: Content, limit: int) -> None:
    taken: list[tuple[float, float, float]] = []
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        size = rng.randint(46, 60)
        place = _place(rng, taken, size / 2 - 2)
        if place:
            _draw_thing(scene, rng, content, Item("digit", rng.randrange(10), 0, *place), size)
    for shape, color in _kinds(rng, limit):
        r = rng.uniform(15, 26)
        place = _place(rng, taken, r)
        if place:
            _draw_shape(scene, rng, Item("shape", shape, color, *place), r)


def _table(scene: Scene, rng: random.Random, content: Content) -> None:
    scene.table = True
    for cell in range(4):
        kind = rng.choice(("garment", "garment", "garment", "digit", "digit", ""))
        if kind:
            value = rng.randrange(len(GARMENTS) if kind == "garment" else 10)
            cx, cy = (MID + (side - 0.5) * SIDE / 2 + rng.uniform(-14, 14) for side in (cell % 2, cell // 2))
            _draw_thing(scene, rng, content, Item(kind, value, 0, cx, cy), rng.randint(56, 78))


def make_scene(rng: random.Random, content: Content, limit: int = MAX_COUNT) -> Scene:
    """Draw one picture; `limit`: the most shapes there may be."""
    noise = np.random.default_rng(rng.getrandbits(63))
    scene = Scene(_background(rng, content), np.zeros((SIDE, SIDE), np.uint8))
    if rng.random() < 0.34:
        _table(scene, rng, content)
    else:
        _shapes(scene, rng, content, limit)
    pixels = scene.pixels + noise.normal(0, 3, scene.pixels.shape)
    scene.pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return scene


def counts(scene: Scene) -> Counter[str]:
    """How many shapes have each shape word and each colour word."""
    shapes = scene.of("shape")
    return Counter([item.word for item in shapes] + [item.color_word for item in shapes])
