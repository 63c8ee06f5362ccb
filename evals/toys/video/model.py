"""The tiny Qwen2.5-VL: stock Hugging Face configuration, word-level tokenizer, video processor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from vtprune.evals.toys.image.scenes import SHAPES
from vtprune.evals.toys.video.clips import COLOR_NAMES, FPS, GRID, MERGE, PATCH, SIDE, SLOT, SLOTS, WAYS
from vtprune.evals.toys.words import SPECIALS as SHARED
from vtprune.evals.toys.words import build_tokenizer, vocabulary, write

VISUAL_TOKENS = SLOTS * GRID * GRID
# Mean colour and spread of the training clips; a clip of the mean colour is exactly zero once normalised.
MEAN_RGB = (232, 232, 232)
STD = 0.2
SPECIALS = (
    *(*SHARED, "answer:"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
)
PAD, UNK, BOS, EOS, ANSWER, IMAGE, VIDEO, VISION_START, VISION_END = range(len(SPECIALS))
_GRAMMAR = """which color came first last ? did come before after way does move how many shapes appear what shape is
yes no none list rank next"""
VOCABULARY = vocabulary(SPECIALS, {*_GRAMMAR.split(), *"123456789", *SHAPES, *COLOR_NAMES, *WAYS})
POSITIONS = 4096  # rotary positions the config admits; training sees about 50
WIDTH = 128
TOWER = 64


def build_processor() -> Qwen2_5_VLProcessor:
    """The stock processor: one `<|video_pad|>` becomes a token per 2 frames and 8 x 8 pixels; pads on the left."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor  # these need torchvision

    tokens = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    shared = {
        "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        "image_mean": [c / 255 for c in MEAN_RGB],
        "image_std": [STD] * 3,
        "patch_size": PATCH,
        "temporal_patch_size": SLOT,
        "merge_size": MERGE,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared),
        tokenizer=build_tokenizer(VOCABULARY, tokens, POSITIONS),
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False, **shared),
    )


def build_config() -> Qwen2_5_VLConfig:
    """Window-attention tower d64 x 4, 2 x 2 merger, Qwen2 LLM d128 x 4 with tied embeddings and M-RoPE."""
    vision = {
        "depth": 4,
        "hidden_size": TOWER,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": PATCH,
        "temporal_patch_size": SLOT,
        "spatial_merge_size": MERGE,
        "window_size": SIDE // 2,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": WIDTH,
        "tokens_per_second": round(FPS / SLOT),  # neighbouring slots are one rotary position apart
    }
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": POSITIONS,
        # A low base: the positions of a clip and its question end near 30.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [6, 5, 5]},
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised fp32 model in eval mode."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config())
    with torch.no_grad():
        # A query that starts equal to its key makes "find the token that matches this word" the default.
        for layer in model.model.language_model.layers[:3]:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model.eval()


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write the checkpoint in the stock format, in bfloat16."""
    write(model, build_model(), build_processor(), folder)
