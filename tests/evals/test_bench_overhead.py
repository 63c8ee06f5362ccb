"""`vtprune bench --overhead`: the limit runs on the lengths and FLOPs of the patched call, and rows are complete."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals.speed import bench_overhead, geometries, growth, plain_loops
from vtprune.evals.speed.bench import Subject
from vtprune.evals.speed.bench_overhead import Forms, OverheadReport, Rounds, overhead, small_llava
from vtprune.evals.speed.flops import counted
from vtprune.evals.speed.free_cuts import FreeCuts, Lengths, projector_of
from vtprune.types import UnsupportedModel


def tiny(name: str, side: int = 8) -> Subject:
    """A geometry cut to four layers, on pictures of side x side visual tokens."""
    config = geometries.GEOMETRIES[name].config(4, 0.04)
    torch.manual_seed(0)
    if name.startswith("qwen"):
        width = 3 * 2 * config.vision_config.patch_size**2
        grid = torch.tensor([[1, 2 * side, 2 * side]])
        pixels = {"pixel_values": torch.randn(4 * side * side, width), "image_grid_thw": grid}
    else:
        config.vision_config.image_size = 14 * side
        pixels = {"pixel_values": torch.randn(1, 3, 14 * side, 14 * side)}
    model = AutoModelForImageTextToText.from_config(config).eval()
    return Subject(f"{name}-{side}", model, geometries.prompt(model, pixels, 1))


@pytest.fixture(scope="module", params=["llava-1.5-7b", "qwen2.5-vl-7b"])
def what(request: pytest.FixtureRequest) -> Subject:
    """A model of a tower whose rows are crops, and one of a tower that packs images."""
    return tiny(request.param)


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
        assert limit < ours < 1.2 * limit
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
    what = tiny("llava-1.5-7b", 4)
    monkeypatch.setattr(what.model.base_model, "multi_modal_projector", None)
    with pytest.raises(UnsupportedModel, match="no projector of llava is known"):
        projector_of(what.model, what.model.base_model.vision_tower)
    text = what.model.get_decoder()
    limit = FreeCuts(what.model, "image", Lengths([3] * len(text.layers)))
    embeds = torch.zeros(1, 5, text.config.hidden_size)
    with limit, pytest.raises(UnsupportedModel, match="takes 'visual_pos_masks'"):
        text(inputs_embeds=embeds, visual_pos_masks=torch.ones(1, 5))


@pytest.fixture(scope="module")
def report() -> Any:
    made = [lambda side=side: tiny("llava-1.5-7b", side) for side in (4, 6)]
    return overhead(made, ["random", "fastv:layer=40", "topk_cls"], 0.25, repeats=2, steps=1, progress=False)


def test_rows_are_complete_and_refusals_are_named(report: Any) -> None:
    assert [(row["geometry"], row["method"]) for row in report.rows] == [
        (f"llava-1.5-7b-{n}", name) for n in (4, 6) for name in ("random", "topk_cls")
    ]
    for row in report.rows:
        assert None not in row.values()
        assert row["pruned_ms"] > 0 < row["limit_ms"]
        assert [len(values) for values in row["rounds_ms"].values()] == [2] * 8
        assert row["overhead"] == pytest.approx(row["overhead_ms"] / row["dense_ms"])
        assert row["kept_by_layer"] == [row["visual"] // 4] * 4
    assert [(row["geometry"], row["method"]) for row in report.refused] == [
        ("llava-1.5-7b-4", "fastv:layer=40"), ("llava-1.5-7b-6", "fastv:layer=40"),
    ]  # fmt: skip
    assert "layer 40" in report.refused[0]["reason"]
    assert "Not run: fastv:layer=40 on llava-1.5-7b-6" in report.notes[-1]
    header, lines = report.cells()
    assert all(len(line) == len(header) for line in lines)


def test_a_row_tells_medians_of_differences_and_the_difference_of_the_least() -> None:
    """A slow moment in one form of one round moves the median, and not the least of all rounds."""
    seen = Rounds(
        dense=[1.0, 2.0, 1.0], full=[1.5, 2.0, 1.01], pruned=[0.5, 0.8, 0.32], limit=[0.3, 0.7, 0.31],
        step=[0.2, 0.1, 0.4], plain_step=[0.1, 0.08, 0.2], text=[0.3, 0.3, 0.2], plain_text=[0.1, 0.2, 0.2],
    )  # fmt: skip
    row = bench_overhead._row(tiny("llava-1.5-7b", 4), "random", 0.25, Lengths([64, 64]), seen)
    assert row["dense_ms"] == 1000
    assert (row["overhead"], row["affordable"]) == (pytest.approx(0.1), False)
    assert (row["full"], row["decode"]) == (pytest.approx(0.01), pytest.approx(1.0))
    assert (row["decode_us"], row["text_us"]) == (pytest.approx(1e5), pytest.approx(1e5))
    least = {"overhead": 0.02, "full": 0.01, "decode_us": 2e4, "decode": 0.25, "text_us": 1e5}
    assert row["least"] == pytest.approx(least)
    told = bench_overhead._line(row)
    assert told[6:8] == ["10.0 / 2.0 % !", "+1.0 / +1.0 %"]
    assert row["rounds_ms"]["dense"] == [1000.0, 2000.0, 1000.0]


def test_a_file_is_read_as_it_was_written(report: Any, tmp_path: Path) -> None:
    path = report.write(tmp_path)
    assert path == tmp_path / "overhead.json"
    assert OverheadReport.load(path) == report
    assert report.environment["geometries"] == ["llava-1.5-7b-4", "llava-1.5-7b-6"]
    assert report.plot(tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"other\.json holds nothing that can be gone on with"):
        OverheadReport.load(tmp_path / "other.json")


class Stopped(BaseException):
    """As if the process were killed."""


def test_a_run_that_stopped_goes_on_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved after every method; what is there is not measured again, and what differs is named."""
    measured: list[str] = []

    def one(name: str) -> list[dict[str, Any]]:
        measured.append(name)
        return [{"method": name.split()[-1], "n": 256, "stopped": "at once"}]

    class Counted(Forms):
        def __init__(self, what: Subject, method: str, *rest: Any) -> None:
            measured.append(f"{method} on {what.name}")
            if len(measured) == 3:
                raise Stopped
            super().__init__(what, method, *rest)

    monkeypatch.setattr(bench_overhead, "Forms", Counted)
    monkeypatch.setattr(bench_overhead, "growth", lambda name, *_, **__: one(f"growth of {name}"))
    monkeypatch.setattr(bench_overhead, "plain_loops", lambda **_: one("loops"))
    monkeypatch.setattr(bench_overhead, "segmentation", lambda: {"what": "segments"})
    monkeypatch.setattr(bench_overhead, "small_llava", lambda grid, *_: tiny("llava-1.5-7b", grid // 6))
    monkeypatch.setattr(vtprune, "methods", lambda: [vtprune.create(name) for name in ("random", "fastv")])
    asked = ["bench", "--overhead", "--repeats", "1", "--new-tokens", "1", "--out", str(tmp_path)]
    with pytest.raises(Stopped):
        CliRunner().invoke(app, asked)
    file = tmp_path / "overhead.json"
    before = json.loads(file.read_text())["rows"]
    assert [(row["geometry"], row["method"]) for row in before] == [
        ("llava-1.5-7b-4", "random"), ("llava-1.5-7b-4", "fastv"),
    ]  # fmt: skip
    measured[:] = ["not", "stopped", "again"]
    result = CliRunner().invoke(app, [*asked, "--json"])
    assert result.exit_code == 0, result.output
    assert f"{file} holds 2 rows of commit" in " ".join(result.stderr.split())
    assert measured[3:] == ["random on llava-1.5-7b-8", "fastv on llava-1.5-7b-8", "growth of random", "loops"]
    told = json.loads(result.stdout)
    assert told == json.loads(file.read_text())
    assert told["rows"][:2] == before
    assert [row["method"] for row in told["rows"]] == ["random", "fastv"] * 2
    assert (len(told["growth"]), len(told["loops"])) == (1, 2)
    assert (tmp_path / "overhead.png").exists()
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert len(measured) == 7, "all is there, and nothing is measured"
    other = CliRunner().invoke(app, [*asked, "--keep", "0.5"])
    assert other.exit_code == 2
    assert "measured with keep 0.11, and now it is 0.5: name another folder" in " ".join(other.stderr.split())


def test_another_model_of_the_same_name_is_refused(report: Any) -> None:
    again = OverheadReport.of_body(json.loads(json.dumps(report.body)))
    bigger = dataclasses.replace(tiny("llava-1.5-7b", 8), name="llava-1.5-7b-4")
    with pytest.raises(ValueError, match="measured with visual 16, and now it is 64"):
        overhead([lambda: bigger], ["random"], 0.25, repeats=2, steps=1, progress=False, before=again)


def test_the_command_names_what_excludes_each_other() -> None:
    result = CliRunner().invoke(app, ["bench", "--overhead", "--layers", "2"])
    assert result.exit_code == 2
    assert "--overhead shrinks what --geometry names" in " ".join(result.output.split())


def test_the_default_model_has_the_published_geometry() -> None:
    what = small_llava(4, "cpu", torch.float32)
    text, tower = what.model.config.text_config, what.model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, tower.hidden_size, tower.num_hidden_layers) == (512, 12, 128, 6)
    assert (what.visual, what.tokens) == (16, 76)


# -- growth and plain loops -----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_growth_is_measured_in_a_process_of_its_own() -> None:
    rows = growth.growth("random", 0.25, frames=(1, 2), progress=False)
    assert [(row["method"], row["n"]) for row in rows] == [("random", 256), ("random", 512)]
    assert all(row["seconds"] > 0 and row["stopped"] is None for row in rows)
    assert rows[1]["per_token"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"] / 2)


def test_a_method_that_takes_too_long_is_stopped_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(rule: Any, keep: float, t: int, seconds: float) -> tuple[float, int]:
        if t > 2:
            raise growth._TooLong
        return 0.5 * t**2, 2**20

    monkeypatch.setattr(growth, "_one", one)
    rows = list(growth._rows("random", 0.25, (1, 2, 4, 8), 3.0))
    assert [row["stopped"] for row in rows] == [None, None, "more than 3 s of CPU time"]
    shown = growth.GrowthReport("growth", rows).cells()
    assert shown[0] == ["method", "256", "512", "1024"]
    assert shown[1] == [["random", "0.500 s 1 MiB", "2.000 s 1 MiB !", "more than 3 s of CPU time"]]


def test_a_process_that_ends_early_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth.sys, "executable", "/bin/false")
    rows = growth.growth("random", 0.25, frames=(1, 2), progress=False)
    told = "the process of the measurement ended with status 1"
    assert [(row["method"], row["n"], row["stopped"]) for row in rows] == [("random", 256, told)]


def test_plain_loops_pick_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed = {"peak_growth_bytes": 1, "gram_bytes": 2}
    monkeypatch.setattr(plain_loops, "memory", lambda *_: weighed)
    rows = plain_loops.plain_loops(cases=[(60, 9)], widths=[32, 16])
    named = [(row["kernel"], row["d"]) for row in rows]
    assert named == [("farthest_point", 32), ("farthest_point", 16), ("facility_greedy", 32), ("dpp_greedy", 32)]
    assert all(row["same_picks"] and row["same_order"] and row["speedup"] > 0 for row in rows)
