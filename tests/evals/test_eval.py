"""The evaluation: marking, controls, intervals, and that shortcuts give the answers of the long way."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vtprune
from vtprune.evals.accuracy import (
    CONTROLS,
    AccuracyReport,
    Exam,
    _rows,
    evaluate,
    interval,
    is_random,
    mark,
    parse_method,
    plans,
    render,
    words_of,
)
from vtprune.evals.toys import image as tiny


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def questions():
    return tiny.questions(per_capability=4, capabilities=["color", "count", "exist"])


@pytest.fixture(scope="module")
def report(loaded, questions) -> AccuracyReport:
    return evaluate(*loaded, questions, ["divprune"], [0.25], seeds=2, batch=5, progress=False)


@pytest.mark.parametrize(
    ("said", "ended", "answer", "expected"),
    [
        ("red", True, "red", (True, True)),
        ("red", False, "red", (True, False)),
        ("red red red", False, "red", (True, False)),
        ("Red.", True, "red", (True, True)),
        ("blue", True, "red", (False, False)),
        ("47", True, "4 7", (True, True)),
        ("4", True, "4 7", (False, False)),
        ("Four", True, "4", (True, True)),
        ("top left", True, "top left", (True, True)),
        ("top", True, "top left", (False, False)),
        ("", True, "yes", (False, False)),
    ],
)
def test_marking_separates_right_from_stopped_right(said, ended, answer, expected) -> None:
    assert mark(said, ended, answer) == expected


def test_kept_features_and_batches_change_no_answer(loaded, questions) -> None:
    model, processor = loaded
    held = Exam(model, processor, questions, batch=5)
    fresh = Exam(model, processor, questions, batch=1, memory=0)
    assert held.questions == fresh.questions
    assert held.answers() == held.answers(needs_tower=True) == fresh.answers()
    with vtprune.patch(model, "divprune", keep=0.25):
        assert held.answers() == held.answers(needs_tower=True) == fresh.answers()


def test_features_are_encoded_once(loaded, questions) -> None:
    exam = Exam(*loaded, questions, batch=6)
    calls = []
    hook = loaded[0].model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        exam.answers()
        exam.answers()
        # Two batches, both encoded in the first pass; transformers 5.17 cannot be handed features and encodes again.
        reusable = "mm_encoder_outputs" in inspect.signature(loaded[0].forward).parameters
        before = 2 if reusable else 4
        assert len(calls) == before
        exam.answers(needs_tower=True)
        assert len(calls) == before + 2
    finally:
        hook.remove()


def test_controls_and_blind_scores_stand_beside_every_score(report: AccuracyReport) -> None:
    methods = list(dict.fromkeys(row["method"] for row in report.rows))
    assert methods == ["dense", "blind-zero", "blind-shuffle", *CONTROLS, "divprune"]
    for row in report.rows:
        assert row["low"] <= row["right"] <= row["high"]
        assert row["stopped"] <= row["right"]
        assert {"blind_zero", "blind_shuffle", "full", "accuracy_kept"} <= row.keys()


def test_random_is_drawn_with_several_seeds_and_nothing_else_is(report: AccuracyReport) -> None:
    for row in report.rows:
        seeds = row.get("right_by_seed")
        if row["method"] == "random":
            assert len(seeds) == 2
            assert row["right"] == pytest.approx(np.mean(seeds))
        else:
            assert seeds is None
    assert [cls.name for cls in vtprune.methods() if is_random(vtprune.create(cls.name))] == ["random"]


def test_the_model_is_left_as_it_was(loaded, questions) -> None:
    model, processor = loaded
    inputs = processor(text=[questions[0].prompt], images=[questions[0].image], return_tensors="pt")
    before = model(**inputs).logits
    evaluate(model, processor, questions[:4], ["fastv"], [0.5], seeds=1, progress=False)
    assert torch.equal(model(**inputs).logits, before)


def untimed(report: AccuracyReport) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "ttft"} for row in report.rows]


def test_several_processes_give_the_same_report(loaded, questions, report: AccuracyReport) -> None:
    shared = evaluate(*loaded, questions, ["divprune"], [0.25], seeds=2, batch=5, progress=False, workers=2)
    assert untimed(shared) == untimed(report)
    with pytest.raises(ValueError, match="workers=0"):
        evaluate(*loaded, questions, ["divprune"], [0.25], workers=0)


def test_accuracy_kept_is_measured_from_the_better_blind_score() -> None:
    scores = {"dense": 9, "blind-zero": 1, "blind-shuffle": 3, "m": 6}
    marks = {
        (name, 0.25 if name == "m" else 1.0): [(np.array([1.0] * n + [0.0] * (10 - n)),) * 2]
        for name, n in scores.items()
    }
    rows = _rows(marks, np.array(["color"] * 10), ["color"])
    pruned = [row for row in rows if row["method"] == "m"]
    assert [row["capability"] for row in pruned] == ["color", "mean"]
    for row in pruned:
        assert row["accuracy_kept"] == pytest.approx((0.6 - 0.3) / (0.9 - 0.3))


def test_nothing_is_kept_of_a_capability_the_model_does_not_have() -> None:
    same = [(np.array([1.0, 0.0] * 5),) * 2]
    marks = {(name, 1.0): same for name in ("dense", "blind-zero", "blind-shuffle")}
    assert all(row["accuracy_kept"] is None for row in _rows(marks, np.array(["color"] * 10), ["color"]))


def test_interval_agrees_with_the_binomial_spread() -> None:
    sample = np.array([1.0] * 200 + [0.0] * 100)
    low, high = interval([sample])
    spread = 1.96 * np.sqrt((2 / 3) * (1 / 3) / 300)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)
    assert interval([sample]) == (low, high)  # seeded
    assert interval([np.ones(300)]) == (1.0, 1.0)
    mixed = interval([sample, np.ones(300)])
    assert mixed[0] < (2 / 3 + 1) / 2 < mixed[1]
    assert mixed[1] - mixed[0] == pytest.approx((high - low) / 2, rel=0.15)


def test_plans_read_options_and_fail_before_any_work() -> None:
    assert parse_method("todre:objective=kcenter,pivot=center") == (
        "todre",
        {"objective": "kcenter", "pivot": "center"},
    )
    made = plans(["todre:objective=kcenter"], [0.5, 16], seeds=3)
    assert [(p.label, p.keep, p.seed) for p in made if p.label == "random"] == [
        ("random", keep, seed) for keep in (0.5, 16) for seed in (0, 1, 2)
    ]
    assert len(made) == 6 + 2 + 2
    assert not {p.label: p.needs_tower for p in made}["uniform"]  # the grid comes along with kept features
    assert plans(["todre"], [0.5])[-1].needs_tower
    assert plans(["flowcut"], [0.5])[-1].needs_tower  # it acts inside the tower
    assert not plans(["fastv"], [0.5])[-1].needs_tower  # its signal comes from the LLM
    with pytest.raises(ValueError, match=r"unknown method 'divprun'.*did you mean 'divprune'"):
        plans(["divprun"], [0.5])
    with pytest.raises(ValueError, match="write name:option=value"):
        plans(["todre:kcenter"], [0.5])
    with pytest.raises(TypeError, match="no option 'colour'"):
        plans(["todre:colour=red"], [0.5])


def test_prompts_go_through_a_chat_template_where_there_is_one(loaded) -> None:
    processor = loaded[1]
    prompt = "<s> <image> what color is the circle ? answer:"
    assert words_of(prompt) == "what color is the circle ?"
    assert render(processor, prompt) == prompt

    class Chatty:
        chat_template = "x"

        def apply_chat_template(self, turn, **options):
            assert options == {"add_generation_prompt": True, "tokenize": False}
            return " | ".join(part.get("text", part["type"]) for part in turn[0]["content"])

    assert render(Chatty(), prompt).startswith("image | what color is the circle ?\n")


def test_report_prints_saves_and_draws(report: AccuracyReport, tmp_path: Path) -> None:
    header, lines = report.cells()
    costs, ends = ["LLM", "tower", "FLOPs", "TTFT"], ["vs dense", "vs uniform", "stopped", "acc. kept"]
    assert header == ["method", "kept", *costs, "color", "count", "exist", "mean", *ends]
    assert ["divprune", "25 %", "25 %", "100 %"] in [line[:4] for line in lines[:3]]
    assert [line[0] for line in lines[3:4]] == ["dense"], "the dearest behind those that prune"
    assert all(len(line) == len(header) for line in lines)
    read = json.loads(report.save(tmp_path / "deep" / "eval.json").read_text())
    assert read["rows"] == report.rows
    assert read["environment"].keys() >= {"cpu", "gpu", "dtype", "batch", "versions", "commit", "time"}
    assert report.to_markdown().count("\n") == len(lines) + 1
    assert report.plot(tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_exam_is_refused(loaded) -> None:
    with pytest.raises(ValueError, match="no questions"):
        Exam(*loaded, [])
