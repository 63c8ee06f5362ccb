"""A stock LLaVA with stored weights, for the cases that compare the whole path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vtprune.evals.parity.compare import agree, close, listed, real, same
from vtprune.evals.parity.registry import Arrays

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


class Stored(torch.nn.Module):
    """Stands in for a projector: whatever the vision tower says, the visual tokens are the stored ones."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, _: Tensor) -> Tensor:
        features: Tensor = self.features  # type: ignore[assignment]
        return features


def stock_llava(
    weights: Arrays, embeds: Tensor, visual: slice
) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    """A stock LLaVA whose decoder has stored weights (Qwen2 if q has a bias, else LLaMA), and inputs that embed so.

    The vocabulary rows are the text rows of embeds [L, D], one token each; the projector returns embeds[visual].
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    image = embeds[visual]
    text = torch.cat([embeds[: visual.start], embeds[visual.stop :]])
    image_token, side = text.shape[0], round(image.shape[0] ** 0.5)
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    decoder: dict[str, Any] = {
        "vocab_size": image_token + 1,
        "hidden_size": int(weights["hidden_size"]),
        "intermediate_size": int(weights["intermediate_size"]),
        "num_hidden_layers": int(weights["num_layers"]),
        "num_attention_heads": int(weights["num_heads"]),
        "num_key_value_heads": int(weights["num_kv_heads"]),
        "rms_norm_eps": float(weights["rms_norm_eps"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(weights["rope_theta"])},
    }
    whole: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**small, patch_size=1, image_size=side),
        "text_config": (Qwen2Config if "layers.0.self_attn.q_proj.bias" in weights else LlamaConfig)(**decoder),
        "image_token_id": image_token,
        "vision_feature_layer": -1,
    }
    config = LlavaConfig(**whole)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.multi_modal_projector = Stored(image[None])
    vocabulary = torch.cat([text, torch.zeros(1, text.shape[1])])
    stored = {name: torch.from_numpy(weights[name]) for name in weights if weights[name].ndim}
    model.get_decoder().load_state_dict({"embed_tokens.weight": vocabulary, **stored})
    ids = torch.full((1, embeds.shape[0]), image_token)
    ids[0, : visual.start] = torch.arange(visual.start)
    ids[0, visual.stop :] = torch.arange(visual.start, image_token)
    return model, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, side, side)}


@torch.no_grad()
def run_base(model: LlavaForConditionalGeneration, inputs: dict[str, Any]) -> Any:
    """Output of the base model, its hidden states after the final norm."""
    return model.model(**inputs, use_cache=True)


def visual_of(arrays: Arrays) -> slice:
    """Where the visual tokens stand in the prompt."""
    before, n, behind = (int(arrays[f"{part}_len"]) for part in ("sys", "vis", "text"))
    agree("tokens of the prompt", before + n + behind, len(arrays["inputs_embeds"]))
    return slice(before, before + n)


def llama_of(arrays: Arrays, folder: Path) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    """The stock LLaVA with the stored LLaMA decoder, and the inputs of a case."""
    embeds = torch.from_numpy(arrays["inputs_embeds"])
    return stock_llava(np.load(folder / "model_llama.npz"), embeds, visual_of(arrays))


def left_of(arrays: Arrays) -> int:
    """What stays if the share R of the visual tokens goes."""
    left = round(int(arrays["vis_len"]) * (1 - real(arrays["R"])))
    agree("tokens that stay", left, arrays["keep"])
    return left


def cached(out: Any) -> list[int]:
    """Tokens that each layer of a cache holds."""
    return [layer.keys.shape[2] for layer in out.past_key_values.layers]


def decode_step(model: LlavaForConditionalGeneration, out: Any, arrays: Arrays) -> tuple[list[float], str]:
    """One decode step on the returned cache: [difference of its state], and the cached tokens per layer in words."""
    stored = torch.tensor(cached(out))
    same("cached tokens per layer", stored, arrays["kv_lengths_after_prefill"])
    step = {"inputs_embeds": torch.from_numpy(arrays["decode_embed"])[None], "past_key_values": out.past_key_values}
    state = run_base(model, step).last_hidden_state[0]
    worst = close("decoded state", state, arrays["decode_last_hidden_state"].reshape(1, -1))
    return [worst], f"cache of {listed(stored.tolist())}"
