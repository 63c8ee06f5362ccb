"""Samples that a pruned model answers otherwise than the dense one, with the tokens it kept drawn over the picture."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.evals.accuracy.plans import CONTROLS
from vtprune.evals.report import Row
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.tasks.gather import Asked, Group
from vtprune.evals.tasks.metrics import METRICS
from vtprune.evals.tasks.sample import Sample

if TYPE_CHECKING:
    from PIL import Image

SAMPLES, ANSWERS = 8, 8  # shown of a task, and of a sample
SIDE, FRAME = 224, 112  # pixels of the longer edge of a picture, and of a frame of a film


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


class Source:
    """The samples of the run, read again from the data file that run.json names, and only if it is still the same."""

    def __init__(self, folder: ResultFolder, document: Row) -> None:
        self.missing = ""
        self._samples: dict[tuple[str, str], Sample] = {}
        data = document.get("data")
        if data is None:
            self.missing = "The run names no data file to take the picture from."
            return
        file = next((f for f in (Path(data["file"]), folder.path / data["file"]) if f.exists()), None)
        if file is None:
            self.missing = f"The data file {data['file']} is gone, so there is no picture."
        elif file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != data["sha256"]:
            self.missing = f"The data file {data['file']} has changed since the run, so there is no picture."
        else:
            self._read(file, data.get("frames") or 8)

    def _read(self, file: Path, frames: int) -> None:
        from vtprune.evals.tasks.data import read

        try:
            found = read(file, frames=frames)
        except (ValueError, OSError) as error:
            self.missing = f"The data file cannot be read again ({error}), so there is no picture."
            return
        self._samples = {(sample.task, str(sample.id)): sample for sample in found}

    def sample(self, task: str, one: str) -> Sample | None:
        """The sample of a line; None where the file does not hold it, or cannot be used."""
        return self._samples.get((task, one))


def differences(folder: ResultFolder, document: Row, tasks: Sequence[Asked]) -> list[Difference]:
    """At most 8 samples of every task, those first whose kept tokens were recorded and that most methods miss."""
    source = Source(folder, document)
    return [one for asked in tasks if asked.dense is not None for one in _of_task(asked, asked.dense, source)]


def _of_task(asked: Asked, dense: Group, source: Source) -> list[Difference]:
    pruned = [group for group in asked.groups if group is not dense]
    changed: dict[int, list[Group]] = {}
    for group in pruned:
        alone = Group(group.label, group.keep, group.key, group.draws[:1], group.ends[:1])
        for i in (alone.agreement(dense) == 0).nonzero()[0].tolist():
            changed.setdefault(i, []).append(group)
    recorded = {i: any("kept" in group.draws[0][i] for group in groups) for i, groups in changed.items()}
    first = sorted(changed, key=lambda i: (not recorded[i], -len(changed[i]), i))[:SAMPLES]
    return [_difference(asked, dense, i, changed[i], source) for i in first]


def _difference(asked: Asked, dense: Group, i: int, groups: Sequence[Group], source: Source) -> Difference:
    line = dense.draws[0][i]
    sample = source.sample(asked.name, line["id"])
    # An answer with a picture says more than one without, and a method more than a control.
    shown = sorted(groups, key=lambda g: ("kept" not in g.draws[0][i], g.label in CONTROLS))[:ANSWERS]
    others, missing = [], source.missing
    for group in shown:
        picture, why = picture_of(sample, group.draws[0][i])
        missing = missing or why
        others.append(_answer(asked, group, group.draws[0][i], picture))
    question = line.get("question") or (sample.prompt if sample else "(the question was not recorded)")
    expected = line.get("answers") or (sample.answers if sample else ())
    return Difference(asked.name, line["id"], question, expected, _answer(asked, dense, line), others, missing)


def _answer(asked: Asked, group: Group, line: Line, picture: str = "") -> Answer:
    metric, parts = METRICS.get(asked.metric), line["parts"]
    mark = None if parts is None else parts[0 if metric is None else metric.first]
    return Answer(group.label, group.title, line["answer"], mark, picture)


def picture_of(sample: Sample | None, line: Line) -> tuple[str, str]:
    """(data URI, why there is none): one of the two is empty."""
    if sample is None:
        return "", "This sample is not in the data file, so there is no picture."
    if "kept" not in line:
        return "", "Kept tokens are recorded for the first samples only, so some answers have no picture."
    try:
        return _uri(_drawn(sample, line["kept"], line["grid"])), ""
    except (ValueError, OSError) as error:
        return "", f"The kept tokens cannot be drawn: {error}"


def _drawn(sample: Sample, kept: Sequence[Sequence[int]], grids: Sequence[Any]) -> Image.Image:
    """The kept tokens over the whole picture, over each of several pictures, or over the frames of a film."""
    import torch
    from PIL import Image

    from vtprune.show import Kept, contact_sheet, draw, panels

    if any(grid is None for grid in grids):
        raise ValueError("they form no grid that is the whole picture")
    units = [Kept(t * h * w, torch.tensor(idx, dtype=torch.long), (t, h, w), ()) for idx, (t, h, w) in zip(kept, grids)]
    if sample.film is not None:
        return contact_sheet(sample.film, units, "frames", side=FRAME, columns=4)
    if len(units) != len(sample.pictures):
        raise ValueError(f"there are {len(sample.pictures)} pictures and {len(units)} sets of tokens")
    drawn = [
        draw(picture, panel, SIDE)
        for picture, unit in zip(sample.pictures, units)
        for panel in panels(unit, picture.width / picture.height)
    ]
    sheet = Image.new("RGB", (sum(d.width for d in drawn), max(d.height for d in drawn)), "white")
    for i, one in enumerate(drawn):
        sheet.paste(one, (sum(d.width for d in drawn[:i]), 0))
    return sheet


def _uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
