"""The tasks of lmms-eval: their names, what each of them is judged by, and which of them can be loaded here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

# Names that papers use. In lmms-eval they are groups with a test split whose answers are not public, or nothing.
PAPERS = {
    "docvqa": "docvqa_val",
    "egoschema": "egoschema_subset",
    "longvideobench": "longvideobench_val_v",
    "textvqa": "textvqa_val",
    "vizwiz_vqa": "vizwiz_vqa_val",
}
# The metrics that papers quote, where they are not the first that the task lists; several are added up.
QUOTED: dict[str, tuple[str, ...]] = {
    "mme": ("mme_perception_score", "mme_cognition_score"),
    "pope": ("pope_f1_score",),
    "seedbench": ("seed_all",),
}
UNSCORED = ("submission", "bypass")  # files for a server, and no metric


@dataclass(frozen=True)
class Loaded:
    """A task of lmms-eval with its data. metrics: what it is judged by, added up; n: its samples."""

    name: str
    task: Any
    metrics: tuple[str, ...]
    n: int

    @property
    def metric(self) -> str:
        """The name of what it is judged by."""
        return " + ".join(self.metrics)


class Harness:
    """The tasks that lmms-eval and the folder `include` define, for one of its models.

    model_name: the stock model, some of which have prompts of their own. kind: "simple" or "chat", its interface.
    """

    def __init__(self, model_name: str, kind: str, include: str | Path | None = None) -> None:
        from lmms_eval.tasks import TaskManager

        if include is not None and not Path(include).is_dir():
            raise ValueError(f"{include} is no folder: name one with the YAML files of tasks for lmms-eval")
        folder = None if include is None else str(include)
        self.manager: Any = TaskManager("ERROR", include_path=folder, model_name=model_name)
        self.kind = kind

    def named(self, names: Iterable[str]) -> list[str]:
        """The names as lmms-eval knows them, each once; ValueError with similar ones for a name that it does not."""
        known = set(self.manager.all_tasks)
        found = [PAPERS.get(name, name) if name not in known or name in PAPERS else name for name in names]
        for name in found:
            if name not in known:
                near = get_close_matches(name, known, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "`lmms-eval tasks list` prints all names"
                raise ValueError(f"lmms-eval has no task {name!r}: {hint}")
        if not found:
            raise ValueError("no task is named: name one or several, such as gqa,pope")
        return list(dict.fromkeys(found))

    def load(self, names: Iterable[str], limit: int | None) -> tuple[list[Loaded], dict[str, str]]:
        """(tasks with their data, why the others could not be loaded); a group is loaded as the tasks in it.

        limit: samples of a task at most. What fails here is mostly a download without a network.
        """
        from lmms_eval.tasks import get_task_dict

        found, missing = [], {}
        for name in names:
            try:
                found += [_loaded(*one, limit) for one in _leaves(get_task_dict([name], self.manager, self.kind))]
            except Exception as error:  # whatever data sets, hubs and the code of tasks raise
                missing[name] = _why(error)
        return list({one.name: one for one in found}.values()), missing


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The tasks in a dictionary of tasks and groups, however deep."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        elif task is not None:
            yield str(name), task


def _loaded(name: str, task: Any, limit: int | None) -> Loaded:
    total = len(task.eval_docs)
    listed = [one["metric"] for one in task.config.metric_list or ()]
    scored = [metric for metric in listed if metric not in UNSCORED] or listed
    metrics = QUOTED.get(name) or tuple(scored[:1])
    return Loaded(name, task, metrics, total if limit is None else min(limit, total))


def _why(error: BaseException) -> str:
    """The first cause, and not what was raised because of it: that a download was given up after so many tries."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
