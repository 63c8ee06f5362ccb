"""What an evaluation or a benchmark returns: rows and the machine they were measured on; to table, JSON, plot."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from typing_extensions import Self

Row = dict[str, Any]


def as_document(kind: str, body: Row) -> Row:
    """`body` as commands print and save it: behind the name of its schema, and the version of vtprune that made it.

    kind: the command, with the option that changes what is told: "bench", "bench-overhead". What each holds stands in
    examples/guides/results.md.
    """
    import vtprune

    return {"schema": f"vtprune.{kind}/1", "version": vtprune.__version__, **body}


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file, whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


@dataclass
class Report:
    """Rows plus the environment they were measured in.

    rows: one flat mapping of JSON values per measurement. environment: see `environment`.
    notes: sentences a reader needs beside the numbers (what blind means, which formula was used).
    """

    title: str
    rows: list[Row]
    environment: Row = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    kind = ""  # names the schema of the JSON, see `as_document`; every report that is printed or saved has one

    @property
    def body(self) -> Row:
        """What the JSON holds behind schema and version."""
        return {"title": self.title, "environment": self.environment, "notes": list(self.notes), "rows": self.rows}

    def to_json(self) -> str:
        """Everything, as one JSON object; NaN never appears (a missing value is null)."""
        return json.dumps(as_document(self.kind, self.body), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write `to_json()` to `path`, folders included, and return the path; whole or not at all."""
        write_json(Path(path), as_document(self.kind, self.body))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, so that a run can be gone on with; ValueError for any other file."""
        try:
            return cls.of_body(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds nothing that can be gone on with: name another folder") from error

    @classmethod
    def of_body(cls, body: Row) -> Self:
        """The report of such a `body`."""
        return cls(body["title"], body["rows"], body["environment"], tuple(body["notes"]))

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(header, lines) of the printed table; reports with a better layout override this."""
        header = list(self.rows[0]) if self.rows else []
        return header, [[show(row.get(name)) for name in header] for row in self.rows]

    def to_table(self) -> Table:
        """A rich table; brackets in names are no markup."""
        from rich.markup import escape
        from rich.table import Table

        header, lines = self.cells()
        table = Table(title=escape(self.title), caption=escape("\n".join(self.notes)) or None, caption_justify="left")
        for i, name in enumerate(header):
            table.add_column(escape(name).replace("-", "\n"), justify="left" if i == 0 else "right", no_wrap=i == 0)
        for line in lines:
            table.add_row(*(escape(cell) for cell in line))
        return table

    def tables(self) -> list[Table]:
        """All that is printed, one after the other."""
        return [self.to_table()]

    def to_markdown(self) -> str:
        """The same table for a README."""
        header, lines = self.cells()
        rule = ["---"] + ["---:"] * (len(header) - 1)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])

    def plot(self, path: str | Path) -> Path:
        """Draw the report; only reports that know what to draw override this."""
        raise NotImplementedError(f"{type(self).__name__} has no plot")


def show(value: Any) -> str:
    """A cell: three decimals for floats below 10, a dash for a missing value."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def environment(device: str, dtype: str, batch: int, **more: Any) -> Row:
    """Machine, processors, versions, commit and time of a measurement; a number without them is no result."""
    import torch

    import vtprune

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "device": device,
        "dtype": dtype,
        "batch": batch,
        "python": platform.python_version(),
        "versions": {"vtprune": vtprune.__version__, **_versions(["torch", "transformers", "triton"])},
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str], file: str) -> None:
    """ValueError where what the file holds was measured with another value of one of `names` than it is now."""
    for name in names:
        if before.get(name) != now[name]:
            raise ValueError(
                f"what is there was measured with {name} {before.get(name)}, and now it is {now[name]}: name another "
                f"folder, or delete {file} in this one"
            )


def resumed(before: Row, now: Row, names: Iterable[str], file: str) -> Row:
    """The environment of a run that is gone on with, all its commits named; ValueError as `check_same` says."""
    check_same(before, now, names, file)
    commits = [*(before["commit"] or "").split(", "), now["commit"]]
    return {**before, "commit": ", ".join(dict.fromkeys(filter(None, commits))) or None}


def one_line(env: Mapping[str, Any]) -> str:
    """The environment in one sentence, to stand under a table."""
    processor = env["gpu"] or f"{env['cpu']}, {env['cpu_threads']} thread(s)"
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if number)
    return f"{processor}; {env['dtype']}, batch {env['batch']}; {versions}; commit {env['commit']}; {env['time']}"


def driver() -> str | None:
    """Version of NVIDIA's kernel driver; None where the kernel does not tell."""
    told = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3,}\.\d[\d.]*", told.read_text()) if told.exists() else None
    return found[0] if found else None


def commit() -> str | None:
    """Commit of the checkout this file lies in, '+' if it has local changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(where: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(where), *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _versions(names: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def share(keep: float | int | None) -> str:
    """0.25 -> '25 %', 64 -> '64'; a dash for a recipe, which carries its own budgets."""
    if keep is None:
        return "–"
    return f"{100 * keep:.3g} %" if isinstance(keep, float) else str(keep)
