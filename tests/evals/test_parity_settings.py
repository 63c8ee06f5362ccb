"""The parity tool takes its settings from the stored file: with one of them altered, the same outputs must fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtprune.evals import parity

Change = Callable[[np.ndarray], Any]


def at(index: Any, value: Any) -> Change:
    """The same array with another value at one place."""

    def change(array: np.ndarray) -> np.ndarray:
        out = array.copy()
        out[index] = value
        return out

    return change


def to(value: Any) -> Change:
    return lambda array: np.asarray(value, dtype=array.dtype)


PROMPT = {"sys_len": lambda a: a + 1, "vis_len": lambda a: a - 1, "text_len": lambda a: a + 1}
BUDGETS: dict[str, Change] = {"budgets": at(1, 9)}
FAST: dict[str, Change] = {"c": to(11), "knn": to(2), "d": to(0.7), "beta": to(0.9), "dyseg_tau": to(0.999)}
HOLITOM: dict[str, Change] = {
    **{"beta": to(0.9), "K": to(2), "newline_mode": to("frame"), "b0_tau": to(0.97), "b1_retain_ratio": to(0.16)},
    **{"b0_no_beta": to(1), "grid": at(1, 5), "b0_n_static": at(0, 1), "b0_total_reduced": to(5)},
}
# A file, and what to alter in it. What an official code never reads (the generator's seed, the margins), is not here.
ALTERED: dict[str, dict[str, Change]] = {
    "aim_inllm": {
        **{"retain_rate": at(15, 0.7), "tau": to(0.2), "iters": to(3), "damping": to(0.3)},
        **PROMPT,
    },
    "diffrate_e2e_vit_cls": {"prune_kept": at(2, 170), "merge_kept": at(3, 121), "cfg": at(4, 4)},
    "diffrate_merge_n50_k31": {"kept": to(30)},
    "divprune_g18x26_d48": {"ratios": at(0, 0.2), "budgets": at(1, 103), "grid": at(0, 17)},
    "divprune_dup200_d24": {"duplicate_rows": at(0, 18)},
    "dycoke_kv_decode": {"L": to(2), "prune_ratio": to(0.7), "similarity_threshold": to(0.95), **PROMPT},
    "fastv_kvcache_decode": {"K": to(2), "R": to(0.6), "keep": to(71), "decode_position_id": to(116), **PROMPT},
    "fastv_prefill": {"K": to(3), "keep": to(71), **PROMPT},
    "flowcut_b3n100_l12": {
        **{"grid": at(0, 9), "num_layers": to(11), "num_heads": to(2), "select_layer": to(9), "target_num": at(0, 11)},
    },
    "flowcut_functions": {"rpl_1": to(10), "target_1": to(300)},
    "flowcutqwen_p64_l12": {"num_layers": to(11), "num_heads": to(4), "visual_target_num": at(0, 3), "ln_eps": to(0.1)},
    "hiprune_llava_b": {"alpha": at(0, 0.6), "retention": at(1, 127), "grid": to([18, 32])},
    "hiprune_next_b5": {"alpha": at(0, 0.3), "retention": at(1, 330)},
    "hiprune_qwen_18x26": {
        **{"alpha": at(0, 0.5), "retain_ratio": at(1, 0.26), "window_size": to(56), "patch_size": to(28)},
        **{"spatial_merge_size": to(1), "shallow_full_attention": to(True), "grid_thw": to([1, 26, 18])},
    },
    "holitom_inner_causalfix": {"K": to(2), "R": to(0.4), "keep": to(61), "layer_Km1_is_causal": to(0), **PROMPT},
    "holitom_inner_sdpa": {"layer_Km1_is_causal": to(1), "R": to(0.4), "kv_lengths_after_prefill": at(1, 94)},
    "leaders_prumerge_n144_c32": {"cluster_k": to(16)},
    "leaders_prunesid_crops3n144": {"budgets": at(1, 21), "grid": at(0, 11)},
    "leaders_prunesid_qwen_18x26": {"need_token_num": at(0, 70)},
    "leaders_vispruner_n64": {"visual_token_num": at(0, 18), "important_ratio": at(0, 0.25), "grid": at(0, 7)},
    "leaders_vscan_llava_b1": BUDGETS,
    "leaders_vscan_qwen_12x12": {
        **{"image_token_ratio": at(1, 0.3), "window_size": to(3), "grid_thw": at((0, 1), 22)},
    },
    "pyramiddrop_e2e": {
        **{"layer_list": at(1, 5), "ratio_list": at(1, 0.3), "stage1_keep": to(37)},
        **PROMPT,
    },
    "recoverable_n64_c32": {"knn_k": to(20), "text_weight": to(5), "lof_neighbors": at(0, 5), "grid": at(0, 7)},
    "sparsevlm_rank": {"rank": to(18), "v1_scale": to(2), "v1_bias": to(9), "vis_len": to(95)},
    "sparsevlm_v1_e2e": {"pruning_layers": at(0, 2), "keep_list": at(1, 44), "num_heads": to(4), **PROMPT},
    "sparsevlm_plus_v2_e2e": {"pruning_layers": at(1, 3), "keep_list": at(0, 111), "num_heads": to(8), **PROMPT},
    "spatten_llm_kv": {
        name: (lambda a: a + 1) for name in ("start_size", "important_size", "recent_size", "num_coming")
    },
    "todre_spec_anyres_n480_d48": {"thumbnail_tokens": to(480), "budgets": at(0, 119)},
    "tome_bsm_cls_n197_r16": {"r": to(15), "r_effective": to(15), "r2": to(9), "class_token": to(0)},
    "tome_bsm_nocls_n196_r20": {"class_token": to(1), "distill_token": to(1)},
    "tome_e2e_vit_cls": {"cfg": at(4, 4), "kind": to("mae"), "r13__r_list": at(0, 12), "prop_attn": to(0)},
    "tome_kth": {"k": to(3), "note_dropped": to(1)},
    "tome_parse_r": {"L6_dec13": at(0, 25)},
    "tome_propattn_n50": {"num_heads": to(4)},
    "topvim_prune_n197_b1": {"keep_ratio": to(0.7), "layers": lambda a: a[:2]},
    "transprune_e2e": {
        **{"layer_list": at(1, 5), "ratio_list": at(0, 0.9), "accumulating_layer_list": at(0, 1)},
        **PROMPT,
    },
    "video_aim_image_N576": {"b1_r_list": at(1, 37), "b2_r_list": at(0, 280)},
    "video_aim_merge_T8_7x7": {"b1_r_list": at(1, 11), "b1_rounds": to(3), "grid": at(0, 7)},
    "video_aim_prune_N64": {"layers": at(2, 16), "bounds": at(1, 51), "retain_rate": at(15, 0.5)},
    "video_dycoke_kv_N120": {
        **{"b0_p": to(0.51), "start": to(13), "img_len": to(119), "tail": to(9), "n_steps": to(8)},
    },
    "video_dycoke_ttm_T9_7x7": {"b0_k": to(0.4), "grid": at(0, 8)},
    "video_fastvid_ov_T16_7x7": {**FAST, "p": to(2), "b1_retention_ratio": to(0.24), "start": to(4), "n_after": to(6)},
    "video_fastvid_lv_T16_13x13": {**FAST, "p": to(2), "b1_retention_ratio": to(0.16), "start": to(4)},
    "video_fastvid_qwen_T16_7x7": {**FAST, "dyseg_ignore": to(0.999), "b1_retention_ratio": to(0.29)},
    "video_holitom_edge_T8_13x13_grid": HOLITOM,
    "video_holitom_outer_T8_7x7_one_token": HOLITOM,
    "video_holitom_inner_N96": {"b0_r": to(0.32), "img_start": to(13), "img_len": to(65)},
    "video_prunevid_T16_7x7": {
        **{"tau": to(0.9), "temporal_segment_ratio": to(0.5), "k": to(3), "b0_cluster_ratio": to(0.27)},
    },
    "video_vidcom2_llava_vid_T8_13x13": {"model": to("llava_ov"), "b0_R": to(0.16), "grid": at(0, 7)},
    "video_vidcom2_qwen2_5_vl_T16_7x7": {"model": to("llava_vid"), "b1_R": to(0.27)},
    "visionzip_anyres_2x2": {"crops_w": to(4), "crops_h": to(1), "dominant": to(26), "contextual": to(6)},
    "visionzip_n64_d32": {"budgets": at((1, 0), 19), "grid": at(0, 7)},
    "zerotprune_spec_h4_n65_reg": {
        **{"prefix": to(1), "iters": to(1), "iters_first": to(1), "v_min": to(0.06), "v_max": to(0.3), "r_s": to(5)},
        **{"keep_ratio": to(0.75), "num_heads": to(2)},
    },
}


def test_a_number_that_was_stored_as_float32_is_read_as_it_was_meant() -> None:
    for meant in (0.1, 0.29, 0.0556, 0.098, 0.123456, 1 / 3, 2 / 3, 5 / 6, 3 / 7, 0.875, 13.5, 1.0, 0.0):
        assert parity.real(np.float32(meant)) == meant
        assert parity.real(np.array([meant])[0]) == meant
    assert int(144 * parity.real(np.float32(5 / 6))) == 120
    assert int(100 * parity.real(np.float32(0.29))) == int(100 * 0.29) == 28


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in ALTERED.items() for key in keys], ids=lambda value: value
)
def test_an_altered_setting_is_noticed(name: str, key: str, shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden"
    for path in golden.glob("model_*.npz"):
        (tmp_path / path.name).symlink_to(path)
    arrays = dict(np.load(golden / f"{name}.npz"))
    before = arrays[key]
    arrays[key] = np.asarray(ALTERED[name][key](before))
    assert arrays[key].shape != before.shape or (arrays[key] != before).any()
    np.savez(tmp_path / f"{name}.npz", **arrays)
    (row,) = parity.run(tmp_path)
    assert row.status == "failed", row.detail


# Beside what repeats another array, says which variant a file is of, or states VisionZip's counts in one of two ways.
OPTIONAL = {"ratios", "grid", "duplicate_rows", "budgets", "L6_dec13", "dyseg_ignore"}
NEEDED = [(name, key) for name, keys in ALTERED.items() for key in keys if key not in OPTIONAL]


@pytest.mark.parametrize(("name", "key"), NEEDED, ids=lambda value: value)
def test_a_missing_setting_is_named(name: str, key: str, shared: Path, tmp_path: Path) -> None:
    """Never a default that happens to fit."""
    golden = shared / "golden"
    for path in golden.glob("model_*.npz"):
        (tmp_path / path.name).symlink_to(path)
    whole = dict(np.load(golden / f"{name}.npz"))
    np.savez(tmp_path / f"{name}.npz", **{k: v for k, v in whole.items() if k != key})
    (row,) = parity.run(tmp_path)
    assert row.status == "failed"
    assert key in row.detail
