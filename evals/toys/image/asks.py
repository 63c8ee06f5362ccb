"""Questions about scenes, every template of them, and the rule that keeps their answers balanced."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

from vtprune.evals.toys.asks import Ask, Balance, admit
from vtprune.evals.toys.image.scenes import (
    COLOR_NAMES,
    COLORS,
    MAX_COUNT,
    SHAPES,
    SIDE,
    Item,
    Scene,
    place_words,
    words_for,
)

RELATIONS = ("left of", "above", "right of", "below")


def references(scene: Scene) -> list[tuple[str, Item]]:
    """All short names ("red", "circle", "red circle") that fit exactly one item, with that item."""
    names: dict[str, list[Item]] = defaultdict(list)
    for item in scene.items:
        shape, color = words_for(item)
        for name in (shape, color, f"{color} {shape}"):
            names[name].append(item)
    return [(name, items[0]) for name, items in names.items() if len(items) == 1]


def _noun(name: str) -> str:
    return f"{name} shape" if name in COLORS else name


def _pick(rng: random.Random, refs: list[tuple[str, Item]]) -> tuple[str, Item]:
    return refs[rng.randrange(len(refs))]


def ask_color(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for name, item in references(scene):
        if name in SHAPES:
            yield Ask(f"what color is the {name} ?", words_for(item)[1], "color", "color", f"color/{name}", 8)


def ask_shape(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for name, item in references(scene):
        if name in COLORS:
            yield Ask(f"what shape is {name} ?", words_for(item)[0], "shape", "shape", f"shape/{name}", 3)


def ask_count(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    n = len(scene.items)
    if 1 <= n <= MAX_COUNT:
        yield Ask("how many shapes are there ?", str(n), "count", "count", "count", MAX_COUNT, 4.0)


def ask_count_kind(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    cap = "count-kind"
    for name, k in Counter(SHAPES[i.shape] for i in scene.items).items():
        if k <= MAX_COUNT:
            yield Ask(f"how many {name}s are there ?", str(k), cap, "count SHAPEs", "count/shape", MAX_COUNT, 5.0)
    for name, k in Counter(COLOR_NAMES[i.color] for i in scene.items).items():
        if k <= MAX_COUNT:
            text = f"how many {name} shapes are there ?"
            yield Ask(text, str(k), cap, "count COLOR shapes", "count/color", MAX_COUNT, 5.0)


def ask_position(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    for name, item in references(scene):
        row, column = place_words(item)
        u, noun = rng.random(), _noun(name)
        if u < 0.6 and row and column:
            yield Ask(f"where is the {noun} ?", f"{row} {column}", "position", "where", "where", 4)
        elif 0.6 <= u < 0.8 and column:
            text = f"is the {noun} on the left or right ?"
            yield Ask(text, column, "position", "left or right", "left or right", 2)
        elif u >= 0.8 and row:
            text = f"is the {noun} at the top or bottom ?"
            yield Ask(text, row, "position", "top or bottom", "top or bottom", 2)


def _compare(a: Item, b: Item, word: str) -> bool | None:
    """Whether `a` is `word` b; None if the centres differ by less than 5 px along that axis."""
    gap = b.cx - a.cx if word in ("left of", "right of") else b.cy - a.cy
    if abs(gap) < 5:
        return None
    return (gap > 0) == (word in ("left of", "above"))


def ask_relation(scene: Scene, rng: random.Random, words: tuple[str, ...] = RELATIONS) -> Iterator[Ask]:
    refs = references(scene)
    for _ in range(12 if len(refs) > 1 else 0):
        (name_a, a), (name_b, b) = _pick(rng, refs), _pick(rng, refs)
        word = rng.choice(words)
        truth = None if a is b else _compare(a, b, word)
        if truth is not None:
            text = f"is the {_noun(name_a)} {word} the {_noun(name_b)} ?"
            yield Ask(text, "yes" if truth else "no", "relation", word, f"relation/{word}", 2, 2.0)


def ask_exist(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    pairs = {words_for(item) for item in scene.items}
    shapes, colors = {s for s, _ in pairs}, {c for _, c in pairs}
    for _ in range(8 if pairs else 0):
        template = rng.choice(("exist COLOR", "exist SHAPE", "exist COLOR SHAPE", "exist COLOR SHAPE"))
        yes = rng.random() < 0.5
        if template == "exist COLOR":
            pool = sorted(colors) if yes else [c for c in COLOR_NAMES if c not in colors]
            names = [f"{c} shape" for c in pool]
        elif template == "exist SHAPE":
            names = sorted(shapes) if yes else [s for s in SHAPES if s not in shapes]
        else:
            near = rng.random() < 0.65  # a colour that is there, on another shape
            names = [
                f"{c} {s}"
                for c in COLOR_NAMES
                for s in SHAPES
                if ((s, c) in pairs) == yes and (yes or not near or c in colors)
            ]
        if names:
            text = f"is there a {rng.choice(names)} ?"
            yield Ask(text, "yes" if yes else "no", "exist", template, text, 2)


def ask_ocr(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    if scene.number:
        yield Ask("what number is written ?", " ".join(scene.number), "ocr", "ocr", "ocr", 90, 4.0)


ASKERS = {
    "color": ask_color,
    "shape": ask_shape,
    "count": ask_count,
    "count-kind": ask_count_kind,
    "position": ask_position,
    "relation": ask_relation,
    "exist": ask_exist,
    "ocr": ask_ocr,
}
_PER_SCENE = {
    "color": 2,
    "shape": 3,
    "count": 1,
    "count-kind": 3,
    "position": 3,
    "relation": 4,
    "exist": 4,
    "ocr": 1,
}


def captions(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    """One-hop lines "describe red" -> "circle top left", "number red" -> "3"; the key is the last word."""
    attributes = [words_for(item) for item in scene.items]
    for i in range(7):
        shape, color = rng.choice(attributes) if attributes else ("circle", "red")
        if rng.random() < 0.35:
            shape, color = rng.choice(SHAPES), rng.choice(COLOR_NAMES)
        # Eight colours are harder to look up than three shapes, so they are keyed twice as often.
        kinds = (shape, color) if i >= 5 else (shape, color, color, f"{color} {shape}")
        key = rng.choice(kinds)
        hits = [item for item in scene.items if key in (*words_for(item), " ".join(words_for(item)[::-1]))]
        if i >= 5:
            if len(hits) <= MAX_COUNT:
                answer = str(len(hits)) if hits else "none"
                yield Ask(f"number {key}", answer, "caption", "number", f"number/{key in COLORS}", 7, 2.0)
            continue
        if len(hits) > 1:
            continue
        answer = "none"
        if hits:
            row, column = place_words(hits[0])
            if not (row and column):
                continue
            other = [w for w in words_for(hits[0]) if w not in key.split()]
            answer = " ".join([*other, row, column])
        yield Ask(f"describe {key}", answer, "caption", "describe", "describe", 0, 0.25)


def coordinates(scene: Scene, rng: random.Random) -> Iterator[Ask]:
    """Training lines about exact places and digits, and the one-hop forms of the relation questions."""
    refs = references(scene)
    for axis in ("column", "row") if refs else ():
        name, item = _pick(rng, refs)
        cell = str(int(item.cx if axis == "column" else item.cy) * 8 // SIDE + 1)
        yield Ask(f"{axis} {name}", cell, "caption", axis, axis, 0, 0.5)
        if rng.random() < 0.3:
            yield Ask(f"which {axis} is the {_noun(name)} in ?", cell, "helper", axis, axis, 0, 0.5)
        for _ in range(2):
            (name_a, a), (name_b, b) = _pick(rng, refs), _pick(rng, refs)
            truth = None if a is b else _compare(a, b, "left of" if axis == "column" else "above")
            if truth is not None:
                answer = ("left" if truth else "right") if axis == "column" else ("above" if truth else "below")
                yield Ask(f"{axis} {name_a} {name_b}", answer, "caption", f"{axis} pair", f"{axis} pair", 2, 0.7)
    if scene.number:
        i = rng.randrange(2)
        order = ("first", "second")[i]
        yield Ask(f"what is the {order} digit ?", scene.number[i], "helper", "digit", "digit", 0, 3.0)
        yield Ask(f"{order} digit", scene.number[i], "caption", "digit key", "digit", 0, 3.0)
        yield Ask("written", " ".join(scene.number), "caption", "written", "written", 0, 3.0)


def easy_ask(text: str, answer: str) -> Ask:
    """An easy-VQA question in our spelling; yes / no balances per wording."""
    words = text.lower().replace("?", " ?")
    if answer in ("yes", "no"):
        return Ask(words, answer, "easy-yesno", "easy-yesno", words, 2)
    if "color" in words:
        return Ask(words, answer, "easy-color", "easy-color", "easy-color", 8)
    return Ask(words, answer, "easy-shape", "easy-shape", "easy-shape", 3)


def training_asks(
    scene: Scene, rng: random.Random, balance: Balance, relations: tuple[str, ...], compare: bool
) -> list[Ask]:
    """The admitted questions of one training scene. `compare` adds relations and `coordinates`."""
    kept: list[Ask] = []
    for capability, ask in ASKERS.items():
        if capability == "relation" and not compare:
            continue
        candidates = list(ask_relation(scene, rng, relations) if capability == "relation" else ask(scene, rng))
        admit(candidates, _PER_SCENE[capability], rng, balance, kept)
    extra = [*captions(scene, rng), *(coordinates(scene, rng) if compare else ())]
    kept += [a for a in {a.text: a for a in extra}.values() if a.choices == 0 or balance.admit(a)]
    return kept
