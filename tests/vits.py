"""Tiny random vision transformers of every class that can be patched, and what the tests know about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 56, 8, 32, 4, 2, 5
PATCHES = (SIZE // PATCH) ** 2


@dataclass(frozen=True)
class Kind:
    """How to make a model, and which of its modules the oracles hook.

    tower: path to the module with the blocks. blocks: path from there. norm: a block's norm before the MLP. attention:
    a block's attention. mask: how that takes "these keys are hidden". prefix: tokens before the patches. rope:
    positions enter attention.
    """

    make: Callable[[], nn.Module]
    blocks: str
    norm: str
    attention: str
    mask: str
    tower: str = ""
    prefix: int = 1
    rope: bool = False


def _timm(cls: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    found = {
        "vit": timm.models.VisionTransformer,
        "distilled": timm.models.deit.VisionTransformerDistilled,
        "eva": timm.models.Eva,
    }[cls]
    return found(**{**sizes, "num_classes": CLASSES, **options})


def _clip_tower(**options: Any) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    sizes = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "heads": HEADS}
    return open_clip.transformer.VisionTransformer(**sizes, mlp_ratio=2.0, output_dim=CLASSES, **options)


def _clip(timm_tower: bool = False) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision: dict[str, Any] = {
        "image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "head_width": WIDTH // HEADS,
    }  # fmt: skip
    text = {"context_length": 8, "vocab_size": 20, "width": WIDTH, "heads": HEADS, "layers": 2}
    if timm_tower:
        from open_clip.timm_model import TimmModel

        tower = TimmModel("test_vit", WIDTH, pool="avg", proj="linear")
        tower.trunk, tower.head = _timm("vit", global_pool="avg", num_classes=0), nn.Linear(WIDTH, WIDTH)
        model = open_clip.model.CustomTextCLIP(WIDTH, vision, text)
        model.visual = tower
        return model
    return open_clip.model.CLIP(WIDTH, vision, text)


def _hf(name: str, config: str, **options: Any) -> nn.Module:
    import transformers

    sizes = {
        "image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH, "num_labels": CLASSES,
    }  # fmt: skip
    return getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **options}))


def _hf_whole(name: str, config: str) -> nn.Module:
    import transformers

    sizes = {
        "image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH, "num_patches": PATCHES,
    }  # fmt: skip
    whole = getattr(transformers, config)(vision_config=sizes, num_labels=CLASSES)
    return getattr(transformers, name)(whole)


def _torchvision() -> nn.Module:
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    sizes = {"image_size": SIZE, "patch_size": PATCH, "hidden_dim": WIDTH, "num_layers": DEPTH, "num_heads": HEADS}
    return vision.VisionTransformer(**sizes, mlp_dim=2 * WIDTH, num_classes=CLASSES)


_T = partial(Kind, blocks="blocks", norm="norm2", attention="attn", mask="attn_mask")
_O = partial(Kind, blocks="transformer.resblocks", norm="ln_2", attention="attn", mask="key_padding_mask")
_H = partial(Kind, norm="norm2", attention="attention", mask="attention_mask")
_C = partial(Kind, blocks="encoder.layers", norm="layer_norm2", attention="self_attn", mask="attention_mask")
_D = partial(_H, blocks="encoder.layer")
_V = partial(_H, blocks="layers", norm="layernorm_after")
EVA02 = {
    "use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "mlp_ratio": 8 / 3,
}  # fmt: skip

KINDS: dict[str, Kind] = {
    "timm-deit": _T(partial(_timm, "vit")),
    "timm-deit-distilled": _T(partial(_timm, "distilled"), prefix=2),
    "timm-deit3": _T(partial(_timm, "vit", init_values=0.3, no_embed_class=True, drop_path_rate=0.2)),
    "timm-augreg-qk-norm": _T(partial(_timm, "vit", qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True)),
    "timm-mae": _T(partial(_timm, "vit", global_pool="avg")),
    "timm-clip": _T(partial(_timm, "vit", pre_norm=True)),
    "timm-dinov2-reg4": _T(
        partial(_timm, "vit", init_values=0.5, reg_tokens=4, no_embed_class=True, global_pool="avg"), prefix=5
    ),
    "timm-siglip": _T(partial(_timm, "vit", class_token=False, global_pool="map"), prefix=0),
    "timm-gap": _T(partial(_timm, "vit", class_token=False, global_pool="avg"), prefix=0),
    "timm-eva": _T(partial(_timm, "eva", init_values=0.4)),
    "timm-eva02": _T(partial(_timm, "eva", init_values=0.4, **EVA02), rope=True),
    "open_clip": _O(_clip, tower="visual"),
    "open_clip-tower-avg": _O(partial(_clip_tower, pool_type="avg", ls_init_value=0.3)),
    "open_clip-tower-attention-pool": _O(partial(_clip_tower, attentional_pool=True, attn_pooler_heads=1)),
    "open_clip-tower-qk-norm": _O(partial(_clip_tower, qk_norm=True, scale_fc=True, scale_attn=True), mask="attn_mask"),
    "open_clip-timm": _T(partial(_clip, True), tower="visual.trunk"),
    "vit": _V(partial(_hf, "ViTModel", "ViTConfig")),
    "vit-classifier": _V(partial(_hf, "ViTForImageClassification", "ViTConfig"), tower="vit"),
    "clip": _C(partial(_hf, "CLIPVisionModel", "CLIPVisionConfig")),
    "clip-projection": _C(partial(_hf, "CLIPVisionModelWithProjection", "CLIPVisionConfig"), tower="vision_model"),
    "clip-classifier": _C(partial(_hf_whole, "CLIPForImageClassification", "CLIPConfig"), tower="vision_model"),
    "siglip": _C(partial(_hf, "SiglipVisionModel", "SiglipVisionConfig"), prefix=0),
    "siglip-classifier": _C(
        partial(_hf_whole, "SiglipForImageClassification", "SiglipConfig"), tower="vision_model", prefix=0
    ),
    "dinov2": _D(partial(_hf, "Dinov2Model", "Dinov2Config", layerscale_value=0.5)),
    "dinov2-classifier": _D(partial(_hf, "Dinov2ForImageClassification", "Dinov2Config"), tower="dinov2"),
    "dinov2-registers": _D(
        partial(_hf, "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", num_register_tokens=3),
        tower="dinov2_with_registers",
        prefix=4,
    ),
    "dinov3": _D(
        partial(_hf, "DINOv3ViTModel", "DINOv3ViTConfig", layerscale_value=0.5, num_register_tokens=3),
        blocks="model.layer",
        prefix=4,
        rope=True,
    ),
    "deit": _V(partial(_hf, "DeiTForImageClassificationWithTeacher", "DeiTConfig"), tower="deit", prefix=2),
    "siglip2": _C(partial(_hf, "Siglip2VisionModel", "Siglip2VisionConfig", num_patches=PATCHES), prefix=0),
    "siglip2-classifier": _C(
        partial(_hf_whole, "Siglip2ForImageClassification", "Siglip2Config"), tower="vision_model", prefix=0
    ),
    "torchvision": Kind(
        _torchvision, "encoder.layers", norm="ln_2", attention="self_attention", mask="key_padding_mask"
    ),
}
NAMES = tuple(KINDS)


def _backbone(name: str, config: str, **options: Any) -> nn.Module:
    return _hf(name, config, out_features=["stage2", "stage4"], **options)


def _depth() -> nn.Module:
    import transformers

    sizes = {
        "image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS, "out_features": [f"stage{k + 1}" for k in range(DEPTH)],
    }  # fmt: skip
    inner = transformers.Dinov2Config(**sizes, mlp_ratio=2, reshape_hidden_states=False)
    config = transformers.DPTConfig(
        backbone_config=inner, hidden_size=WIDTH, neck_hidden_sizes=[8] * DEPTH, fusion_hidden_size=8
    )
    return transformers.DPTForDepthEstimation(config)


def _features_only() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(1, DEPTH - 1), **sizes)


# Models that lay their rows out on a grid.
MAPPED: dict[str, Kind] = {
    "dinov2-backbone": _D(partial(_backbone, "Dinov2Backbone", "Dinov2Config", layerscale_value=0.5)),
    "dinov2-registers-backbone": _D(
        partial(_backbone, "Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", num_register_tokens=3), prefix=4
    ),
    "dinov3-backbone": _D(
        partial(_backbone, "DINOv3ViTBackbone", "DINOv3ViTConfig", num_register_tokens=3),
        blocks="model.layer",
        prefix=4,
        rope=True,
    ),
    "vit-masked": _V(partial(_hf, "ViTForMaskedImageModeling", "ViTConfig", encoder_stride=PATCH), tower="vit"),
    "deit-masked": _V(
        partial(_hf, "DeiTForMaskedImageModeling", "DeiTConfig", encoder_stride=PATCH), tower="deit", prefix=2
    ),
    "dpt": _D(_depth, tower="backbone"),
    "timm-features-only": _T(_features_only, tower="model"),
}


def kind(name: str) -> Kind:
    return KINDS[name] if name in KINDS else MAPPED[name]


def maps(model: Any, x: Tensor) -> list[Tensor]:
    """What a model of `MAPPED` puts out, every tensor with a place for every patch."""
    out = model(x)
    for name in ("reconstruction", "predicted_depth"):
        if hasattr(out, name):
            return [getattr(out, name)]
    return list(out.feature_maps if hasattr(out, "feature_maps") else out)


@cache
def model(name: str) -> Any:
    """One model of each kind for all tests, with weights large enough to tell tokens apart."""
    torch.manual_seed([*NAMES, *MAPPED].index(name))
    made = kind(name).make().eval()
    if name.startswith("dinov2") and not hasattr(blocks(name, made)[0].attention, "q_proj"):
        with pytest.raises(vtprune.UnsupportedModel, match="older transformers"):
            vtprune.patch(made, "tome", keep=0.5)
        pytest.skip("refused as it should be: this transformers' DINOv2 attention takes no mask")
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return made


def images(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def run(model: Any, x: Tensor) -> Tensor:
    """The one tensor that a user of the model wants: logits, or the pooled features."""
    if type(model).__name__.startswith("Siglip2"):
        out = model(**patches(x))
    else:
        out = model.encode_image(x) if hasattr(model, "encode_image") else model(x)
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out


def patches(x: Tensor) -> dict[str, Tensor]:
    """The same images as SigLIP 2 takes them: rows of pixels, which of them are real, and the grid."""
    grid = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)  # [B, h, w, p, p, C]
    return {
        "pixel_values": grid.flatten(3).flatten(1, 2),
        "pixel_attention_mask": torch.ones(len(x), grid.shape[1] * grid.shape[2], dtype=torch.int64),
        "spatial_shapes": torch.tensor([grid.shape[1:3]] * len(x)),
    }


def part(module: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        module = getattr(module, name)
    return module


def tower(name: str, model: Any) -> Any:
    return part(model, kind(name).tower)


def blocks(name: str, model: Any) -> list[Any]:
    return list(part(tower(name, model), kind(name).blocks))
