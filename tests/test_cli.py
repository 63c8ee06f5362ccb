"""The command line: every command, its JSON, its files, and one clear sentence on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app, parse_keep, parse_keeps

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
    found = json.loads(run("methods", "--json"))
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
    result = runner.invoke(app, ["demo", "--limit", "3", "--keep", "0.11", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "A toy" in result.output
    for name in ("demo.json", "pareto.png", "overlay.png"):
        assert f"wrote {tmp_path / name}" in " ".join(result.stdout.split())
        assert (tmp_path / name).stat().st_size > 1000
    for cls in vtprune.methods():
        assert cls.video or cls.name in result.stdout


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
    told = {row["method"] for row in demo["rows"]} | {
        n.split(": ")[1] for n in demo["notes"] if n.startswith("Not run")
    }
    assert told >= {cls.name for cls in vtprune.methods()}
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

    from vtprune.evals import tiny

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
