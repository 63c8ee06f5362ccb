"""Which document of lmms-eval each call of a model belongs to, and the length of its prompt once it is pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vtprune.core.result import Last

Key = tuple[Any, ...]  # (task, split, number of the document)


@dataclass
class Visits:
    """The documents that a stock class looked up, and the rows that it generated for, both in order.

    tasks: task -> split -> documents, as lmms-eval gives them to a model. fed, lengths: prompt tokens of every row, as
    fed and once pruned. kept: what `Pruned.after` returned, for every call.
    Stock classes sort and batch the requests by rules of their own, and tell nobody in which order they went; but each
    looks up a document when its turn comes.
    """

    tasks: Any
    fed: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    keys: dict[Key, None] = field(default_factory=dict)

    @property
    def documents(self) -> Any:
        """`tasks`, noting every document that is looked up."""
        return _Noting(self.tasks, lambda key: self.keys.setdefault(key))

    @property
    def order(self) -> list[Key] | None:
        """The document of every row; None where rows cannot be told apart, as where one is asked about twice."""
        return list(self.keys) if len(self.keys) == len(self.lengths) else None


class _Noting:
    """A nested container that notes the path of every look-up that is three levels deep."""

    def __init__(self, inside: Any, note: Callable[[Key], object], path: Key = ()) -> None:
        self._inside, self._note, self._path = inside, note, path

    def __getitem__(self, key: Any) -> Any:
        path, found = (*self._path, key), self._inside[key]
        if len(path) < 3:
            return _Noting(found, self._note, path)
        self._note(path)
        return found

    def __len__(self) -> int:
        return len(self._inside)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)


def prompt_tokens(inputs: dict[str, Any], last: Last | None) -> list[int]:
    """Tokens of the prompt of every row, without padding, that are left behind the last stage.

    inputs: what `generate` was called with. last: what was pruned in it, None for nothing.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if last is not None:
        ids, mask = last.index, last.valid
    return [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()


def with_input_tokens(requests: list[Any], answers: list[Any], visits: Visits) -> list[Any]:
    """The answers of lmms-eval, with the tokens of the prompt where the stock class has not counted any."""
    order = visits.order
    if order is None:
        return answers
    lengths = dict(zip(order, visits.lengths))
    return [_counted(answer, lengths.get(key_of(request))) for request, answer in zip(requests, answers)]


def key_of(request: Any) -> Key:
    """The document of a request, as `Visits` names it."""
    number, task, split = request.args[-3:]
    return task, split, number


def _counted(answer: Any, length: int | None) -> Any:
    from lmms_eval.api.instance import GenerationResult, TokenCounts

    result = GenerationResult(answer) if isinstance(answer, str) else answer
    if length is None or not isinstance(result, GenerationResult):
        return answer
    counts = result.token_counts or TokenCounts()
    if counts.input_tokens is None:
        counts.input_tokens = length
    return GenerationResult(result.text, counts)
