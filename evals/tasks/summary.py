"""The tables of an evaluation, made of the answers in its folder and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vtprune.evals.report import Report, Row, one_line, share
from vtprune.evals.tasks import scores, wording
from vtprune.evals.tasks.folder import ResultFolder
from vtprune.evals.tasks.gather import Asked, gather, on_all
from vtprune.evals.tasks.scores import MEAN
from vtprune.evals.tasks.timings import mean_times, timed

NOTES = (
    "relative = score / dense score of the same run, in brackets its 95 % interval (paired bootstrap over samples, "
    "2000 resamples); mean: the plain mean of relative over tasks.",
    "agreement: the share of answers equal to those of the dense model; draws of random methods are averaged.",
    "LLM, tower: the share of the visual tokens in an average layer of either; the rows of a task are ordered by the "
    "LLM's. FLOPs: of tower, projector and LLM prefill, of dense = 1.",
)
TIMES = (
    "Medians over samples, the first of every cell left out as a warm-up; mean: means over tasks of the medians.",
    "TTFT: from the vision tower's first step to the first logits, in `generate` as it answered.",
    "The speed-up is dense TTFT / TTFT, the share of the selection its time / dense prefill.",
)


class Times(Report):
    """Times by task, method and budget."""

    kind = "eval-times"


@dataclass
class Summary(Report):
    """Scores as rows, beside `timing`, their times; `document` is what run.json says.

    `to_json` holds scores only: two runs on one machine give the same text. Numbers are rounded to six decimals, below
    which the order of a sum shows.
    """

    timing: Times = field(default_factory=lambda: Times("", []))
    document: Row = field(default_factory=dict)

    kind = "eval-data"

    @property
    def body(self) -> Row:
        return {"title": self.title, "rows": self.rows, "notes": list(self.notes)}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(header, lines): scores and times side by side; no means where there is one task only."""
        header = [
            "task",
            "method",
            "kept",
            "score",
            "relative",
            "agreement",
            "LLM",
            "tower",
            "FLOPs",
            "TTFT ms",
            "speed-up",
            "> random",
        ]
        alone = len({row["task"] for row in self.rows} - {MEAN}) < 2
        pairs = [(row, time) for row, time in zip(self.rows, self.timing.rows) if not (alone and row["task"] == MEAN)]
        tasks = list(dict.fromkeys(row["task"] for row, _ in pairs))
        pairs.sort(key=lambda pair: (tasks.index(pair[0]["task"]), by_cost(pair[0])))
        return header, [_line(row, time) for row, time in pairs]

    def write(self, folder: ResultFolder) -> None:
        """Write eval.json, timing.json and eval.md into the folder."""
        self.save(folder.path / "eval.json")
        self.timing.save(folder.path / "timing.json")
        told = [f"# {self.title}", self.to_markdown(), *self.notes, one_line(self.environment)]
        (folder.path / "eval.md").write_text("\n\n".join(told) + "\n", encoding="utf-8")


def summarise(folder: ResultFolder) -> Summary:
    """The tables of what is finished in the folder; what is not is named in the notes and counts for nothing.

    Rows stand by task, in the order of the run, and end with task "mean". Raises ValueError where the folder is no
    evaluation, or its cells answer different samples.
    """
    document = folder.document()
    tasks = gather(folder)
    rng = np.random.default_rng(0)
    by_task = [scores.scored(asked, rng) for asked in tasks]
    over_all = scores.means(tasks, by_task)
    notes = [*NOTES, *_limited(document), *(text for pair in zip(tasks, by_task) for text in scores.remarks(*pair))]
    notes += [text for rows in by_task for text in scores.beaten(rows)]
    of_mean = scores.beaten(over_all, relative=True)
    notes += of_mean if len(tasks) > 1 else []  # with one task they say the same again
    notes += _without_mean(tasks)
    rows = [_rounded(one.row) for one in [*(one for rows in by_task for one in rows), *over_all]]
    times = [timed(asked) for asked in tasks]
    times_of_all = [*(row for of_task in times for row in of_task), *mean_times(tasks, times)]
    environment = document.get("environment", {})
    timing = Times(f"Times of {document['model']}", times_of_all, environment, TIMES)
    return Summary(f"Evaluation of {document['model']}", rows, environment, tuple(notes), timing, document)


def _without_mean(tasks: Sequence[Asked]) -> list[str]:
    """A sentence for every way of pruning that some tasks lack."""
    whole = set(on_all(tasks))
    partial = {g.key: g.title for asked in tasks for g in asked.groups if g.key not in whole}
    lacking = {key: [a.name for a in tasks if key not in [g.key for g in a.groups]] for key in partial}
    return [f"{partial[key]} has no mean: it is not finished on {', '.join(names)}." for key, names in lacking.items()]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def by_cost(row: Row) -> tuple[float, float]:
    """Sorts the rows of a task: the fewest visual tokens in an average layer first, of as many the best first."""
    tokens = float("inf") if row["visual_tokens"] is None else round(row["visual_tokens"][1])
    return tokens, -(row["relative"] or 0)


def _limited(document: Row) -> list[str]:
    limit = document.get("settings", {}).get("limit")
    told = [] if limit is None else [f"Only the first {limit} samples of every task were asked (--limit)."]
    return told + [f"{task} was not run: {why}" for task, why in document.get("missing", {}).items()]


def _line(row: Row, time: Row) -> list[str]:
    return [
        row["task"],
        row["method"],
        wording.NONE if row["keep"] is None else share(row["keep"]),
        wording.score_text(row["score"]),
        wording.percent(row["relative"]) + wording.bounds(row),
        wording.percent(row["agreement"]),
        wording.llm_share(row),
        wording.share_of(row["tower_share"]),
        wording.flops(row["flops"]),
        wording.milliseconds(time["ttft_ms"]),
        wording.times(time["speedup"]),
        wording.verdict(row["beats_random"]),
    ]
