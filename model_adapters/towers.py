"""The vision tower of a vision-language model: its layout, its attention modules, and how its layers are counted."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from vtprune.core.errors import UnsupportedModel

from .attention_interface import interface_of
from .family import families
from .tower_layout import Call, Layout, Modality, TowerCall, per_entry, sizes_of, tower_of

__all__ = [
    "Call",
    "Layout",
    "Modality",
    "TowerCall",
    "attention_modules",
    "feature_layer",
    "has_cls",
    "layer_index",
    "layout_of",
    "per_entry",
    "sizes_of",
    "tower_of",
]

CLS_NAMES = ("class_embedding", "cls_token", "class_token")


def layout_of(base: nn.Module, modality: Modality) -> Layout:
    """The layout of a base model; UnsupportedModel, naming the family, if none is known."""
    model_type = cast(Any, base).config.model_type
    tested = {known.model_type: known.family for known in families() if known.status == "tested"}
    layout = tested[model_type]().layout(base, modality) if model_type in tested else None
    if layout is None:
        names = ", ".join(name for name, family in tested.items() if getattr(family, f"{modality}_layout") is not None)
        raise UnsupportedModel(
            f"no {modality} layout is known for model type {model_type!r}, so neither tower signals nor stages in the "
            "tower can be mapped to its visual tokens; choose a method that needs neither (`vtprune methods`) or one "
            f"of: {names}"
        )
    return layout


def attention_modules(tower: nn.Module) -> list[nn.Module]:
    """The attention modules of a tower, first layer first."""
    return [module for module in tower.modules() if interface_of(module) is not None]


def has_cls(tower: nn.Module) -> bool:
    """True if the tower puts a CLS token before its patches."""
    return any(name.rsplit(".", 1)[-1] in CLS_NAMES for name, _ in tower.named_parameters())


def feature_layer(base: Any) -> int | None:
    """`vision_feature_layer`: which of the tower's hidden states the projector reads; None if the family has no choice.

    0 is the embedding, so hidden state i >= 1 is the output of layer i - 1, and -2 that of the last layer but one.
    Where a list of them is read side by side, its last entry.
    """
    layer = getattr(base.config, "vision_feature_layer", None)
    return layer[-1] if isinstance(layer, list | tuple) else layer


def layer_index(base: Any, tower: Any, depth: int, layer: int | float | None) -> int:
    """The tower layer, 0-based, that `Signal.layer` names on this model; may lie outside 0..depth-1 for an int."""
    if isinstance(layer, float):
        wanted = max(1, round(layer * depth)) - 1
        whole = getattr(tower, "fullatt_block_indexes", None) or range(depth)  # the other layers see a window each
        return min((i for i in whole if i >= wanted), default=max(whole))
    if layer is None:
        state = feature_layer(base)
        return depth - 1 if state is None else state - 1 if state >= 0 else depth + state
    return layer if layer >= 0 else depth + layer
