"""Fast CPU forward for training a toy's language model: packed questions and blocked attention.

One prefix (what the model sees) is followed by all its questions. Every question sees only the prefix and itself,
which gives the logits of asking it alone. Flash attention on CPU takes two thirds of a training step at this size;
plain matmul, softmax, matmul on a few images at a time stays in cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4  # images of LENGTH keys whose attention scores fit the cache together
LENGTH = 257


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _turn(
    q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor] | None, part: slice, back: bool = False
) -> tuple[Tensor, Tensor]:
    """The last positions q and all positions k [b, H, N, D] of a part of the batch, rotated by where they stand."""
    if rope is None:
        return q, k
    cos, sin = rope[0][part, None], rope[1][part, None]
    sin = -sin if back else sin
    n = q.shape[2]
    return _rotate(q, cos[:, :, -n:], sin[:, :, -n:]), _rotate(k, cos, sin)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()


def _rows(q: Tensor, k: Tensor, biases: tuple[Tensor, ...]) -> list[tuple[slice, slice]]:
    """(query rows, key columns): all at once, or the prefix among itself and the questions over all."""
    queries, keys = q.shape[1], k.shape[1]
    if len(biases) < 2:
        return [(slice(0, queries), slice(0, keys))]
    prefix = len(biases[0])
    return [(slice(0, prefix), slice(0, prefix)), (slice(prefix, queries), slice(0, keys))]


def _parts(keys: int, batch: int) -> list[slice]:
    """Runs of images whose attention scores fit the cache together."""
    size = max(CHUNK, CHUNK * LENGTH // keys)
    return [slice(start, start + size) for start in range(0, batch, size)]


class Attention(torch.autograd.Function):
    """Multi-head attention of q [B, N, H * D] over k, v [B, L, H * D].

    `biases` are added to the scores: none (tower), (causal [P, P], questions [B, L - P, L]) or, where
    N = L - P, the latter alone. `rope`: cos and sin [B, L, D]; the queries are the last N positions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        biases: tuple[Tensor, ...],
        rope: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        out = torch.empty_like(q)
        probs: list[Tensor] = []
        scale = (q.shape[-1] // heads) ** -0.5
        for part in _parts(k.shape[1], len(q)):
            qh, kh, vh = (_heads(t[part], heads) for t in (q, k, v))
            qh, kh = _turn(qh, kh, rope, part)
            qh = qh * scale
            for i, (rows, columns) in enumerate(_rows(q, k, biases)):
                scores = qh[:, :, rows] @ kh[:, :, columns].transpose(-1, -2)
                if biases:
                    scores += biases[i] if biases[i].dim() == 2 else biases[i][part, None]
                p = torch.softmax(scores, -1)
                out[part, rows] = (p @ vh[:, :, columns]).transpose(1, 2).flatten(2)
                probs.append(p)
        ctx.save_for_backward(q, k, v, out, *probs)
        ctx.heads, ctx.rope, ctx.scale, ctx.biases = heads, rope, scale, biases
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, *probs = ctx.saved_tensors
        heads, rope, scale, biases = ctx.heads, ctx.rope, ctx.scale, ctx.biases
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        used = iter(probs)
        for part in _parts(k.shape[1], len(q)):
            qh, kh, vh, gh = (_heads(t[part], heads) for t in (q, k, v, grad))
            inner = (gh * _heads(out[part], heads)).sum(-1, keepdim=True)
            qh, kh = _turn(qh, kh, rope, part)
            dqh, dkh, dvh = torch.empty_like(qh), torch.zeros_like(kh), torch.zeros_like(vh)
            for rows, columns in _rows(q, k, biases):
                p, g = next(used), gh[:, :, rows]
                dvh[:, :, columns] += p.transpose(-1, -2) @ g
                ds = g @ vh[:, :, columns].transpose(-1, -2)
                ds = ds.sub_(inner[:, :, rows]).mul_(p)
                dqh[:, :, rows] = ds @ kh[:, :, columns]
                dkh[:, :, columns] += ds.transpose(-1, -2) @ qh[:, :, rows]
            dqh, dkh = _turn(dqh, dkh, rope, part, back=True)
            for full, head in ((dq, dqh * scale), (dk, dkh * scale), (dv, dvh)):
                full[part] = head.transpose(1, 2).flatten(2)
        return dq, dk, dv, None, None, None


class _Adapted(torch.autograd.Function):
    """x [..., i] through a frozen weight [o, i] and its low-rank change `scale` up [o, r] down [r, i]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        flat = x.flatten(0, -2)
        low = flat @ down.T
        ctx.save_for_backward(flat, low, weight, down, up)
        ctx.scale = scale
        return torch.addmm(flat @ weight.T, low, up.T, alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        flat, low, weight, down, up = ctx.saved_tensors
        shape, grad = grad.shape, grad.flatten(0, -2)
        dlow = (grad @ up).mul_(ctx.scale)
        dx = torch.addmm(grad @ weight, dlow, down).view(*shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return dx, None, dlow.T @ flat, (grad.T @ low).mul_(ctx.scale), None


def linear(x: Tensor, layer: Any) -> Tensor:
    """A linear layer; one that PEFT has wrapped takes its frozen weight and its adapter in one step."""
    if hasattr(layer, "lora_A"):
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return _Adapted.apply(x, layer.base_layer.weight, down, up, layer.scaling["default"])
    return F.linear(x, layer.weight, layer.bias)


def _share(x: Tensor, heads: int, of: int) -> Tensor:
    """Keys or values [B, N, of * D], each of which serves `heads / of` heads in turn -> [B, N, heads * D]."""
    if heads == of:
        return x
    return x.unflatten(-1, (of, -1)).repeat_interleave(heads // of, -2).flatten(-2)


class _RMSNorm(torch.autograd.Function):
    """Root mean square norm over the last dimension; statistics in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inv = (rms.square_().div_(x.shape[-1]).add_(eps)).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, inv)
        return (x * inv).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, inv = ctx.saved_tensors
        normed = x * inv
        dweight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        g = grad * weight
        mean = torch.linalg.vecdot(g, normed)[..., None] / x.shape[-1]
        return (g - normed * mean).mul_(inv), dweight, None


def rms_norm(x: Tensor, layer: Any) -> Tensor:
    return _RMSNorm.apply(x, layer.weight, layer.variance_epsilon)


def prefixed_hidden(lm: Any, prefix: Tensor, ids: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
    """Final hidden states [B, Q, d] of questions behind the embedded `prefix` [B, P, d].

    `ids` and `segments` [B, Q]: token ids, and which question a token belongs to (padding: -1); `positions`
    [..., B, P + Q] as the model's rotary takes them.
    """
    batch, count = ids.shape
    width = prefix.shape[1]
    x = torch.cat([prefix, F.embedding(ids, lm.embed_tokens.weight)], 1)
    order = torch.arange(count)
    seen = (segments[:, :, None] == segments[:, None]) & (order[:, None] >= order)
    low = -1e4
    bias = torch.cat([torch.zeros(batch, count, width), torch.where(seen, 0.0, low)], -1).to(x.dtype)
    causal = torch.full((width, width), low).triu(1).to(x.dtype)
    cos, sin = lm.rotary_emb(x, positions)
    heads, of = lm.config.num_attention_heads, lm.config.num_key_value_heads
    for i, layer in enumerate(lm.layers):
        attention, mlp = layer.self_attn, layer.mlp
        last = i == len(lm.layers) - 1  # nobody reads the image positions after the last layer
        rows, biases = (slice(width, None), (bias,)) if last else (slice(None), (causal, bias))
        h = rms_norm(x, layer.input_layernorm)
        q, k, v = (
            linear(h[:, rows], attention.q_proj),
            _share(linear(h, attention.k_proj), heads, of),
            _share(linear(h, attention.v_proj), heads, of),
        )
        x = x[:, rows] + linear(Attention.apply(q, k, v, heads, biases, (cos, sin)), attention.o_proj)
        h = rms_norm(x, layer.post_attention_layernorm)
        x = x + linear(F.silu(linear(h, mlp.gate_proj)) * linear(h, mlp.up_proj), mlp.down_proj)
    return rms_norm(x, lm.norm)
