"""The columns of one row of a data file, checked: its question, pictures or film, answers and options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.evals.tasks.sample import LETTERS
from vtprune.evals.tasks.tables import Row

COLUMNS = (
    "id", "task", "question", "image", "images", "video", "answer", "answers", "options", "choices", "metric",
)  # fmt: skip


def check_names(row: Row) -> None:
    """ValueError where the row has a column that is not one of `COLUMNS`."""
    unknown = [str(name) for name in row.values if name not in COLUMNS]
    if unknown:
        plural = "s" if len(unknown) > 1 else ""
        raise ValueError(
            f"{row.where}: unknown column{plural} {', '.join(unknown)}; the known ones are {', '.join(COLUMNS)}"
        )


def text_of(row: Row, column: str) -> str | None:
    """A column of text, stripped; a number is written as text. None where it is empty."""
    value = row.values.get(column)
    return None if value is None else _text(row, column, value) or None


def question_of(row: Row) -> str:
    """The question; ValueError where there is none."""
    question = text_of(row, "question")
    if question is None:
        raise ValueError(f"{row.where}: there is no question: write it in the column question")
    return question


def media_of(row: Row, folder: Path) -> tuple[tuple[Any, ...], Any]:
    """(pictures, film): each a path below `folder`, an absolute path, or bytes. One of the two is there.

    Raises ValueError where there is neither or both, or where a value is none of these.
    """
    column, images = _either(row, "image", "images")
    pictures = tuple(_medium(row, column, one, folder) for one in _listed(images))
    film = row.values.get("video")
    if isinstance(film, list | tuple):
        raise ValueError(f"{row.where}: video holds a list: name one file")
    if pictures and film is not None:
        raise ValueError(f"{row.where}: it has both {column} and video: ask about one of them")
    if not pictures and film is None:
        raise ValueError(
            f"{row.where}: it has neither an image nor a video, and only visual tokens are pruned: leave out questions "
            "about text alone"
        )
    return pictures, None if film is None else _medium(row, "video", film, folder)


def answers_of(row: Row) -> tuple[str, ...]:
    """The right answers, none where the sample has no label; ValueError where one of several is empty."""
    column, value = _either(row, "answer", "answers")
    answers = tuple(_text(row, column, one) for one in _listed(value))
    if len(answers) > 1 and not all(answers):
        raise ValueError(f"{row.where}: one of its {len(answers)} answers is empty: write it or leave it out")
    return answers if any(answers) else ()


def options_of(row: Row) -> tuple[str, ...]:
    """The options of a multiple-choice question, none where it is another kind; ValueError for what is no choice."""
    column, value = _either(row, "options", "choices")
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{row.where}: {column} is {value!r}: write a list of texts")
    options = tuple(_text(row, column, one) for one in value)
    if options and not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{row.where}: {column} has {len(options)} of them: give between 2 and {len(LETTERS)}")
    if not all(options) or len(set(options)) < len(options):
        raise ValueError(f"{row.where}: {column} {list(options)} has an empty or a double one: write each once")
    return options


def _either(row: Row, one: str, other: str) -> tuple[str, Any]:
    """(the name that is used, its value) of a column that has two names."""
    if one in row.values and other in row.values:
        raise ValueError(f"{row.where}: it has both {one} and {other}, two names of one column: use one of them")
    name = other if other in row.values else one
    return name, row.values.get(name)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _text(row: Row, column: str, value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError(f'{row.where}: {column} is {str(value).lower()}: write it as text, "yes" or "no"')
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps becomes one of floats in pandas
    if not isinstance(value, str | int | float):
        kind = "empty" if value is None else f"of type {type(value).__name__}"
        raise ValueError(f"{row.where}: {column} is or holds something {kind}: write text or a number")
    return str(value).strip()


def _medium(row: Row, column: str, value: Any, folder: Path) -> Path | bytes:
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:  # how datasets stores a picture or a video
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if not value else f"a {type(value).__name__}"
        raise ValueError(f"{row.where}: {column} is {kind}: give the path of a file, or its bytes in parquet")
    return folder / value
