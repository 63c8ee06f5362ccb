"""The passes over the questions: which method at which share, the controls first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch

import vtprune
from vtprune.parsing import parse_method
from vtprune.signals import kind_of
from vtprune.types import Method, Positions

CONTROLS = ("random", "uniform")


@dataclass(frozen=True)
class Plan:
    """One pass over the questions: a label for the table, the method and how much it keeps (no method: dense).

    blind: how the images are hidden ("zero" or "shuffle"), None if they are not. positions: as in `vtprune.patch`, None
    for "keep". equal: the average share over the LLM's layers that `keep` was set to reach, None where `keep`
    is what was asked for.
    """

    label: str
    method: Method | None
    keep: float | int
    seed: int | None = None
    blind: str | None = None
    positions: str | None = None
    equal: float | None = None

    @property
    def needs_tower(self) -> bool:
        """Whether the pass must run the vision tower: a stage acts inside it, or reads a signal from it."""
        stages = self.method.stages(self.keep, depth=0) if self.method else []
        return any(isinstance(s.where, tuple) or (s.where == "llm" and s.method.needs) for s in stages)

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """The model, patched inside a `with` block."""
        if self.method is None:
            return nullcontext()
        options: dict[str, Any] = {} if self.positions is None else {"positions": self.positions}
        return vtprune.patch(model, self.method, keep=self.keep, **options)


def plans(methods: Iterable[str], keeps: Sequence[float | int], seeds: int = 3) -> list[Plan]:
    """Every method at every keep, the controls first; a method with a `seed` option is run with `seeds` seeds.

    methods: names, with options of the method or `positions`, which is one of its stages: "fastv:positions=compact".
    """
    made: list[Plan] = []
    for text in dict.fromkeys([*CONTROLS, *methods]):
        name, options = parse_method(text)
        positions = options.pop("positions", None)
        if positions not in (None, *get_args(Positions)):
            raise ValueError(f"method {text!r}: positions={positions} is neither keep nor compact")
        method = vtprune.create(name, **options)
        draws: list[int | None] = list(range(seeds)) if is_random(method) and "seed" not in options else [None]
        for keep in keeps:
            for seed in draws:
                drawn = method if seed is None else dataclasses.replace(method, seed=seed)  # type: ignore[type-var]
                made.append(Plan(text, drawn, keep, seed, positions=positions))
    return made


def both_positions(methods: Iterable[str]) -> list[str]:
    """The methods, and behind each that officially renumbers position ids the same with ids renumbered."""
    out: list[str] = []
    for text in methods:
        name, options = parse_method(text)
        cls = type(vtprune.create(name))
        out.append(text)
        if "positions" not in options and cls.official_positions == "compact":
            out.append(f"{text}{',' if options else ':'}positions=compact")
    return out


def is_random(method: Method) -> bool:
    """Whether the result depends on the seed: another seed is asked and another answer comes."""
    if not any(f.name == "seed" for f in dataclasses.fields(method)):  # type: ignore[arg-type]
        return False
    generator = torch.Generator().manual_seed(0)
    signals = {s: torch.rand((64, 8) if kind_of(s).vector else (64,), generator=generator) for s in method.needs}
    v = vtprune.Visual(torch.randn(64, 8, generator=generator), budget=16, grid=(1, 8, 8), signals=signals)
    first, second = (dataclasses.replace(method, seed=s)(v).idx for s in (0, 1))  # type: ignore[type-var]
    return not torch.equal(first, second)
