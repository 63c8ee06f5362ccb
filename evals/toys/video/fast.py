"""Fast CPU forward of the tiny Qwen2.5-VL for training: the stock parameters, the blocked attention of `toys.fast`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.evals.toys.fast import Attention, linear, prefixed_hidden, rms_norm
from vtprune.evals.toys.video.clips import GRID, MERGE, PATCH, SLOT, SLOTS
from vtprune.evals.toys.video.model import BOS, MEAN_RGB, STD, VISION_END, VISION_START, VISUAL_TOKENS

PREFIX = 1 + 1 + VISUAL_TOKENS + 1  # <s>, start, the clip, end
CELLS = GRID * MERGE  # patches along one side
_UNIT = MERGE * MERGE


def patches(clips: list[np.ndarray]) -> Tensor:
    """uint8 clips [16, 48, 48, 3] -> bfloat16 [B, 8, 144, 96], as the video processor orders patches and pixels."""
    x = (torch.from_numpy(np.stack(clips)).float() - torch.tensor(MEAN_RGB)) / (255 * STD)
    x = x.view(len(clips), SLOTS, SLOT, GRID, MERGE, PATCH, GRID, MERGE, PATCH, 3)
    x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return x.reshape(len(clips), SLOTS, CELLS * CELLS, -1).to(torch.bfloat16)


@cache
@torch.inference_mode(False)  # whoever asks first: what is kept must serve training too
def _layout() -> tuple[Tensor, Tensor, Tensor, int]:
    """Of one slot: patches in window order [144], the way back for its 36 tokens, places [144, 2], window length."""
    rows, columns = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    # Patches lie merge block by merge block, blocks window by window.
    raster = torch.stack([rows, columns]).view(2, GRID, MERGE, GRID, MERGE).transpose(2, 3).flatten(1, 2).flatten(2)
    side = GRID // 2  # a window is half a frame wide
    windows = torch.arange(GRID * GRID).view(2, side, 2, side).transpose(1, 2).flatten()
    order = (windows[:, None] * _UNIT + torch.arange(_UNIT)).flatten()
    return order, windows.argsort(), raster[:, windows].flatten(1).T, side * side * _UNIT


def _rotations(tower: Any, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, head width] at (row, column) `places` [n, 2]: rows turn one half, columns the other."""
    angles = (places[..., None].float() * tower.rotary_pos_emb.inv_freq.float()).flatten(1).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def visual_tokens(model: Any, x: Tensor) -> Tensor:
    """Patches [B, T, 144, 96] -> visual tokens [B, T * 36, d] in raster order.

    Slots never see each other in this tower, so any number of them at a time will do.
    """
    tower = model.model.visual
    batch, slots = x.shape[:2]
    order, back, places, window = _layout()
    x = F.linear(x.flatten(0, 1)[:, order], tower.patch_embed.proj.weight.flatten(1))
    rope = _rotations(tower, places, x.dtype)
    heads = tower.config.num_heads
    for i, block in enumerate(tower.blocks):
        h = linear(rms_norm(x, block.norm1), block.attn.qkv)
        if i in tower.fullatt_block_indexes:
            turns = [t.expand(len(h), -1, -1) for t in rope]
        else:
            h = h.unflatten(1, (-1, window)).flatten(0, 1)
            turns = [t.unflatten(0, (-1, window)).repeat(len(x), 1, 1) for t in rope]
        q, k, v = h.chunk(3, -1)
        h = Attention.apply(q, k, v, heads, (), tuple(turns)).reshape(x.shape)
        x = x + linear(h, block.attn.proj)
        h = rms_norm(x, block.norm2)
        x = x + linear(F.silu(linear(h, block.mlp.gate_proj)) * linear(h, block.mlp.up_proj), block.mlp.down_proj)
    merger = tower.merger
    x = rms_norm(x, merger.ln_q).unflatten(1, (-1, _UNIT)).flatten(2)
    x = linear(F.gelu(linear(x, merger.mlp[0])), merger.mlp[2])
    return x[:, back].unflatten(0, (batch, slots)).flatten(1, 2)


def question_hidden(
    model: Any, visual: Tensor, ids: Tensor, segments: Tensor, positions: Tensor, gap: int = 0
) -> Tensor:
    """Final hidden states [B, Q, d] of packed questions.

    `visual` [B, 288, d]; `ids`, `segments`, `positions` [B, Q] as for the tiny LLaVA, positions counted from the end
    of the clip's frame (`<|vision_end|>` is 0). gap: rotary positions between a frame's width and that token; versions
    of transformers differ in it.
    """
    lm = model.model.language_model
    batch = len(ids)
    edge = lm.embed_tokens.weight[[BOS, VISION_START, VISION_END]].expand(batch, -1, -1)
    prefix = torch.cat([edge[:, :2], visual, edge[:, 2:]], 1)
    first = 2 + GRID + gap
    raster = torch.cartesian_prod(torch.arange(SLOTS), torch.arange(GRID), torch.arange(GRID)) + 2
    clip = torch.cat([torch.arange(2).expand(3, -1), raster.T, torch.full((3, 1), first)], 1)
    places = torch.cat([clip[:, None].expand(-1, batch, -1), (positions + first).expand(3, -1, -1)], -1)
    return prefixed_hidden(lm, prefix, ids, segments, places)
