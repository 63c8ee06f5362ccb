"""Official methods inside the LLM on a small decoder, restated in float64 token by token; nothing here calls vtprune.

Every function answers the arrays of a stored run, so that `vtprune.evals.parity` can be tried on other layers, shares
and sizes than those of the stored files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from oracles import top
from torch import Tensor


def weights(
    seed: int, depth: int, width: int = 32, heads: int = 4, kv: int = 4, bias: bool = False, scale: float = 2.0
) -> dict[str, Any]:
    """A LLaMA of random weights (a Qwen2, with bias), under the names that Hugging Face gives them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> np.ndarray:
        return (torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])).numpy()

    mlp, small = 3 * width // 2, width // heads * kv
    sizes = {
        **{"self_attn.q_proj": (width, width), "self_attn.k_proj": (small, width), "self_attn.v_proj": (small, width)},
        **{"self_attn.o_proj": (width, width), "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width)},
        "mlp.down_proj": (width, mlp),
    }
    out: dict[str, Any] = {"norm.weight": np.ones(width, np.float32) + 0.1 * draw(width)}
    for i in range(depth):
        for name, shape in sizes.items():
            out[f"layers.{i}.{name}.weight"] = scale * draw(*shape)
            if bias and name[10:11] in "qkv":
                out[f"layers.{i}.{name}.bias"] = draw(shape[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"layers.{i}.{name}.weight"] = np.ones(width, np.float32) + 0.1 * draw(width)
    numbers = {"num_layers": depth, "hidden_size": width, "num_heads": heads, "num_kv_heads": kv}
    settings = {**numbers, "intermediate_size": mlp, "rms_norm_eps": np.float32(1e-6), "rope_theta": np.float32(1e4)}
    return {name: np.asarray(value) for name, value in {**out, **settings}.items()}


class Decoder:
    """Layers with a cache each. States [n, D], `ids` the rotary position of every token."""

    def __init__(self, w: dict[str, Any]) -> None:
        self.w = {name: torch.from_numpy(np.asarray(value)).double() for name, value in w.items()}
        self.depth, self.heads, self.kv = (int(w[name]) for name in ("num_layers", "num_heads", "num_kv_heads"))
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.hidden: dict[str, tuple[Tensor, Tensor]] = {}  # of the last layer: what entered and what left a module

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + float(self.w["rms_norm_eps"])).sqrt() * self.w[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", torch.zeros(()))

    def turned(self, x: Tensor, ids: Sequence[int]) -> Tensor:
        """Rotary positions on [H, n, d]."""
        half = x.shape[-1] // 2
        speed = float(self.w["rope_theta"]) ** (-torch.arange(half).double() / half)
        angle = torch.tensor(list(ids)).double()[:, None] * speed
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def qkv(self, i: int, h: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """[H, n, d] each, keys and values repeated for the query heads that share them."""
        x, name = self.norm(h, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn"
        q, k, v = (self.linear(x, f"{name}.{p}_proj").view(len(h), -1, self.width()).transpose(0, 1) for p in "qkv")
        share = self.heads // self.kv
        k, v = self.turned(k, ids), v
        return self.turned(q, ids), k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)

    def width(self) -> int:
        return int(self.w["hidden_size"]) // self.heads

    def logits(self, q: Tensor, k: Tensor, masked: Sequence[int] = ()) -> Tensor:
        """[H, n, m], causal from the end; masked keys are hidden from everybody."""
        out = q @ k.transpose(1, 2) / math.sqrt(self.width())
        n, m = out.shape[1:]
        out = out.masked_fill(torch.ones(n, m).triu(m - n + 1).bool(), -torch.inf)
        out[:, :, list(masked)] = -torch.inf
        return out

    def layer(self, i: int, h: Tensor, ids: Sequence[int], masked: Sequence[int] = (), new: bool = False) -> Tensor:
        """States behind layer i; new: h is one more token behind those of the cache."""
        q, k, v = self.qkv(i, h, ids)
        if new:
            k, v = (torch.cat([old, now], 1) for old, now in zip(self.cache[i], (k, v)))
            self.cache[i] = k, v
        else:
            self.cache.append((k, v))
        seen = self.logits(q, k, masked).softmax(-1).nan_to_num() @ v
        said = self.linear(seen.transpose(0, 1).flatten(1), f"layers.{i}.self_attn.o_proj")
        between = h + said
        x, name = self.norm(between, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp"
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        thought = self.linear(torch.nn.functional.silu(gate) * up, f"{name}.down_proj")
        self.hidden = {"attention": (self.norm(h, f"layers.{i}.input_layernorm"), said), "mlp": (x, thought)}
        return between + thought

    def lengths(self) -> list[int]:
        return [k.shape[1] for k, _ in self.cache]


def prompt(seed: int, width: int, sys: int, vis: int, text: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(sys + vis + text, width, generator=generator)
    decode = torch.randn(1, width, generator=generator)
    sizes = {"sys_len": sys, "vis_len": vis, "text_len": text}
    return {
        "inputs_embeds": embeds.numpy(),
        "decode_embed": decode.numpy(),
        **{k: np.array(v) for k, v in sizes.items()},
    }


def start(arrays: dict[str, Any]) -> tuple[Tensor, Tensor, range]:
    embeds, new = (torch.from_numpy(arrays[name]).double() for name in ("inputs_embeds", "decode_embed"))
    first = int(arrays["sys_len"])
    return embeds, new, range(first, first + int(arrays["vis_len"]))


def last_row(model: Decoder, i: int, h: Tensor, ids: Sequence[int]) -> Tensor:
    """[n] attention of the last token in layer i, mean over heads."""
    q, k, _ = model.qkv(i, h, ids)
    return model.logits(q, k)[:, -1].softmax(-1).mean(0)


def transition(model: Decoder) -> Tensor:
    """[n] of the layer that ran last: |out| / |in| times the softmax over all tokens of 1 - cos(in, out), twice."""
    total = 0.0
    for before, after in model.hidden.values():
        far = torch.tensor([1 - float(a @ b / a.norm() / b.norm()) for a, b in zip(before, after)]).double()
        total = total + after.norm(dim=1) / before.norm(dim=1) * far.exp() / far.exp().sum()
    return total  # type: ignore[return-value]


def renumbering(
    w: dict[str, Any], arrays: dict[str, Any], layers: Sequence[int], ratios: Sequence[float], ttv: Sequence[int] = ()
) -> dict[str, Any]:
    """PyramidDrop; with ttv, the layers counted from 1 whose transitions are summed, TransPrune."""
    model, (h, new, visual) = Decoder(w), start(arrays)
    n, out = len(visual), dict(arrays)
    alive, moved = list(range(len(h))), []
    for i in range(model.depth):
        if i in layers:
            stage, ids = list(layers).index(i), range(len(alive))
            q, k, _ = model.qkv(i, h, ids)
            rows = model.logits(q, k).softmax(-1).mean(0)
            at = [p for p, token in enumerate(alive) if token in visual]
            if ttv:
                text = [p for p, token in enumerate(alive) if token >= visual.stop]
                looked, turned = rows[text].mean(0)[at], torch.stack(moved).sum(0)[at]
                score = turned / (turned.sum() + 1e-8) + looked / (looked.sum() + 1e-8)
                out[f"stage{stage}_ttv_list"] = torch.stack(moved).numpy()
            else:
                score = rows[-1][at]
            keep = int(n * ratios[stage])
            stay = {at[j] for j in top(score, keep)}
            left = [p for p in range(len(alive)) if p not in at or p in stay]
            h, alive, moved = h[left], [alive[p] for p in left], [m[left] for m in moved]
            out |= {f"stage{stage}_score_visual": score.float().numpy(), f"stage{stage}_keep": np.array(keep)}
            out |= {f"stage{stage}_kept_indices": np.array(alive), f"stage{stage}_position_ids": np.arange(len(alive))}
        h = model.layer(i, h, range(len(alive)))
        if i + 1 in ttv:
            moved.append(transition(model))
    lengths = model.lengths()
    for i in range(model.depth):
        new = model.layer(i, new, [lengths[i]], new=True)
    return {
        **out,
        **{"layer_list": np.array(layers), "ratio_list": np.array(ratios, np.float32)},
        **{"accumulating_layer_list": np.array(ttv)},
        **{"final_kept_indices": np.array(alive), "kv_lengths_after_prefill": np.array(lengths)},
        **{"decode_position_id_per_layer": np.array(lengths)},
        "last_hidden_state": model.norm(h, "norm").float().numpy(),
        "decode_last_hidden_state": model.norm(new, "norm").float().numpy(),
    }


def fastv(w: dict[str, Any], arrays: dict[str, Any], layer: int, gone: float) -> dict[str, Any]:
    """The share `gone` of the visual tokens goes before a layer; positions stay."""
    model, (h, new, visual) = Decoder(w), start(arrays)
    alive, n = list(range(len(h))), len(h)
    whole = h
    for i in range(model.depth):
        whole = model.layer(i, whole, range(n))
    model.cache = []
    keep = round(len(visual) * (1 - gone))
    score = torch.zeros(0)
    for i in range(model.depth):
        if i == layer:
            score = before[list(visual)]  # noqa: F821
            stay = {visual[j] for j in top(score, keep)}
            alive = [p for p in alive if p not in visual or p in stay]
            h = h[alive]
        if i == layer - 1:
            before = last_row(model, i, h, alive)  # noqa: F841
        h = model.layer(i, h, alive)
    lengths, keys = model.lengths(), model.cache[layer][0]
    for i in range(model.depth):
        new = model.layer(i, new, [n], new=True)
    return {
        **arrays,
        **{"K": np.array(layer), "R": np.float32(gone), "keep": np.array(keep)},
        **{"score_visual": score.float().numpy(), "kept_indices": np.array(alive)},
        **{"kv_lengths_after_prefill": np.array(lengths), "decode_position_id": np.array(n)},
        "keys_layer_K": keys.float().numpy(),
        "last_hidden_state_full": model.norm(whole, "norm").float().numpy(),
        "last_hidden_state": model.norm(h, "norm").float().numpy(),
        "decode_last_hidden_state": model.norm(new, "norm").float().numpy(),
    }


def sharp_rank(logits: Tensor) -> Tensor:
    """[N] AIM's importance of masked logits [H, N, N]: five steps of PageRank at a temperature of 0.1."""
    share = (logits / 0.1).softmax(-1).nan_to_num()
    rank = torch.full(share.shape[:2], 1 / share.shape[1], dtype=torch.float64)[:, None]
    for _ in range(5):
        rank = rank @ share
    return rank[:, 0].square().mean(0).sqrt()


def aim(w: dict[str, Any], arrays: dict[str, Any], rates: Sequence[float]) -> dict[str, Any]:
    """Nothing is dropped: behind layer l the int(rate * V) most important visual tokens are not masked."""
    model, (h, new, visual) = Decoder(w), start(arrays)
    n, seen, importance, masks = len(h), set(range(len(h))), [], []
    for i, rate in enumerate(rates):
        masked = sorted(set(range(n)) - seen)
        q, k, _ = model.qkv(i, h, range(n))
        importance.append(sharp_rank(model.logits(q, k, masked)))
        h = model.layer(i, h, range(n), masked)
        left = [p for p in visual if p in seen]
        keep = int(len(visual) * rate + n - len(visual)) - (n - len(visual))
        seen = (seen - set(visual)) | {left[j] for j in top(importance[-1][left], keep)}
        masks.append([p in seen for p in range(n)])
    for i in range(model.depth):
        before = masks[i - 1] if i else [True] * n
        new = model.layer(i, new, [n], [p for p in range(n) if not before[p]], new=True)
    settings = {"tau": np.float32(0.1), "iters": np.array(5), "damping": np.float32(0)}
    return {
        **arrays,
        **settings,
        **{"retain_rate": np.array(rates, np.float32), "keep_mask_after_layer": np.array(masks, np.uint8)},
        "importance_all_layers": torch.stack(importance).float().numpy(),
        "last_hidden_state": model.norm(h, "norm").float().numpy(),
        "decode_last_hidden_state": model.norm(new, "norm").float().numpy(),
    }
