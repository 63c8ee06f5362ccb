"""Which models vLLM can prune, and how an engine comes to use them: its config is checked, then names our class.

vLLM asks a class of `MODELS_CONFIG_MAP` about the config of every engine. Ours stands behind each model there: it does
nothing without a recipe, swaps the architecture of a model on the list, and refuses a recipe for any other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.config.multimodal import MultiModalConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from ...core.errors import UnsupportedModel
from ...recipe import Recipe
from . import KEY
from .contract import check
from .plan import plan_of

MODULE = f"{__package__}.models"
# Architecture of vLLM: the name of our class, under which it is registered too; and whether a token has one position.
PRUNED = {
    "LlavaForConditionalGeneration": ("PrunedLlava", True),
    "LlavaNextForConditionalGeneration": ("PrunedLlavaNext", True),
    "LlavaOnevisionForConditionalGeneration": ("PrunedLlavaOnevision", True),
    "Qwen2VLForConditionalGeneration": ("PrunedQwen2VL", False),
    "Qwen2_5_VLForConditionalGeneration": ("PrunedQwen2_5VL", False),
    "Qwen3VLForConditionalGeneration": ("PrunedQwen3VL", False),
}
WORKER = f"{__package__}.cpu_worker.PrunedCPUWorker"
CPU_WORKERS = ("auto", "vllm.v1.worker.cpu_worker.CPUWorker")
ASPECT_RATIO = "anyres_max_9"  # of LLaVA-OneVision, as vLLM has it
ROOM = 4  # as many positions as the model has, times this, get a row in the tables of rotary embeddings


class PrunedMultiModalConfig(MultiModalConfig):
    """The multimodal config of an engine with a recipe, which vLLM asks whether rows carry their positions along."""

    def is_multimodal_pruning_enabled(self) -> bool:
        return True


def register_all() -> None:
    """As `vtprune.integrations.vllm.register`."""
    for name, _ in PRUNED.values():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"{MODULE}:{name}")
    for name in list(ModelRegistry.get_supported_archs()):
        before = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)
        if not issubclass(before, _Asked):
            MODELS_CONFIG_MAP[name] = type(f"Asked{before.__name__}", (_Asked, before), {})


class _Asked(VerifyAndUpdateConfig):
    """What vLLM asks about a config, first of the class that stood there, then of ours."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        super().verify_and_update_model_config(model_config)
        activate(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        super().verify_and_update_config(vllm_config)
        check_engine(vllm_config)


def has_one_row(model_config: Any) -> bool:
    """True if a token of this pruned model has one position."""
    return dict(PRUNED.values())[model_config.architecture]


def recipe_of(model_config: Any) -> str | None:
    """The recipe (JSON) of a model's config; None where it is not pruned."""
    return getattr(model_config.multimodal_config, "vtprune_recipe", None)


def activate(model_config: Any) -> None:
    """Make an engine prune if its options hold a recipe: its config names our class from now on.

    Raises UnsupportedModel for a model that is not on the list, ValueError and TypeError for a recipe that cannot be
    read or that the engine cannot honour, RuntimeError for a vLLM outside the tested versions.
    """
    multimodal = model_config.multimodal_config
    options = dict((multimodal and multimodal.mm_processor_kwargs) or {})
    if KEY not in options:
        return
    check()
    given, architecture = options.pop(KEY), model_config.architecture
    recipe = _read(given)
    if architecture not in PRUNED:
        raise UnsupportedModel(
            f"vLLM runs this model as {architecture}, which vtprune does not prune there; it prunes "
            f"{', '.join(PRUNED)} (of vLLM itself, not model_impl='transformers')"
        )
    if getattr(model_config.hf_config.vision_config, "model_type", None) == "pixtral":
        raise UnsupportedModel("LLaVA with a Pixtral tower is not pruned in vLLM: its images have tokens between rows")
    ratio = getattr(model_config.hf_config, "vision_aspect_ratio", ASPECT_RATIO)
    if ratio != ASPECT_RATIO:
        raise UnsupportedModel(f"vision_aspect_ratio={ratio!r}: vLLM lays out mosaics by {ASPECT_RATIO!r} alone")
    if multimodal.video_pruning_rate:
        raise ValueError(
            f"video_pruning_rate={multimodal.video_pruning_rate}: vLLM's own pruning and a recipe exclude each other; "
            "leave it out (the method 'evs' in a recipe does the same)"
        )
    name, one_row = PRUNED[architecture]
    plan = plan_of(recipe, model_config.hf_config)
    _check_positions(plan.recipe, one_row)
    multimodal.mm_processor_kwargs = options
    multimodal.__class__ = PrunedMultiModalConfig
    multimodal.vtprune_recipe = recipe
    if one_row:
        _three_rows(model_config.hf_config)
    model_config.hf_config.architectures = [name]
    model_config.model_arch_config = model_config.get_model_arch_config()
    model_config._architecture = name
    model_config._model_info = dataclasses.replace(model_config._model_info, architecture=name)


def check_engine(vllm_config: Any) -> None:
    """Refuse what an engine's other options make impossible; on a CPU take the worker that passes positions on."""
    from vllm.platforms import current_platform

    recipe = recipe_of(vllm_config.model_config)
    if recipe is None:
        return
    needs = plan_of(recipe, vllm_config.model_config.hf_config).needs
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    if compilation.cudagraph_mm_encoder:
        raise ValueError("cudagraph_mm_encoder=True replays the tower without the pruning behind it: leave it out")
    if needs and compilation.compile_mm_encoder:
        raise ValueError(f"compile_mm_encoder=True hides the attention of the tower, and the recipe reads {needs[0]}")
    if needs and parallel.tensor_parallel_size > 1:
        raise ValueError(
            f"tensor_parallel_size={parallel.tensor_parallel_size} divides the heads of the tower, and the recipe "
            f"reads {needs[0]}: choose a method that reads no attention, such as divprune"
        )
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise ValueError(
            "enable_tower_connector_lora=True counts unpruned tokens: leave it out where images are pruned"
        )
    if vllm_config.speculative_config is not None:
        raise ValueError("a speculative decoder with a recipe was not tested: leave speculative_config out")
    if current_platform.is_cpu() and parallel.worker_cls in CPU_WORKERS:
        parallel.worker_cls = WORKER


def _read(given: Any) -> str:
    """The recipe that an option holds, checked: a path, or the document as text or as an object."""
    if isinstance(given, Mapping):
        return Recipe.from_json(json.dumps(given)).to_json()
    if not isinstance(given, str):
        raise TypeError(f"{KEY}={given!r:.80}: give the path of a recipe, or the recipe itself")
    if given.lstrip().startswith("{"):
        return Recipe.from_json(given).to_json()
    if not Path(given).is_file():
        raise ValueError(f"{KEY}={given!r}: there is no such file; vtprune.Recipe.save writes one")
    return Recipe.load(given).to_json()


def _check_positions(recipe: Recipe, one_row: bool) -> None:
    for stage in recipe.stages:
        if stage.positions == "compact" and not one_row:
            raise ValueError(
                f"{stage.method.name}: positions='compact' is undefined for M-RoPE position ids; use 'keep'"
            )


def _three_rows(config: Any) -> None:
    """Let vLLM keep three rows of positions for a model that has one: `positions` says what they hold.

    The whole model's config says so and not the text model's, whose rotary embedding stays as it was.
    """
    text = config.get_text_config()
    config.rope_parameters = {"rope_type": "default", "mrope_section": [1, 1, 1]}
    if (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") == "default":
        text.max_position_embeddings *= ROOM  # a longer table, the same angles: kept text may stand that far
