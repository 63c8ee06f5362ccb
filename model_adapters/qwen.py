"""Qwen2-VL and its successors: images of any size and videos, merged in the tower, with grids (t, h, w) in the call."""

from __future__ import annotations

import torch
from torch import Tensor

from .family import Family, family
from .tower_layout import CONSECUTIVE, Layout, PackedPatches, TowerCall, consecutive, consecutive_patches


@family
class Qwen(Family):
    tested = ("qwen2_vl", "qwen3_vl", "qwen3_5")
    same_shape = ("qwen3_vl_moe",)
    note = "grids (t, h, w) come with the call"
    image_layout = video_layout = CONSECUTIVE


def _window_order(f: TowerCall) -> Tensor:
    """Where each merged token stands in the order of windows in which the blocks see them."""
    from transformers.vision_utils import get_vision_window_index

    tower = f.tower
    index, _ = get_vision_window_index(
        f.call[f.grid],
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    return torch.argsort(index)


def _from_windows(f: TowerCall, x: Tensor) -> Tensor:
    return consecutive(f, x)[_window_order(f).to(x.device)]


def _patches_in_windows(f: TowerCall, length: int) -> PackedPatches:
    whole = consecutive_patches(f, length)
    return PackedPatches(whole.groups[_window_order(f).cpu()], whole.grids, whole.side)


WINDOWS = Layout(_from_windows, packed=_patches_in_windows)


@family
class QwenWindows(Family):
    """The tower of Qwen2.5-VL sees its tokens window by window."""

    tested = ("qwen2_5_vl",)
    note = "grids (t, h, w) come with the call; the tower works in windows"
    image_layout = video_layout = WINDOWS
