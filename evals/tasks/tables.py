"""The rows of a data file: JSON lines, a JSON list, parquet, or the folder of a saved dataset."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KINDS = "a .jsonl, .json or .parquet file, or the folder of a dataset that datasets' save_to_disk has written"


@dataclass(frozen=True)
class Row:
    """One row: its number from 1, where it stands, for messages, and its columns without the empty ones."""

    number: int
    where: str
    values: dict[str, Any]


def rows(path: Path) -> list[Row]:
    """All rows of a data file; at least one.

    Raises FileNotFoundError where there is nothing at `path`, ImportError where the package that reads it is not
    installed, and ValueError where it is of another kind, damaged or empty.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: name {KINDS}")
    if path.is_dir():
        found = _numbered(path, _saved(path), "row")
    elif path.suffix.lower() == ".parquet":
        found = _numbered(path, _parquet(path), "row")
    elif path.suffix.lower() == ".json":
        found = _numbered(path, _list(path), "item")
    elif path.suffix.lower() == ".jsonl":
        found = list(_lines(path))
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}: name {KINDS}")
    if not found:
        raise ValueError(f"{path} is empty: give it at least one question")
    return found


def _row(number: int, where: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no JSON object: write the columns of a sample in braces")
    return Row(number, where, {name: v for name, v in values.items() if not _missing(v)})


def _missing(value: Any) -> bool:
    """Nothing, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _numbered(path: Path, values: list[Any], unit: str) -> list[Row]:
    return [_row(i, f"{path}, {unit} {i}", one) for i, one in enumerate(values, 1)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}): save it as UTF-8") from error


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would also cut inside of strings
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield _row(number, where, json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} is no JSON ({error.msg} at column {error.colno}): write one object on a line"
                ) from error


def _list(path: Path) -> list[Any]:
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno} is no JSON ({error.msg} at column {error.colno}): correct it, or end the "
            "name of a file with one object on a line in .jsonl"
        ) from error
    if not isinstance(found, list):
        raise ValueError(f"{path} holds no list: write the samples as a JSON list of objects")
    return found


def _parquet(path: Path) -> list[Any]:
    if find_spec("pyarrow") is None:
        raise ImportError(f"reading {path} needs pyarrow, which is not installed: run pip install pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}): write it again") from error


def _saved(path: Path) -> list[Any]:
    if (path / "dataset_dict.json").exists():
        splits = json.loads(_text(path / "dataset_dict.json"))["splits"]
        raise ValueError(f"{path} holds several splits: name the folder of one of them, {', '.join(splits)}")
    if not (path / "state.json").exists():
        raise ValueError(f"{path} holds no saved dataset (it has no state.json): name {KINDS}")
    if find_spec("datasets") is None:
        raise ImportError(f"reading the folder {path} needs datasets, which is not installed: run pip install datasets")
    from datasets import load_from_disk

    try:
        table = load_from_disk(str(path)).with_format("arrow")[:]  # as stored: pictures stay encoded
    except Exception as error:  # of Arrow, of JSON, or of the system
        raise ValueError(f"{path} cannot be read as a saved dataset ({error}): save it again") from error
    return table.to_pylist()
