"""Own data: what is read from every kind of file, what is refused and in which words, and the example to begin from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.evals.tasks import data, template
from vtprune.evals.tasks.metrics import METRICS
from vtprune.evals.tasks.sample import Sample, by_task
from vtprune.evals.toys import image as tiny
from vtprune.evals.toys import video as tiny_video

runner = CliRunner()
Row = dict[str, Any]
ASK = {"question": "what is it ?", "image": "a.png"}
CAT = {**ASK, "answer": "cat"}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("example")
    template.write(folder)
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows, or lines as they are, beside a picture a.png."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")

    def write(*rows: Row | str, name: str = "own.jsonl") -> Path:
        text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(text), encoding="utf-8")
        return tmp_path / name

    return write


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it says is compared by the caller
        data.read(path, **options)
    return str(error.value)


def two_hundred(folder: Path) -> list[Row]:
    """Questions of the toys on real files: 199 about pictures, and one about a clip."""
    (folder / "images").mkdir()
    rows: list[Row] = []
    for question in tiny.questions(per_capability=20)[:199]:
        name = f"images/{question.image_id}.png"
        question.image.save(folder / name)
        rows.append({"question": question.prompt, "image": name, "answer": question.answer, "id": f"q{len(rows)}"})
        rows[-1]["task"] = question.capability
    return [*rows, {"question": "which color came first ?", "video": "clip.mp4", "answer": "red", "task": "clips"}]


def unplaced(samples: list[Sample]) -> list[Sample]:
    """Without the names of lines and rows, which differ."""
    return [replace(sample, where="") for sample in samples]


def test_200_samples_are_the_same_from_every_kind_of_file(tmp_path: Path, example: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = two_hundred(tmp_path)
    (tmp_path / "clip.mp4").write_bytes((example / "clip.mp4").read_bytes())
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.json").write_text(json.dumps(rows))
    # Arrow fills columns that a row lacks with null; that the last id is missing there has to change nothing either.
    parquet.write_table(pyarrow.Table.from_pylist(rows, _schema(pyarrow)), tmp_path / "own.parquet")
    samples = data.read(tmp_path / "own.jsonl", frames=16)
    assert len(samples) == 200
    assert [s.id for s in samples[-2:]] == ["q198", "200"]
    assert unplaced(data.read(tmp_path / "own.json", frames=16)) == unplaced(samples)
    assert unplaced(data.read(tmp_path / "own.parquet", frames=16)) == unplaced(samples)
    assert np.array_equal(samples[0].pictures[0], tiny.questions(per_capability=20)[0].image)
    film = samples[-1].film
    assert film is not None
    clip = tiny_video.questions(per_capability=1)[0].video.frames
    off = [np.abs(film.frames.astype(int) - frames).mean() for frames in (clip, clip[::-1])]
    assert off[0] < off[1] / 2, "the clip, in order, but for its compression"
    metrics = {task: group[0].metric for task, group in by_task(samples).items()}
    assert metrics["exist"] == metrics["relation"] == "yesno_f1"
    assert metrics["color"] == metrics["clips"] == "exact"


def _schema(pyarrow: Any) -> Any:
    return pyarrow.schema([(name, pyarrow.string()) for name in ("question", "image", "video", "answer", "id", "task")])


def test_a_saved_dataset_gives_the_same(tmp_path: Path, example: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = two_hundred(tmp_path)
    (tmp_path / "clip.mp4").write_bytes((example / "clip.mp4").read_bytes())
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = sorted({name for row in rows for name in row})
    made = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    made.save_to_disk(tmp_path / "own")
    assert unplaced(data.read(tmp_path / "own")) == unplaced(data.read(tmp_path / "own.jsonl"))
    encoded = [{"bytes": (tmp_path / row["image"]).read_bytes(), "path": "x.png"} for row in rows[:3]]
    features = datasets.Features(question=datasets.Value("string"), image=datasets.Image())
    pictures = datasets.Dataset.from_dict({"question": ["what ?"] * 3, "image": encoded}, features)
    pictures.save_to_disk(tmp_path / "pictures")
    assert [s.images for s in data.read(tmp_path / "pictures")] == [(row["bytes"],) for row in encoded]
    assert data.digest(tmp_path / "pictures") != data.digest(tmp_path / "own")
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "splits")
    assert "several splits: name the folder of one of them, train, test" in refused(tmp_path / "splits")


def test_parquet_may_hold_pictures_and_films_themselves(tmp_path: Path, example: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture, clip = (example / "images" / "color-0.png").read_bytes(), (example / "clip.mp4").read_bytes()
    struct = [{"bytes": picture, "path": None}, {"bytes": None, "path": str(example / "images" / "color-1.png")}]
    tables = {
        "raw": {"image": [picture, picture]},
        "struct": {"image": struct},
        "lists": {"images": [[struct[0], struct[1]], [struct[0]]]},
        "films": {"video": [clip, clip]},
    }
    read = {}
    for name, columns in tables.items():
        table = pyarrow.table({"question": ["what ?"] * 2, **columns})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        read[name] = data.read(tmp_path / f"{name}.parquet")
    second = example / "images" / "color-1.png"
    assert [s.images for s in read["raw"]] == [(picture,), (picture,)]
    assert [s.images for s in read["struct"]] == [(picture,), (second,)]
    assert [s.images for s in read["lists"]] == [(picture, second), (picture,)]
    assert np.array_equal(read["raw"][0].pictures[0], Image.open(example / "images" / "color-0.png"))
    film = read["films"][0].film
    assert film is not None
    assert film.frames.shape == (8, 48, 48, 3)


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        ([{"options": ["cat", "dog"], "answer": 1}, {"options": ["cat", "dog"], "answer": "A"}], "choice"),
        ([{"answer": "yes"}, {"answer": "No"}], "yesno_f1"),
        ([{"answer": "yes"}, {"answer": "red"}], "exact"),
        ([{"answers": ["yes"]}, {"answers": ["no"]}], "yesno_f1"),
        ([{"answers": ["yes", "no"]}, {"answers": ["no"]}], "vqa"),
        ([{}, {}], "agreement"),
        ([{"answer": ""}, {"answers": []}], "agreement"),
        ([{"options": ["cat", "dog"]}, {}], "agreement"),
        ([{"answer": "1"}, {"answer": "2", "metric": "relaxed"}], "relaxed"),
        ([{"answer": 3, "metric": "anls"}, {"answer": 2.5, "metric": "anls"}], "anls"),
        ([{"answer": "red", "metric": "agreement"}, {"metric": "agreement", "answer": "blue"}], "agreement"),
    ],
)
def test_the_metric_of_a_task(rows: list[Row], metric: str, lines: Callable[..., Path]) -> None:
    assert [s.metric for s in data.read(lines(*({**ASK, **row} for row in rows)))] == [metric] * 2


def test_a_metric_that_is_asked_for_goes_before_the_file(lines: Callable[..., Path]) -> None:
    path = lines({**CAT, "metric": "anls"}, {**CAT, "task": "other"})
    assert [s.metric for s in data.read(path, metric="relaxed")] == ["relaxed"] * 2
    assert "metric 'bleu' is unknown: choose from exact, relaxed" in refused(path, metric="bleu")


def test_values_become_text_and_names_have_defaults(lines: Callable[..., Path], tmp_path: Path) -> None:
    path = lines({**ASK, "answer": 3.0}, "", {**ASK, "answer": 2.5, "id": 7}, {**ASK, "answers": [1, " two "]})
    one, two, three = data.read(path)
    assert (one.id, one.task, one.answers, one.where) == ("1", "own", ("3",), f"{path}, line 1")
    assert (two.id, two.answers, two.where) == ("7", ("2.5",), f"{path}, line 3")
    assert (three.answers, three.images) == (("1", "two"), (tmp_path / "a.png",))


@pytest.mark.parametrize("answer", ["B", "b", "dog", 1, "1"])
def test_the_answer_of_a_choice_becomes_its_letter(answer: str | int, lines: Callable[..., Path]) -> None:
    (sample,) = data.read(lines({**ASK, "choices": ["cat", "dog"], "answer": answer}))
    assert (sample.answers, sample.options) == (("B",), ("cat", "dog"))


def test_the_limit_counts_for_every_task_and_keeps_order_and_metric(lines: Callable[..., Path]) -> None:
    answers = [("a", "yes"), ("b", "red"), ("a", "no"), ("a", "red"), ("b", "blue")]
    path = lines(*({**ASK, "task": task, "answer": answer} for task, answer in answers))
    found = data.read(path, limit=2)
    assert [(s.task, s.id, s.metric) for s in found] == [
        ("a", "1", "exact"), ("b", "2", "exact"), ("a", "3", "exact"), ("b", "5", "exact"),
    ]  # fmt: skip
    assert len(data.read(path, limit=9)) == 5
    assert "limit=0 must be at least 1" in refused(path, limit=0)
    assert "frames=0 must be at least 1" in refused(path, frames=0)


BAD = {
    "line 2 is no JSON (Expecting value at column 1)": [CAT, "no"],
    "line 1 is no JSON object": ["[1]"],
    "is empty: give it at least one question": [""],
    "line 1: unknown column img; the known ones are id, task, question, image, images, video,": [{**CAT, "img": "x"}],
    "line 2: unknown columns x, y;": [CAT, {**CAT, "x": 1, "y": 2}],
    "line 2: there is no image file ": [CAT, {**CAT, "image": "none.png"}],
    "none.png, the first of 3 missing files": [CAT, {**CAT, "images": ["none.png", "no.png"]} | {"image": None}]
    + [{"question": "?", "video": "no.mp4", "answer": "x"}],
    "line 1: there is no video file ": [{"question": "?", "video": "no.mp4"}],
    "line 1: there is no image file": [{**CAT, "image": "."}],
    "line 2: it has no answer, as 2 of the 3 samples of the task 'own'": [CAT, ASK, {**ASK, "answer": " "}],
    "line 1: one of its 2 answers is empty": [{**ASK, "answers": ["cat", ""]}],
    "line 3: the id 'x' is that of ": [{**CAT, "id": "x"}, CAT, {**CAT, "id": "x"}],
    "line 2: the id '1' is that of ": [CAT, {**CAT, "id": 1}],
    "line 1: it has both image and video": [{**CAT, "video": "a.mp4"}],
    "line 1: it has both image and images, two names of one column": [{**CAT, "images": ["a.png"]}],
    "line 1: it has both answer and answers": [{**CAT, "answers": ["a"]}],
    "line 1: video holds a list": [{"question": "?", "video": ["a.mp4"]}],
    "line 1: image is empty: give the path": [{**CAT, "image": ""}],
    "line 1: image is a int": [{**CAT, "image": 3}],
    "line 1: there is no question": [{"image": "a.png", "answer": "x"}],
    "line 2: there is no question": [CAT, {**CAT, "question": " "}],
    "line 1: it has neither an image nor a video": [{"question": "?", "answer": "x"}],
    "line 1: metric 'bleu' is unknown: choose from exact, relaxed, vqa, anls, choice, yesno_f1, agreement":
        [{**CAT, "metric": "bleu"}],
    "line 2: the metric exact and, at ": [{**CAT, "metric": "vqa"}, {**CAT, "metric": "exact"}],
    "line 1: the metric exact needs an answer": [{**ASK, "metric": "exact"}],
    "line 1: it has no options, and its metric is choice": [{**CAT, "metric": "choice"}],
    "line 1: it has options, and its metric is exact": [{**CAT, "options": ["a", "cat"], "metric": "exact"}],
    "line 2: it has no options, and its metric is choice": [{**CAT, "options": ["a", "cat"]}, CAT],
    "line 1: the answer 'cat' is no option: give a letter from A to B": [{**CAT, "options": ["fox", "dog"]}],
    "line 1: it has 2 answers, and a multiple choice": [{**ASK, "answers": ["A", "B"], "options": ["fox", "dog"]}],
    "line 1: options has 1 of them": [{**CAT, "options": ["cat"]}],
    "line 1: options ['cat', 'cat'] has an empty or a double one": [{**CAT, "options": ["cat", "cat"]}],
    "line 1: choices is 'cat': write a list": [{**CAT, "choices": "cat"}],
    "line 1: the metric yesno_f1 needs one answer, yes or no, and not cat": [{**CAT, "metric": "yesno_f1"}],
    "line 1: answer is true: write it as text": [{**ASK, "answer": True}],
    "line 1: answer is or holds something of type dict": [{**ASK, "answer": {"text": "cat"}}],
    "line 1: answers is or holds something empty": [{**ASK, "answers": ["cat", None]}],
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_what_is_wrong_is_told_with_file_and_line(said: str, lines: Callable[..., Path]) -> None:
    path = lines(*BAD[said])
    told = refused(path)
    assert f"{path}{'' if said.startswith('is empty') else ', '}" in told
    assert said in told


def test_what_is_no_data_file(tmp_path: Path, lines: Callable[..., Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.jsonl"):
        data.read(tmp_path / "none.jsonl")
    assert "ends in '.csv'" in refused(lines(CAT, name="own.csv"))
    assert "holds no saved dataset" in refused(tmp_path)
    assert "holds no list" in refused(lines(CAT, name="own.json"))
    assert "own.json, line 2 is no JSON" in refused(lines("[", "x]", name="own.json"))
    assert "own.json, item 2: there is no question" in refused(
        lines(json.dumps([CAT, {"image": "a.png"}]), name="own.json")
    )
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    assert "is not text in UTF-8 (byte 14)" in refused(tmp_path / "latin.jsonl")
    pytest.importorskip("pyarrow")
    assert "cannot be read as parquet" in refused(lines(CAT, name="own.parquet"))


def test_a_byte_order_mark_and_separators_of_unicode_are_no_trouble(tmp_path: Path, lines: Callable[..., Path]) -> None:
    path = lines(json.dumps({**ASK, "answer": "a\u2028b"}, ensure_ascii=False), CAT)
    path.write_text("\ufeff" + path.read_text(encoding="utf-8").replace("\n", "\r\n"), encoding="utf-8", newline="")
    assert [s.answers for s in data.read(path)] == [("a\u2028b",), ("cat",)]


@pytest.mark.parametrize(
    ("name", "package"), [("own.parquet", "pyarrow"), ("saved", "datasets"), ("own.jsonl", "rapidfuzz")]
)
def test_a_missing_package_is_named(
    name: str, package: str, tmp_path: Path, lines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines({**CAT, "metric": "anls"})
    (tmp_path / "own.parquet").write_text("")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}, which is not installed: run pip install {package}"):
        data.read(tmp_path / name)


def test_the_digest_changes_with_the_data_and_not_with_the_place(tmp_path: Path, lines: Callable[..., Path]) -> None:
    path = lines(CAT)
    first = data.digest(path)
    assert len(first) == 64
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("own.jsonl", "a.png"):
        (moved / name).write_bytes((tmp_path / name).read_bytes())
    assert data.digest(moved / "own.jsonl") == first
    (moved / "a.png").write_bytes(b"longer" + (moved / "a.png").read_bytes())
    assert data.digest(moved / "own.jsonl") != first, "the size of a picture counts"
    assert data.digest(lines({**CAT, "answer": "dog"})) != first


def test_the_example_covers_every_metric_with_real_files(example: Path) -> None:
    samples = data.read(example / "data.jsonl")
    assert {s.metric for s in samples} == {*METRICS, data.AGREEMENT}
    assert 8 <= len(samples) <= 12
    assert all(s.pictures[0].size == (64, 64) for s in samples)
    (clip, other) = data.read(example / "video.jsonl", frames=16)
    assert clip.film is not None
    assert clip.film.frames.shape == (16, 48, 48, 3)
    assert (clip.metric, other.metric) == ("exact", "yesno_f1")
    text = (example / "README.md").read_text()
    for name in (
        *data.NAMES,
        "question",
        "image",
        "images",
        "video",
        "answer",
        "answers",
        "options",
        "choices",
        "task",
    ):
        assert f"`{name}`" in text


def test_the_embedded_models_answer_the_example(example: Path) -> None:
    """They know its words, and most of their answers are right by the metric of the task."""
    model, processor = tiny.load()
    marks = []
    for sample in data.read(example / "data.jsonl"):
        assert processor.tokenizer.unk_token_id not in processor.tokenizer(sample.question)["input_ids"]
        if sample.answers and not sample.options:
            prompt = f"<s> <image> {sample.question} answer:"
            marks.append(_mark(model, processor, processor(sample.pictures, prompt, return_tensors="pt"), sample))
    assert np.mean(marks) > 0.6


def test_the_embedded_model_of_clips_answers_the_example(example: Path) -> None:
    pytest.importorskip("torchvision")
    model, processor = tiny_video.load()
    for sample in data.read(example / "video.jsonl", frames=16):
        assert sample.film is not None
        prompt = f"<s> <|vision_start|> <|video_pad|> <|vision_end|> {sample.question} answer:"
        film, told = [sample.film.frames], [sample.film.metadata]
        inputs = processor(videos=film, video_metadata=told, text=[prompt], return_tensors="pt")
        assert _mark(model, processor, inputs, sample) == 1


def _mark(model: Any, processor: Any, inputs: Any, sample: Sample) -> float:
    ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    metric = METRICS[sample.metric]
    return metric.parts(processor.decode(ids, skip_special_tokens=True), sample)[metric.first]


def test_template_writes_once_and_again_only_by_force(tmp_path: Path) -> None:
    pytest.importorskip("av")
    folder = tmp_path / "new" / "own"
    result = runner.invoke(app, ["template", str(folder)])
    assert result.exit_code == 0, result.output
    assert f"vtprune eval --data {folder / 'data.jsonl'}" in result.stdout
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len(before) == 14
    (folder / "README.md").write_text("mine")
    (folder / "mine.txt").write_text("mine")
    refusal = runner.invoke(app, ["template", str(folder)])
    assert refusal.exit_code == 2
    assert "is there already: name another folder, or write over it with --force" in refusal.stderr
    assert (folder / "README.md").read_text() == "mine"
    assert runner.invoke(app, ["template", str(folder), "--force"]).exit_code == 0
    film = folder / "clip.mp4"  # an encoder does not always write the same bytes
    assert {p: p.read_bytes() for p in before if p != film} == {p: before[p] for p in before if p != film}
    assert film.stat().st_size > 1000
    assert (folder / "mine.txt").exists()


def test_template_refuses_a_file_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, ["template", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "is a file: name a folder" in result.stderr
    monkeypatch.setitem(sys.modules, "av", None)
    result = runner.invoke(app, ["template", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert "pip install av" in result.stderr
    assert not (tmp_path / "new").exists()
