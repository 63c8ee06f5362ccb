"""`vtprune inspect`: what is told of a checkpoint before anything is run, and what bench and show are asked about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals import models
from vtprune.evals.accuracy import prepare
from vtprune.evals.inspection import PROMPT

runner = CliRunner()
TYPES = sorted({name.partition("-")[0] for name in families.NAMES})


def run(*args: object) -> str:
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def checkpoint(family: str, saved: Path) -> Path:
    """With a processor where the tests know one, else the config alone."""
    folder = saved / family
    if not folder.exists():
        if family in checkpoints.PROCESSORS:
            checkpoints.save(family, folder)
            (folder / "model.safetensors").unlink()  # which nobody asks for
        else:
            families.FAMILIES[family].config().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", TYPES)
def test_every_family_is_told_from_its_config(family: str, saved: Path) -> None:
    folder = checkpoint(family, saved)
    told = json.loads(run("inspect", folder, "--size", "40x24", "--json"))
    assert told["schema"] == "vtprune.inspect/1"
    assert told["version"] == vtprune.__version__
    assert told["prunable"] is True
    assert told["family"]["status"] == "tested"
    assert told["attention"]["llm"] == "sdpa"
    assert sum(told["layers"].values()) == families.depth(families.model(family))
    model = families.model(family)
    for method in told["methods"]:  # as patching the real model says
        rule, reason = vtprune.create(method["name"]), None
        try:
            vtprune.patch(model, rule, keep=None if rule.adaptive else 0.25).remove()
        except (vtprune.VtpruneError, ValueError) as error:
            reason = str(error)
        assert (method["takes"], method["reason"]) == (reason is None, reason)
    if family not in checkpoints.PROCESSORS:
        assert told["input"] is None
        assert "Visual tokens are not counted" in told["notes"][0]


@pytest.mark.parametrize("family", checkpoints.PROCESSORS)
@pytest.mark.parametrize("size", [(40, 24), (16, 60)])
def test_tokens_and_grids_are_those_of_a_run(family: str, size: tuple[int, int], saved: Path) -> None:
    folder = checkpoint(family, saved)
    asked = json.loads(run("inspect", folder, "--size", f"{size[0]}x{size[1]}", "--json"))["input"]
    model = families.model(family)
    inputs = prepare(model, models.processor_of(str(folder)), [PROMPT], [Image.new("RGB", size)])
    with vtprune.patch(model, "random", keep=0.5) as handle, torch.inference_mode():
        model(**inputs)
    units = [{"tokens": u.n, "grids": [list(s.grid) for s in u.spans]} for u in handle.last.images]
    assert asked["units"] == units
    assert asked["visual_tokens"] == sum(unit["tokens"] for unit in units)
    assert asked["text_tokens"] + asked["visual_tokens"] == inputs["input_ids"].shape[1]


def test_gains_bound_what_a_method_saves(saved: Path) -> None:
    from vtprune.evals.costs import llm_flops, vision_flops

    folder = checkpoint("internvl", saved)
    gain = json.loads(run("inspect", folder, "--size", "60x20", "--json"))["gain"]
    assert "upper bound" in gain["bound"]
    model = families.fresh("internvl").to(torch.float32)
    inputs = prepare(model, models.processor_of(str(folder)), [PROMPT], [Image.new("RGB", (60, 20))])
    fed = inputs["input_ids"].shape[1]
    assert gain["dense"]["llm_flops"] == llm_flops(model, fed, None)
    assert gain["dense"]["vision_flops"] == vision_flops(model, inputs)
    for line, name in zip(gain["at"], ("divprune", "fastv")):
        with vtprune.patch(model, name, keep=line["keep"]) as handle, torch.inference_mode():
            cache = model(**inputs).past_key_values
        reached = gain["dense"]["llm_flops"] / llm_flops(model, fed, handle)
        assert reached == line["llm_gain"] if name == "divprune" else reached < line["llm_gain"]
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert (stored == line["kv_bytes"]) == (name == "divprune")
    assert gain["at"][0]["prefill_gain"] < gain["at"][0]["llm_gain"]


def test_the_words_say_what_the_document_says(saved: Path) -> None:
    told = run("inspect", checkpoint("gemma3", saved), "--size", "40x24")
    assert "an image of 40 x 24 pixels: 16 visual tokens in a grid of 4 x 4" in told
    assert "family     tested: every method against an oracle, on tiny random weights" in told
    assert "refuses fastv: fastv at layer 2: gemma3 has layers of kind sliding_attention" in told
    assert "upper bound" in told
    clip = run("inspect", checkpoint("qwen2_5_vl", saved), "--frames", 8, "--size", "64x64")
    assert "a clip of 8 frames of 64 x 64 pixels: 64 visual tokens in a grid of 4 x 4 x 4" in clip
    assert "note       FLOPs of its vision side cannot be counted" in clip


def test_films_and_pictures_of_ones_own_are_looked_at(saved: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 32)).save(tmp_path / "photo.png")
    told = run("inspect", checkpoint("qwen2_5_vl", saved), "--image", tmp_path / "photo.png")
    assert "an image of 64 x 32 pixels" in told
    for package in ("torchvision", "av"):
        pytest.importorskip(package, reason="a clip is encoded and decoded")
    from test_video import encode

    clip = encode(tmp_path / "clip.mp4", [0, 100, 200, 300])
    told = json.loads(run("inspect", checkpoint("qwen2_5_vl", saved), "--video", clip, "--frames", 2, "--json"))
    assert (told["input"]["kind"], told["input"]["frames"]) == ("video", 2)


def test_nothing_to_prune_is_one_sentence(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes))
    model.save_pretrained(tmp_path / "text")
    said = run("inspect", tmp_path / "text")
    assert said.count("\n") == 1
    assert (
        "(LlamaForCausalLM) is a text-only model: its config names nothing visual, so there is nothing to prune" in said
    )
    told = json.loads(run("inspect", tmp_path / "text", "--json"))
    assert (told["prunable"], told["reason"], told["methods"]) == (False, said.strip(), None)
    transformers.MllamaConfig().save_pretrained(tmp_path / "cross")
    assert "cannot be pruned: its image tokens are not in the sequence" in run("inspect", tmp_path / "cross")
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    assert "is no vision-language model" in run("inspect", tmp_path / "vit")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["inspect", "/no/such/model"], "--model /no/such/model: no model there"),
        (["inspect", "x", "--size", "0x4"], "--size 0x4: write width and height in pixels"),
        (["inspect", "x", "--size", "4x4", "--image", "y.png"], "give one of them"),
        (["inspect", "x", "--image", "y.png", "--frames", "3"], "a picture has none"),
        (["bench", "--geometry", "tiny", "--image", "y.png"], "--image is for a model with weights of its own"),
        (["bench", "--image", "y.png", "--video", "z.mp4"], "name one of them"),
        (["show", "x.png", "--image", "y.png"], "name one picture"),
    ],
)
def test_bad_input_ends_with_one_sentence(args: list[str], said: str) -> None:
    result = runner.invoke(app, args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_of_pictures_is_not_asked_about_videos(saved: Path) -> None:
    result = runner.invoke(app, ["inspect", str(checkpoint("llava", saved)), "--frames", "4"])
    assert result.exit_code == 2
    assert "takes no videos" in result.stderr


@pytest.fixture(scope="module")
def native(saved: Path) -> Path:
    """A tiny Qwen2.5-VL whose patches and merging are those of the real one, so that its token counts are, too."""
    config = families.FAMILIES["qwen2_5_vl"].config()
    config.vision_config.patch_size, config.vision_config.window_size = 14, 112
    config.vision_config.fullatt_block_indexes, config.vision_config.depth = [], 1
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.max_position_embeddings = 4096
    folder = checkpoints.save("qwen2_5_vl", saved / "native")
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    pictures = transformers.Qwen2VLImageProcessor(
        patch_size=14, merge_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 12845056}
    )
    processor = models.processor_of(str(folder))
    processor.image_processor = pictures
    processor.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("error::FutureWarning")
def test_bench_of_a_photograph_reports_its_tokens(native: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1344, 896), (90, 120, 30)).save(tmp_path / "photo.jpg")
    told = json.loads(run("inspect", native, "--image", tmp_path / "photo.jpg", "--json"))
    some = ["bench", "--model", native, "--method", "random", "--keep", "0.11", "--repeats", 1, "--new-tokens", 1]
    asked = [*some, "--image", tmp_path / "photo.jpg", "--prompt", "Where?", "--out", tmp_path, "--json"]
    result = runner.invoke(app, [str(a) for a in asked])
    assert result.exit_code == 0, result.output
    assert "too few" not in result.stderr
    report = json.loads(result.stdout)
    assert report["environment"]["visual_tokens"] == told["input"]["visual_tokens"] == 48 * 32
    assert told["input"]["units"] == [{"tokens": 1536, "grids": [[1, 32, 48]]}]
    assert report["environment"]["tokens"] - 1536 == told["input"]["text_tokens"] - len(PROMPT) + len("Where?")
    assert [row["kept_by_layer"] for row in report["rows"] if row["method"] == "random"] == [[169, 169]]
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path], "the file is named by the model's folder"


def test_bench_warns_of_few_visual_tokens(saved: Path, tmp_path: Path) -> None:
    folder = checkpoints.save("llava", saved / "whole")
    result = runner.invoke(
        app,
        ["bench", "--model", str(folder), "--method", "random", "--keep", "0.5", "--repeats", "1", "--new-tokens", "1",
         "--out", str(tmp_path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "25 visual tokens are too few to tell" in result.stderr
    assert "--image" in result.stderr


def test_show_takes_the_names_that_the_other_commands_take(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "photo.png")
    ways = [
        [tmp_path / "photo.png", "--question", "what color is it ?"],
        ["--image", tmp_path / "photo.png", "--prompt", "what color is it ?"],
    ]
    one, other = (json.loads(run("show", *way, "--out", tmp_path / "kept.png", "--json")) for way in ways)
    assert one == other


def test_version_and_completion() -> None:
    assert run("--version") == f"vtprune {vtprune.__version__}\n"
    assert "--install-completion" in run("--help")


def test_a_command_says_at_once_that_it_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, before anything heavy is loaded; never into a file."""
    import io
    import sys

    from vtprune.cli import common

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, said in ((Terminal(), "vtprune slow: loading"), (io.StringIO(), "")):

        @common.sentence
        def slow(stream: Any = stream, said: str = said) -> None:
            assert said in stream.getvalue()

        monkeypatch.setattr(sys, "stderr", stream)
        slow()
        assert bool(stream.getvalue()) == bool(said)


def test_a_chat_template_asks_for_its_package_before_the_weights(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llava", saved), folder)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "jinja2" else find(name, *rest)
    )
    result = runner.invoke(app, ["bench", "--model", str(folder)])
    assert result.exit_code == 2
    assert "needs jinja2: run pip install jinja2" in result.stderr
