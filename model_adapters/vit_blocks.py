"""Plain vision transformers of timm, open_clip, torchvision and transformers: where their blocks are, and their parts.

Libraries are recognised by the names of their classes, so nothing of them is imported before such a model is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.core.errors import UnsupportedModel

Given = dict[str, Any]
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
    if class_path(type(b.attn)) not in ("timm.layers.attention.Attention",):
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


def class_path(cls: type) -> str:
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
    parts = BLOCKS[class_path(type(blocks[0]))]
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
        unknown = [type(b).__name__ for b in found if class_path(type(b)) not in BLOCKS]
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
