"""Plain vision transformers of timm, open_clip, torchvision and transformers: where their blocks are, and their parts.

Libraries are recognised by the names of their classes, so nothing of them is imported before such a model is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.covering import cover, standing
from vtprune.types import UnsupportedCall, UnsupportedModel

Given = dict[str, Any]
Sizes = Callable[[], "Tensor | None"]
INSIDE = (
    "visual", "trunk", "vision_model", "vit", "deit", "dinov2", "dinov2_with_registers", "backbone", "_backbone",
    "timm_model",
)  # fmt: skip
LISTS = ("blocks", "transformer.resblocks", "encoder.layers", "encoder.layer", "model.layer", "layer", "layers")
# transformers: tokens before the patches by model type of the tower, CLS first where there are any.
PREFIX: dict[str, Callable[[Any], int]] = {
    "vit": lambda config: 1,
    "clip_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "deit": lambda config: 2,
    "dinov3_vit": lambda config: 1 + config.num_register_tokens,
    "siglip2_vision_model": lambda config: 0,
}
# transformers: text-image models that hold such a tower, and wrappers around a model of timm.
WHOLE = ("clip", "siglip", "siglip2", "timm_wrapper", "timm_backbone")
LIBRARIES = ("timm", "open_clip", "torchvision")
PIXELS = "pixel_values"
WORKING = (
    "timm's VisionTransformer and Eva, open_clip's VisionTransformer, torchvision's VisionTransformer, and "
    "transformers' ViT, DeiT, CLIP, SigLIP, SigLIP 2, DINOv2 (with registers too) and DINOv3 (ViT)"
)
REFUSED = {
    "beit": "its attention adds a bias for every pair of places",
    "data2vec-vision": "its attention adds a bias for every pair of places",
    "vit_mae": "it drops patches at random itself and puts them back by place",
}
# Ends of the names of models of transformers that read rows as they come, such as the first one or their mean. All
# others may lay them out on a grid.
READS_ROWS = ("Model", "ModelWithProjection", "ForImageClassification", "ForImageClassificationWithTeacher")
ROPE = ("rope", "position_embeddings")  # arguments of a block that hold rotary positions, [N, d] or a pair of those


@dataclass(frozen=True)
class Parts:
    """A block class in its own modules: x = x + attend(x), then x + feed(x).

    attend: (block, x, bias [B, N] or None, further arguments) -> what attention adds; bias is added to the logits of
        every key. feed: (block, x) -> what the MLP adds. attention: name of the attention module.
    queries, keys: names of the modules inside it that put out queries and keys, [B, N, C] or [B, H, N, d]; empty: they
        are slices of one packed projection of what `norm` puts out.
    check: raises UnsupportedModel for a block of this class that `attend` and `feed` would not reproduce.
    rotate: (block, queries or keys, arguments) -> rotated; None: positions do not enter attention.
    pads: the block's attention_mask hides padding at the right end of some images, and a reduction follows it.
    """

    attend: Callable[[Any, Tensor, Tensor | None, Given], Tensor]
    feed: Callable[[Any, Tensor], Tensor]
    attention: str
    queries: str = ""
    keys: str = ""
    norm: str = ""
    check: Callable[[Any], None] = lambda block: None
    rotate: Callable[[Any, Tensor, Given], Tensor] | None = None
    pads: bool = False


@dataclass
class Vit:
    """One vision transformer. prefix: rows before the patches; has_cls: row 0 is a CLS token.

    owner: the model that reads the tower's rows: the model itself, or the classifier around it. by_place: it may lay
        them out on a grid, so that every block has to put out all of them.
    """

    owner: Any
    root: Any
    blocks: list[nn.Module]
    parts: Parts
    prefix: int
    has_cls: bool
    by_place: bool = False

    def checkpointing(self) -> bool:
        """True if blocks will be run a second time in the backward pass."""
        holders = (self.root, getattr(self.root, "transformer", None))
        if any(getattr(holder, "grad_checkpointing", False) for holder in holders):
            return torch.is_grad_enabled()
        return any(block.training and getattr(block, "gradient_checkpointing", False) for block in self.blocks)

    @property
    def flash(self) -> bool:
        """True if attention runs on kernels that take no additive mask."""
        config = getattr(self.root, "config", None)
        return "flash" in (getattr(config, "_attn_implementation", None) or "")


# -- blocks -----------------------------------------------------------------------------------------------------------


def _everywhere(bias: Tensor | None) -> Tensor | None:
    """A bias on keys [B, N] as a mask for all heads and queries, [B, 1, 1, N]."""
    return None if bias is None else bias[:, None, None, :]


def _timm_attend(b: Any, x: Tensor, bias: Tensor | None, given: Given) -> Tensor:
    return b.drop_path1(b.ls1(b.attn(b.norm1(x), attn_mask=_everywhere(bias))))


def _timm_feed(b: Any, x: Tensor) -> Tensor:
    return b.drop_path2(b.ls2(b.mlp(b.norm2(x))))


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _eva_attend(b: Any, x: Tensor, bias: Tensor | None, given: Given) -> Tensor:
    out = b.attn(b.norm1(x), rope=given.get("rope"), attn_mask=_everywhere(bias))
    return b.drop_path1(_scaled(b.gamma_1, out))


def _eva_feed(b: Any, x: Tensor) -> Tensor:
    return b.drop_path2(_scaled(b.gamma_2, b.mlp(b.norm2(x))))


def _eva_rotate(b: Any, x: Tensor, given: Given) -> Tensor:
    rope, first = given.get("rope"), b.attn.num_prefix_tokens
    if rope is None:
        return x
    from timm.layers import apply_rot_embed_cat

    turned = apply_rot_embed_cat(x[:, :, first:], rope, half=getattr(b.attn, "rotate_half", False))
    return torch.cat([x[:, :, :first], turned], 2).type_as(x)


def _clip_attend(b: Any, x: Tensor, bias: Tensor | None, given: Given) -> Tensor:
    y = b.ln_1(x)
    return b.ls_1(b.attn(y, y, y, need_weights=False, key_padding_mask=bias)[0])


def _custom_clip_attend(b: Any, x: Tensor, bias: Tensor | None, given: Given) -> Tensor:
    return b.ls_1(b.ln_attn(b.attn(b.ln_1(x), attn_mask=_everywhere(bias))))


def _clip_feed(b: Any, x: Tensor) -> Tensor:
    return b.ls_2(b.mlp(b.ln_2(x)))


def _hf_clip_attend(b: Any, x: Tensor, bias: Tensor | None, given: Given) -> Tensor:
    return b.self_attn(hidden_states=b.layer_norm1(x), attention_mask=_everywhere(bias), **given)[0]


def _hf_clip_feed(b: Any, x: Tensor) -> Tensor:
    return b.mlp(b.layer_norm2(x))


def _hf_vit_attend(b: Any, x: Tensor, bias: Tensor | None, given: Given) -> Tensor:
    return b.dropout(b.attention(b.layernorm_before(x), _everywhere(bias), **given)[0])


def _hf_vit_feed(b: Any, x: Tensor) -> Tensor:
    return b.dropout(b.mlp(b.layernorm_after(x)))


def _dinov2_attend(b: Any, x: Tensor, bias: Tensor | None, given: Given) -> Tensor:
    out = b.attention(b.norm1(x), attention_mask=_everywhere(bias), **given)[0]
    return b.drop_path(b.layer_scale1(out))


def _dinov2_feed(b: Any, x: Tensor) -> Tensor:
    return b.drop_path(b.layer_scale2(b.mlp(b.norm2(x))))


def _hf_rotate(b: Any, x: Tensor, given: Given) -> Tensor:
    cos, sin = given["position_embeddings"]
    first = x.shape[2] - sin.shape[-2]
    a, c = x[:, :, first:].chunk(2, dim=-1)
    return torch.cat([x[:, :, :first], x[:, :, first:] * cos + torch.cat([-c, a], -1) * sin], 2)


def _tv_attend(b: Any, x: Tensor, bias: Tensor | None, given: Given) -> Tensor:
    y = b.ln_1(x)
    return b.dropout(b.self_attention(y, y, y, need_weights=False, key_padding_mask=bias)[0])


def _tv_feed(b: Any, x: Tensor) -> Tensor:
    return b.mlp(b.ln_2(x))


def _refuse(block: Any, why: str) -> None:
    raise UnsupportedModel(f"{type(block).__name__} {why}: its tokens cannot be reduced exactly")


def _check_timm(b: Any) -> None:
    if _name(type(b.attn)) not in ("timm.layers.attention.Attention",):
        _refuse(b, f"attends by {type(b.attn).__name__}, which is not known to vtprune")


def _check_clip(b: Any) -> None:
    if hasattr(b, "ln_1_kv") or not b.attn.batch_first:
        _refuse(b, "attends across two sequences, or takes the batch second")


def _check_custom_clip(b: Any) -> None:
    if b.attn.logit_scale is not None:
        _refuse(b, "has scaled cosine attention")


def _check_dinov2(b: Any) -> None:
    if not hasattr(b.attention, "q_proj"):
        _refuse(b, "is that of an older transformers, with attention that takes no mask (upgrade to 5.23 or later)")


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


_timm = Parts(_timm_attend, _timm_feed, "attn", "q_norm", "k_norm", check=_check_timm)
_eva = Parts(_eva_attend, _eva_feed, "attn", "q_norm", "k_norm", rotate=_eva_rotate)
_hf_clip = Parts(_hf_clip_attend, _hf_clip_feed, "self_attn", "q_proj", "k_proj")
_hf_vit = Parts(_hf_vit_attend, _hf_vit_feed, "attention", "q_proj", "k_proj")
_dinov2 = Parts(_dinov2_attend, _dinov2_feed, "attention", "q_proj", "k_proj", check=_check_dinov2)
BLOCKS: dict[str, Parts] = {
    "timm.models.vision_transformer.Block": _timm,
    "timm.models.eva.EvaBlock": _eva,
    "open_clip.transformer.ResidualAttentionBlock": Parts(
        _clip_attend, _clip_feed, "attn", norm="ln_1", check=_check_clip
    ),
    "open_clip.transformer.CustomResidualAttentionBlock": Parts(
        _custom_clip_attend, _clip_feed, "attn", "ln_q", "ln_k", check=_check_custom_clip
    ),
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": _hf_clip,
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": _hf_clip,
    "transformers.models.siglip2.modeling_siglip2.Siglip2EncoderLayer": replace(_hf_clip, pads=True),
    "transformers.models.vit.modeling_vit.ViTLayer": _hf_vit,
    "transformers.models.deit.modeling_deit.DeiTLayer": _hf_vit,
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": replace(_dinov2, rotate=_hf_rotate),
    "torchvision.models.vision_transformer.EncoderBlock": Parts(_tv_attend, _tv_feed, "self_attention", norm="ln_1"),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Layer": _dinov2,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": _dinov2,
}


# -- models -----------------------------------------------------------------------------------------------------------


def vit_of(model: Any) -> Vit | None:
    """The vision transformer that `model` is or holds; None if it is none of timm, open_clip or torchvision, nor a
    plain one of transformers (vision-language models are none).

    Raises UnsupportedModel, naming the class, for one whose blocks are not known.
    """
    library = _library(model)
    if library is None:
        return None
    root, owner = model, model
    # Inwards first: the blocks that a text-image model shows itself are those of its text tower.
    while (inner := _inner(root)) is not None:
        root = inner
    blocks = _blocks(root)
    if blocks is None:
        raise UnsupportedModel(
            f"{type(root).__name__} of {library} holds no list of transformer blocks that vtprune knows; supported "
            f"blocks: {_blocks_known()}; vision transformers that work: {WORKING}"
        )
    parts = BLOCKS[_name(type(blocks[0]))]
    for block in blocks:
        parts.check(block)
    prefix, has_cls = _prefix(root)
    return Vit(owner, root, list(blocks), parts, prefix, has_cls, _by_place(owner, root, library))


def _library(model: Any) -> str | None:
    names = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if "transformers" not in names:
        return next((name for name in LIBRARIES if name in names), None)
    kind, inside = _kind(model), _kind(getattr(model, "backbone", None))
    if kind in PREFIX or kind in WHOLE or inside in PREFIX or inside in WHOLE:
        return "transformers"
    if kind in REFUSED or (getattr(model, "input_modalities", None) == ("image",) and model.main_input_name == PIXELS):
        why = REFUSED.get(kind, "vtprune does not know its blocks")
        raise UnsupportedModel(
            f"{type(model).__name__} ({kind}) cannot be pruned: {why}; vision transformers that work: {WORKING}"
        )
    return None


def _kind(model: Any) -> Any:
    return getattr(getattr(model, "config", None), "model_type", None)


def _inner(root: Any) -> Any:
    """The model inside a wrapper, a classifier or a text-image model; None if there is none."""
    if type(root).__name__ == "FeatureGetterNet":  # timm, features_only=True
        return root.model
    return next((getattr(root, name) for name in INSIDE if isinstance(getattr(root, name, None), nn.Module)), None)


def _by_place(owner: Any, root: Any, library: str) -> bool:
    """True unless a class of the library itself reads the rows, and is known to take them as they come."""
    if _kind(root) in ("vit", "deit") and root.embeddings.mask_token is not None:
        return True  # made for masked image modelling, whose head may stand around the model that is given
    names = [name for name in dir(type(owner)) if name.startswith("forward")]
    homes = {next(cls for cls in type(owner).__mro__ if name in cls.__dict__) for name in names}
    if any(cls.__module__.split(".")[0] not in (library, "torch") for cls in homes):
        return True
    home = next(cls for cls in type(owner).__mro__ if "forward" in cls.__dict__)
    return library == "transformers" and not home.__name__.endswith(READS_ROWS)


def _blocks_known() -> str:
    return ", ".join(sorted(name.rsplit(".", 1)[1] for name in BLOCKS))


def _blocks(root: Any) -> Any:
    """The list of blocks of a tower, if it has one; all must be of one known class."""
    for path in LISTS:
        found = root
        for name in path.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
            continue
        unknown = [type(b).__name__ for b in found if _name(type(b)) not in BLOCKS]
        if unknown or len({type(b) for b in found}) > 1:
            raise UnsupportedModel(
                f"{type(root).__name__} is made of {', '.join(sorted(set(unknown) or {'blocks of several classes'}))}, "
                f"which vtprune cannot split between attention and MLP exactly; supported blocks: {_blocks_known()}; "
                f"vision transformers that work: {WORKING}"
            )
        return found
    return None


def _prefix(root: Any) -> tuple[int, bool]:
    if hasattr(root, "num_prefix_tokens"):
        return root.num_prefix_tokens, getattr(root, "cls_token", None) is not None
    config = getattr(root, "config", None)
    if config is not None and config.model_type not in PREFIX:
        raise UnsupportedModel(f"{type(root).__name__} ({config.model_type}): vision transformers that work: {WORKING}")
    prefix = PREFIX[config.model_type](config) if config is not None else 1
    return prefix, prefix > 0


# -- signals ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Images of a batch that have equally many tokens: rows [I] of the batch, and the first n tokens of each."""

    rows: Tensor | None = None
    n: int | None = None

    def of(self, x: Tensor) -> Tensor:
        """x [B, N, ...] -> [I, n, ...], and x itself for all of it."""
        return x if self.rows is None else x[self.rows, : self.n]


WHOLE_BATCH = Part()


class Attention:
    """Queries and keys of one block, from what its own modules put out."""

    def __init__(self, vit: Vit, k: int, seen: dict[str, Tensor], given: Given, part: Part = WHOLE_BATCH) -> None:
        """part: the images, and of each the tokens, to read them of."""
        self.parts, self.block, self.given = vit.parts, vit.blocks[k], given
        self.seen = {name: part.of(x) for name, x in seen.items()}
        self.module: Any = getattr(self.block, self.parts.attention)

    @property
    def scaling(self) -> float:
        """Factor on q.k."""
        return self.module.head_dim**-0.5

    def queries(self) -> Tensor:
        """[B, H, N, d], rotated."""
        return self._rotated(self._heads(self.seen["q"] if self.parts.queries else self._packed(0)))

    def keys(self) -> Tensor:
        """[B, H, N, d], rotated."""
        return self._rotated(self._heads(self.seen["k"] if self.parts.queries else self._packed(1)))

    def mean_keys(self) -> Tensor:
        """[B, N, d], before rotation: the mean over heads, which a packed projection takes of its weights."""
        if self.parts.keys:
            return self._heads(self.seen["k"]).mean(1)
        w, b = self._slice(1)
        heads, d = self.module.num_heads, self.module.head_dim
        return self._project(w.view(heads, d, -1).mean(0), None if b is None else b.view(heads, d).mean(0))

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.parts.rotate is None else self.parts.rotate(self.block, x, self.given)

    def _heads(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unflatten(-1, (-1, self.module.head_dim)).transpose(1, 2)

    def _slice(self, part: int) -> tuple[Tensor, Tensor | None]:
        w, b = self.module.in_proj_weight, self.module.in_proj_bias
        rows = slice(part * w.shape[1], (part + 1) * w.shape[1])
        return w[rows], None if b is None else b[rows]

    def _packed(self, part: int) -> Tensor:
        return self._project(*self._slice(part))

    def _project(self, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(self.seen["norm"].to(w.dtype), w, b)  # autocast puts out other dtypes than the weights have


def watch(vit: Vit, k: int, note: Callable[[int, str, Tensor], None]) -> list[Callable[[], None]]:
    """Call note(k, "q" | "k" | "norm", output) when those modules of block k ran; returns the undo."""
    block: Any = vit.blocks[k]
    attention = getattr(block, vit.parts.attention)
    names = {"q": vit.parts.queries, "k": vit.parts.keys}
    found = {name: getattr(attention, path) for name, path in names.items() if path}
    if vit.parts.norm:
        found["norm"] = getattr(block, vit.parts.norm)
    return [module.register_forward_hook(partial(_noted, note, k, name)).remove for name, module in found.items()]


def _noted(note: Callable[[int, str, Tensor], None], k: int, name: str, module: Any, args: Any, output: Tensor) -> None:
    note(k, name, output)


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
    name = _name(type(pool))
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
