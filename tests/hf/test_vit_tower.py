"""Reducers inside a VLM's tower: merging there equals averaging in place, with every copy attended to."""

from __future__ import annotations

from functools import partial
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

import vtprune
from vtprune import Stage
from vtprune.model_adapters.tower_tokens import blocks_of
from vtprune.model_adapters.towers import has_cls, tower_of
from vtprune.reduction import Reducer


def features(tower: nn.Module, model: Any, batch: Any) -> Tensor:
    """What the tower's last block puts out, [T, N, C]."""
    seen: list[Tensor] = []
    hook = blocks_of(tower)[-1].register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["paligemma", "video_llava"])
@pytest.mark.parametrize("where", [1, slice(1, 3)])
@torch.no_grad()
def test_merging_equals_averaging_in_place(family: str, attention: str, where: Any) -> None:
    model, batch = families.model(family, attention), families.inputs(family, rows=(1, 2))
    tower = tower_of(model.base_model, "image")
    prefix, blocks = int(has_cls(tower)), blocks_of(tower)
    where = where if isinstance(where, int) else slice(1, min(3, len(blocks)))
    with vtprune.patch(model, [Stage(("vit", where), vtprune.create("tome"), keep=0.5)]) as handle:
        ours = features(tower, model, batch)
        units = handle.last.tower_units
    assert units
    members: dict[tuple[int, int], list[int]] = {}
    left: dict[int, list[int]] = {}

    def average(k: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        for unit in units:
            if unit.where != ("vit", k):
                continue
            alive = left.get(unit.row, list(range(prefix, x.shape[1])))
            left[unit.row] = [prefix + p for p in unit.positions.tolist()]
            new = unit.assignment.apply(x[unit.row, alive])
            groups: dict[int, list[int]] = {}
            for s, d in zip(unit.assignment.src.tolist(), unit.assignment.dst.tolist()):
                groups.setdefault(d, []).extend(members.get((unit.row, alive[s]), [alive[s]]))
            for d, positions in groups.items():
                x[unit.row, positions] = new[d]
                members[unit.row, alive[unit.idx[d]]] = positions
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return (x, *args[1:]), kwargs

    hooks = [b.register_forward_pre_hook(partial(average, k), with_kwargs=True) for k, b in enumerate(blocks)]
    try:
        theirs = features(tower, model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    last = {unit.row: unit for unit in units}
    for row, unit in last.items():
        kept = [prefix + p for p in unit.positions.tolist()]
        torch.testing.assert_close(ours[row, kept], theirs[row, kept], rtol=1e-4, atol=1e-5)
        assert len(kept) < ours.shape[1] - prefix


@torch.no_grad()
def test_a_packed_tower_says_that_sizes_do_not_count() -> None:
    model, batch = families.model("qwen2_vl"), families.inputs("qwen2_vl", rows=(1,))
    with vtprune.patch(model, "tome", keep=0.5) as handle:
        model(**batch)
    assert any("sizes of merged tokens" in note for note in handle.last.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["diffrate", "tome", "zero_tprune", "token_transforming", "topk_cls", "flowcut"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_methods_run_under_autocast_and_round_no_score(family: str, method: str, dtype: torch.dtype) -> None:
    """A method that autocast reached would see its own products in half precision."""
    model, batch, rounded = families.model(family), families.inputs(family), []
    made = vtprune.create(method)
    asked = "reduce" if isinstance(made, Reducer) else "batch"
    plain = getattr(type(made), asked)

    def watched(self: Any, *args: Any) -> Any:
        rounded.append(torch.is_autocast_enabled("cpu"))
        return plain(self, *args)

    spy = type(made.name, (type(made),), {asked: watched})
    where = made.default_where()
    with (
        vtprune.patch(model, [Stage(where, spy(), keep=0.4)]) as handle,
        torch.autocast("cpu", dtype=dtype),
    ):
        assert model(**batch).logits.isfinite().all()
        kept = [len(unit.positions) for unit in handle.last.units]
    assert rounded
    assert not any(rounded)
    with vtprune.patch(model, [Stage(where, spy(), keep=0.4)]) as handle:
        model(**batch)
        assert [len(unit.positions) for unit in handle.last.units] == kept
