"""What reads the rows of a plain vision transformer after its blocks: pooling heads, means, and masks over padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.core.covering import cover, standing
from vtprune.core.errors import UnsupportedCall, UnsupportedModel

from .vit_blocks import Given, Vit, class_path

Sizes = Callable[[], "Tensor | None"]


# -- padding ----------------------------------------------------------------------------------------------------------


def real_tokens(mask: Any, n: int) -> list[int]:
    """How many of n tokens of each image are real, of a mask over keys that hides padding at the right end.

    mask: [B, 1, M, N], boolean (True = attend) or additive. Raises UnsupportedCall for any other.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != n:
        what = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedCall(f"attention_mask={what}: a mask [batch, 1, tokens, {n}] over the keys is supported")
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    seen = seen[:, 0].any(1)  # [B, N]
    counts = seen.sum(1)
    if not bool((seen == (torch.arange(n, device=seen.device) < counts[:, None])).all()):
        raise UnsupportedCall("attention_mask hides tokens in front of real ones: put the padding at the right end")
    return counts.tolist()


def cut_masks(vit: Vit, valid: Sizes) -> list[Callable[[], None]]:
    """Give a pooling head, in place of the mask of all patches, valid() [B, M] of the rows that are left."""
    head = getattr(vit.root, "head", None)
    if not vit.parts.pads or not isinstance(head, nn.Module):
        return []
    return [head.register_forward_pre_hook(partial(_cut_mask, valid), with_kwargs=True).remove]


def _cut_mask(valid: Sizes, module: Any, args: Any, kwargs: Given) -> Any:
    here = valid()
    if here is None:
        return None
    hidden = args[0] if args else kwargs["hidden_state"]
    return (hidden,), {"attention_mask": here}


# -- pooling ----------------------------------------------------------------------------------------------------------


def masked_mean(vit: Vit, sizes: Sizes, valid: Sizes) -> list[Callable[[], None]]:
    """For a classifier that takes the mean over the patches that its own mask shows; returns the undo.

    valid() [B, M]: which rows are left, None if all are; sizes() [B, M] or None: how often they count.
    """
    if type(vit.owner).__name__ != "Siglip2ForImageClassification":
        return []
    return [vit.root.register_forward_hook(partial(_spread_states, vit, sizes, valid), with_kwargs=True).remove]


def _spread_states(vit: Vit, sizes: Sizes, valid: Sizes, module: Any, args: Any, kwargs: Given, output: Any) -> Any:
    """Rows scaled so that the sum over all patches, divided by their number, is the weighted mean of those left."""
    left, size, mask = valid(), sizes(), kwargs.get("pixel_attention_mask")
    if left is None:
        return None
    x = output.last_hidden_state
    weight = left.float() if size is None else left * size
    count = mask.sum(1, keepdim=True) if mask is not None else x.new_full((1, 1), x.shape[1])
    x = x * (weight * (count / weight.sum(1, keepdim=True))).to(x.dtype)[..., None]
    output.last_hidden_state = x if mask is None else F.pad(x, (0, 0, 0, mask.shape[1] - x.shape[1]))
    return output


def weighted_pooling(vit: Vit, sizes: Sizes) -> list[Callable[[], None]]:
    """Let mean and attention pooling count a row as often as sizes() [B, M] says; returns the undo.

    Raises UnsupportedModel for a pooling that takes no weights.
    """
    root, owner, undo = vit.root, vit.owner, []
    pool = getattr(root, "attn_pool", None)
    if pool is not None:
        undo += _attention_pool(pool, vit, sizes)
    elif getattr(root, "global_pool", "") in ("avg", "avgmax") and not callable(getattr(type(root), "pool", None)):
        raise UnsupportedModel(
            f"{type(root).__name__} takes a mean that knows no weights for merged tokens: choose a method that prunes "
            "without merging (topk_cls, zero_tprune), or tome with pooling='plain'"
        )
    for name, ours in (("pool", _timm_pool), ("_global_pool", _clip_pool)):
        if callable(getattr(type(root), name, None)):
            undo.append(cover(root, name, partial(ours, root, standing(root, name), sizes)))
    head: Any = getattr(root, "head", None)
    if isinstance(getattr(head, "attention", None), nn.MultiheadAttention):  # SigLIP
        hook = partial(_padded, sizes)
        undo.append(head.attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
    first = _mean_head(owner)
    if first is not None:
        undo.append(root.register_forward_hook(partial(_weighted_states, sizes, first)).remove)
    return undo


def _attention_pool(pool: Any, vit: Vit, sizes: Sizes) -> list[Callable[[], None]]:
    name = class_path(type(pool))
    if name == "timm.layers.attention_pool.AttentionPoolLatent" and pool.pos_embed is None:
        return [pool.register_forward_pre_hook(partial(_biased, sizes), with_kwargs=True).remove]
    if name == "open_clip.transformer.AttentionalPooler":
        pools = [p for p in (pool, getattr(vit.root, "attn_pool_contrastive", None)) if p is not None]
        if getattr(vit.root, "attn_pool_type", "") == "cascade":  # the second pools what the first put out
            pools = pools[:1]
        return [p.attn.register_forward_pre_hook(partial(_padded, sizes), with_kwargs=True).remove for p in pools]
    raise UnsupportedModel(
        f"{type(pool).__name__} pools by attention that takes no weights for merged tokens (or has positions of its "
        "own): choose a method that prunes without merging (topk_cls, zero_tprune)"
    )


def _log(size: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[B, rows] log sizes of the last rows."""
    return size[:, size.shape[1] - rows :].log().to(dtype)


def _biased(sizes: Sizes, module: Any, args: Any, kwargs: Given) -> Any:
    size = sizes()
    if size is None:
        return None
    x = args[0]
    return args, {**kwargs, "attn_mask": _log(size, x.shape[1], x.dtype)[:, None, None, :]}


def _padded(sizes: Sizes, module: Any, args: Any, kwargs: Given) -> Any:
    size = sizes()
    if size is None:
        return None
    keys = args[1]
    return args, {**kwargs, "key_padding_mask": _log(size, keys.shape[1], keys.dtype)}


def weigh_rows(x: Tensor, size: Tensor, first: int) -> Tensor:
    """x [B, M, C] with rows from `first` on scaled so that their plain mean is the mean weighted by size [B, M]."""
    if x.shape[1] != size.shape[1]:
        raise UnsupportedCall(
            f"{x.shape[1]} rows to pool, but the last forward pass left {size.shape[1]}: pool what it put out"
        )
    part = size[:, first:]
    factor = (part * (part.shape[1] / part.sum(1, keepdim=True))).to(x.dtype)
    return torch.cat([x[:, :first], x[:, first:] * factor[..., None]], 1)


def _timm_pool(root: Any, plain: Any, sizes: Sizes, x: Tensor, pool_type: str | None = None) -> Tensor:
    size = sizes()
    kind = root.global_pool if pool_type is None else pool_type
    if size is None or root.attn_pool is not None or kind not in ("avg", "avgmax"):
        return plain(x, pool_type)
    first = 0 if getattr(root, "pool_include_prefix", False) else root.num_prefix_tokens
    mean = plain(weigh_rows(x, size, first), "avg")
    return mean if kind == "avg" else 0.5 * (plain(x, "max") + mean)


def _clip_pool(root: Any, plain: Any, sizes: Sizes, x: Tensor) -> Any:
    size = sizes()
    pooled, tokens = plain(x)
    if size is None or root.pool_type != "avg":
        return pooled, tokens
    return plain(weigh_rows(x, size, 1))[0], tokens


# transformers: classifiers that take the mean of the tower's rows, and the first row that counts.
MEAN_HEADS: dict[str, Callable[[Any], int]] = {
    "CLIPForImageClassification": lambda owner: 1,
    "SiglipForImageClassification": lambda owner: 0,
    "Dinov2ForImageClassification": lambda owner: 1,
    "Dinov2WithRegistersForImageClassification": lambda owner: 1 + owner.config.num_register_tokens,
}


def _mean_head(owner: Any) -> int | None:
    found = MEAN_HEADS.get(type(owner).__name__)
    return None if found is None else found(owner)


def _weighted_states(sizes: Sizes, first: int, module: Any, args: Any, output: Any) -> Any:
    size = sizes()
    if size is not None:
        output.last_hidden_state = weigh_rows(output.last_hidden_state, size, first)
    return output
