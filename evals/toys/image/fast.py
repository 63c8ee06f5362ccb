"""Fast CPU forward of the tiny LLaVA for training: the stock parameters, the blocked attention of `toys.fast`.

The prefix is `<s>` and 256 visual tokens, so every question restarts at position 257.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.evals.toys.fast import Attention, linear, prefixed_hidden
from vtprune.evals.toys.image.model import BOS, tower

PREFIX = 257


def _layer_norm(x: Tensor, layer: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def tower_features(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised pixels [B, 3, 64, 64] -> layer -2 patches [B, 256, d] and last-layer CLS output [B, d]."""
    vit = tower(model)
    embed = vit.embeddings
    kernel = embed.patch_embedding.weight
    size = kernel.shape[-1]
    patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = F.linear(patches, kernel.flatten(1))
    x = torch.cat([embed.class_embedding.expand(len(x), 1, -1), x], 1) + embed.position_embedding.weight
    x = _layer_norm(x, vit.pre_layrnorm)
    heads = vit.config.num_attention_heads
    features = x
    last = len(vit.encoder.layers) - 1
    for i, layer in enumerate(vit.encoder.layers):
        features, rows = x, slice(0, 1 if i == last else None)  # the last layer serves the CLS token alone
        attention = layer.self_attn
        h = _layer_norm(x, layer.layer_norm1)
        q, k, v = (
            linear(h[:, rows], attention.q_proj),
            linear(h, attention.k_proj),
            linear(h, attention.v_proj),
        )
        x = x[:, rows] + linear(Attention.apply(q, k, v, heads, (), None), attention.out_proj)
        h = linear(_layer_norm(x, layer.layer_norm2), layer.mlp.fc1)
        x = x + linear(F.silu(1.702 * h) * (1 / 1.702), layer.mlp.fc2)  # quick_gelu
    return features[:, 1:], _layer_norm(x[:, 0], vit.post_layernorm)


def project(model: Any, features: Tensor) -> Tensor:
    """Patch features [B, 256, d] -> visual tokens [B, 256, d]."""
    projector = model.model.multi_modal_projector
    return linear(F.gelu(linear(features, projector.linear_1)), projector.linear_2)


def question_hidden(model: Any, visual: Tensor, ids: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
    """Final hidden states [B, Q, d] of packed questions.

    `visual` [B, 256, d] projected visual tokens; `ids`, `segments`, `positions` [B, Q]: token ids, which
    question a token belongs to (padding: -1) and its rotary position.
    """
    lm = model.model.language_model
    batch = len(ids)
    prefix = torch.cat([lm.embed_tokens.weight[BOS].expand(batch, 1, -1), visual], 1)
    all_positions = torch.cat([torch.arange(PREFIX).expand(batch, -1), positions], 1)
    return prefixed_hidden(lm, prefix, ids, segments, all_positions)
