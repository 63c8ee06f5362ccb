"""Pictures of kept tokens lie under the object: through the real image processors, read back pixel by pixel.

The oracle knows nothing of crops, tiles and padding. In every tiny model the vision tower is made blind to all but a
token's own pixels. A picture with a bright object and the same picture without it are shown to it; the tokens whose
features differ are those that saw the object, and these are kept. What stays bright in the figure must then be the
object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers
from families import BOS, FIRST_TEXT, IMAGE
from PIL import Image

from vtprune import Assignment, Method
from vtprune.places import boxes
from vtprune.show import Kept, draw, joined, panels, rasters, record

GREY, BRIGHT = (90, 90, 90), (255, 255, 0)


def _clip(**more: Any) -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}, **more)


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


PROCESSORS: dict[str, tuple[str, Callable[[], Any]]] = {
    "crop": ("llava", _clip),
    "padded to a square": (
        "llava",
        lambda: transformers.LlavaImageProcessor(
            size={"shortest_edge": 20}, crop_size=_square(20), do_pad=True
        ),
    ),
    "squeezed": ("paligemma", lambda: transformers.SiglipImageProcessor(size=_square(20))),
    "any resolution": (
        "llava_next",
        lambda: transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 12}, crop_size=_square(12), image_grid_pinpoints=families.PINPOINTS
        ),
    ),
    "any resolution, shrunk": (
        "llava_onevision",
        lambda: transformers.LlavaOnevisionImageProcessor(
            size=_square(16), image_grid_pinpoints=families.PINPOINTS_WIDE
        ),
    ),
    "native": (
        "qwen2_5_vl",
        lambda: transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=256, max_pixels=4096),
    ),
    "tiles and thumbnail": (
        "internvl",
        lambda: transformers.GotOcr2ImageProcessor(
            size=_square(24), crop_to_patches=True, min_patches=2, max_patches=6
        ),
    ),
    "tiles with text between": (
        "smolvlm",
        lambda: transformers.SmolVLMImageProcessor(
            size={"longest_edge": 72}, max_image_size={"longest_edge": 24}, do_image_splitting=True
        ),
    ),
    "tiles of Idefics3": (
        "idefics3",
        lambda: transformers.Idefics3ImageProcessor(
            size={"longest_edge": 72}, max_image_size={"longest_edge": 24}, do_image_splitting=True
        ),
    ),
    "pan and scan": (
        "gemma3",
        lambda: transformers.Gemma3ImageProcessor(
            size=_square(32), do_pan_and_scan=True, pan_and_scan_min_crop_size=8, pan_and_scan_max_num_crops=4,
            pan_and_scan_min_ratio_to_activate=1.2,
        ),
    ),
    "rows": ("mistral3", lambda: transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=_square(8))),
}  # fmt: skip


@dataclass(frozen=True)
class Sees(Method):
    """Keeps the tokens whose features are not those of `plain`, which an earlier run without the object left."""

    plain: list[torch.Tensor] = field(default_factory=list)
    learn: bool = False
    adaptive = True

    def batch(self, views: list[Any]) -> list[Assignment]:
        if self.learn:
            self.plain.extend(v.x.clone() for v in views)
            return [Assignment(torch.arange(v.n - 1)) for v in views]
        moved = [(v.x - x).norm(dim=-1) for v, x in zip(views, self.plain)]
        bar = 0.2 * max(float(m.max()) for m in moved)
        return [Assignment((m > bar).nonzero().flatten()) for m in moved]

    def __call__(self, v: Any) -> Assignment:
        raise AssertionError("asked by batch")


def _own_pixels_only(name: str) -> Any:
    """The family's tiny model with a tower whose blocks add nothing and that knows no places."""
    model = families.fresh(name)
    tower = (
        getattr(model.model, "vision_tower", None) or getattr(model.model, "vision_model", None) or model.model.visual
    )
    with torch.no_grad():
        for key, weight in tower.named_parameters():
            last = key.rsplit(".", 2)[-2]
            adds = last in ("out_proj", "fc2", "proj", "down_proj", "o_proj", "projection_layer")
            if "position" in key or (adds and "patch_embed" not in key):
                weight.zero_()
    return model


def _inputs(model: Any, name: str, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with as many places as the model makes tokens of these pixels."""
    taken = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
    tensors = {k: torch.as_tensor(pixels[k]) for k in taken if k in pixels}
    with torch.no_grad():
        out = model.model.get_image_features(**tensors, return_dict=True).pooler_output
    sizes = [int(x.reshape(-1, x.shape[-1]).shape[0]) for x in out]
    if name in ("smolvlm", "idefics3"):  # tiles of 3 x 3 tokens
        sizes = [9] * (sum(sizes) // 9)
    split = name in ("smolvlm", "idefics3", "gemma3")  # words stand between crops
    ids = [BOS]
    for i, n in enumerate(sizes):
        ids += [*([FIRST_TEXT + i % 9] if split else []), *[IMAGE] * n]
    ids += [FIRST_TEXT + 1, FIRST_TEXT + 2]
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **tensors}
    if (types := families.FAMILIES[name].types) is not None:
        batch[types] = (batch["input_ids"] == IMAGE).long() * (name != "paligemma")
    return batch


def _scene(size: tuple[int, int], where: tuple[int, int, int, int] | None) -> Image.Image:
    image = Image.new("RGB", size, GREY)
    if where is not None:
        image.paste(BRIGHT, where)
    return image


def _drawn(case: str, size: tuple[int, int], where: tuple[int, int, int, int]) -> tuple[Image.Image, list[Any], Kept]:
    name, make = PROCESSORS[case]
    model, processor = _own_pixels_only(name), make()

    def look(picture: Image.Image) -> Any:
        return processor(images=[picture], return_tensors="pt")

    learned: list[torch.Tensor] = []
    for image, learn in ((_scene(size, None), True), (_scene(size, where), False)):
        units = record(model, _inputs(model, name, look(image)), Sees(learned, learn), None)
    unit = joined(units)
    image = _scene(size, where)
    return image, panels(unit, size[0] / size[1], boxes(look, size, rasters(unit))), unit


def _bright(picture: Image.Image) -> np.ndarray:
    """[h, w] bool: neither faded nor a line."""
    pixels = np.asarray(picture).astype(int)
    line = (pixels == (40, 40, 40)).all(-1)
    return (pixels.min(-1) < 150) & ~line


@pytest.mark.parametrize("size", [(60, 30), (30, 60), (48, 48), (90, 24)], ids=str)
@pytest.mark.parametrize("case", PROCESSORS)
def test_what_stays_bright_is_the_object(case: str, size: tuple[int, int]) -> None:
    width, height = size
    where = (width // 2 - 2, height // 2 - 8, width // 2 + 5, height // 2 - 2)
    image, parts, unit = _drawn(case, size, where)
    assert 0 < len(unit.idx) < unit.n / 2
    drawn_cells = 0
    for part in parts:
        drawn = draw(image, part, side=480)
        scale = drawn.width / width, drawn.height / height
        bright = _bright(drawn)
        xs, ys = (np.array(edges) * n for edges, n in zip(part.edges(), drawn.size))
        cell = max(np.diff(xs)), max(np.diff(ys))
        left, top, right, bottom = (where[i] * scale[i % 2] for i in range(4))
        # LLaVA-NeXT throws away up to a row of tokens beside the padding: nothing of that can be bright.
        there = slice(int(max(top, ys[0])) + 4, int(min(bottom, ys[-1])) - 4), slice(int(left) + 4, int(right) - 4)
        assert bright[there].mean() > 0.7, part.title
        rows, cols = np.nonzero(bright)
        assert cols.min() >= left - cell[0] - 2
        assert cols.max() <= right + cell[0] + 2
        assert rows.min() >= top - cell[1] - 2
        assert rows.max() <= bottom + cell[1] + 2
        drawn_cells += sum(part.kept)
    assert drawn_cells > 0
