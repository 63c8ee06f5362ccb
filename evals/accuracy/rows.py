"""From marks to rows and tables: accuracy by kind of question beside what it costs, with intervals."""

from __future__ import annotations

import string
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.accuracy.exam import Marks
from vtprune.evals.costs import NOTES as COST_NOTES
from vtprune.evals.report import Report, Row, one_line, share
from vtprune.evals.tasks.resampling import resampled

if TYPE_CHECKING:
    from typing_extensions import Self

NOTES = (
    "answer right: generation begins with the answer; stopped right: it is exactly the answer, then the end token.",
    "blind: the dense model with the image (or clip) zeroed, or shuffled between questions.",
    "accuracy kept = (pruned - blind) / (full - blind), with the better of the two blind scores.",
    *COST_NOTES,
    "(= 25 %): the keep at which the average share over the LLM's layers is 25 %, found by trying.",
    "vs dense, vs uniform: difference of the means in points to dense, and to as many evenly spaced tokens in an "
    "average layer, where they were asked (± half of the paired 95 % interval, questions drawn anew within kinds).",
    "± half of the 95 % bootstrap interval over questions (scipy.stats.bootstrap, percentile, 2000 resamples; "
    "0 where every resample is the same, as when all answers are right).",
)


def _rows(
    marks: dict[tuple[str, float | int], list[tuple[Marks, Marks]]], asked: NDArray[np.str_], names: list[str]
) -> list[Row]:
    return with_accuracy_kept(measured(marks, asked, names))


def measured(
    marks: dict[tuple[str, float | int], list[tuple[Marks, Marks]]], asked: NDArray[np.str_], names: list[str]
) -> list[Row]:
    """A row for every method, keep and capability, and one for their mean."""
    rows = []
    for (method, keep), runs in marks.items():
        right, stopped = (np.mean([run[i] for run in runs], axis=0) for i in (0, 1))
        for name in [*names, "mean"]:
            groups = [right[asked == c] for c in (names if name == "mean" else [name])]
            halted = [stopped[asked == c].mean() for c in (names if name == "mean" else [name])]
            low, high = interval(groups)
            row: Row = {
                "method": method,
                "keep": keep,
                "capability": name,
                "n": sum(len(g) for g in groups),
                "right": float(np.mean([g.mean() for g in groups])),
                "low": low,
                "high": high,
                "stopped": float(np.mean(halted)),
            }
            if len(runs) > 1:
                each = [[r[asked == c].mean() for c in names if name in ("mean", c)] for r, _ in runs]
                row["right_by_seed"] = [float(np.mean(values)) for values in each]
            rows.append(row)
    return rows


def with_accuracy_kept(rows: list[Row]) -> list[Row]:
    """The rows beside the dense and blind scores, where these are known yet: a run may have been interrupted."""
    known = {(row["method"], row["capability"]): row["right"] for row in rows if row["keep"] == 1.0}
    for row in rows:
        name = row["capability"]
        zero, shuffled, full = (known.get((who, name)) for who in ("blind-zero", "blind-shuffle", "dense"))
        row.update(blind_zero=zero, blind_shuffle=shuffled, full=full, accuracy_kept=None)
        if zero is None or shuffled is None or full is None:
            continue
        blind = max(zero, shuffled)
        seeing = full - blind
        row["accuracy_kept"] = (row["right"] - blind) / seeing if seeing > 0.05 else None
    return rows


def interval(groups: Sequence[Marks], resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over groups of the mean over questions."""
    from scipy.stats import bootstrap

    if all(len(g) < 2 or g.min() == g.max() for g in groups):
        centre = float(np.mean([g.mean() for g in groups]))
        return centre, centre
    usable = [g if len(g) > 1 else np.repeat(g, 2) for g in groups]

    def mean(*samples: Marks, axis: int = -1) -> Marks:
        return np.mean([s.mean(axis=axis) for s in samples], axis=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one constant group among varying ones is no problem
        found = bootstrap(
            usable, mean, n_resamples=resamples, vectorized=True, method="percentile", rng=np.random.default_rng(0)
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def compare(rows: Sequence[Row], answers: Sequence[Row], asked: NDArray[np.str_], names: Sequence[str]) -> None:
    """Fill in `over_dense` and `over_uniform` of the mean rows: [difference, low, high], paired over questions.

    answers: of every method and keep its marks [n], written by `packed`, in the order of `asked`. The 95 % interval is
    that of the bootstrap over questions, drawn anew within each kind, the same ones for every row. Uniform tokens are
    compared with where they leave as many in an average layer of the LLM, to a percent.
    """
    keys = [(one["method"], one["keep"]) for one in answers]
    exact, draws = mean_and_draws(answers, asked, names)
    means = {(row["method"], row["keep"]): row for row in rows if row["capability"] == "mean"}
    uniform = [key for key in keys if key[0] == "uniform"]

    def over(mine: int, other: tuple[str, Any] | None) -> list[float] | None:
        if other is None or keys[mine] == other:
            return None
        return apart(exact, draws, mine, keys.index(other))

    for i, key in enumerate(keys):
        row = means[key]
        near = [k for k in uniform if abs(means[k]["llm_share"] - row["llm_share"]) <= 0.01]
        row["over_dense"] = over(i, ("dense", 1.0) if ("dense", 1.0) in keys else None)
        row["over_uniform"] = over(i, near[0] if near else None)


def mean_and_draws(
    answers: Sequence[Row], asked: NDArray[np.str_], names: Sequence[str]
) -> tuple[Marks, NDArray[np.float64]]:
    """([runs], [draws, runs]) the mean over kinds of every run, and that of questions drawn anew within each kind.

    A draw takes the same questions for every run.
    """
    marks = np.stack([unpacked(one["right"], len(asked)) for one in answers])
    rng = np.random.default_rng(0)
    parts = [marks[:, asked == name, None] for name in names]
    draws = np.mean([resampled(part, rng)[..., 0] for part in parts], axis=0)
    return np.mean([part.mean((1, 2)) for part in parts], axis=0), draws


def apart(exact: Marks, draws: NDArray[np.float64], mine: int, theirs: int) -> list[float]:
    """[difference, low, high] of two runs of `mean_and_draws`, with the 95 % interval."""
    low, high = np.percentile(draws[:, mine] - draws[:, theirs], [2.5, 97.5])
    return [float(exact[mine] - exact[theirs]), float(low), float(high)]


def packed(runs: Sequence[tuple[Marks, Marks]]) -> list[str]:
    """The marks of every draw, right or not, as bits in hexadecimal."""
    return [np.packbits(right.astype(bool)).tobytes().hex() for right, _ in runs]


def unpacked(texts: Sequence[str], count: int) -> Marks:
    """[count] the marks that `packed` wrote, averaged over draws."""
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count) for text in texts]
    return np.mean(bits, axis=0, dtype=np.float64)


def by_cost(row: Row) -> tuple[bool, int, float]:
    """Sorts the mean rows: the fewest visual tokens in an average layer of the LLM first, as printed, blind rows last.

    Rows of one cost stand by accuracy, the best first.
    """
    return row["method"].startswith("blind"), round(100 * row["llm_share"]), -row["right"]


def budget_text(row: Row) -> str:
    """What a row kept, as asked for: "25 %"; "25 % (= 50 %)" where that is an average share of 50 %, as was wanted."""
    wanted = "" if row.get("equal_share") is None else f" (= {share(row['equal_share'])})"
    return share(row["keep"]) + wanted


def cost_cells(row: Row) -> list[str]:
    """The cells under `COST_HEADER` of a mean row; dashes for a blind one, which is the dense model."""
    if row["method"].startswith("blind"):
        return ["–"] * len(COST_HEADER)
    flops = "–" if row["flops"] is None else f"{row['flops']:.2f}"
    return [f"{100 * row['llm_share']:.0f} %", f"{100 * row['tower_share']:.0f} %", flops, f"{row['ttft']:.2f}"]


COST_HEADER = ("LLM", "tower", "FLOPs", "TTFT")


def difference(found: Sequence[float] | None) -> str:
    """A paired difference in points with half of its interval; a dash where there is none."""
    if found is None:
        return "–"
    value, low, high = (100 * x for x in found)
    return f"{value:+.1f}±{(high - low) / 2:.1f}"


_ORDER = string.ascii_letters  # a letter for every kind of question, in files


@dataclass
class AccuracyReport(Report):
    """Accuracy by method, keep and capability; rows of the capability "mean" hold the costs and the paired differences.

    answers: of every method and keep which questions were answered right, so that a run can be gone on with. kinds: of
    every question the capability that it asks for, in the order of the answers.
    """

    answers: list[Row] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    kind = "eval"

    @property
    def body(self) -> Row:
        names = list(dict.fromkeys(self.kinds))
        kinds = {"names": names, "asked": "".join(_ORDER[names.index(kind)] for kind in self.kinds)}
        return {**super().body, "answers": self.answers, "kinds": kinds}

    @classmethod
    def of_body(cls, body: Row) -> Self:
        report = super().of_body(body)
        report.answers, names = body["answers"], body["kinds"]["names"]
        report.kinds = [names[_ORDER.index(letter)] for letter in body["kinds"]["asked"]]
        return report

    def cells(self) -> tuple[list[str], list[list[str]]]:
        names = list(dict.fromkeys(row["capability"] for row in self.rows))
        header = ["method", "kept", *COST_HEADER, *names, "vs dense", "vs uniform", "stopped", "acc. kept"]
        lines: dict[tuple[str, Any], dict[str, Row]] = {}
        for row in self.rows:
            lines.setdefault((row["method"], row["keep"]), {})[row["capability"]] = row
        return header, [self._line(by, names) for by in sorted(lines.values(), key=lambda by: by_cost(by["mean"]))]

    @staticmethod
    def _line(by: Mapping[str, Row], names: Sequence[str]) -> list[str]:
        def cell(row: Row) -> str:
            return f"{100 * row['right']:.1f}±{50 * (row['high'] - row['low']):.0f}"

        mean = by["mean"]
        kept = "–" if mean["accuracy_kept"] is None else f"{100 * mean['accuracy_kept']:.1f}"
        if mean["method"].startswith("blind"):
            kept = "–"
        over = [difference(mean.get(name)) for name in ("over_dense", "over_uniform")]
        accuracy = [cell(by[n]) for n in names]
        return [
            mean["method"], budget_text(mean), *cost_cells(mean), *accuracy, *over, f"{100 * mean['stopped']:.1f}", kept
        ]  # fmt: skip

    def to_page(self) -> str:
        """The table as a page: its title, its notes and the machine that it was measured on."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        return f"# {self.title}\n\n{self.to_markdown()}\n\n{notes}\n\n{one_line(self.environment)}\n"

    def plot(self, path: str | Path) -> Path:
        """Accuracy against what it costs: the mean large, every capability small beside it."""
        from vtprune.evals.figures import pareto

        return pareto(self.rows, self.title, path)
