"""The tiny LLaVA: stock Hugging Face configuration, word-level tokenizer and processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vtprune.evals.toys.image.scenes import COLOR_NAMES, GRID, PATCH, SHAPES, SIDE
from vtprune.evals.toys.words import SPECIALS as SHARED
from vtprune.evals.toys.words import build_tokenizer, vocabulary, write

VISUAL_TOKENS = GRID * GRID
# Mean colour and spread of the training scenes; a picture of the mean colour is exactly zero once normalised.
MEAN_RGB = (219, 219, 219)
STD = 0.22
SPECIALS = (*SHARED, "<image>", "answer:")
PAD, UNK, BOS, EOS, IMAGE, ANSWER = range(len(SPECIALS))
_GRAMMAR = """what color is the shape ? how many shapes are there where on left or right at top bottom of above
below a number written describe column row which in first second digit yes no none does image contain not present"""
WORDS = {*_GRAMMAR.split(), *"0123456789", *SHAPES, *COLOR_NAMES, *(f"{s}s" for s in SHAPES)}
VOCABULARY = vocabulary(SPECIALS, WORDS)
POSITIONS = 4096  # rotary positions the config admits; training sees about 300


def build_processor() -> LlavaProcessor:
    """The stock processor: one `<image>` becomes 256 placeholders, batches are padded on the left."""
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[c / 255 for c in MEAN_RGB],
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(VOCABULARY, {"image_token": "<image>"}, POSITIONS),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def build_config() -> LlavaConfig:
    """2.28 M parameters: CLIP tower d128 x 6, two-layer projector, Llama d128 x 6 with tied embeddings."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def _grid_waves(width: int, scale: float = 0.15, base: float = 50.0) -> torch.Tensor:
    """[1 + 256, width] 2-D sine / cosine start of the tower's position table; the CLS row is zero."""
    quarter = width // 4
    rates = base ** (-torch.arange(quarter) / quarter)
    angles = torch.arange(GRID)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows = waves[:, None].expand(GRID, GRID, -1)
    columns = waves[None].expand(GRID, GRID, -1)
    table = torch.cat([rows, columns], -1).reshape(VISUAL_TOKENS, width)
    return torch.cat([torch.zeros(1, width), table * scale])


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """A freshly initialised fp32 model in eval mode."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config())
    embeddings = tower(model).embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(_grid_waves(128))
        # A query that starts equal to its key makes "find the patch that matches this word" the default.
        for layer in model.model.language_model.layers[:3]:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model.eval()


def tower(model: LlavaForConditionalGeneration) -> Any:
    """The CLIP transformer (embeddings, norms, encoder), wherever this version of transformers keeps it."""
    vision: Any = model.model.vision_tower
    return getattr(vision, "vision_model", vision)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the checkpoint in the stock format, in bfloat16."""
    write(model, build_model(), build_processor(), folder)
