"""FlowCut inside the vision towers of LLaVA and of Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune import patch
from vtprune.evals.parity.compare import agree, close, grid_of, listed, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.stock import Stored, run_base
from vtprune.registry import create
from vtprune.types import Visual


@case("flowcut_")
def flowcut(arrays: Arrays, folder: Path) -> str:
    """The whole tower: a stock LLaVA whose CLIP encoder has the stored weights, patched, one prefill for all crops."""
    if "cls_attn_0" in arrays:
        return _flowcut_functions(arrays)
    embeddings, depth = torch.from_numpy(arrays["embeddings"]), int(arrays["num_layers"])
    batch, n = embeddings.shape[0], embeddings.shape[1] - 1
    model, inputs, shown = _flowcut_llava(arrays, embeddings)
    grid_of(arrays, n)
    agree("layers", depth, len(arrays["w_layer_norm1_weight"]))
    worst = []
    for t in arrays["target_num"].tolist():
        with patch(model, "flowcut", keep=t, count="batch") as handle:
            run_base(model, inputs)
            last = handle.last
        assert last is not None
        stored = arrays[f"kept_{t}"]
        for crop in range(batch):
            mine = [unit for unit in last.tower_units if unit.image == crop]
            same(f"kept of crop {crop} at {t}", mine[-1].positions, stored[crop])
            scores = mine[0].scores
            assert scores is not None
            worst.append(close(f"scores of block 0 at {t}", scores, arrays[f"cumscore_layer0_{t}"][crop]))
            features = shown.seen[crop].index_select(0, mine[-1].positions)
            worst.append(close(f"features of crop {crop} at {t}", features, arrays[f"features_{t}"][crop]))
        lengths = torch.tensor(last.tower_lengths["image"])
        same(f"tokens per block at {t}", lengths[1:], arrays[f"tokens_after_layer_{t}"][: depth - 1])
    kept = listed(arrays["target_num"].tolist())
    return f"stock LLaVA, {batch} crops, {kept} of {n}: tokens per block; scores and features within {max(worst):.1g}"


def _flowcut_functions(arrays: Arrays) -> str:
    """Scores and prune counts from given attention rows, one block at a time."""
    from vtprune.methods.in_vit.flowcut import CLS, CLS_VALUE, VALUE_NORM

    cases, worst = sum(name.startswith("cls_attn_") for name in arrays), []
    for i in range(cases):
        row, value = torch.from_numpy(arrays[f"cls_attn_{i}"]), torch.from_numpy(arrays[f"semantic_attn_{i}"])
        norm, signals = torch.from_numpy(arrays[f"value_{i}"]).abs().sum(-1), (CLS, CLS_VALUE, VALUE_NORM)
        left, target, n = int(arrays[f"rpl_{i}"]), int(arrays[f"target_{i}"]), row.shape[1]
        given = [dict(zip(signals, rows)) for rows in zip(row, value, norm)]
        units = [Visual(torch.zeros(n, 1), target, signals=rows, block=(0, left)) for rows in given]
        answers = create("flowcut", count="batch").batch(units)
        for b, answer in enumerate(answers):
            assert answer.scores is not None
            worst.append(close(f"scores {i}", answer.scores, arrays[f"score_{i}"][b]))
            same(f"pruned {i}", torch.tensor([n - len(answer.idx)]), arrays[f"prune_num_{i}"].reshape(1))
    return f"{cases} blocks: counts equal, scores within {max(worst):.1g}"


class Shown(torch.nn.Module):
    """Stands in for a projector and remembers what it was given."""

    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def _small_text(family: str, width: int, tokens: int, **extra: Any) -> dict[str, Any]:
    """Options of a decoder that nobody reads."""
    size = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 1}
    return {"model_type": family, "vocab_size": tokens, "num_key_value_heads": 1, "head_dim": width, **size, **extra}


def _flowcut_llava(arrays: Arrays, embeddings: Tensor) -> tuple[Any, dict[str, Tensor], Shown]:
    """A stock LLaVA whose tower starts from `embeddings` [B, N+1, D] with the stored layers; its projector."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    batch, n, width = embeddings.shape[0], embeddings.shape[1] - 1, embeddings.shape[2]
    depth = int(arrays["num_layers"])
    tower = {
        "model_type": "clip_vision_model", "hidden_size": width, "num_hidden_layers": depth, "hidden_act": "gelu",
        "num_attention_heads": int(arrays["num_heads"]), "intermediate_size": arrays["w_mlp_0_weight"].shape[1],
        "patch_size": 1, "image_size": 2,
    }  # fmt: skip
    options: dict[str, Any] = {"image_token_id": 1, "vision_feature_layer": int(arrays["select_layer"]) - depth}
    config: Any = AutoConfig.for_model(
        "llava", vision_config=tower, text_config=_small_text("llama", width, 2), **options
    )
    model = LlavaForConditionalGeneration(config).eval()
    vision: Any = model.model.vision_tower
    vision.embeddings.forward, vision.pre_layrnorm = lambda *_, **__: embeddings, torch.nn.Identity()
    shown = model.model.multi_modal_projector = Shown()
    _load_layers(vision.encoder.layers, arrays, {"mlp_0": "mlp.fc1", "mlp_2": "mlp.fc2"})
    ids = torch.tensor([[0, *[1] * n, 0]]).expand(batch, -1)
    return model, {"input_ids": ids, "pixel_values": torch.zeros(batch, 3, 2, 2)}, shown


def _load_layers(layers: torch.nn.ModuleList, arrays: Arrays, names: dict[str, str]) -> None:
    """Stored weights `w_{part}_{weight or bias}` [L, ...] into the layers; names: what a part is called there."""
    parts = [name[2:].rsplit("_", 1) for name in arrays if name.startswith("w_")]
    for i, layer in enumerate(layers):
        known = {name.replace(".", "_"): name for name, _ in layer.named_modules()} | names
        state = {f"{known[part]}.{kind}": torch.from_numpy(arrays[f"w_{part}_{kind}"][i]) for part, kind in parts}
        layer.load_state_dict(state)


@case("flowcutqwen_")
def flowcut_qwen(arrays: Arrays, folder: Path) -> str:
    """A stock Qwen2-VL tower with the stored blocks; every patch is a token (merge size 1), as in the official code."""
    model, inputs, shown = _flowcut_qwen(arrays)
    worst, n = [], arrays["hidden"].shape[0]
    for t in arrays["visual_target_num"].tolist():
        with patch(model, "flowcut", keep=4 * t, end="after") as handle:
            run_base(model, inputs)
            last = handle.last
        assert last is not None
        same(f"kept at {t}", last.tower_units[-1].positions, arrays[f"kept_patches_{t}"])
        # The official code notes lengths at blocks that may prune: an even number of blocks before the end.
        lengths = [len(unit.idx) for unit in last.tower_units][::-2][::-1]
        same(f"tokens per prune at {t}", torch.tensor(lengths), arrays[f"tokens_after_prune_{t}"])
        features = shown.seen.index_select(0, last.tower_units[-1].positions)
        worst.append(close(f"features at {t}", features, arrays[f"features_{t}"]))
    kept = listed([4 * t for t in arrays["visual_target_num"].tolist()])
    return f"stock Qwen2-VL tower, {kept} of {n} patches: tokens per prune; features within {max(worst):.1g}"


def _flowcut_qwen(arrays: Arrays) -> tuple[Any, dict[str, Tensor], Shown]:
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    hidden = torch.from_numpy(arrays["hidden"])
    n, width = hidden.shape
    tower = {
        "model_type": "qwen2_vl_vision", "depth": int(arrays["num_layers"]), "embed_dim": width, "hidden_size": width,
        "num_heads": int(arrays["num_heads"]), "mlp_ratio": arrays["w_mlp_0_weight"].shape[1] // width,
        "hidden_act": "gelu", "spatial_merge_size": 1,
    }  # fmt: skip
    third = width // 6
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [width // 2 - 2 * third, third, third]}
    text = _small_text("qwen2_vl_text", width, 4, rope_parameters=rope)
    ids = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3}
    config: Any = AutoConfig.for_model("qwen2_vl", vision_config=tower, text_config=text, **ids)
    model = Qwen2VLForConditionalGeneration(config).eval()
    vision: Any = model.model.visual
    half = torch.from_numpy(arrays["rotary_pos_emb"])
    angles = torch.cat([half, half], dim=-1)
    vision.patch_embed = Stored(hidden)
    vision.rotary_pos_emb.forward = lambda *_, **__: (angles.cos(), angles.sin())
    shown = vision.merger = Shown()
    _load_layers(vision.blocks, arrays, {"mlp_0": "mlp.fc1", "mlp_2": "mlp.fc2"})
    for block in vision.blocks:
        block.norm1.eps = block.norm2.eps = real(arrays["ln_eps"])
    return (
        model,
        {
            "input_ids": torch.tensor([[3, *[1] * n, 0]]),
            "pixel_values": torch.zeros(n, 3),
            "image_grid_thw": torch.tensor([[1, *arrays["grid"].tolist()]]),
            "mm_token_type_ids": torch.tensor([[0, *[1] * n, 0]]),
        },
        shown,
    )
