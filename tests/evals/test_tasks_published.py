"""Presets of the published protocols, and the figures of others: with a source each, and never under our name."""

from __future__ import annotations

import pytest

import vtprune
from vtprune.evals.tasks.published import FIGURES, PRESETS, TITLE, figures_for, preset_of, published


def test_budgets_are_those_of_the_papers() -> None:
    assert {name: preset.keeps for name, preset in PRESETS.items()} == {
        "llava-1.5": (192, 128, 64), "llava-next": (640, 320, 160), "video": (0.25, 0.2, 0.15, 0.1),
    }  # fmt: skip
    for preset in PRESETS.values():
        assert len(preset.tasks) == len(set(preset.tasks)) >= 5
        assert preset.models


def test_every_figure_has_a_method_a_source_and_a_label() -> None:
    papers = {cls.name: cls.paper for cls in vtprune.methods()}
    labels = {"paper", "abstract", "README", "repository", "project page", "secondary"}
    for figure in FIGURES:
        assert figure.preset in PRESETS
        assert figure.method in papers
        assert figure.how in labels
        assert figure.kept
        assert figure.row["source"] == papers[figure.by]
        assert 80 < figure.row["relative"] < 105
    keys = [(f.preset, f.method, f.model, f.kept, f.benchmark, f.by) for f in FIGURES]
    assert len(keys) == len(set(keys)), "no figure stands there twice"


def test_a_figure_as_a_row() -> None:
    rows = figures_for("video", ["vidcom2:frames=1", "random"])
    first = next(
        r for r in rows if r["model"] == "LLaVA-OneVision-7B" and r["benchmark"] == "MLVU" and r["kept"] == "15 %"
    )
    assert first == {
        "method": "vidcom2", "model": "LLaVA-OneVision-7B", "kept": "15 %", "benchmark": "MLVU", "value": 58.9,
        "dense": 63.0, "relative": 93.5, "how": "project page", "source": "https://arxiv.org/abs/2505.14454",
    }  # fmt: skip
    assert {row["method"] for row in rows} == {"vidcom2"}


def test_a_figure_that_another_paper_published_names_that_paper() -> None:
    rows = [row for row in figures_for("video", ["fastvid"]) if row["benchmark"] == "MVBench"]
    assert [row["source"] for row in rows] == [vtprune.registry.get("holitom").paper]
    (divprune,) = [row for row in figures_for("llava-1.5", ["divprune"]) if row["benchmark"] == "POPE F1"]
    assert divprune["how"] == "secondary"
    assert (divprune["value"], divprune["dense"], divprune["relative"]) == (None, None, 100.18)


def test_the_table_says_that_the_figures_are_not_ours() -> None:
    report = published("llava-next", ["divprune", "todre"])
    assert report.title == f"{TITLE}: llava-next" == "Published by others; not measured here: llava-next"
    assert "| divprune | LLaVA-NeXT-7B | 25 % |" in report.to_markdown()
    assert report.environment == {}
    assert published("llava-next", ["uniform"]).rows == []
    assert published("llava-next", ["uniform"]).to_markdown()


def test_an_unknown_preset_is_refused() -> None:
    for call in (preset_of, lambda name: figures_for(name, [])):
        with pytest.raises(ValueError, match=r"no preset is called 'llava': choose from llava-1\.5, llava-next, video"):
            call("llava")
