"""What lmms-eval returns of a task, read: its score, the mark and the answer of every sample, what the calls cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vtprune.evals.tasks.folder import Line


def score(aggregates: Mapping[str, Any], metrics: Sequence[str]) -> float | None:
    """The sum of the metrics, by the first of a task's filters; None where one of them is no number."""
    values = [next((v for key, v in aggregates.items() if key.split(",")[0] == metric), None) for metric in metrics]
    numbers = [float(v) for v in values if isinstance(v, (int, float))]
    return sum(numbers) if values and len(numbers) == len(values) and all(map(math.isfinite, numbers)) else None


def mark(sample: Mapping[str, Any], metrics: Sequence[str]) -> float | None:
    """The sample's own mark, as many tasks write it down: a number, or a number called score."""
    value = sample.get(metrics[0]) if len(metrics) == 1 else None
    value = value.get("score") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, (int, float)) else None


def text(answer: Any) -> str:
    """The text in the lists of responses that lmms-eval nests by request and by repeat."""
    while isinstance(answer, (list, tuple)) and answer:
        answer = answer[0]
    return answer if isinstance(answer, str) else str(answer)


def costs(visits: Any) -> dict[Any, Line]:
    """By number of the document: its tokens and seconds, where the calls of the model could be told apart."""
    order = None if visits is None else visits.order
    if order is None or len(order) != len(visits.kept):
        return {}
    rows = zip(order, visits.fed, visits.lengths, visits.kept)
    bare = {"visual_tokens": [0, 0], "seconds": {}}  # a question without a picture
    return {
        key[2]: {**bare, "prompt_tokens": [fed, left]} if call is None else call.line() for key, fed, left, call in rows
    }
