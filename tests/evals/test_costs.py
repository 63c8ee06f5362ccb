"""What tables say of costs: shares by layer and FLOPs against counts by hand, the keep of an equal share, pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtprune
from vtprune import Stage
from vtprune.evals.accuracy import AccuracyReport, evaluate, paired
from vtprune.evals.accuracy.plans import Plan, both_positions, plans
from vtprune.evals.accuracy.probe import CostProbe
from vtprune.evals.accuracy.rows import by_cost, compare, packed, unpacked
from vtprune.evals.costs import llm_by_layer, llm_flops, text_cost, tower_share, vision_flops
from vtprune.evals.readme import summary
from vtprune.evals.toys import image as tiny

LAYERS, VISUAL = 6, 256  # of the toy's LLM, and of its pictures
D, MLP, VOCAB = 128, 352, 71


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def questions():
    return tiny.questions(per_capability=4, capabilities=["color", "count"])


@pytest.fixture(scope="module")
def probe(loaded, questions) -> CostProbe:
    return CostProbe(*loaded, questions, prompts=2)


def plan(text: str, keep: float | int) -> Plan:
    return plans([text], [keep], seeds=1)[-1]


def prefill(lengths: list[int]) -> int:
    """FLOPs by hand: projections, gated MLP, half of the attention square; the head for one token."""
    linear = 4 * D * D + 3 * D * MLP
    return sum(2 * n * linear + 2 * n * n * D for n in lengths) + 2 * D * VOCAB


def test_fastv_keeps_all_tokens_up_to_its_layer(loaded, probe: CostProbe) -> None:
    """At layer 2 of 6 with a quarter kept: (2 x 256 + 4 x 64) / (6 x 256) = 1/2, whatever keep says."""
    cost = probe.cost(plan("fastv", 0.25))
    assert cost["llm_share"] == pytest.approx((2 * 256 + 4 * 64) / (6 * 256))
    assert cost["tower_share"] == 1.0
    assert cost["ttft"] > 0
    inputs = probe.inputs[0]
    fed = inputs["input_ids"].shape[1]
    text = fed - VISUAL
    with vtprune.patch(loaded[0], "fastv", keep=0.25) as handle, torch.inference_mode():
        loaded[0](**inputs)
        assert llm_by_layer(handle.last, fed, VISUAL) == [256, 256, 64, 64, 64, 64]
        flops = llm_flops(loaded[0], fed, handle)
    assert loaded[0].config.get_text_config().vocab_size == VOCAB
    assert flops == prefill([fed, fed, *[64 + text] * 4])
    vision = vision_flops(loaded[0], inputs)
    expected = (vision + flops) / (vision + prefill([fed] * LAYERS))
    assert cost["flops"] == pytest.approx(expected, rel=2e-3), "prompts differ by a word or two"


def test_a_stage_that_reads_its_own_layer_pays_the_keys_of_what_it_drops(loaded, probe: CostProbe) -> None:
    inputs = probe.inputs[0]
    fed = inputs["input_ids"].shape[1]
    stage = Stage(3, vtprune.create("pyramiddrop"), keep=64)
    with vtprune.patch(loaded[0], stage) as handle, torch.inference_mode():
        loaded[0](**inputs)
        flops = llm_flops(loaded[0], fed, handle)
    assert flops == prefill([fed] * 3 + [fed - VISUAL + 64] * 3) + 2 * (VISUAL - 64) * D * D


def test_before_the_llm_every_layer_runs_on_what_is_kept(probe: CostProbe) -> None:
    cost = probe.cost(plan("divprune", 64))
    assert (cost["llm_share"], cost["tower_share"]) == (0.25, 1.0)
    assert probe.cost(Plan("dense", None, 1.0)) == {"llm_share": 1.0, "tower_share": 1.0, "flops": 1.0, "ttft": 1.0}


def test_a_tower_stage_counts_from_its_block_on(loaded, probe: CostProbe) -> None:
    """Half of the patches leave before block 2 of the 6 that run: (2 + 4 / 2) / 6."""
    with vtprune.patch(loaded[0], Stage(("vit", 2), vtprune.create("topk_cls"), keep=0.5)) as handle:
        with torch.inference_mode():
            loaded[0](**probe.inputs[0])
            pruned = vision_flops(loaded[0], probe.inputs[0])
        assert tower_share(handle.last) == pytest.approx((2 + 4 / 2) / 6)
    assert pruned < vision_flops(loaded[0], probe.inputs[0])


def test_flops_of_what_the_formula_does_not_know_are_not_told() -> None:
    from transformers import LlamaConfig, MixtralConfig

    assert text_cost(LlamaConfig()) is not None
    assert text_cost(MixtralConfig()) is None


def test_keep_is_found_for_an_equal_share(probe: CostProbe) -> None:
    found = probe.equal(plan("fastv", 0.5))
    assert isinstance(found, Plan)
    assert found.equal == 0.5
    assert probe.share(found) == pytest.approx(0.5, abs=0.005)
    assert found.keep == pytest.approx(0.25, abs=0.005), "2/6 of the layers hold all, so a quarter in the others"
    known = probe.equal(plan("fastv", 0.5), {0.25: 0.5})
    assert isinstance(known, Plan)
    assert known.keep == 0.25
    assert probe.equal(plan("divprune", 0.5)) is None, "its share is its keep"


def test_a_share_out_of_reach_is_said(probe: CostProbe) -> None:
    least = probe.equal(plan("fastv", 0.11))
    assert least == pytest.approx((2 * 256 + 4 * 1) / (6 * 256))
    assert probe.equal(plan("dycoke_kv", 0.5)) == 1.0, "it drops nothing of the prompt"


def test_positions_are_paired_where_they_are_renumbered_officially(loaded, probe: CostProbe) -> None:
    made = both_positions(["divprune", "pyramiddrop", "sparsevlm:version=plus", "pyramiddrop:positions=keep"])
    assert made == [
        "divprune", "pyramiddrop", "pyramiddrop:positions=compact", "sparsevlm:version=plus",
        "sparsevlm:version=plus,positions=compact", "pyramiddrop:positions=keep",
    ]  # fmt: skip
    with plan("pyramiddrop:positions=keep", 0.25).applied(loaded[0]) as handle:
        assert not any(stage.compact for stage in handle.stages)
    with plan("pyramiddrop:positions=compact", 0.25).applied(loaded[0]) as handle:
        assert all(stage.compact for stage in handle.stages)
    with pytest.raises(ValueError, match="neither keep nor compact"):
        plans(["fastv:positions=loose"], [0.5])


def row(method: str, right: float, llm: float, keep: float = 0.5, **more: Any) -> dict[str, Any]:
    cost = {"llm_share": llm, "tower_share": 1.0, "flops": llm, "ttft": llm}
    base = {"method": method, "keep": keep, "capability": "mean", "right": right, "low": right, "high": right, "n": 4}
    return {**base, **cost, "equal_share": None, **more}


def test_rows_stand_by_cost_and_of_one_cost_by_accuracy() -> None:
    rows = [row("dear", 0.9, 0.7), row("dense", 1.0, 1.0, 1.0), row("blind-zero", 0.2, 1.0, 1.0)]
    rows += [row("worse", 0.5, 0.1101), row("better", 0.6, 0.1099)]
    assert [r["method"] for r in sorted(rows, key=by_cost)] == ["better", "worse", "dear", "dense", "blind-zero"]


def test_differences_are_paired() -> None:
    """The same questions are drawn for both, so that equal answers differ by nothing in every resample."""
    rng = np.random.default_rng(0)
    dense, asked = (rng.random(80) < 0.6).astype(float), np.array(["a"] * 40 + ["b"] * 40)
    lost = dense.copy()
    lost[np.flatnonzero(dense)[:4]] = 0
    marks = {"dense": dense, "uniform": dense, "m": lost}
    answers = [
        {"method": name, "keep": 1.0 if name == "dense" else 0.5, "right": packed([(m, m)])}
        for name, m in marks.items()
    ]
    assert unpacked(answers[2]["right"], 80).tolist() == lost.tolist()
    rows = [row("dense", 0.6, 1.0, 1.0), row("uniform", 0.6, 0.5), row("m", 0.5, 0.505), row("other", 0.1, 0.9)]
    compare(rows[:3], answers, asked, ["a", "b"])
    assert rows[0]["over_dense"] is None
    assert rows[1]["over_dense"] == [0.0, 0.0, 0.0]
    difference, low, high = rows[2]["over_uniform"]
    assert difference == pytest.approx(-4 / 80)
    assert low < difference < high <= 0
    spread = np.sqrt(np.mean([dense.std() ** 2, lost.std() ** 2]) * 2 / 80)
    assert (high - low) / 2 < 1.5 * spread, "narrower than of two samples that have nothing to do with each other"


def test_two_methods_are_compared_from_the_file(tmp_path, capsys) -> None:
    """Difference and interval of a saved table, against those that the table itself tells of uniform tokens."""
    generator = np.random.default_rng(3)
    kinds = np.array(["a"] * 40 + ["b"] * 20)
    marks = {name: (generator.random(60) < p).astype(float) for name, p in (("uniform", 0.5), ("divprune", 0.8))}
    answers = [{"method": n, "keep": 0.5, "right": packed([(m, m)])} for n, m in marks.items()]
    rows = [row(name, float(np.mean([m[:40].mean(), m[40:].mean()])), 0.5) for name, m in marks.items()]
    compare(rows, answers, kinds, ["a", "b"])
    AccuracyReport("t", rows, {}, (), answers, kinds.tolist()).save(tmp_path / "eval.json")
    report = AccuracyReport.load(tmp_path / "eval.json")
    assert report.kinds == kinds.tolist()
    (found,) = paired.paired(report, "divprune", "uniform")
    assert found["over"] == rows[1]["over_uniform"]
    assert found["over"][0] == pytest.approx(found["right"] - found["other"])
    paired.main([str(tmp_path), "divprune", "uniform"])
    assert "| 50 % |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="both divprune and random"):
        paired.paired(report, "divprune", "random")


def test_the_page_shows_the_cheapest_first_and_marks_what_leads() -> None:
    rows = [
        row("dense", 0.9, 1.0, 1.0), row("blind-zero", 0.3, 1.0, 1.0), row("blind-shuffle", 0.2, 1.0, 1.0),
        row("uniform", 0.5, 0.25, 0.25), row("fastv", 0.8, 0.5, 0.25, equal_share=0.5), row("tome", 0.7, 0.5),
    ]  # fmt: skip
    env = {"cpu": "C", "dtype": "float32", "batch": 1, "versions": {"torch": "1", "transformers": "2"}}
    saved = {"rows": [*rows, {"capability": "color"}], "environment": env, "notes": ["Out of reach: x."]}
    lines = summary(saved).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| `uniform` (control)",
        "| `fastv`",
        "| `tome`",
        "| dense",
    ]
    assert "| 25 % (= 50 %) | 50 % | 100 % | 0.50 | 0.50 | **80.0** ± 0.0 |" in lines[3]
    assert "| 70.0 ± 0.0 |" in lines[4], "a row of that cost is better"
    assert "Out of reach: x." in lines[-1]
    short = summary(saved, ["fastv@0.25"]).splitlines()
    assert [line.split(" | ")[0] for line in short[2:4]] == ["| `fastv`", "| dense"]
    with pytest.raises(ValueError, match=r"no row tome@0.1: .*tome@0.5"):
        summary(saved, ["tome@0.1"])


def test_a_run_goes_on_where_it_stopped(loaded, questions, tmp_path) -> None:
    some = {"seeds": 1, "batch": 8, "progress": False}
    whole = evaluate(*loaded, questions, ["fastv"], [0.5], **some)
    kept: list[dict[str, Any]] = []

    def stop(report: AccuracyReport) -> None:
        report.save(tmp_path / "eval.json")
        kept.append(report.rows[-1])
        if len(kept) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*loaded, questions, ["fastv"], [0.5], finished=stop, **some)
    asked: list[str] = []
    before = AccuracyReport.load(tmp_path / "eval.json")
    after = evaluate(
        *loaded, questions, ["fastv"], [0.5], before=before, **some,
        finished=lambda report: asked.append(report.rows[-1]["method"]),
    )  # fmt: skip
    assert asked == ["fastv", "fastv"][: len(asked)], "dense, blind rows and controls are there"
    assert asked

    def told(report: AccuracyReport) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k != "ttft"} for r in report.rows]

    assert told(after) == told(whole)
    with pytest.raises(ValueError, match="measured with batch 8, and now it is 4"):
        evaluate(*loaded, questions, ["fastv"], [0.5], before=before, **{**some, "batch": 4})


def test_the_command_leaves_out_a_model_that_is_not_installed(tmp_path, monkeypatch, capsys) -> None:
    import sys

    from vtprune.evals.accuracy.__main__ import main

    monkeypatch.setitem(sys.modules, "vtprune.evals.toys.mid", None)
    main(["--out", str(tmp_path / "t"), "--models", "mid"])
    assert "left out: mid" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
