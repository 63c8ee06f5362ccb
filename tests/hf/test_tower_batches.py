"""Stages in the tower run on all images of equal length together: the calls they start do not grow with the batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import families
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune import Assignment, Method, Stage, Visual
from vtprune.reduction import Reducer, Reduction, Tokens, keep_rows
from vtprune.types import VtpruneError

SIDE, BLOCKS = 4, 8
IN_TOWER = [cls.name for cls in vtprune.methods() if cls.seam == "in_vit"]


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@cache
def deep() -> Any:
    """A LLaVA whose tower has several blocks between the first stage and the last."""
    torch.manual_seed(0)
    tower = families._tower("clip_vision_model", 4 * SIDE, layers=BLOCKS)
    config = families._config("llava", families._text("llama"), tower, **families._INDEX, image_seq_length=SIDE**2)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    families._spread(model)
    return model.eval()


def inputs(images: int) -> dict[str, Any]:
    """A row for each image."""
    ids = torch.tensor([[*[families.IMAGE] * SIDE**2, *range(families.FIRST_TEXT, families.FIRST_TEXT + 3)]] * images)
    pixels = torch.randn(images, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def calls(images: int) -> int:
    batch = inputs(images)
    deep()(**batch)
    with Calls() as counted:
        deep()(**batch)
    return counted.found.total()


@pytest.mark.parametrize("method", IN_TOWER)
def test_the_calls_a_stage_adds_do_not_grow_with_the_batch(method: str) -> None:
    dense = {images: calls(images) for images in (1, 8)}
    with vtprune.patch(deep(), method, keep=0.3):
        one, eight = (calls(images) - dense[images] for images in (1, 8))
    assert eight <= 1.5 * one, f"{method} adds {one} calls to the dense prefill of one image, {eight} to that of eight"


@dataclass(frozen=True)
class OneByOne(Method):
    """A method of whole batches, asked for one image at a time."""

    method: Any = None

    @property
    def needs(self) -> Any:
        return self.method.needs

    def __call__(self, v: Visual) -> Assignment:
        answer: Assignment = self.method(v)
        return answer


ALIKE = {"topk_cls": {}, "zero_tprune": {"at": (0.0, 0.5)}, "tome": {"proportional": False}}


@pytest.mark.parametrize("method", ALIKE)
@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_5_vl", "qwen2_vl-video", "mistral3"])
@torch.no_grad()
def test_a_batch_is_asked_what_its_images_are(family: str, method: str) -> None:
    """Images of several sizes, of which some have no more tokens than their budget."""
    model, batch = families.model(family), families.inputs(family, rows=(2, 1))
    made, found = vtprune.create(method, **ALIKE[method]), []
    for stage in (made, OneByOne(made)):
        with vtprune.patch(model, Stage(("vit", slice(1, 9)), stage, keep=5)) as handle:
            logits = model(**batch).logits
            last = handle.last
        units = [unit for unit in last.tower_units if len(unit.idx) < unit.n]
        found.append(
            (logits, last.index, [(u.where, u.image, u.row, u.n, u.idx.tolist(), u.positions.tolist()) for u in units])
        )
    (logits, index, units), (theirs, their_index, their_units) = found
    assert units == their_units
    assert units
    assert torch.equal(index, their_index)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Wrong(Reducer):
    """Answers what the test says."""

    name = "wrong"
    kind: str = ""

    def reduce(self, t: Tokens, left: int) -> Reduction:
        index = torch.arange(left).expand(len(t.x), -1)
        if self.kind == "count":
            index = index[:, 1:]
        if self.kind == "outside":
            index = index + t.n
        if self.kind == "twice":
            index = torch.zeros_like(index)
        weight = torch.full((len(t.x), 1), torch.nan if self.kind == "weights" else 0.5)
        pair = torch.zeros(len(t.x), 1, dtype=torch.int64)
        return Reduction(keep_rows(t, index), pair, pair, weight)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("count", "budget is 8"), ("outside", "outside 0..15"), ("twice", "twice"), ("weights", "not finite")],
)
def test_wrong_answers_for_a_batch_are_refused(kind: str, message: str) -> None:
    stage = Stage(("vit", 1), Wrong(kind), keep=0.5)
    with vtprune.patch(deep(), stage), pytest.raises(VtpruneError, match=f"wrong .*{message}"):
        deep()(**inputs(2))
