"""What people hold a model in: adapters, parallel training, compilers, value heads, pipelines."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtprune.core.errors import UnsupportedModel

from .family import is_supported
from .vit_blocks import vit_of

# By library and class: the attribute that holds the model, on whose own calls the hooks act.
HOLDERS = {
    "peft.PeftModel": "base_model",  # a tuner, or with prompt learning the model itself
    "peft.PeftMixedModel": "base_model",
    "peft.BaseTuner": "model",
    "torch.OptimizedModule": "_orig_mod",
    "torch.DistributedDataParallel": "module",
    "torch.DataParallel": "module",
    "torch.FullyShardedDataParallel": "module",
    "torch.AveragedModel": "module",
    "deepspeed.DeepSpeedEngine": "module",
    "transformers.Pipeline": "model",
}
VALUE_HEAD = "pretrained_model"  # trl's classes, and the many that follow them


def unwrapped(model: Any) -> nn.Module:
    """The vision-language model or vision transformer inside known wrappers, in any nesting; `model` itself if in none.

    Raises TypeError where there is no module, UnsupportedModel for a wrapper that is not known but holds a model, or
    one whose hooks would act elsewhere; the message says what to call.
    """
    inner, path = model, "model"
    while (name := _holder(inner)) is not None:
        _check_replicas(inner)
        inner, path = getattr(inner, name), f"{path}.{name}"
    if not isinstance(inner, nn.Module):
        raise TypeError(f"{path} is a {type(inner).__name__}; pass the loaded Hugging Face model itself")
    _check_shards(inner)
    if not _is_vlm(inner) and not _is_vit(inner):
        _refuse_unknown(inner, path)
    return inner


def _holder(model: Any) -> str | None:
    """The attribute of a known wrapper that holds its model."""
    for cls in type(model).__mro__:
        name = HOLDERS.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}")
        if name is not None:
            return name
    return VALUE_HEAD if VALUE_HEAD in getattr(model, "_modules", ()) else None


def _check_replicas(model: Any) -> None:
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise UnsupportedModel(
            f"DataParallel copies the model to devices {list(model.device_ids)} at every call, where hooks find the "
            "modules of the original: use DistributedDataParallel, or one device"
        )


def _check_shards(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedModel(
                f"FullyShardedDataParallel stands in the place of {name}, so that module's own attributes cannot be "
                "hooked: shard with torch.distributed.fsdp.fully_shard, or wrap the whole model only"
            )


def _is_vlm(model: Any) -> bool:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not is_supported(kind) or not hasattr(type(model), "get_decoder"):
        return False
    return hasattr(type(getattr(model, "base_model", None)), "get_image_features")


def _is_vit(model: Any) -> bool:
    try:
        return vit_of(model) is not None
    except UnsupportedModel:  # one whose blocks are not known
        return False


def _refuse_unknown(model: nn.Module, path: str) -> None:
    """Say where the models are that an unknown wrapper holds."""
    modules = [(name, module) for name, module in model.named_modules() if name]
    found = [name for name, module in modules if _is_vlm(module)]
    if not found and not any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__):
        found = [name for name, module in modules if _is_vit(module)]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if outer:
        calls = " or ".join(f"vtprune.patch({path}{_access(name)}, ...)" for name in outer)
        raise UnsupportedModel(
            f"{type(model).__name__} is no model that vtprune knows, but holds {len(outer)}: call {calls}; what is "
            "around it then runs on the pruned model"
        )


def _access(name: str) -> str:
    """A submodule's name as Python: "heads.0" -> ".heads[0]"."""
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
