"""Samples that a pruned model answers otherwise than the dense one, with the tokens it kept drawn over the picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtprune.evals.accuracy.plans import CONTROLS
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.tasks.gather import Asked, Group
from vtprune.evals.tasks.metrics import METRICS

SAMPLES, ANSWERS = 8, 8  # shown of a task, and of a sample
SIDE = 640  # pixels of the longer edge of a drawing
MISSING = "Only the first changed answers of every method are drawn, so some have no picture."


@dataclass(frozen=True)
class Answer:
    """What one way of pruning said. mark: 0..1, None without a label; picture: a data URI, "" if there is none."""

    method: str
    title: str
    text: str
    mark: float | None
    picture: str = ""


@dataclass(frozen=True)
class Difference:
    """A sample, what the dense model said, and the other answers. missing: why there is no picture, "" if there is."""

    task: str
    id: str
    question: str
    expected: Sequence[str]
    dense: Answer
    others: list[Answer]
    missing: str = ""


def differences(folder: ResultFolder, tasks: Sequence[Asked]) -> list[Difference]:
    """At most 8 samples of every task, those first of which there are drawings and that most methods miss."""
    return [one for asked in tasks if asked.dense is not None for one in _of_task(folder, asked, asked.dense)]


def _of_task(folder: ResultFolder, asked: Asked, dense: Group) -> list[Difference]:
    changed: dict[int, list[Group]] = {}
    for group in asked.groups:
        alone = Group(group.label, group.keep, group.key, group.draws[:1], group.ends[:1])
        for i in (alone.agreement(dense) == 0).nonzero()[0].tolist() if group is not dense else ():
            changed.setdefault(i, []).append(group)

    def drawn(i: int, group: Group) -> bool:
        return folder.picture(asked.name, group.ends[0]["cell"]["name"], group.draws[0][i]["id"]).exists()

    recorded = {i: any(drawn(i, group) for group in groups) for i, groups in changed.items()}
    first = sorted(changed, key=lambda i: (not recorded[i], -len(changed[i]), i))[:SAMPLES]
    # An answer with a picture says more than one without, and a method more than a control.
    shown = {i: sorted(changed[i], key=lambda g: (not drawn(i, g), g.label in CONTROLS))[:ANSWERS] for i in first}
    return [_difference(folder, asked, dense, i, groups) for i, groups in shown.items()]


def _difference(folder: ResultFolder, asked: Asked, dense: Group, i: int, groups: Sequence[Group]) -> Difference:
    line = dense.draws[0][i]
    others = []
    for group in groups:
        file = folder.picture(asked.name, group.ends[0]["cell"]["name"], line["id"])
        others.append(_answer(asked, group, group.draws[0][i], _uri(file)))
    missing = "" if all(other.picture for other in others) else MISSING
    question = line.get("question") or "(the question was not recorded)"
    return Difference(
        asked.name, line["id"], question, line.get("answers") or (), _answer(asked, dense, line), others, missing
    )


def _answer(asked: Asked, group: Group, line: Line, picture: str = "") -> Answer:
    metric, parts = METRICS.get(asked.metric), line["parts"]
    mark = None if parts is None else parts[0 if metric is None else metric.first]
    return Answer(group.label, group.title, line["answer"], mark, picture)


def _uri(file: Path) -> str:
    """The drawing as a data URI of at most 640 pixels; "" where there is none."""
    from PIL import Image

    if not file.exists():
        return ""
    out = io.BytesIO()
    with Image.open(file) as picture:
        small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    small.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
