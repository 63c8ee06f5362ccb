"""What a recipe means for an engine that encodes every image by itself and must know the counts ahead.

Nothing here needs vLLM. The rasters of an image, the layers of its tower and what travels from patches to visual tokens
are told by the families of `vtprune.model_adapters`, which get the transformers model without any weights.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.method import Stage
from ...core.select import Selected
from ...core.signal import Signal
from ...core.visual import Span
from ...model_adapters.family import Family, family_of
from ...recipe import Recipe
from ...selection import count, select
from ...signals import kind_of
from ..budget import with_keep

Modality = Literal["image", "video"]
MODALITIES: tuple[Modality, ...] = ("image", "video")
Keep = float | int | None  # the budget of a request; None: that of the recipe


class EnginePlan:
    """A recipe on one model.

    recipe: what every request gets that names no budget. config: that of the transformers model.
    Raises UnsupportedModel where the family is unknown, ValueError where the engine cannot honour a stage; each error
    names the stage and the way out.
    """

    def __init__(self, recipe: Recipe, config: Any) -> None:
        self.recipe, self.base = recipe, _without_weights(config)
        self.family: Family = family_of(self.base, config.model_type)
        for stage in recipe.stages:
            self._check(stage)
        count(recipe, (1, 16, 16))  # raises for a method whose counts nobody knows before the features

    def stages(self, keep: Keep) -> tuple[Stage, ...]:
        """The stages of a request; none where it keeps all tokens."""
        if isinstance(keep, float) and keep == 1.0:
            return ()
        return with_keep(self.recipe, keep).stages

    def spans(self, modality: Modality, call: Mapping[str, Any], n: int) -> tuple[Span, ...]:
        """The rasters of one image or video of n tokens. call: what is told of it, such as `image_grid_thw` [1, 3]."""
        return self.family.spans(self.base, modality, dict(call), [n])[0]

    def count(self, keep: Keep, modality: Modality, call: Mapping[str, Any], n: int) -> int:
        """How many of the n tokens of an image or video stay."""
        stages = self.stages(keep)
        if not stages:
            return n
        return int(count(stages, sizes=n, spans=self.spans(modality, call, n), video=modality == "video"))  # type: ignore[arg-type]

    def select(
        self,
        keep: Keep,
        modality: Modality,
        features: Sequence[Tensor],
        calls: Sequence[Mapping[str, Any]],
        signals: Sequence[dict[Signal, Tensor]],
    ) -> list[Selected]:
        """What stays of images or videos with features [N, D] each; every one is a row of its own."""
        stages = self.stages(keep)
        if not stages:
            return [Selected(len(x), torch.arange(len(x), device=x.device), x) for x in features]
        spans = [self.spans(modality, call, len(x)) for call, x in zip(calls, features)]
        video = [modality == "video"] * len(features)
        rows = list(range(len(features)))
        return select(list(features), stages, spans=spans, video=video, signals=list(signals), rows=rows)

    def digest(self, keep: Keep) -> str:
        """What tells cached features of one pruning from those of another: recipe, budget and version."""
        stages = self.stages(keep)
        said = Recipe(stages).to_json() if stages else f"all {self.recipe.made_with}"
        return "vtprune-" + hashlib.sha256(said.encode()).hexdigest()[:16]

    @cached_property
    def needs(self) -> tuple[Signal, ...]:
        """The signals of the tower that the stages read."""
        return tuple(dict.fromkeys(need for stage in self.recipe.stages for need in stage.method.needs))

    @property
    def renumbers(self) -> bool:
        """True if the kept tokens are numbered without gaps."""
        return any(stage.compact for stage in self.recipe.stages)

    def _check(self, stage: Stage) -> None:
        name = stage.method.name
        if stage.where != "llm":
            raise ValueError(
                f"{name} at {stage.where!r} acts inside the model, where vLLM lays out the cache and the attention: "
                "a served recipe has stages before the LLM only"
            )
        if stage.method.reads_text:
            raise ValueError(
                f"{name} reads the question, and vLLM encodes an image once for all questions about it: choose a "
                "method that looks at the image alone"
            )
        if stage.per == "sample" or stage.keep_total is not None:
            raise ValueError(
                f"{name}: per={stage.per!r}, keep_total={stage.keep_total} divides one budget among the images of a "
                "prompt, and vLLM encodes and stores each by itself: use keep with per='image', 'crop' or 'frame'"
            )
        for need in stage.method.needs:
            kind = kind_of(need)
            if "tower" not in kind.where or kind.source != "attention":
                raise ValueError(
                    f"{name} reads {need}, and of the vision tower vLLM shows the attention only: choose another method"
                )


def _without_weights(config: Any) -> nn.Module:
    """The base model of transformers on the meta device: its code and sizes without any memory."""
    import transformers

    config = copy.deepcopy(config)
    config.__dict__.pop("rope_parameters", None)  # of the whole model: ours, see `architectures`
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


@lru_cache(maxsize=4)
def _made(recipe: str, config: _ByContent) -> EnginePlan:
    return EnginePlan(Recipe.from_json(recipe), config.config)


def plan_of(recipe: str, config: Any) -> EnginePlan:
    """The plan of a recipe (JSON) on a model with this config; the same object for the same content."""
    return _made(recipe, _ByContent(config))


class _ByContent:
    """A config that is equal to another of the same content."""

    def __init__(self, config: Any) -> None:
        self.config, self.said = config, str(config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByContent) and self.said == other.said

    def __hash__(self) -> int:
        return hash(self.said)
