"""The folder of an evaluation: what was asked, a line for every answer, and what is finished, so that a run can go on.

run.json                     what is evaluated: model, data, cells. A folder belongs to one such document.
cells/TASK/CELL.jsonl        a line for every sample, written as it is answered
cells/TASK/CELL.json         the cell's end: it is there when, and only when, the cell is finished
cells/TASK/CELL.failed.json  why the cell could not be finished; it is tried again by the next run
eval.json, timing.json       the tables: scores, which a second run repeats, and times, which it does not
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from vtprune.evals.report import write_json

SCHEMA, VERSION = "vtprune.eval", 1
Line = dict[str, Any]


@dataclass(frozen=True)
class ResultFolder:
    """The files of one evaluation below `path`."""

    path: Path

    def open(self, document: Line) -> None:
        """Begin the evaluation that `document` describes, or go on with it; cells may be added.

        Raises ValueError where the folder holds another evaluation, or one that another version has written, and names
        what differs; FileNotFoundError where the folder can not be made.
        """
        document = {"schema": SCHEMA, "version": VERSION, **document}
        if not (self.path / "run.json").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "run.json", document)
            return
        found = self.document()
        keys = [key for key in document if key not in ("environment", "cells") and found.get(key) != document[key]]
        if keys:
            told = "; ".join(f"{key} was {_short(found.get(key))}, now {_short(document[key])}" for key in keys)
            raise ValueError(f"{self.path} holds another evaluation ({told}): name another folder or delete it")
        known = {cell["name"]: cell for cell in found["cells"]}
        new = [cell for cell in document["cells"] if cell["name"] not in known]
        for cell in new:
            _check_new(cell, found["cells"], self.path)
        if new:
            write_json(self.path / "run.json", {**found, "cells": [*found["cells"], *new]})

    def check_ours(self) -> None:
        """Raise ValueError where the folder holds other things than an evaluation, among which ours would be lost."""
        if self.path.exists() and not (self.path / "run.json").exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no evaluation: name another folder")

    def document(self) -> Line:
        """What run.json says; ValueError where it is not there, no JSON, or of another version."""
        file = self.path / "run.json"
        if not file.exists():
            raise ValueError(f"{self.path} holds no evaluation: it has no run.json, which `vtprune eval --out` writes")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is no JSON ({error}): delete the folder and evaluate again") from error
        if found.get("schema") != SCHEMA or found.get("version") != VERSION:
            raise ValueError(
                f"{file} is version {found.get('version')!r} of {found.get('schema')!r}, and this vtprune reads "
                f"version {VERSION} of {SCHEMA!r}: name another folder"
            )
        return found

    def lines_of(self, task: str, cell: str) -> list[Line]:
        """The lines that are there, finished or not. A last line that was cut off in writing is left out."""
        file = self._file(task, cell, ".jsonl")
        if not file.exists():
            return []
        whole = file.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.decode("utf-8").splitlines()]

    def end_of(self, task: str, cell: str) -> Line | None:
        """What was written at the end of a finished cell; None while it is not finished."""
        return _read(self._file(task, cell, ".json"))

    def failure_of(self, task: str, cell: str) -> Line | None:
        """Why a cell could not be finished: {"error": ...}; None where nothing failed, or a later run finished it."""
        return None if self.end_of(task, cell) else _read(self._file(task, cell, ".failed.json"))

    def append(self, task: str, cell: str, lines: Iterable[Line], *, keep: int = 0) -> Iterator[Line]:
        """Write the lines of a cell as they come, behind the first `keep` that are there; yields each once written."""
        before = self.lines_of(task, cell)[:keep]
        file = self._file(task, cell, ".jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text("".join(_line(line) for line in before), encoding="utf-8")
        part.replace(file)
        with file.open("a", encoding="utf-8") as out:
            for line in lines:
                _write_line(out, line)
                yield line

    def finish(self, task: str, cell: str, end: Line) -> None:
        """Mark a cell as finished."""
        write_json(self._file(task, cell, ".json"), end)
        self._file(task, cell, ".failed.json").unlink(missing_ok=True)

    def fail(self, task: str, cell: str, error: str) -> None:
        """Write down why a cell could not be finished."""
        write_json(self._file(task, cell, ".failed.json"), {"error": error})

    def picture(self, task: str, cell: str, sample: str) -> Path:
        """Where a drawing of what was kept of a sample belongs."""
        return self._file(task, cell, "") / f"{quote(sample, safe='')}.png"

    def _file(self, task: str, cell: str, ending: str) -> Path:
        return self.path / "cells" / quote(task, safe="") / f"{cell}{ending}"


def _check_new(cell: Line, known: Iterable[Line], path: Path) -> None:
    """Raise ValueError if a cell of that label and budget is there, and prunes by other options or another recipe."""
    for other in known:
        if all(cell[key] == other[key] for key in ("label", "keep", "seed")):
            raise ValueError(
                f"{path} holds {cell['label']} pruning by {_short(other['prunes'])}, and now it is "
                f"{_short(cell['prunes'])}: name another folder or delete this one"
            )


def _line(line: Line) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _write_line(out: IO[str], line: Line) -> None:
    out.write(_line(line))
    out.flush()


def _read(file: Path) -> Line | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 160 else text[:157] + "..."
