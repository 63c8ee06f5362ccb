"""Pruning inside an unmodified lmms-eval: `--model vtprune_NAME`, where NAME is one of its models on transformers.

    lmms_eval --model vtprune_llava_hf --tasks gqa --device cuda:0 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,device_map=cuda:0,method=divprune,keep=0.25

To the arguments of NAME come `method` (a name, or `name:option=value;option=value`), `keep` (0.25, 25% or 64) and, in
place of both, `recipe` (a file). Without any of the three nothing is pruned. lmms-eval finds the models by the entry
point `lmms_eval.models`, which names `manifests`; nothing here is imported before.
"""

from __future__ import annotations

import inspect
import types
import warnings
from functools import cache
from importlib import import_module
from typing import Any

from vtprune.integrations.lmms_wrapper import Pruned, RunFailed

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
