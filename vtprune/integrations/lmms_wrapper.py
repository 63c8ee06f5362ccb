"""What stands before a stock class of lmms-eval: it prunes the model, counts its prompts, and lets no failure pass."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vtprune.core.errors import VtpruneError
from vtprune.core.method import Method
from vtprune.handle import Handle, patch
from vtprune.integrations.lmms_counts import Visits, prompt_tokens, with_input_tokens
from vtprune.parsing import parse_keep, parse_method
from vtprune.recipe import Recipe, method_of

PROBE = "vtprune_probe"
QUESTION = "What is in the picture?"


class RunFailed(SystemExit):
    """Ends a run of lmms-eval with a message and exit status 1; `__cause__` is what went wrong.

    It is no `Exception` on purpose. lmms-eval makes an empty answer of an exception inside `generate`, so that a method
    that raises would score 0, and exit status 0 of any other one.
    """


def asked_for(method: Any, keep: Any, recipe: Any) -> tuple[Method | Recipe | None, float | int | None]:
    """What `--model_args` asks for: a method or a recipe, and the budget; (None, None) for nothing.

    Raises ValueError or TypeError for an unknown method or option, a missing or impossible budget, a file that is no
    recipe, and a recipe beside a method; OSError for a file that is not there.
    """
    if recipe is not None:
        if method is not None or keep is not None:
            raise ValueError(f"recipe={recipe} carries its own methods and budgets: leave out method= and keep=")
        return Recipe.load(recipe), None
    if method is None:
        if keep is not None:
            raise ValueError(f"keep={keep} without a method prunes nothing: add method=, such as method=divprune")
        return None, None
    name, options = parse_method(str(method))
    budget = None if keep is None else parse_keep(str(keep), "keep=")
    return method_of(name, budget, None, options), budget


class Pruned:
    """Stands before a class of lmms-eval among the bases of another: that class, with its `self.model` pruned.

    handle: the patch in force, whose pruned prompt lengths go into lmms-eval's token counts; None for nothing pruned.
    visits: what the last `generate_until` asked the model. after: called behind every call of the model's `generate`;
    what it returns is kept in `visits`.
    """

    handle: Handle | None = None
    visits: Visits | None = None
    after: Callable[[], Any] | None = None
    model: Any
    task_dict: Any
    is_simple: bool

    def __init__(self, method: Any = None, keep: Any = None, recipe: Any = None, **stock: Any) -> None:
        """method, keep, recipe: see the module; stock: the arguments of the stock class.

        Raises RunFailed for arguments that do not fit, before any weights are loaded, for a model that cannot be
        pruned, and if it cannot answer a first question.
        """
        with _ending_the_run():
            what, budget = asked_for(method, keep, recipe)
        super().__init__(**stock)
        with _ending_the_run():
            self.handle = None if what is None else patch(self.model, what, keep=budget)
            self.probe()

    def probe(self) -> None:
        """Ask one question about a picture of shades of grey, as a task would; RunFailed where that does not work."""
        from lmms_eval.api.instance import Instance
        from PIL import Image

        picture = Image.linear_gradient("L").convert("RGB")
        content = [{"type": "image", "url": picture}, {"type": "text", "text": QUESTION}]
        turn = [{"role": "user", "content": content}]
        options = {"max_new_tokens": 2, "temperature": 0}
        asks = (options, lambda _: [picture]) if self.is_simple else (lambda _: list(turn), options)
        metadata = {"task": PROBE, "doc_id": 0, "repeats": 1}
        request = Instance("generate_until", (QUESTION, *asks, 0, PROBE, PROBE), 0, metadata)
        tasks, self.task_dict = self.task_dict, {PROBE: {PROBE: [{}]}}
        try:
            self.generate_until([request])
        finally:
            self.task_dict = tasks
        if self.handle is not None and self.handle.last is None:
            raise ValueError("the model answered a question about a picture, and nothing was pruned in it")

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """What the stock class answers, in the order of the requests; an exception ends the run, as RunFailed."""
        stock: Any = super()
        with self._watched() as visits:
            answers = stock.generate_until(requests)
        return with_input_tokens(requests, answers, visits)

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """What the stock class computes; an exception ends the run, as RunFailed."""
        stock: Any = super()
        with _ending_the_run():
            return stock.loglikelihood(requests)

    @contextmanager
    def _watched(self) -> Iterator[Visits]:
        """Note which documents the model is asked about, and how long their prompts are once pruned."""
        model, generate, tasks = self.model, self.model.generate, self.task_dict
        self.visits = visits = Visits(tasks)

        def watched(*args: Any, **inputs: Any) -> Any:
            before = self.handle.last if self.handle else None
            with _ending_the_run():
                told = generate(*args, **inputs)
            last = self.handle.last if self.handle else None
            visits.fed += prompt_tokens(inputs, None)
            visits.lengths += prompt_tokens(inputs, last if last is not before else None)
            if self.after is not None:
                visits.kept += [self.after()]
            return told

        model.generate, self.task_dict = watched, visits.documents
        try:
            with _ending_the_run():
                yield visits
        finally:
            del model.generate
            self.task_dict = tasks


@contextmanager
def _ending_the_run() -> Iterator[None]:
    """Turn an exception into RunFailed: one sentence for what users can mend, a traceback before it for the rest."""
    try:
        yield
    except (VtpruneError, ValueError, TypeError, OSError) as error:
        raise RunFailed(f"vtprune: {' '.join(str(error).split())}") from error
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        raise RunFailed(f"{told}vtprune: the run was ended by {type(error).__name__}: {error}") from error
