"""The command line: every command, its JSON, its files, and one clear sentence on bad input."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import vtprune
from vtprune import pictures
from vtprune.cli import app, parse_keep, parse_keeps
from vtprune.evals import accuracy, models
from vtprune.evals.report import Report
from vtprune.evals.toys import image as tiny

runner = CliRunner()


def run(*args: object) -> str:
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "picture.png"
    Image.new("RGB", (80, 60), (200, 30, 30)).save(path)
    return path


def test_methods_lists_every_method_with_its_paper() -> None:
    table = run("methods")
    found = json.loads(run("methods", "--json"))["methods"]
    assert [row["name"] for row in found] == [cls.name for cls in vtprune.methods()]
    for row in found:
        assert row["name"] in table
        assert row["paper"].startswith("https://")
        assert row["seam"] in ("pre_llm", "in_llm", "in_vit")


def test_eval_prints_a_table_or_json_and_writes_files(tmp_path: Path) -> None:
    some = ["eval", "--method", "divprune", "--keep", "25%", "--limit", 3, "--capability", "color", "--seeds", 1]
    out = run(*some, "--out", tmp_path)
    for name in ("dense", "blind-zero", "random", "uniform", "divprune"):
        assert name in out
    assert {p.name for p in tmp_path.iterdir()} == {"eval.json", "eval.md", "pareto.png"}
    read = json.loads(run(*some, "--json"))
    assert {row["method"] for row in read["rows"]} >= {"dense", "random", "uniform", "divprune"}
    assert {row["keep"] for row in read["rows"]} == {1.0, 0.25}


def test_demo_ends_with_table_plot_and_overlay(tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", "--limit", "2", "--keep", "0.11", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "A toy" in result.output
    for name in ("demo.json", "pareto.png", "overlay.png"):
        assert f"wrote {tmp_path / name}" in " ".join(result.stdout.split())
        assert (tmp_path / name).stat().st_size > 1000
    for name in ("auto", "divprune", "visionzip", "fastv", "pyramiddrop", "tome", "random", "uniform"):
        assert name in result.stdout
    assert Image.open(tmp_path / "overlay.png").width <= 1600


def test_bench_writes_one_file_a_run(tmp_path: Path) -> None:
    some = ["bench", "--geometry", "tiny", "--method", "divprune", "--keep", "64", "--repeats", 1, "--new-tokens", 1]
    out = run(*some, "--out", tmp_path)
    assert "FLOPs = 2 x MAC" in " ".join(out.split())
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["rows"][1]["kept_by_layer"] == [64] * 6
    read = json.loads(run(*some, "--out", tmp_path, "--json"))
    assert [row["method"] for row in read["rows"]] == ["dense", "divprune"]


def test_show_draws_the_kept_tokens(picture: Path, tmp_path: Path) -> None:
    out = run("show", picture, "--method", "uniform", "--keep", 16, "--out", tmp_path / "kept.png")
    assert "uniform kept 16 of 256 visual tokens" in out
    assert Image.open(tmp_path / "kept.png").width > 300
    read = json.loads(run("show", picture, "--keep", 0.5, "--out", tmp_path / "kept.png", "--json"))
    assert len(read["kept"]) == 128


def test_video_is_evaluated_demonstrated_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="the stock video processor needs it")
    some = ["eval", "--video", "--keep", "25%", "--limit", 2, "--capability", "order", "--seeds", 1]
    read = json.loads(run(*some, "--json"))
    assert {row["method"] for row in read["rows"]} >= {"dense", "blind-zero", "random", "uniform", "divprune"}
    assert read["environment"]["video"] is True
    result = runner.invoke(app, ["demo", "--video", "--limit", "2", "--keep", "0.1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "clips of 16 frames" in result.output
    demo = json.loads((tmp_path / "demo.json").read_text())
    assert {row["method"] for row in demo["rows"]} >= {"auto", "holitom", "evs", "vidcom2", "uniform"}
    assert Image.open(tmp_path / "overlay.png").width > 600


def test_show_draws_a_contact_sheet_of_a_video_file(tmp_path: Path) -> None:
    for package in ("torchvision", "av"):
        pytest.importorskip(package, reason="a clip is encoded, decoded and seen")
    from test_video import encode

    clip = encode(tmp_path / "clip.mp4", [100 * i for i in range(40)])
    out = run("show", "--video", clip, "--method", "uniform", "--keep", 24, "--out", tmp_path / "kept.png")
    assert "uniform kept 24 of 224 visual tokens" in out  # 16 frames, two at a time, of 4 x 7 tokens
    assert Image.open(tmp_path / "kept.png").width > 1200
    again = ["show", "--video", clip, "--frames", 4, "--keep", 0.5, "--out", tmp_path / "kept.png", "--json"]
    assert len(json.loads(run(*again))["kept"]) == 28


@pytest.mark.parametrize("command", [["eval", "--limit", "2"], ["show"]])
def test_a_model_of_pictures_is_not_asked_about_videos(command: list[str], tmp_path: Path) -> None:
    for package in ("torchvision", "av"):
        pytest.importorskip(package, reason="a clip is encoded and decoded")
    from test_video import encode

    from vtprune.evals.toys import image as tiny

    tiny.load()[1].save_pretrained(tmp_path / "llava")  # no weights: they are not looked for
    clip = [str(encode(tmp_path / "clip.mp4", [0, 100, 200]))] if command[0] == "show" else []
    result = runner.invoke(app, [*command, "--video", *clip, "--model", str(tmp_path / "llava")])
    assert result.exit_code == 2
    assert "takes no videos (its LlavaProcessor has no video processor)" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["show"], "name one picture, or one video file"),
        (["show", "--video", "/no/such/clip.mp4"], "no such video file"),
        (["show", "picture.png", "--video", "clip.mp4"], "name one picture, or one video file"),
        (["eval", "--video", "--capability", "ocr"], "unknown capabilities ['ocr']"),
        (["eval", "--keep", "0"], "--keep 0: use a share in (0, 1]"),
        (["eval", "--keep", "1.5"], "--keep 1.5:"),
        (["eval", "--keep=-3"], "--keep -3:"),
        (["eval", "--keep", "half"], "--keep half:"),
        (["eval", "--keep", "nan"], "--keep nan:"),
        (["eval", "--method", "divprun"], "did you mean 'divprune'"),
        (["eval", "--method", "divprune:colour=red"], "no option 'colour'"),
        (["eval", "--capability", "smell"], "unknown capabilities ['smell']"),
        (["eval", "--model", "/no/such/model", "--limit", "2"], "--model /no/such/model: no model there"),
        (["eval", "--device", "foo"], "--device foo: no such device"),
        (["eval", "--device", "meta"], "a meta device runs no model"),
        (["eval", "--dtype", "int8"], "--dtype int8: choose one of float32"),
        (["bench", "--geometry", "llava"], "unknown geometry 'llava'; choose one of: tiny"),
        (["bench", "--geometry", "llava-1.5-7b", "--device", "cpu"], "needs a GPU"),
        (["bench", "--geometry", "tiny", "--model", "x"], "exclude each other"),
        (["show", "/no/such/image.png"], "No such file"),
        (["train-tiny", "--scale", "-1"], "scale=-1.0 trains nothing"),
    ],
)
def test_bad_input_ends_with_one_sentence(args: list[str], said: str, tmp_path: Path) -> None:
    result = runner.invoke(app, args)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("vtprune: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no picture")
    result = runner.invoke(app, ["show", str(path)])
    assert result.exit_code == 2
    assert "notes.txt" in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(vtprune, "methods", broken)
    assert isinstance(runner.invoke(app, ["methods"]).exception, ZeroDivisionError)


@pytest.mark.parametrize(("text", "value"), [("0.25", 0.25), ("25%", 0.25), ("64", 64), ("1.0", 1.0), ("1", 1)])
def test_keep_is_a_share_or_a_number_of_tokens(text: str, value: float | int) -> None:
    assert parse_keep(text) == value
    assert type(parse_keep(text)) is type(value)


def test_several_keeps() -> None:
    assert parse_keeps(["0.5,0.25", "64"], (0.1,)) == [0.5, 0.25, 64]
    assert parse_keeps(None, (0.1,)) == [0.1]


def test_show_says_why_a_choice_made_at_decode_cannot_be_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (64, 64), "white").save(picture)
    arguments = ["show", str(picture), "--method", "dycoke_kv:layer=1", "--out", str(tmp_path / "kept.png")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "recalled" in " ".join(result.output.split())
    assert not (tmp_path / "kept.png").exists()


def test_show_puts_tokens_where_a_cropping_processor_looked(tmp_path: Path) -> None:
    """The middle third of a wide picture is all that CLIP's own processor shows: nothing else may be bright."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    from vtprune.evals.toys import image as tiny

    model, processor = tiny.load()
    crop = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    options = {name: getattr(processor, name) for name in ("patch_size", "num_additional_image_tokens", "image_token")}
    strategy = processor.vision_feature_select_strategy
    LlavaProcessor(crop, processor.tokenizer, vision_feature_select_strategy=strategy, **options).save_pretrained(
        tmp_path / "crop"
    )
    model.save_pretrained(tmp_path / "crop")
    Image.new("RGB", (300, 100), (90, 90, 90)).save(tmp_path / "wide.png")
    arguments = ["show", tmp_path / "wide.png", "--model", tmp_path / "crop", "--out", tmp_path / "kept.png"]
    run(*arguments, "--keep", "100%")  # which prunes nothing
    drawn = np.asarray(Image.open(tmp_path / "kept.png")).astype(int)[40:140, 10:346]
    assert (abs(drawn - 90).max(-1) < 3).any(0).nonzero()[0].min() in range(110, 116)
    assert (abs(drawn - 90).max(-1) < 3).any(0).nonzero()[0].max() in range(220, 226)


def _picture(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.{'gif' if kind == 'animated' else 'png'}"
    if kind == "animated":
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "cut":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        Image.new("1", (20000, 20000)).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("animated", "holds 2 frames"),
        ("cut", "cannot be read as a picture"),
        ("folder", "is a folder"),
        ("huge", "more than Pillow reads safely"),
        ("missing", "No such file"),
    ],
)
def test_a_file_that_is_no_still_picture_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["show", str(_picture(tmp_path, kind)), "--out", str(tmp_path / "kept.png")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_pictures_are_read_upright_in_eight_bits_over_white(tmp_path: Path) -> None:
    upright = Image.new("RGB", (6, 4), "red")
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.save(tmp_path / "turned.png", exif=exif)
    assert pictures.read(tmp_path / "turned.png")[0].size == (4, 6)
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.asarray(pictures.read(tmp_path / "deep.png")[0])[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture, notes = pictures.read(tmp_path / "clear.png")
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert "over white" in notes[0]


def test_pictures_are_read_from_bytes_as_from_their_file(tmp_path: Path) -> None:
    upright = Image.new("RGB", (6, 4), "red")
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.save(tmp_path / "turned.png", exif=exif)
    from_file, notes = pictures.read(tmp_path / "turned.png")
    picture, same_notes = pictures.read((tmp_path / "turned.png").read_bytes())
    assert (picture.size, same_notes) == ((4, 6), notes)
    assert np.array_equal(picture, from_file)


@pytest.mark.parametrize("kind", ["text", "animated"])
def test_a_message_names_bytes_by_their_number(kind: str, tmp_path: Path) -> None:
    content = b"no picture"
    if kind == "animated":
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        content = (tmp_path / "a.gif").read_bytes()
    told = {"text": "cannot be read as a picture: its format is unknown", "animated": "holds 2 frames"}[kind]
    with pytest.raises(ValueError, match=f"the picture of {len(content)} bytes {told}"):
        pictures.read(content)


@pytest.mark.parametrize("out", ["folder", "kept.xyz", "file/kept.png"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    out: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the work has begun"))
    result = runner.invoke(app, ["show", str(picture), "--out", str(tmp_path / out)])
    assert result.exit_code == 2
    assert "--out" in result.stderr


@pytest.mark.parametrize(
    ("args", "modules"),
    [
        (["eval"], ["scipy"]),
        (["eval", "--out", "x"], ["matplotlib"]),
        (["demo"], ["scipy", "matplotlib"]),
        (["eval", "--video"], ["torchvision"]),
        (["show", "--video", "clip.mp4"], ["av", "torchvision"]),
        (["eval-vit", "--weights", "x.whl"], ["onnx"]),
        (["show", "x.png", "--vit", "x.whl"], ["onnx"]),
        (["bench", "--plot", "x.json"], ["matplotlib"]),
    ],
)
def test_missing_packages_are_told_before_the_work(
    args: list[str], modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the work has begun"))
    result = runner.invoke(app, args)
    assert result.exit_code == 2
    assert f"pip install {' '.join(modules)}\n" in result.stderr


SOME = ["eval", "--method", "divprune", "--keep", "0.5", "--limit", "2", "--capability", "color", "--seeds", "1"]


def test_an_interrupted_evaluation_keeps_what_it_has_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sit, done = accuracy._sit, []

    def interrupted(exam, new_tokens, plan):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(plan)
        return sit(exam, new_tokens, plan)

    monkeypatch.setattr(accuracy, "_sit", interrupted)
    result = runner.invoke(app, [*SOME, "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert f"interrupted after 4 finished rows: they are in {tmp_path / 'eval.json'}" in result.stderr
    read = json.loads((tmp_path / "eval.json").read_text())
    assert {row["method"] for row in read["rows"]} == {"dense", "blind-zero", "blind-shuffle", "random"}
    assert any("Interrupted" in note for note in read["notes"])
    monkeypatch.setattr(accuracy, "_sit", sit)
    whole = json.loads(run(*SOME, "--json"))
    for row in [*read["rows"], *whole["rows"]]:
        row.pop("ttft", None)  # measured anew
        row.pop("over_uniform", None)  # uniform tokens are asked after the interruption
    assert read["rows"] == whole["rows"][: len(read["rows"])]
    done.clear()
    done[:] = [None] * 4
    monkeypatch.setattr(accuracy, "_sit", interrupted)
    assert "interrupted after 0 finished rows" in runner.invoke(app, SOME).stderr


def test_brackets_in_names_are_no_markup() -> None:
    report = Report("Accuracy of q[/b]", [{"method[/i]": "todre[bold]", "x": "[/red]"}], {}, ("in /a[/b]",))
    console = Console(width=200, file=io.StringIO())
    console.print(report.to_table())
    for text in ("q[/b]", "method[/i]", "todre[bold]", "[/red]", "/a[/b]"):
        assert text in console.file.getvalue()


def test_weights_that_could_run_code_are_refused(tmp_path: Path, picture: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    shutil.copytree(tiny.CHECKPOINT, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"w": Evil()}, tmp_path / "model" / "pytorch_model.bin")
    result = runner.invoke(app, ["show", str(picture), "--model", str(tmp_path / "model")])
    assert result.exit_code == 2
    assert "convert it to safetensors" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_repository_with_code_of_its_own_is_refused_without_a_question(tmp_path: Path, picture: Path) -> None:
    shutil.copytree(tiny.CHECKPOINT, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForImageTextToText": "mine.M"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    result = runner.invoke(app, ["show", str(picture), "--model", str(tmp_path / "model")], input="y\ny\n")
    assert result.exit_code == 2
    assert "never run" in result.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["folder", "junk.whl", "junk.onnx", "empty.onnx", "other.whl", "missing.whl"])
def test_a_wrong_file_of_weights_is_one_sentence(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "other.whl":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("a.txt", "a")
    elif name != "missing.whl":
        path.write_text("" if name == "empty.onnx" else "junk")
    result = runner.invoke(app, ["eval-vit", "--weights", str(path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert name in result.stderr
