"""The grid of an evaluation: a cell is one way of pruning, and every cell is asked every question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtprune
from vtprune.evals.accuracy.plans import plans
from vtprune.evals.report import share
from vtprune.recipe import VERSION, Recipe, written_options


@dataclass(frozen=True)
class Cell:
    """One way of pruning: nothing at all (dense), a method at a budget, or a recipe.

    label: the method as the user wrote it, or the name of the recipe's file. keep: None for dense and for a recipe,
    which carries its own. seed: which draw of a random method this is. positions: as in `vtprune.patch`, None for the
    method's own.
    """

    label: str
    method: Any = None
    keep: float | int | None = None
    seed: int | None = None
    positions: str | None = None

    @property
    def title(self) -> str:
        """'divprune at 25 %', for people."""
        kept = "" if self.keep is None else f" at {share(self.keep)}"
        return self.label + kept + ("" if self.seed is None else f", seed {self.seed}")

    @property
    def identity(self) -> dict[str, Any]:
        """What the cell computes, as JSON: every option of its method, the defaults too, or its whole recipe."""
        what: Any = None
        if isinstance(self.method, Recipe):
            what = json.loads(self.method.to_json())
            what.pop("vtprune")  # who wrote it changes nothing
        elif self.method is not None:
            what = {"method": self.method.name, "options": written_options(self.method), "version": VERSION}
            what |= {} if self.positions is None else {"positions": self.positions}
        return {"label": self.label, "keep": self.keep, "seed": self.seed, "prunes": what}

    @property
    def document(self) -> dict[str, Any]:
        """The cell as the folder of an evaluation describes it."""
        return {"name": self.name, **self.identity}

    @property
    def name(self) -> str:
        """The name of the cell's files: readable, and different whenever what it computes is."""
        text = json.dumps(self.identity, sort_keys=True)
        plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.label)[:40]
        kept = "" if self.keep is None else f"_{self.keep}"
        drawn = "" if self.seed is None else f"_seed{self.seed}"
        return f"{plain}{kept}{drawn}_{hashlib.sha1(text.encode()).hexdigest()[:8]}"

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """The model, patched inside a `with` block, which gives the `Handle`, or None where nothing is pruned."""
        if self.method is None:
            return nullcontext()
        options: dict[str, Any] = {} if self.positions is None else {"positions": self.positions}
        return vtprune.patch(model, self.method, keep=self.keep, **options)


DENSE = Cell("dense")


def cells(
    methods: Iterable[str], keeps: Sequence[float | int], seeds: int = 3, recipes: Sequence[str | Path] = ()
) -> list[Cell]:
    """Dense, then the controls and every method at every keep, then every recipe.

    Raises ValueError for an unknown method, an option it does not have, or a file that is no recipe.
    """
    made = [
        Cell(plan.label, plan.method, plan.keep, plan.seed, plan.positions) for plan in plans(methods, keeps, seeds)
    ]
    named = [Cell(Path(path).stem, Recipe.load(path)) for path in recipes]
    return [DENSE, *made, *named]
