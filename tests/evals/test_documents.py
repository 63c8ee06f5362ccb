"""Every command with --json prints one object that names its schema and version, and a guide tells what it holds."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main
from results import example
from test_tasks_grid import write_questions
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals import demo
from vtprune.evals.accuracy import vit_data
from vtprune.evals.toys import image

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "examples" / "guides" / "results.md"
# How to run each command, by the kind of what it tells. OUT is a folder of its own.
CALLS: dict[str, dict[str, str]] = {
    "methods": {"methods": ""},
    "inspect": {"inspect": str(image.CHECKPOINT)},
    "demo": {"demo": "--limit 2 --keep 0.11 --out OUT"},
    "eval": {
        "eval": "--method divprune --keep 0.5 --limit 2 --capability color --seeds 1 --out OUT",
        "eval-data": "--data DATA --limit 1 --method random --keep 0.5 --seeds 1 --out OUT",
    },
    "tune": {"tune": "--data DATA --limit 2 --method random --keep 0.5 --max-drop 99% --out OUT"},
    "report": {"report": "RESULTS"},
    "template": {"template": "OUT"},
    "bench": {"bench": "--geometry tiny --method random --keep 64 --repeats 1 --new-tokens 1 --out OUT"},
    "show": {"show": "PICTURE --out OUT/kept.png", "show-vit": "PICTURE --vit W --method tome --out OUT/kept.png"},
    "eval-vit": {"eval-vit": "--weights W --method random --keep 0.5 --train 10 --test 4 --batch 4 --out OUT"},
}


def with_json() -> list[str]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return [name for name, command in commands.items() if any("--json" in option.opts for option in command.params)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What commands are asked about."""
    folder = tmp_path_factory.mktemp("asked")
    image.questions(per_capability=1, capabilities=["color"])[0].image.save(folder / "picture.png")
    data = write_questions(folder / "data", 8, ("color",))
    results = example(folder / "results", ("divprune",), (0.5,), n=4)
    return {"PICTURE": folder / "picture.png", "DATA": data, "RESULTS": results.path}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demonstration of one method on questions of one kind, in one process, and a small vision transformer."""
    from transformers import Dinov2Config, Dinov2Model

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224}
    monkeypatch.setattr(vit_data, "dinov2_small", lambda _: Dinov2Model(Dinov2Config(**sizes, patch_size=14)).eval())
    pictures = torch.randint(0, 255, (10, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr(vit_data, "fashion", lambda _, __, n: (pictures[:n], torch.arange(n) % 2))
    some = SimpleNamespace(load=image.load, questions=partial(image.questions, capabilities=["color"]))
    monkeypatch.setattr(demo, "toy", lambda _: some)
    monkeypatch.setattr(demo, "FEW", ("divprune",))
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 1)


def test_every_command_that_prints_json_is_run_here() -> None:
    assert set(with_json()) == set(CALLS), "say in CALLS how to run it"


@pytest.mark.parametrize(("command", "kind"), [(name, kind) for name, calls in CALLS.items() for kind in calls])
def test_a_command_prints_one_document(command: str, kind: str, places: dict[str, Path], tmp_path: Path) -> None:
    arguments = CALLS[command][kind]
    for name, path in {**places, "OUT": tmp_path}.items():
        arguments = arguments.replace(name, str(path))
    result = CliRunner().invoke(app, [command, *arguments.split(), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert list(told.items())[:2] == [("schema", f"vtprune.{kind}/1"), ("version", vtprune.__version__)]
    assert kind.partition("-")[0] == command.partition("-")[0]
    if "--out OUT" in CALLS[command][kind] and command != "show":
        assert told in [json.loads(file.read_text()) for file in tmp_path.glob("*.json")], "what is saved is the same"


def test_the_guide_tells_of_every_document() -> None:
    """Of those too that no call above prints: a server's, the kernels'."""
    sources = [path.read_text() for path in (ROOT / "evals").rglob("*.py")]
    reports = {kind for text in sources for kind in re.findall(r'^    kind = "([\w-]+)"$', text, re.M)}
    assert {"bench-serve", "eval"} <= reports
    told = re.findall(r"^\| `vtprune\.([\w-]+)/1` \|", GUIDE.read_text(), re.M)
    assert len(told) == len(set(told))
    assert set(told) == reports | {kind for calls in CALLS.values() for kind in calls}
