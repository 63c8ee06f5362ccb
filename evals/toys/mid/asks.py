"""Questions about the mid model's pictures: ten kinds, their answers balanced, and lines for training alone."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator

from vtprune.evals.toys.asks import Ask, Balance, admit
from vtprune.evals.toys.mid.content import DIGITS, GARMENTS
from vtprune.evals.toys.mid.scenes import (
    CELLS,
    COLOR_NAMES,
    COLORS,
    MAX_COUNT,
    SHAPES,
    SIDE,
    Item,
    Scene,
    counts,
    place_words,
)

RELATIONS = ("left of", "above", "right of", "below")
WORN = {
    "shirt": "chest",
    "trousers": "legs",
    "sweater": "chest",
    "dress": "chest",
    "sandal": "feet",
    "sneaker": "feet",
    "bag": "hand",
    "boot": "feet",
}
_NEAR = 18  # pixels: closer centres than this are neither left nor right, neither above nor below


def references(scene: Scene) -> list[tuple[str, Item]]:
    """All short names ("red", "circle", "red circle") that fit exactly one shape, with that shape."""
    names: dict[str, list[Item]] = defaultdict(list)
    for item in scene.of("shape"):
        for name in (item.word, item.color_word, f"{item.color_word} {item.word}"):
            names[name].append(item)
    return [(name, items[0]) for name, items in names.items() if len(items) == 1]


def _noun(name: str) -> str:
    return f"{name} shape" if name in COLORS else name


def ask_color(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for name, item in references(scene):
        if name in SHAPES:
            yield Ask(f"what color is the {name}?", item.color_word, "color", "color", f"color/{name}", len(COLORS))


def ask_shape(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for name, item in references(scene):
        if name in COLORS:
            yield Ask(f"what shape is {name}?", item.word, "shape", "shape", f"shape/{name}", len(SHAPES))


def ask_count(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    n = len(scene.of("shape"))
    if 1 <= n <= MAX_COUNT:
        yield Ask("how many shapes are there?", DIGITS[n], "count", "count", "count", MAX_COUNT, 2.0)
    for name, k in counts(scene).items():
        if k <= 4:
            words = f"{name}s" if name in SHAPES else f"{name} shapes"
            yield Ask(f"how many {words} are there?", DIGITS[k], "count", "count kind", f"count/{name}", 4, 2.0)


def ask_position(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for name, item in references(scene):
        row, column = place_words(item)
        if row and column:
            yield Ask(f"where is the {_noun(name)}?", f"{row} {column}", "position", "where", "where", 4)


def compare(a: Item, b: Item, word: str) -> bool | None:
    """Whether `a` is `word` b; None if their centres are too close along that axis."""
    gap = b.cx - a.cx if word in ("left of", "right of") else b.cy - a.cy
    return None if abs(gap) < _NEAR else (gap > 0) == (word in ("left of", "above"))


def ask_relation(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    refs = references(scene)
    for _ in range(12 if len(refs) > 1 else 0):
        (name_a, a), (name_b, b) = rng.choice(refs), rng.choice(refs)
        word = rng.choice(RELATIONS)
        truth = None if a is b else compare(a, b, word)
        if truth is not None:
            text = f"is the {_noun(name_a)} {word} the {_noun(name_b)}?"
            yield Ask(text, "yes" if truth else "no", "relation", word, f"relation/{word}", 2, 2.0)


def ask_exist(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    pairs = {(item.word, item.color_word) for item in scene.of("shape")}
    shapes, colors = {s for s, _ in pairs}, {c for _, c in pairs}
    for _ in range(8 if pairs else 0):
        template = rng.choice(("exist COLOR", "exist SHAPE", "exist COLOR SHAPE", "exist COLOR SHAPE"))
        yes = rng.random() < 0.5
        if template == "exist COLOR":
            names = [f"{c} shape" for c in COLOR_NAMES if (c in colors) == yes]
        elif template == "exist SHAPE":
            names = [s for s in SHAPES if (s in shapes) == yes]
        else:
            near = rng.random() < 0.65  # a colour that is there, on another shape
            names = [
                f"{c} {s}"
                for c in COLOR_NAMES
                for s in SHAPES
                if ((s, c) in pairs) == yes and (yes or not near or c in colors)
            ]
        if names:
            name = rng.choice(names)
            article = "an" if name.startswith("o") else "a"
            yield Ask(f"is there {article} {name}?", "yes" if yes else "no", "exist", template, template + name, 2)


def _cells(scene: Scene) -> Iterator[tuple[str, Item]]:
    for item in scene.items if scene.table else ():
        row, column = place_words(item)
        yield f"{row} {column}", item


def _digits(scene: Scene) -> Iterator[tuple[str, Item]]:
    """Each digit with words that say which one is meant."""
    digits = scene.of("digit")
    if len(digits) == 1:
        yield "", digits[0]
    if scene.table:
        yield from ((f" at the {cell}", item) for cell, item in _cells(scene) if item.kind == "digit")


def ask_digit(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for which, item in _digits(scene):
        yield Ask(f"which digit is {which.strip() or 'written'}?", item.word, "digit", "digit", "digit", 10, 2.0)


def ask_parity(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for which, item in _digits(scene):
        answer = ("even", "odd")[item.value % 2]
        yield Ask(f"is the digit{which} even or odd?", answer, "parity", "parity", f"parity{which}", 2)


def ask_garment(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for cell, item in _cells(scene):
        if item.kind == "garment":
            text = f"what garment is at the {cell}?"
            yield Ask(text, item.word, "garment", "garment", "garment", len(GARMENTS), 1.5)


def ask_worn(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for cell, item in _cells(scene):
        if item.kind == "garment":
            text = f"where on the body is the thing at the {cell} worn or held?"
            yield Ask(text, WORN[item.word], "worn", "worn", "worn", len(set(WORN.values())))


ASKERS = {
    "color": ask_color,
    "shape": ask_shape,
    "count": ask_count,
    "position": ask_position,
    "relation": ask_relation,
    "exist": ask_exist,
    "digit": ask_digit,
    "garment": ask_garment,
    "parity": ask_parity,
    "worn": ask_worn,
}
_PER_SCENE = {
    "color": 2,
    "shape": 2,
    "count": 3,
    "position": 2,
    "relation": 4,
    "exist": 3,
    "digit": 3,
    "garment": 4,
    "parity": 2,
    "worn": 2,
}


def captions(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    """One-hop lines for training ("red" -> "circle top left"): the key is the last word before the answer."""
    if scene.table:
        full = dict(_cells(scene))
        for cell in CELLS:
            answer = full[cell].word if cell in full else "nothing"
            yield Ask(cell, answer, "caption", "cell", "cell", 0, 0.5)
        return
    refs = references(scene)
    names = rng.sample(refs, min(3, len(refs)))
    for name, item in names:
        row, column = place_words(item)
        if row and column:
            rest = [w for w in (item.color_word, item.word) if w not in name.split()]
            yield Ask(name, " ".join([*rest, row, column]), "caption", "describe", "describe", 0, 0.4)
    present = counts(scene)
    absent = [w for w in (*SHAPES, *COLOR_NAMES) if not present[w]]
    yield Ask(rng.choice(absent), "none", "caption", "absent", "absent", 0, 0.4)
    name = rng.choice((*SHAPES, *COLOR_NAMES, *sorted(present)))
    if present[name] <= MAX_COUNT:
        yield Ask(f"number of {name}", DIGITS[present[name]], "caption", "number", "number", 7, 1.0)
    if refs:
        yield from _coordinates(refs, rng)


def _coordinates(refs: list[tuple[str, Item]], rng: random.Random) -> Iterator[Ask]:
    """Exact places, and the one-hop forms of the relation questions."""
    for axis in ("column", "row"):
        name, item = rng.choice(refs)
        cell = DIGITS[int(item.cx if axis == "column" else item.cy) * 8 // SIDE + 1]
        yield Ask(f"{axis} of {name}", cell, "caption", axis, axis, 0, 0.3)
        (name_a, a), (name_b, b) = rng.choice(refs), rng.choice(refs)
        truth = None if a is b else compare(a, b, "left of" if axis == "column" else "above")
        if truth is not None:
            answer = ("left" if truth else "right") if axis == "column" else ("above" if truth else "below")
            yield Ask(f"{axis} of {name_a} from {name_b}", answer, "caption", f"{axis} pair", f"{axis} pair", 2, 0.7)


def training_asks(scene: Scene, rng: random.Random, balance: Balance) -> list[Ask]:
    """The admitted questions and lines of one training picture."""
    kept: list[Ask] = []
    for capability, ask in ASKERS.items():
        admit(list(ask(scene, rng)), _PER_SCENE[capability], rng, balance, kept)
    kept += [a for a in {a.text: a for a in captions(scene, rng)}.values() if a.choices == 0 or balance.admit(a)]
    return kept
