"""Tiny stock models of every supported family, and inputs shaped as each family's processor shapes them.

Random weights, under 130 thousand parameters, no tokenizer: ids are made by hand, but separators, newline
counts, row breaks, timestamps, token types and padding follow the processors. The stock models check the
placeholder counts themselves.

    model = families.model("qwen2_5_vl")  # cached; takes attn_implementation="eager" too
    batch = families.inputs("qwen2_5_vl", rows=(2, 0, 1))  # images per row, left-padded
    batch.units                                            # [row][image] -> positions of its placeholders
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

PAD, BOS, IMAGE, VIDEO, START, END, BREAK, NEWLINE, GLOBAL, VSTART, VEND = 0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11
ROW_COL = 12  # <row_1_col_1>; the next ids are the further tiles
FIRST_TEXT, VOCAB = 24, 96
WIDTH = 32


@dataclass(frozen=True)
class Piece:
    """A run of prompt ids. A visual piece also carries the tensors of its one image or video."""

    ids: list[int]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shares_row: bool = False  # several images in one prompt (LLaVA-OneVision then drops the tiles)


Visualise = Callable[[Any, torch.Generator, bool], Piece]  # size, source of pixels, shares_row


class Inputs(dict):
    """Keyword arguments of the model, plus where each image or video stands: units[row][i] = positions."""

    units: list[list[list[int]]]


@dataclass(frozen=True)
class Family:
    """How to make one tiny model and its inputs."""

    model_class: str
    config: Callable[[], Any]
    sizes: tuple[Any, ...]
    visual: Visualise
    collate: Callable[[list[list[Piece]]], dict[str, Any]]
    video: bool = False
    types: str | None = None  # name under which the processor returns 0 text / 1 image / 2 video
    mrope: bool = False
    tile_units: bool = False  # text stands between the tiles of an image, so each tile is pruned by itself
    visual_first: bool = False  # PaliGemma: images, then BOS, then the prompt


def _text(model_type: str, **extra: Any) -> dict[str, Any]:
    base = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    return base | extra


def _tower(model_type: str, image: int, layers: int = 3, **extra: Any) -> dict[str, Any]:
    base = {
        "model_type": model_type,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": image,
        "patch_size": 4,
        "projection_dim": WIDTH,
    }
    return base | extra


def _qwen_tower(model_type: str, **extra: Any) -> dict[str, Any]:
    base = {
        "model_type": model_type,
        "depth": 3,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    return base | {"temporal_patch_size": 2, "in_channels": 3} | extra


def _rope(*section: int, **extra: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)} | extra


def _config(model_type: str, text: dict[str, Any], tower: dict[str, Any], **extra: Any) -> Any:
    return AutoConfig.for_model(model_type, text_config=text, vision_config=tower, **extra)


PINPOINTS = [[12, 24], [24, 12], [24, 24]]
PINPOINTS_WIDE = [[16, 32], [32, 16], [32, 32]]
_IMAGE = {"image_token_id": IMAGE}
_INDEX = {"image_token_index": IMAGE}
_BOTH_INDEX = {"image_token_index": IMAGE, "video_token_index": VIDEO}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
}


def _llava() -> Any:
    return _config("llava", _text("llama"), _tower("clip_vision_model", 20), **_INDEX, image_seq_length=25)


def _llava_next() -> Any:
    tower = _tower("clip_vision_model", 12)
    return _config("llava_next", _text("llama"), tower, **_INDEX, image_grid_pinpoints=PINPOINTS)


def _llava_next_video() -> Any:
    tower = _tower("clip_vision_model", 16)
    extra = {"image_grid_pinpoints": PINPOINTS_WIDE, "spatial_pool_mode": "average", "spatial_pool_stride": 2}
    return _config("llava_next_video", _text("llama"), tower, **_BOTH_INDEX, **extra)


def _llava_onevision() -> Any:
    tower = _tower("siglip_vision_model", 16, vision_use_head=False)
    extra = {"image_grid_pinpoints": PINPOINTS_WIDE, "vision_aspect_ratio": "anyres_max_2"}
    return _config("llava_onevision", _text("qwen2"), tower, **_BOTH_INDEX, **extra)


def _video_llava() -> Any:
    return _config("video_llava", _text("llama"), _tower("clip_vision_model", 16), **_BOTH_INDEX)


def _qwen2_vl() -> Any:
    tower = _qwen_tower("qwen2_vl_vision", embed_dim=WIDTH, mlp_ratio=2)
    return _config("qwen2_vl", _text("qwen2_vl_text", rope_parameters=_rope(2, 3, 3)), tower, **_QWEN_IDS)


def _qwen2_5_vl() -> Any:
    extra = {
        "intermediate_size": 48,
        "out_hidden_size": WIDTH,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    tower = _qwen_tower("qwen2_5_vl_vision", **extra)
    return _config("qwen2_5_vl", _text("qwen2_5_vl_text", rope_parameters=_rope(2, 3, 3)), tower, **_QWEN_IDS)


def _qwen3_vl() -> Any:
    extra = {"intermediate_size": 48, "out_hidden_size": WIDTH, "num_position_embeddings": 64}
    tower = _qwen_tower("qwen3_vl_vision", deepstack_visual_indexes=[0, 1], **extra)
    return _config("qwen3_vl", _text("qwen3_vl_text", rope_parameters=_rope(4, 2, 2)), tower, **_QWEN_IDS)


def _qwen3_5() -> Any:
    tower = _qwen_tower("qwen3_5_vision", intermediate_size=48, out_hidden_size=WIDTH, num_position_embeddings=64)
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    rope = _rope(2, 1, 1, partial_rotary_factor=0.5, mrope_interleaved=True)
    kinds = ["linear_attention", "full_attention"] * 2
    text = _text("qwen3_5_text", rope_parameters=rope, layer_types=kinds, **linear)
    return _config("qwen3_5", text, tower, **_QWEN_IDS)


def _glm4v() -> Any:
    tower = _qwen_tower("glm4v_vision", intermediate_size=48, out_hidden_size=WIDTH, image_size=32)
    text = _text("glm4v_text", rope_parameters=_rope(2, 1, 1, partial_rotary_factor=0.5))
    ids = _GLM_IDS | {"video_start_token_id": VSTART, "video_end_token_id": VEND}
    return _config("glm4v", text, tower, **ids)


def _internvl() -> Any:
    tower = _tower("internvl_vision", 24)
    return _config("internvl", _text("qwen2"), tower, **_IMAGE, image_seq_length=9, tie_word_embeddings=False)


def _smolvlm() -> Any:
    return _config("smolvlm", _text("llama"), _tower("smolvlm_vision", 24), **_IMAGE, scale_factor=2)


def _idefics3() -> Any:
    return _config("idefics3", _text("llama"), _tower("idefics3_vision", 24), **_IMAGE, scale_factor=2)


def _gemma3(window: int = 256) -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = _text("gemma3_text", layer_types=kinds, sliding_window=window, query_pre_attn_scalar=16)
    ids = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    return _config(
        "gemma3",
        text,
        _tower("siglip_vision_model", 32, vision_use_head=False),
        **ids,
        mm_tokens_per_image=16,
    )


def _gemma3_window() -> Any:
    return _gemma3(window=12)


def _paligemma() -> Any:
    tower = _tower("siglip_vision_model", 20, vision_use_head=False)
    return _config("paligemma", _text("gemma"), tower, **_INDEX, projection_dim=WIDTH, hidden_size=WIDTH)


def _mistral3() -> Any:
    tower = _tower("pixtral", 64)
    return _config("mistral3", _text("mistral", sliding_window=None), tower, **_INDEX, tie_word_embeddings=False)


def _pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _plain(
    size: int, tokens: int, name: str = "pixel_values", before: Sequence[int] = (), after: Sequence[int] = ()
) -> Visualise:
    """A fixed-resolution image: one square, a constant number of placeholders."""

    def visual(_: Any, generator: torch.Generator, shares_row: bool) -> Piece:
        ids = [*before, *[IMAGE] * tokens, *after]
        return Piece(ids, {name: _pixels(generator, 1, 3, size, size)})

    return visual


def _frames(size: int, tokens: Callable[[int], int]) -> Visualise:
    """A video of `frames` fixed-resolution frames; tokens(frames) placeholders."""

    def visual(frames: int, generator: torch.Generator, shares_row: bool) -> Piece:
        count = tokens(frames)
        return Piece([VIDEO] * count, {"pixel_values_videos": _pixels(generator, 1, frames, 3, size, size)})

    return visual


def _mosaic(pinpoints: list[list[int]], tile: int, max_tiles: int | None = None) -> Visualise:
    """Any-resolution tiling: base view, then the unpadded mosaic with a newline after each row."""
    side = tile // 4

    def visual(size: tuple[int, int], generator: torch.Generator, shares_row: bool) -> Piece:
        sizes = torch.tensor([size])
        if shares_row and max_tiles is not None:  # OneVision: several images in a prompt are not tiled
            tensors = {"pixel_values": _pixels(generator, 1, 1, 3, tile, tile), "image_sizes": sizes}
            return Piece([IMAGE] * (side * side + 1), tensors, shares_row=True)
        best = transformers.image_processing_utils.select_best_resolution(size, pinpoints)
        rows, columns = _unpad(size, best[0] // 4, best[1] // 4)
        if max_tiles is not None:
            ratio = math.sqrt(rows * columns / (max_tiles * side * side))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        tiles = 1 + (best[0] // tile) * (best[1] // tile)
        tensors = {"pixel_values": _pixels(generator, 1, tiles, 3, tile, tile), "image_sizes": sizes}
        return Piece([IMAGE] * (side * side + rows * (columns + 1)), tensors)

    return visual


def _unpad(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a mosaic once the padding that kept the aspect ratio is cut off."""
    height, width = size
    if width / height > columns / rows:
        return rows - 2 * ((rows - int(round(height * columns / width, 7))) // 2), columns
    return rows, columns - 2 * ((columns - int(round(width * rows / height, 7))) // 2)


def _grid(modality: str = "image", seconds: bool = False) -> Visualise:
    """Native resolution with a (t, h, w) patch grid (Qwen2-VL and its descendants)."""
    token, pixels = (IMAGE, "pixel_values") if modality == "image" else (VIDEO, "pixel_values_videos")

    def visual(grid: tuple[int, int, int], generator: torch.Generator, shares_row: bool) -> Piece:
        patches = math.prod(grid)
        tensors = {
            pixels: _pixels(generator, patches, 3 * 2 * 4 * 4),
            f"{modality}_grid_thw": torch.tensor([grid]),
        }
        if seconds:
            tensors["second_per_grid_ts"] = torch.tensor([0.5])
        return Piece([START, *[token] * (patches // 4), END], tensors)

    return visual


def _stamped_frames(grid: tuple[int, int, int], generator: torch.Generator, shares_row: bool) -> Piece:
    """Qwen3-VL video: a timestamp, then the frame between its own start and end tokens."""
    frames, height, width = grid
    ids = [START]
    for t in range(frames):
        ids += [FIRST_TEXT + t, FIRST_TEXT + 9, START, *[VIDEO] * (height * width // 4), END]
    pixels = _pixels(generator, math.prod(grid), 3 * 2 * 4 * 4)
    return Piece([*ids, END], {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])})


def _tiles(count: int, generator: torch.Generator, shares_row: bool) -> Piece:
    """InternVL: all tiles (thumbnail last) as one run."""
    return Piece([START, *[IMAGE] * (9 * count), END], {"pixel_values": _pixels(generator, count, 3, 24, 24)})


def _split(size: tuple[int, int], generator: torch.Generator, shares_row: bool) -> Piece:
    """Idefics3, SmolVLM: tiles with <row_i_col_j> between them, the global view last."""
    rows, columns = size
    ids: list[int] = []
    for i in range(rows):
        for j in range(columns):
            ids += [START, ROW_COL + 4 * i + j, *[IMAGE] * 9]
        ids.append(NEWLINE)
    ids += [*[NEWLINE] * bool(rows), START, GLOBAL, *[IMAGE] * 9, START]
    return Piece(ids, {"pixel_values": _pixels(generator, rows * columns + 1, 3, 24, 24)})


def _framed(frames: int, generator: torch.Generator, shares_row: bool) -> Piece:
    """A video of InternVL: "Frame1: " and an image of one tile, line by line."""
    ids = [i for t in range(frames) for i in (FIRST_TEXT + t, START, *[IMAGE] * 9, END, NEWLINE)][:-1]
    return Piece(ids, {"pixel_values": _pixels(generator, frames, 3, 24, 24)})


def _stamped_images(frames: int, generator: torch.Generator, shares_row: bool) -> Piece:
    """A video of SmolVLM: an introduction, then a timestamp and a global view for each frame."""
    frame = (START, GLOBAL, *[IMAGE] * 9, START)
    ids = [i for t in range(frames) for i in (NEWLINE, FIRST_TEXT + t, *frame)]
    pixels = _pixels(generator, frames, 3, 24, 24)
    return Piece([FIRST_TEXT + 9, NEWLINE, *ids, NEWLINE], {"pixel_values": pixels})


def _row_breaks(size: tuple[int, int], generator: torch.Generator, shares_row: bool) -> Piece:
    """Pixtral: every row of merged patches ends with a break token, the last one with an end token."""
    height, width = size
    ids = [*[IMAGE] * (width // 8), BREAK] * (height // 8)
    ids[-1] = END
    return Piece(ids, {"pixel_values": _pixels(generator, 1, 3, height, width), "image_sizes": torch.tensor([size])})


def _stack(rows: list[list[Piece]]) -> dict[str, Any]:
    """Concatenate along the first axis; tile counts and pixel sizes are zero-padded to the largest."""
    pieces = [p for row in rows for p in row]
    names = pieces[0].tensors if pieces else ()
    return {name: _pad_cat([p.tensors[name] for p in pieces]) for name in names}


def _pad_cat(tensors: list[Tensor]) -> Tensor:
    shape = [max(t.shape[d] for t in tensors) for d in range(1, tensors[0].dim())]
    padded = [t.new_zeros(t.shape[0], *shape) for t in tensors]
    for full, t in zip(padded, tensors, strict=True):
        full[tuple(slice(0, n) for n in t.shape)] = t
    return torch.cat(padded)


def _stack_onevision(rows: list[list[Piece]]) -> dict[str, Any]:
    """Prompts of several images are said to be such, so that the model does not tile them."""
    out = _stack(rows)
    if out:
        counts = [[len(row)] if any(p.shares_row for p in row) else [1] * len(row) for row in rows]
        out["batch_num_images"] = torch.tensor([n for row in counts for n in row if n])
    return out


def _per_row(rows: list[list[Piece]]) -> dict[str, Any]:
    """Idefics3, SmolVLM: pixel_values [B, tiles, 3, H, W]; the model drops the all-zero tiles that pad."""
    if not any(rows):
        return {}
    tiles = [[t for p in row for t in p.tensors["pixel_values"]] for row in rows]
    most = max(len(t) for t in tiles)
    shape = next(t[0].shape for t in tiles if t)
    pixels = torch.zeros(len(rows), most, *shape)
    for row, images in enumerate(tiles):
        for i, image in enumerate(images):
            pixels[row, i] = image
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(len(rows), most, *shape[1:], dtype=torch.bool),
    }


_GRIDS = ((1, 6, 8), (1, 4, 10), (1, 8, 8))
_ANYRES = ((11, 22), (22, 13), (24, 24))
_ANYRES_WIDE = ((15, 30), (30, 18), (32, 32))
_QWEN: dict[str, Any] = {"types": "mm_token_type_ids", "mrope": True, "collate": _stack}
_GEMMA_IMAGE = _plain(32, 16, before=(NEWLINE, START), after=(END, NEWLINE))

FAMILIES: dict[str, Family] = {
    "llava": Family("LlavaForConditionalGeneration", _llava, (20,), _plain(20, 25), _stack),
    "llava_next": Family("LlavaNextForConditionalGeneration", _llava_next, _ANYRES, _mosaic(PINPOINTS, 12), _stack),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        _llava_onevision,
        _ANYRES_WIDE,
        _mosaic(PINPOINTS_WIDE, 16, max_tiles=2),
        _stack_onevision,
    ),
    "llava_onevision-video": Family(
        "LlavaOnevisionForConditionalGeneration",
        _llava_onevision,
        (4,),
        _frames(16, lambda frames: 4 * frames + 1),
        _stack,
        video=True,
    ),
    "llava_next_video": Family(
        "LlavaNextVideoForConditionalGeneration",
        _llava_next_video,
        _ANYRES_WIDE[:2],
        _mosaic(PINPOINTS_WIDE, 16),
        _stack,
    ),
    "llava_next_video-video": Family(
        "LlavaNextVideoForConditionalGeneration",
        _llava_next_video,
        (4,),
        _frames(16, lambda frames: 4 * frames),
        _stack,
        video=True,
    ),
    "video_llava": Family(
        "VideoLlavaForConditionalGeneration",
        _video_llava,
        (16,),
        _plain(16, 16, "pixel_values_images"),
        _stack,
    ),
    "video_llava-video": Family(
        "VideoLlavaForConditionalGeneration",
        _video_llava,
        (2,),
        _frames(16, lambda frames: 17 * frames),
        _stack,
        video=True,
    ),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", _qwen2_vl, _GRIDS, _grid(), **_QWEN),
    "qwen2_vl-video": Family(
        "Qwen2VLForConditionalGeneration",
        _qwen2_vl,
        ((3, 4, 6), (2, 6, 6)),
        _grid("video"),
        video=True,
        **_QWEN,
    ),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, _GRIDS, _grid(), **_QWEN),
    "qwen2_5_vl-video": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _qwen2_5_vl,
        ((3, 4, 6), (2, 6, 6)),
        _grid("video", seconds=True),
        video=True,
        **_QWEN,
    ),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", _qwen3_vl, _GRIDS, _grid(), **_QWEN),
    "qwen3_vl-video": Family(
        "Qwen3VLForConditionalGeneration",
        _qwen3_vl,
        ((3, 4, 6), (2, 6, 6)),
        _stamped_frames,
        video=True,
        **_QWEN,
    ),
    "qwen3_5": Family("Qwen3_5ForConditionalGeneration", _qwen3_5, _GRIDS, _grid(), **_QWEN),
    "glm4v": Family("Glm4vForConditionalGeneration", _glm4v, _GRIDS, _grid(), **_QWEN),
    "internvl": Family("InternVLForConditionalGeneration", _internvl, (1, 3), _tiles, _stack),
    # To these two models the frames of a video are images, with words between them.
    "internvl-frames": Family("InternVLForConditionalGeneration", _internvl, (3,), _framed, _stack, tile_units=True),
    "smolvlm-frames": Family(
        "SmolVLMForConditionalGeneration", _smolvlm, (3,), _stamped_images, _per_row, tile_units=True
    ),
    "smolvlm": Family("SmolVLMForConditionalGeneration", _smolvlm, ((0, 0), (1, 2)), _split, _per_row, tile_units=True),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration", _idefics3, ((1, 2), (0, 0)), _split, _per_row, tile_units=True
    ),
    "gemma3": Family("Gemma3ForConditionalGeneration", _gemma3, (32,), _GEMMA_IMAGE, _stack, types="token_type_ids"),
    # A window that ends inside the prompt.
    "gemma3-window": Family(
        "Gemma3ForConditionalGeneration", _gemma3_window, (32,), _GEMMA_IMAGE, _stack, types="token_type_ids"
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        _paligemma,
        (20,),
        _plain(20, 25),
        _stack,
        types="token_type_ids",
        visual_first=True,
    ),
    "mistral3": Family("Mistral3ForConditionalGeneration", _mistral3, ((24, 32), (16, 24)), _row_breaks, _stack),
}
NAMES = tuple(FAMILIES)
IMAGES = tuple(name for name, family in FAMILIES.items() if not family.video)


@cache
def _cached(model_class: str, config: Callable[[], Any], attn_implementation: str) -> Any:
    torch.manual_seed(0)
    settings = config()
    model = getattr(transformers, model_class)._from_config(settings, attn_implementation=attn_implementation)
    _spread(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = list(range(FIRST_TEXT))  # a random model must not say "<image>"
    return model.eval()


@torch.no_grad()
def _spread(model: Any) -> None:
    """Weights large enough that attention is peaked and a wrong position or mask shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    tied = model.config.tie_word_embeddings  # Gemma scales embeddings itself
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() < 2:
            weight.add_(0.1 * noise)
        elif "embed" in name and not tied:
            weight.copy_(noise)
        else:
            # Linear attention feeds its state back: large weights there only amplify rounding.
            gain = 0.5 if "linear_attn" in name else 1.0
            weight.copy_(gain * noise * (weight[0].numel() ** -0.5))


def model(name: str, attn_implementation: str = "sdpa") -> Any:
    """The stock model of a family: fp32, eval mode, seeded weights. Shared: leave it as you found it."""
    family = FAMILIES[name]
    return _cached(family.model_class, family.config, attn_implementation)


def depth(model: Any) -> int:
    """Decoder layers of a model."""
    return len(model.get_decoder().layers)


def fresh(name: str, attn_implementation: str = "sdpa") -> Any:
    """The same model, not shared."""
    family = FAMILIES[name]
    return _cached.__wrapped__(family.model_class, family.config, attn_implementation)


def text(seed: int, length: int = 5) -> Piece:
    """Random words."""
    generator = torch.Generator().manual_seed(7919 + seed)
    return Piece(torch.randint(FIRST_TEXT, VOCAB, (length,), generator=generator).tolist())


def turn(name: str, visuals: int, seed: int = 0, first: bool = True, shares_row: bool | None = None) -> list[Piece]:
    """One user turn: words, visuals with words between them, words. `first` adds BOS."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    shares_row = visuals > 1 if shares_row is None else shares_row
    start = [Piece([BOS])] if first else []
    pieces: list[Piece] = []
    for i in range(visuals):
        size = family.sizes[(seed + i) % len(family.sizes)]
        pieces += [
            family.visual(size, generator, shares_row),
            *([] if family.visual_first else [text(seed + i, 2)]),
        ]
    if family.visual_first:
        return [*pieces, *start, text(seed, 5 + seed % 3), Piece([NEWLINE])]
    return [*start, text(seed + 50, 3 + seed % 2), *pieces, text(seed, 4 + seed % 3)]


def inputs(name: str, rows: Sequence[int] = (1,), seed: int = 0, only: int | None = None) -> Inputs:
    """Inputs with rows[r] images (or videos) in row r, left-padded. `only=r` gives that same row alone."""
    picked = range(len(rows)) if only is None else [only]
    return build(name, [turn(name, rows[r], seed=10 * seed + r) for r in picked])


def build(name: str, rows: Sequence[list[Piece]]) -> Inputs:
    """Collate rows of pieces as the family's processor would, with left padding."""
    family = FAMILIES[name]
    length = max(sum(len(p.ids) for p in row) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    units: list[list[list[int]]] = []
    for r, row in enumerate(rows):
        flat = [i for p in row for i in p.ids]
        ids[r, length - len(flat) :] = torch.tensor(flat)
        mask[r, length - len(flat) :] = 1
        units.append(_units(row, length - len(flat), family.tile_units))
    out = Inputs(input_ids=ids, attention_mask=mask)
    out.update(family.collate([[p for p in row if p.tensors] for row in rows]))
    if family.types is not None:
        types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        # PaliGemma: 0 marks the whole prompt (a bidirectional prefix), 1 would mark the answer to learn.
        out[family.types] = torch.zeros_like(types) if family.visual_first else types
    out.units = units
    return out


def _units(row: list[Piece], start: int, per_tile: bool) -> list[list[int]]:
    units = []
    for piece in row:
        if piece.tensors:
            unit = [start + i for i, token in enumerate(piece.ids) if token in (IMAGE, VIDEO)]
            gaps = [i for i in range(1, len(unit)) if per_tile and unit[i] != unit[i - 1] + 1]
            units += [unit[a:b] for a, b in zip([0, *gaps], [*gaps, len(unit)], strict=True)]
        start += len(piece.ids)
    return units
