"""The tables of an evaluation: cases worked out by hand, intervals against a slow bootstrap, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import results
from rich.console import Console

from vtprune.evals.tasks.cells import DENSE, Cell, cells
from vtprune.evals.tasks.folder import ResultFolder
from vtprune.evals.tasks.resampling import interval, resampled
from vtprune.evals.tasks.summary import Summary, summarise

MADE = {(cell.label, cell.keep, cell.seed): cell for cell in cells(["divprune", "fastv"], [0.5, 0.25], seeds=3)}
DIVPRUNE = MADE["divprune", 0.25, None]
RANDOM = [MADE["random", 0.25, seed] for seed in range(3)]


def marked(marks: list[float], **more: Any) -> list[dict[str, Any]]:
    """Lines with these marks; a right answer is "yes", a wrong one "no"."""
    return [results.line(i, "yes" if mark else "no", [mark], **more) for i, mark in enumerate(marks)]


def row_of(summary: Summary, method: str, task: str = "t", keep: float | None = 0.25) -> dict[str, Any]:
    found = [r for r in summary.rows if (r["method"], r["task"], r["keep"]) == (method, task, keep)]
    assert len(found) == 1
    return found[0]


def test_scores_are_relative_to_dense(tmp_path: Path) -> None:
    answers = {DENSE: marked([1, 1, 1, 1, 0]), DIVPRUNE: marked([1, 0, 1, 1, 0], visual_tokens=[64, 16])}
    row = row_of(summarise(results.write(tmp_path, {"t": ("exact", answers)})), "divprune")
    assert (row["score"], row["relative"], row["n"], row["seeds"]) == (0.6, 0.75, 5, 1)
    assert row["delta"] == pytest.approx(-0.2)
    assert row["agreement"] == 0.8
    assert row["visual_tokens"] == [64, 16]
    assert row["beats_random"] is None
    assert row["low"] <= 0.75 <= row["high"]


def test_relative_scores_use_the_total_of_the_metric(tmp_path: Path) -> None:
    """F1 is no mean of marks: it is made of the mean counts."""
    from vtprune.evals.tasks.metrics import METRICS
    from vtprune.evals.tasks.sample import Sample

    metric = METRICS["yesno_f1"]
    truth = ["yes", "yes", "no", "no", "yes", "no"]
    said = {DENSE: ["yes", "yes", "no", "yes", "yes", "no"], DIVPRUNE: ["yes", "no", "no", "yes", "no", "no"]}
    samples = [Sample(str(i), "t", "?", answers=(answer,), metric="yesno_f1") for i, answer in enumerate(truth)]
    answers = {
        cell: [results.line(s.id, a, list(metric.parts(a, s))) for s, a in zip(samples, answered)]
        for cell, answered in said.items()
    }
    summary = summarise(results.write(tmp_path, {"t": ("yesno_f1", answers)}))
    dense, pruned = row_of(summary, "dense", keep=None), row_of(summary, "divprune")
    assert dense["score"] == pytest.approx(6 / 7, abs=1e-6)  # 3 hits, 1 false alarm
    assert pruned["score"] == pytest.approx(2 / 5, abs=1e-6)  # 1 hit, 1 false alarm, 2 misses
    assert pruned["relative"] == pytest.approx(pruned["score"] / dense["score"], abs=1e-5)


def slow(dense: np.ndarray, pruned: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ratios of means over resampled pairs, one resample at a time."""
    found = []
    for _ in range(4000):
        drawn = rng.integers(len(dense), size=len(dense))
        found.append(pruned[drawn].mean() / dense[drawn].mean())
    return np.percentile(found, [2.5, 97.5])


def test_the_interval_is_that_of_a_slow_bootstrap(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    dense = (rng.random(200) < 0.8).astype(float)
    pruned = np.where(rng.random(200) < 0.1, 0.0, dense)
    answers = {DENSE: marked(dense.tolist()), DIVPRUNE: marked(pruned.tolist())}
    row = row_of(summarise(results.write(tmp_path, {"t": ("exact", answers)})), "divprune")
    assert [row["low"], row["high"]] == pytest.approx(slow(dense, pruned, rng).tolist(), abs=0.008)
    unpaired = rng.permutation(pruned)
    assert np.ptp(slow(dense, unpaired, rng)) > 1.5 * (row["high"] - row["low"]), "pairs are what makes it narrow"


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(6)
    inside, runs = 0, 300
    for _ in range(runs):
        dense = (rng.random(150) < 0.8).astype(float)
        pruned = dense * (rng.random(150) < 0.9)
        draws = resampled(np.stack([dense, pruned])[..., None], rng, 400)[..., 0]
        low, high = interval(draws[:, 1] / draws[:, 0])
        assert low is not None
        assert high is not None
        inside += low <= 0.9 <= high
    assert 0.91 <= inside / runs <= 0.98


def test_one_resample_serves_all_ways() -> None:
    marks = np.random.default_rng(0).random((1, 50, 2)).repeat(3, axis=0)
    draws = resampled(marks, np.random.default_rng(1), 250)
    assert draws.shape == (250, 3, 2)
    assert (draws[:, 0] == draws[:, 1]).all()
    assert draws[:, 0].mean(0) == pytest.approx(marks[0].mean(0), abs=0.02)


def test_draws_of_random_are_averaged_sample_by_sample(tmp_path: Path) -> None:
    seeds = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]]
    answers = {DENSE: marked([1, 1, 1, 0]), **{cell: marked(m) for cell, m in zip(RANDOM, seeds)}}
    row = row_of(summarise(results.write(tmp_path, {"t": ("exact", answers)})), "random")
    assert row["seeds"] == 3
    assert row["score"] == pytest.approx(5 / 12, abs=1e-6)
    assert row["agreement"] == pytest.approx((1 + 1 / 3 + 0 + 2 / 3) / 4, abs=1e-6)


@pytest.mark.parametrize(("share", "beats"), [(0.9, True), (0.5, False)])
def test_whether_a_method_beats_random_is_said(tmp_path: Path, share: float, beats: bool) -> None:
    rng = np.random.default_rng(7)
    chance = {DENSE: 1.0, DIVPRUNE: share, **dict.fromkeys(RANDOM, 0.5)}
    answers = {cell: marked((rng.random(200) < p).astype(float).tolist()) for cell, p in chance.items()}
    summary = summarise(results.write(tmp_path, {"t": ("exact", answers)}))
    assert row_of(summary, "divprune")["beats_random"] is beats
    assert row_of(summary, "random")["beats_random"] is None
    told = [note for note in summary.notes if note.startswith("`divprune` at 25 % does not beat random")]
    assert len(told) == (0 if beats else 1)
    if told:
        assert "beyond noise on t (difference" in told[0]
        assert "95 % interval" in told[0]


def test_a_method_without_random_beside_it_is_not_judged(tmp_path: Path) -> None:
    at_half = MADE["random", 0.5, 0]
    answers = {DENSE: marked([1, 1]), DIVPRUNE: marked([0, 0]), at_half: marked([1, 1])}
    assert row_of(summarise(results.write(tmp_path, {"t": ("exact", answers)})), "divprune")["beats_random"] is None


def test_all_tokens_are_not_compared_with_random(tmp_path: Path) -> None:
    """At keep=1.0 nothing is pruned, so there is nothing to beat."""
    answers = dict.fromkeys([DENSE, *cells(["divprune"], [1.0, 0.5], seeds=1)], marked([1, 1, 0]))
    summary = summarise(results.write(tmp_path, {"t": ("exact", answers)}))
    assert [row_of(summary, "divprune", keep=keep)["beats_random"] for keep in (1.0, 0.5)] == [None, False]
    assert not any("at 100 %" in note for note in summary.notes)


def test_without_labels_the_score_is_agreement(tmp_path: Path) -> None:
    dense = [results.line(i, text) for i, text in enumerate(["A cat.", "two", "red", "no"])]
    pruned = [results.line(i, text) for i, text in enumerate(["the cat", "2", "blue", "no"])]
    folder = results.write(tmp_path, {"t": ("agreement", {DENSE: dense, DIVPRUNE: pruned})})
    summary = summarise(folder)
    row = row_of(summary, "divprune")
    assert (row["score"], row["relative"], row["agreement"]) == (0.75, 0.75, 0.75)
    assert row_of(summary, "dense", keep=None)["score"] == 1
    assert row["low"] < 0.75 < row["high"]
    assert any("t has no labels" in note for note in summary.notes)


@pytest.mark.parametrize("parts", [True, False], ids=["parts that do not add up to it", "no parts"])
def test_a_sum_of_a_harness_has_no_interval(tmp_path: Path, parts: bool) -> None:
    marks = [1.0, 0.0, 1.0]
    lines = marked(marks) if parts else [results.line(i, "yes") for i in range(3)]
    scores = {("t", DENSE): 1500.0, ("t", DIVPRUNE): 1200.0}
    summary = summarise(results.write(tmp_path, {"t": ("mme_score", {DENSE: lines, DIVPRUNE: lines})}, scores))
    row = row_of(summary, "divprune")
    assert (row["score"], row["relative"], row["delta"]) == (1200, 0.8, -300)
    assert row["low"] is row["high"] is row["delta_low"] is None
    assert any("t (mme_score)" in note and "no intervals" in note for note in summary.notes)
    assert row_of(summary, "divprune", "mean")["relative"] == 0.8


def test_the_mean_over_tasks_is_that_of_relative_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    few, many = (rng.random(n) < 0.8 for n in (40, 400))
    tasks: dict[str, Any] = {
        name: ("exact", {DENSE: marked(m.tolist()), DIVPRUNE: marked((m & (rng.random(len(m)) < 0.9)).tolist())})
        for name, m in (("a", few), ("b", many))
    }
    summary = summarise(results.write(tmp_path, tasks))
    a, b, mean = (row_of(summary, "divprune", name) for name in ("a", "b", "mean"))
    assert mean["relative"] == pytest.approx((a["relative"] + b["relative"]) / 2, abs=1e-6)
    assert mean["n"] == 440
    widths = [(row["high"] - row["low"]) for row in (a, b, mean)]
    assert widths[2] == pytest.approx(np.hypot(widths[0], widths[1]) / 2, rel=0.15), "tasks are drawn independently"


def test_what_is_not_finished_is_named_and_counts_for_nothing(tmp_path: Path) -> None:
    fastv, half = MADE["fastv", 0.25, None], MADE["divprune", 0.5, None]
    whole: dict[Cell, Any] = {DENSE: marked([1, 1]), DIVPRUNE: marked([1, 0])}
    tasks: dict[str, Any] = {
        "a": ("exact", {**whole, fastv: "out of memory", half: None}),
        "b": ("exact", {**whole, fastv: marked([1, 1])}),
    }
    folder = results.write(tmp_path, tasks)
    list(folder.append("a", half.name, marked([1])))
    summary = summarise(folder)
    assert not [row for row in summary.rows if (row["method"], row["task"]) == ("fastv", "a")]
    assert not [row for row in summary.rows if (row["method"], row["task"]) == ("fastv", "mean")]
    assert row_of(summary, "fastv", "b")["relative"] == 1
    assert "fastv at 25 % failed on a and is in no row: out of memory" in summary.notes
    assert "divprune at 50 % is not finished on a (1 of 2 answers) and is in no row." in summary.notes
    assert "fastv at 25 % has no mean: it is not finished on a." in summary.notes


def test_without_dense_nothing_is_relative(tmp_path: Path) -> None:
    answers: Any = {DENSE: "no network", DIVPRUNE: marked([1, 0])}
    summary = summarise(results.write(tmp_path, {"t": ("exact", answers)}))
    row = row_of(summary, "divprune")
    assert (row["score"], row["relative"], row["agreement"]) == (0.5, None, None)
    assert "t has no finished dense cell, so nothing is relative to it." in summary.notes


def test_a_dense_score_of_nothing_has_no_ratio(tmp_path: Path) -> None:
    answers = {DENSE: marked([0, 0]), DIVPRUNE: marked([1, 0])}
    summary = summarise(results.write(tmp_path, {"t": ("exact", answers)}))
    row = row_of(summary, "divprune")
    assert (row["relative"], row["low"], row["delta"]) == (None, None, 0.5)
    assert any("scores 0 on t" in note for note in summary.notes)


def test_a_ratio_that_some_resamples_cannot_have_has_no_interval(tmp_path: Path) -> None:
    answers = {DENSE: marked([1, 0, 0]), DIVPRUNE: marked([1, 1, 0])}
    row = row_of(summarise(results.write(tmp_path, {"t": ("exact", answers)})), "divprune")
    assert row["relative"] == 2
    assert row["low"] is row["high"] is None
    assert row["delta_low"] < row["delta_high"]


@pytest.mark.parametrize(("n", "told"), [(29, True), (30, False)])
def test_few_samples_are_noted(tmp_path: Path, n: int, told: bool) -> None:
    summary = summarise(results.write(tmp_path, {"t": ("exact", {DENSE: marked([1] * n)})}))
    assert any(f"t has {n} samples only" in note for note in summary.notes) is told


def test_cells_on_other_samples_are_refused(tmp_path: Path) -> None:
    answers = {DENSE: marked([1, 1]), DIVPRUNE: marked([1, 1, 1])}
    with pytest.raises(ValueError, match=r"divprune at 25 % does not answer the same samples of t .* delete"):
        summarise(results.write(tmp_path, {"t": ("exact", answers)}))


def test_lines_in_another_order_are_the_same(tmp_path: Path) -> None:
    lines = marked([1, 1, 0, 0])
    summary = summarise(results.write(tmp_path, {"t": ("exact", {DENSE: lines, DIVPRUNE: lines[::-1]})}))
    assert row_of(summary, "divprune")["agreement"] == 1
    assert row_of(summary, "divprune")["delta_low"] == 0


def test_times_are_medians_without_the_first_sample(tmp_path: Path) -> None:
    def lines(ttft: list[float], select: float) -> list[dict[str, Any]]:
        return [
            results.line(i, "yes", [1], seconds={"ttft": t, "prefill": t / 2, "encode": 0.01, "select": select})
            for i, t in enumerate(ttft)
        ]

    answers = {DENSE: lines([9, 0.08, 0.12, 0.08, 0.12], 0), DIVPRUNE: lines([9, 0.04, 0.05, 0.05, 0.05], 0.005)}
    summary = summarise(results.write(tmp_path, {"t": ("exact", answers)}))
    dense, pruned = summary.timing.rows[:2]
    assert (dense["ttft_ms"], pruned["ttft_ms"], pruned["prefill_ms"]) == (100, 50, 25)
    assert (pruned["speedup"], pruned["select_share"], pruned["peak_mib"]) == (2, 0.1, 12.5)
    assert dense["speedup"] == 1
    assert [row["task"] for row in summary.timing.rows] == ["t", "t", "mean", "mean"]
    assert summary.timing.rows[3]["speedup"] == 2


def test_of_three_samples_all_are_timed(tmp_path: Path) -> None:
    lines = [results.line(i, "yes", [1], seconds={"ttft": t}) for i, t in enumerate([0.3, 0.1, 0.4])]
    summary = summarise(results.write(tmp_path, {"t": ("exact", {DENSE: lines})}))
    assert summary.timing.rows[0]["ttft_ms"] == 300
    assert summary.timing.rows[0]["prefill_ms"] is None


def test_times_that_were_not_measured_are_missing(tmp_path: Path) -> None:
    answers = {DENSE: marked([1, 1]), DIVPRUNE: marked([1, 1])}
    summary = summarise(results.write(tmp_path, {"t": ("exact", answers)}))
    assert summary.timing.rows[1]["ttft_ms"] is None
    assert summary.timing.rows[1]["speedup"] is None


def test_files_are_the_same_each_time_and_hold_no_machine(tmp_path: Path) -> None:
    first, second = results.example(tmp_path / "a", n=12), results.example(tmp_path / "b", n=12)
    other = {**second.document(), "environment": {**results.ENVIRONMENT, "cpu": "another CPU"}}
    (second.path / "run.json").write_text(json.dumps(other))
    for folder in (first, second):
        summarise(folder).write(folder)
    texts = [(folder.path / "eval.json").read_bytes() for folder in (first, second)]
    assert texts[0] == texts[1]
    assert set(json.loads(texts[0])) == {"schema", "version", "title", "rows", "notes"}
    assert json.loads((second.path / "timing.json").read_text())["environment"]["cpu"] == "another CPU"
    assert summarise(first).to_json() + "\n" == texts[0].decode()
    assert "| color | divprune | 25 % |" in (first.path / "eval.md").read_text()


def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    summary = summarise(results.example(tmp_path, n=12))
    console = Console(width=120)
    with console.capture() as got:
        console.print(summary.to_table())
    lines = got.get().splitlines()
    assert max(map(len, lines)) <= 120
    assert all(one in got.get() for one in ("color", "visionzip", "11 %", "TTFT"))
    assert "…" not in got.get(), "no cell is cut off"


def test_a_table_of_one_task_does_not_repeat_it_as_a_mean(tmp_path: Path) -> None:
    summary = summarise(results.write(tmp_path, {"t": ("exact", {DENSE: marked([1, 1])})}))
    assert [row["task"] for row in summary.rows] == ["t", "mean"]
    assert [line[0] for line in summary.cells()[1]] == ["t"]


def test_a_limit_is_noted(tmp_path: Path) -> None:
    folder = results.write(tmp_path, {"t": ("exact", {DENSE: marked([1])})}, settings={"limit": 1})
    assert any("first 1 samples" in note for note in summarise(folder).notes)


def test_a_folder_that_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no evaluation"):
        summarise(ResultFolder(tmp_path))
