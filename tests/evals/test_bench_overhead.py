"""`vtprune bench --overhead`: the limit runs on the lengths and FLOPs of the patched call, and rows are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals.speed.bench import Subject, subject
from vtprune.evals.speed.bench_overhead import Forms, overhead, small_llava
from vtprune.evals.speed.flops import counted
from vtprune.evals.speed.free_cuts import FreeCuts, Lengths, projector_of
from vtprune.types import UnsupportedModel


@pytest.fixture(scope="module", params=["llava", "qwen"])
def what(request: pytest.FixtureRequest) -> Subject:
    """A small model of a tower whose rows are crops, and one of a tower that packs images."""
    if request.param == "llava":
        return small_llava(6, "cpu", torch.float32)
    return subject("qwen2.5-vl-7b", "cpu", torch.float32, layers=4, scale=0.04)


@pytest.mark.parametrize("method", ["random", "fastv", "topk_cls"])
def test_the_limit_runs_on_the_lengths_of_the_patched_call(what: Subject, method: str) -> None:
    """A stage in the tower costs the projector of all tokens, whose FLOPs the limit does not spend."""
    with torch.inference_mode():
        forms = Forms(what, method, 0.25, steps=1)
        layers = what.model.get_decoder().layers
        seen: dict[int, int] = {}
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: seen.__setitem__(i, kwargs["hidden_states"].shape[1]), with_kwargs=True
            )
            for i, layer in enumerate(layers)
        ]
        with forms.limit:
            limit = counted(forms.prefill)
        for hook in hooks:
            hook.remove()
        with vtprune.patch(what.model, forms.method, keep=0.25) as handle:
            ours = counted(forms.prefill)
            last = handle.last
    assert [seen[i] for i in range(len(layers))] == last.lengths
    assert forms.lengths.tower == last.tower_lengths.get("image", [])
    if method == "random":
        assert ours == limit
    elif method == "fastv":
        assert 0 <= ours - limit < 0.002 * limit
    else:
        assert limit < ours < 1.1 * limit
        assert forms.lengths.tower[-1] < forms.lengths.tower[0]


def test_at_full_length_the_limit_is_the_dense_model(what: Subject) -> None:
    with torch.inference_mode():
        dense = what.model(**what.inputs).logits
        before = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in what.model.modules()]
        lengths = Lengths([what.tokens] * len(what.model.get_decoder().layers))
        with FreeCuts(what.model, "image", lengths):
            assert torch.equal(what.model(**what.inputs).logits, dense)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in what.model.modules()] == before


def test_a_model_whose_limit_cannot_be_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    what = small_llava(4, "cpu", torch.float32)
    monkeypatch.setattr(what.model.base_model, "multi_modal_projector", None)
    with pytest.raises(UnsupportedModel, match="no projector of llava is known"):
        projector_of(what.model, what.model.base_model.vision_tower)
    text = what.model.get_decoder()
    limit = FreeCuts(what.model, "image", Lengths([3] * len(text.layers)))
    embeds = torch.zeros(1, 5, 512)
    with limit, pytest.raises(UnsupportedModel, match="takes 'visual_pos_masks'"):
        text(inputs_embeds=embeds, visual_pos_masks=torch.ones(1, 5))


@pytest.fixture(scope="module")
def report() -> Any:
    made = [lambda: small_llava(4, "cpu", torch.float32), lambda: small_llava(6, "cpu", torch.float32)]
    return overhead(made, ["random", "fastv:layer=40", "topk_cls"], 0.25, repeats=2, steps=1, progress=False)


def test_rows_are_complete_and_refusals_are_named(report: Any) -> None:
    assert [(row["geometry"], row["method"]) for row in report.rows] == [
        (f"llava-small-{n}", name) for n in (16, 36) for name in ("random", "topk_cls")
    ]
    for row in report.rows:
        assert None not in row.values()
        assert row["pruned_ms"] > 0 < row["limit_ms"]
        assert len(row["overhead_ms_all"]) == 2
        assert row["overhead"] == pytest.approx(row["overhead_ms"] / row["dense_ms"])
        assert row["kept_by_layer"] == [row["visual"] // 4] * 12
    assert [(row["geometry"], row["method"]) for row in report.refused] == [
        ("llava-small-16", "fastv:layer=40"), ("llava-small-36", "fastv:layer=40"),
    ]  # fmt: skip
    assert "layer 40" in report.refused[0]["reason"]
    assert "Not run: fastv:layer=40 on llava-small-36" in report.notes[-1]
    header, lines = report.cells()
    assert all(len(line) == len(header) for line in lines)


def test_one_file_and_one_picture_in_a_folder_of_the_day(report: Any, tmp_path: Path) -> None:
    path = report.write(tmp_path)
    assert path.parent.parent == tmp_path
    assert path.parent.name.endswith("-overhead")
    read = json.loads(path.read_text())
    assert read["rows"] == report.rows
    assert read["refused"] == report.refused
    assert read["environment"]["geometries"] == ["llava-small-16", "llava-small-36"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_command_names_what_excludes_each_other() -> None:
    result = CliRunner().invoke(app, ["bench", "--overhead", "--layers", "2"])
    assert result.exit_code == 2
    assert "--overhead shrinks what --geometry names" in " ".join(result.output.split())
