"""Pruning inside an unmodified lmms-eval: `--model vtprune_NAME`, where NAME is one of its models on transformers.

    lmms_eval --model vtprune_llava_hf --tasks gqa --device cuda:0 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,device_map=cuda:0,method=divprune,keep=0.25

To the arguments of NAME come `method` (a name, or `name:option=value;option=value`), `keep` (0.25, 25% or 64) and, in
place of both, `recipe` (a file). Without any of the three nothing is pruned. lmms-eval finds the models by the entry
point `lmms_eval.models`, which names `manifests`; nothing here is imported before.
"""

from __future__ import annotations

import inspect
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from vtprune.core.errors import VtpruneError
from vtprune.core.method import Method
from vtprune.handle import Handle, patch
from vtprune.integrations.lmms_counts import Visits, prompt_tokens, with_input_tokens
from vtprune.parsing import parse_keep, parse_method
from vtprune.recipe import Recipe, method_of

PREFIX = "vtprune_"
# Models of lmms-eval that load a transformers class which vtprune prunes, and the model types of their checkpoints.
# `huggingface` is not among them: with transformers 5 it loads the model without its head, which cannot generate.
# Nor is `video_llava`, which takes nothing but films and a CUDA device.
MODELS: dict[str, tuple[str, ...]] = {
    "gemma3": ("gemma3",),
    "glm4v": ("glm4v",),
    "internvl_hf": ("internvl",),
    "lfm2_5_vl": ("lfm2_vl",),
    "llava_hf": ("llava", "llava_next", "llava_onevision"),
    "mistral3_vl": ("mistral3",),
    "qwen2_vl": ("qwen2_vl",),
    "qwen2_5_vl": ("qwen2_5_vl",),
    "qwen3_vl": ("qwen3_vl", "qwen3_vl_moe"),
    "qwen3_5": ("qwen3_5",),
}
KINDS = ("simple", "chat")  # the two interfaces of lmms-eval, and the folders of their classes
PROBE = "vtprune_probe"
QUESTION = "What is in the picture?"


class RunFailed(SystemExit):
    """Ends a run of lmms-eval with a message and exit status 1; `__cause__` is what went wrong.

    It is no `Exception` on purpose. lmms-eval makes an empty answer of an exception inside `generate`, so that a method
    that raises would score 0, and exit status 0 of any other one.
    """


def manifests() -> list[Any]:
    """The payload of the entry point: a manifest for each of `MODELS` that the installed lmms-eval has.

    A name that it does not have is warned of, for an exception would hide the other plug-ins too.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    found = []
    for name in MODELS:
        paths = {f"{kind}_class_path": f"{__name__}.{name}_{kind}" for kind in KINDS if _stock_path(name, kind)}
        if paths:
            found.append(ModelManifest(model_id=PREFIX + name, **paths))
        else:
            warnings.warn(f"this lmms-eval has no model {name!r}, so there is no {PREFIX}{name}", stacklevel=2)
    return found


def __getattr__(name: str) -> Any:
    """The classes that the manifests name, `llava_hf_simple` for one; each is made when it is first asked for."""
    stock, _, kind = name.rpartition("_")
    if stock in MODELS and kind in KINDS and _stock_path(stock, kind):
        return _pruned_class(stock, kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _stock_path(name: str, kind: str) -> str:
    """Where lmms-eval keeps a class: 'module.Class'; empty where it has none of this kind."""
    models = import_module("lmms_eval.models")  # its registry may still be in the making, these two tables are not
    table = models.AVAILABLE_SIMPLE_MODELS if kind == "simple" else models.AVAILABLE_CHAT_TEMPLATE_MODELS
    return f"lmms_eval.models.{kind}.{name}.{table[name]}" if name in table else ""


@cache
def _pruned_class(name: str, kind: str) -> type:
    module, _, cls = _stock_path(name, kind).rpartition(".")
    try:
        stock = getattr(import_module(module), cls)
    except ModuleNotFoundError as error:
        raise RunFailed(
            f"vtprune: the model {name} of lmms-eval needs the package {error.name!r}: run pip install 'vtprune[lmms]'"
        ) from error
    _ask_as_stock()
    made = types.new_class(f"{name}_{kind}", (Pruned, stock))
    made.__module__, made.__doc__ = __name__, f"{cls} of lmms-eval, pruned; see `Pruned`."
    return made


def _ask_as_stock() -> None:
    """Have a task ask our models as it asks the stock ones: it looks up its prompts by the name given to --model."""
    task = import_module("lmms_eval.api.task").ConfigurableTask
    stock = task.__init__
    if hasattr(stock, "__wrapped__"):
        return
    signature = inspect.signature(stock)

    def init(*args: Any, **options: Any) -> None:
        given = signature.bind(*args, **options)
        name = given.arguments.get("model_name")
        if isinstance(name, str):
            given.arguments["model_name"] = name.removeprefix(PREFIX)
        stock(*given.args, **given.kwargs)

    init.__wrapped__ = stock  # type: ignore[attr-defined]
    task.__init__ = init


def stock_model(model_type: str) -> str:
    """The model of lmms-eval that loads checkpoints of a model type; ValueError, with the known ones, if none does."""
    for name, model_types in MODELS.items():
        if model_type in model_types:
            return name
    known = ", ".join(sorted(one for model_types in MODELS.values() for one in model_types))
    raise ValueError(f"no model of lmms-eval is known for checkpoints of type {model_type!r}; known types: {known}")


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
        options = {"max_new_tokens": 2, "temperature": 0}
        asks = (options, lambda _: [picture]) if self.is_simple else (lambda _: _turn(content), options)
        request = Instance("generate_until", (QUESTION, *asks, 0, PROBE, PROBE), 0, _metadata())
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


def _turn(content: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def _metadata() -> dict[str, Any]:
    return {"task": PROBE, "doc_id": 0, "repeats": 1}


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
