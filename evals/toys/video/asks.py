"""Questions about clips, every template of them, and the training lines that prepare them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from vtprune.evals.toys.asks import Ask, Balance, admit
from vtprune.evals.toys.image.scenes import SHAPES
from vtprune.evals.toys.video.clips import COLOR_NAMES, MAX_EVENTS, Clip, Event


def _color(event: Event) -> str:
    return COLOR_NAMES[event.color]


def ask_first(clip: Clip, rng: random.Random) -> Iterator[Ask]:
    if len(clip.events) > 1:
        for word, event in (("first", clip.events[0]), ("last", clip.events[-1])):
            yield Ask(f"which color came {word} ?", _color(event), "first", word, word, len(COLOR_NAMES), 2.0)


def ask_order(clip: Clip, rng: random.Random) -> Iterator[Ask]:
    for _ in range(8 if len(clip.events) > 1 else 0):
        i, j = rng.sample(range(len(clip.events)), 2)
        text = f"did {_color(clip.events[i])} come before {_color(clip.events[j])} ?"
        yield Ask(text, "yes" if i < j else "no", "order", "order", "order", 2, 3.0)


def ask_direction(clip: Clip, rng: random.Random) -> Iterator[Ask]:
    for event in clip.events:
        if event.way:
            yield Ask(f"which way does {_color(event)} move ?", event.way, "direction", "direction", "direction", 4)


def ask_count(clip: Clip, rng: random.Random) -> Iterator[Ask]:
    yield Ask("how many shapes appear ?", str(len(clip.events)), "count", "count", "count", MAX_EVENTS, 3.0)


def ask_shape(clip: Clip, rng: random.Random) -> Iterator[Ask]:
    for event in clip.events:
        yield Ask(f"what shape is {_color(event)} ?", SHAPES[event.shape], "shape", "shape", "shape", len(SHAPES))


ASKERS = {
    "first": ask_first,
    "order": ask_order,
    "direction": ask_direction,
    "count": ask_count,
    "shape": ask_shape,
}
_PER_CLIP = {"first": 2, "order": 3, "direction": 2, "count": 1, "shape": 2}


def captions(clip: Clip, rng: random.Random, compare: bool) -> Iterator[Ask]:
    """One-hop lines: "list" -> "red blue", "rank blue" -> "2", "next red" -> "blue", "way red" -> "left".

    compare: also "first blue red" -> "red", which names what the yes and no of `order` hide.
    """
    names = [_color(event) for event in clip.events]
    for _ in range(3 if compare and len(names) > 1 else 0):
        i, j = rng.sample(range(len(names)), 2)
        yield Ask(f"first {names[i]} {names[j]}", names[min(i, j)], "caption", "pair", "pair", 0, 2.0)
    yield Ask("list", " ".join(names), "caption", "list", "list", 0, 1.0)
    for _ in range(2):
        name = rng.choice(names if rng.random() < 0.75 else COLOR_NAMES)
        rank = names.index(name) if name in names else None
        yield Ask(f"rank {name}", "none" if rank is None else str(rank + 1), "caption", "rank", "rank", 0, 1.0)
    i = rng.randrange(len(names))
    following = names[i + 1] if i + 1 < len(names) else "none"
    yield Ask(f"next {names[i]}", following, "caption", "next", "next", 0, 0.7)
    event = rng.choice(clip.events)
    yield Ask(f"way {_color(event)}", event.way or "none", "caption", "way", "way", 0, 0.7)


def training_asks(clip: Clip, rng: random.Random, balance: Balance, compare: bool) -> list[Ask]:
    """The admitted questions of one training clip and its captions; `compare` as in `captions`."""
    kept: list[Ask] = []
    for capability, ask in ASKERS.items():
        admit(list(ask(clip, rng)), _PER_CLIP[capability], rng, balance, kept)
    return kept + list({a.text: a for a in captions(clip, rng, compare)}.values())
