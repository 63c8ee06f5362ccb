"""Full-size models with random weights, built from stock configs, and inputs of the size the papers measure.

Speed does not depend on what the weights say, so nothing has to be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEXT_TOKENS = 60


@dataclass(frozen=True)
class Geometry:
    """How to build one model and the pixels of one sample.

    config(layers, scale): the stock config; layers caps the depth, scale < 1 narrows every width.
    pixels(config, batch): the processor's tensors for `batch` samples, random.
    """

    config: Callable[[int | None, float], Any]
    pixels: Callable[[Any, int], dict[str, Tensor]]
    modality: str = "image"


def _widths(heads: int, kv: int, head: int, mlp: int, depth: int, layers: int | None, scale: float) -> dict[str, Any]:
    kv = max(1, round(kv * scale))
    heads = kv * max(1, round(heads * scale / kv))
    return {
        "hidden_size": heads * head,
        "intermediate_size": max(8, round(mlp * scale / 8) * 8),
        "num_hidden_layers": min(depth, layers or depth),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


def _llama(layers: int | None, scale: float) -> Any:
    from transformers import LlamaConfig

    widths = _widths(32, 32, 128, 11008, 32, layers, scale)
    return LlamaConfig(vocab_size=32064, max_position_embeddings=8192, **widths)


def _qwen2(layers: int | None, scale: float, vocab: int) -> Any:
    from transformers import Qwen2Config

    widths = _widths(28, 4, 128, 18944, 28, layers, scale)
    return Qwen2Config(vocab_size=vocab, max_position_embeddings=32768, **widths)


def _tower(kind: str, heads: int, head: int, mlp: int, depth: int, layers: int | None, scale: float) -> Any:
    import transformers

    widths = _widths(heads, heads, head, mlp, depth, layers, scale)
    del widths["num_key_value_heads"]
    side = {"CLIPVisionConfig": 336, "SiglipVisionConfig": 384}[kind]
    return getattr(transformers, kind)(image_size=side, patch_size=14, **widths)


def _llava(layers: int | None, scale: float) -> Any:
    from transformers import LlavaConfig

    tower = _tower("CLIPVisionConfig", 16, 64, 4096, 24, layers and max(2, layers), scale)
    return LlavaConfig(vision_config=tower, text_config=_llama(layers, scale), image_token_index=32000)


def _llava_next(layers: int | None, scale: float) -> Any:
    from transformers import LlavaNextConfig

    tower = _tower("CLIPVisionConfig", 16, 64, 4096, 24, layers and max(2, layers), scale)
    return LlavaNextConfig(vision_config=tower, text_config=_llama(layers, scale), image_token_index=32000)


def _llava_onevision(layers: int | None, scale: float) -> Any:
    from transformers import LlavaOnevisionConfig

    tower = _tower("SiglipVisionConfig", 16, 72, 4304, 26, layers, scale)
    text = _qwen2(layers, scale, 152000)
    return LlavaOnevisionConfig(
        vision_config=tower, text_config=text, image_token_index=151646, video_token_index=151647
    )


def _qwen2_5_vl(layers: int | None, scale: float) -> Any:
    from transformers import Qwen2_5_VLConfig

    text = _qwen2(layers, scale, 152064).to_dict()
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    widths = _widths(16, 16, 80, 3420, 32, layers, scale)
    depth = widths["num_hidden_layers"]
    tower = {
        "depth": depth,
        "hidden_size": widths["hidden_size"],
        "intermediate_size": widths["intermediate_size"],
        "num_heads": widths["num_attention_heads"],
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [i for i in range(depth) if i % 8 == 7] or [depth - 1],
    }
    unwanted = ("model_type", "architectures", "layer_types", "dtype", "transformers_version")
    text = {k: v for k, v in text.items() if k not in unwanted}
    return Qwen2_5_VLConfig(text_config=text, vision_config=tower)


def _crops(count: int | None, name: str) -> Callable[[Any, int], dict[str, Tensor]]:
    def pixels(config: Any, batch: int) -> dict[str, Tensor]:
        side = config.vision_config.image_size
        shape = (batch, 3, side, side) if count is None else (batch, count, 3, side, side)
        return {name: torch.randn(shape)}

    return pixels


def _mosaic(config: Any, batch: int) -> dict[str, Tensor]:
    side = config.vision_config.image_size
    sizes = torch.tensor([[2 * side, 2 * side]] * batch)
    return _crops(5, "pixel_values")(config, batch) | {"image_sizes": sizes}


def _patches(config: Any, batch: int) -> dict[str, Tensor]:
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, 64, 80]] * batch)
    return {"pixel_values": torch.randn(batch * 64 * 80, width), "image_grid_thw": grid}


GEOMETRIES = {
    "llava-1.5-7b": Geometry(_llava, _crops(None, "pixel_values")),
    "llava-next-7b": Geometry(_llava_next, _mosaic),
    "llava-onevision-7b-video": Geometry(_llava_onevision, _crops(32, "pixel_values_videos"), "video"),
    "qwen2.5-vl-7b": Geometry(_qwen2_5_vl, _patches),
}


def build(
    name: str, device: str, dtype: torch.dtype, batch: int = 1, layers: int | None = None, scale: float = 1.0
) -> tuple[Any, dict[str, Tensor]]:
    """(model in eval mode, inputs of `batch` equal samples: one image or video and 60 text tokens each).

    Raises ValueError for an unknown name, and for a full-size model on a CPU.
    """
    if name not in GEOMETRIES:
        raise ValueError(f"unknown geometry {name!r}; choose one of: tiny, {', '.join(GEOMETRIES)}")
    if not 0 < scale <= 1:
        raise ValueError(f"scale={scale} is outside (0, 1]: it narrows the model, 1 is full size")
    if layers is not None and layers < 1:
        raise ValueError(f"layers={layers} leaves no model: use an int >= 1")
    if device == "cpu" and layers is None and scale == 1:
        raise ValueError(
            f"{name} at full size needs a GPU: shrink it with --layers 2 and --scale 0.25, or use --device cuda"
        )
    from transformers import AutoModelForImageTextToText

    geometry = GEOMETRIES[name]
    torch.manual_seed(0)
    config = geometry.config(layers, scale)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        pixels = geometry.pixels(config, batch)
    pixels = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in pixels.items()}
    return model, prompt(model, pixels, batch, geometry.modality)


def prompt(model: Any, pixels: dict[str, Tensor], batch: int, modality: str = "image") -> dict[str, Tensor]:
    """Put as many placeholders as the model makes features between two pieces of text, in every row."""
    config = model.config
    visual = getattr(config, f"{modality}_token_id")
    count = visual_tokens(model, pixels, batch, modality)
    device = model.device
    half = TEXT_TOKENS // 2
    words = torch.randint(100, 1000, (batch, TEXT_TOKENS), device=device).clamp(
        max=config.get_text_config().vocab_size - 1
    )
    start = getattr(config, "vision_start_token_id", None)
    if start is not None:
        words[:, half - 1] = start
    run = torch.full((batch, count), visual, device=device)
    ids = torch.cat([words[:, :half], run, words[:, half:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if start is not None:
        inputs["mm_token_type_ids"] = (ids == visual).long() * (2 if modality == "video" else 1)
    return inputs


def encode(model: Any, pixels: dict[str, Tensor], modality: str = "image") -> Any:
    """Features of the vision tower and projector, as the model's own forward gets them."""
    return getattr(model.base_model, f"get_{modality}_features")(**pixels, return_dict=True).pooler_output


def visual_tokens(model: Any, pixels: dict[str, Tensor], batch: int, modality: str = "image") -> int:
    """Visual tokens of one sample."""
    with torch.inference_mode():
        features = encode(model, pixels, modality)
    return sum(f.shape[:-1].numel() for f in features) // batch
