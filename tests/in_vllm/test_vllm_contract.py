"""What the plug-in stands on in vLLM is there; other versions, models, recipes and options are refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import pytest

import vtprune
from vtprune.integrations.vllm import contract

pytest.importorskip("vllm", reason="vLLM is in the environment of `make test-vllm`")
pytestmark = pytest.mark.vllm


ALL = contract.NAMES | contract.IN_WORKERS


@pytest.mark.parametrize("module", ALL)
def test_every_name_is_there(module: str) -> None:
    missing = [name for name in ALL[module] if contract._find(module, name) is None]
    assert not missing, f"{module} lacks {', '.join(missing)}"


def test_all_imports_from_vllm_are_in_the_contract() -> None:
    folder = Path(contract.__file__).parent
    for file in folder.glob("*.py"):
        for module, names in re.findall(r"^\s*from (vllm[\w.]*) import (.+)$", file.read_text(), re.M):
            for name in names.split(", "):
                known = any(entry.split(".")[0] == name for entry in ALL.get(module, ()))
                submodule = f"{module}.{name}" in ALL
                assert known or submodule, f"{file.name} imports {name} from {module}"


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(contract, "installed", lambda: version)
    with pytest.raises(RuntimeError, match=rf"0\.32.*0\.34.*{re.escape(version)}"):
        contract.check()


def start(folder: Path, recipe: Any, **options: Any) -> None:
    with engines.engine(folder, recipe, **options):
        pytest.fail("the engine started")


def recipe(method: str, **stage: Any) -> vtprune.Recipe:
    return vtprune.Recipe.of(vtprune.Stage(stage.pop("where", "pre_llm"), vtprune.create(method), **stage))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.save("qwen2_5_vl", tmp_path_factory.mktemp("models") / "qwen2_5_vl")


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (recipe("fastv", where=2, keep=0.5), {}, "inside the model"),
        (recipe("recoverable", keep=0.5), {}, "reads the question"),
        (recipe("dycoke"), {}, "dycoke"),
        (recipe("divprune", keep=0.5, positions="compact"), {}, "undefined for M-RoPE"),
        ("no such file.json", {}, "no such file"),
        ({"schema": "vtprune.recipe"}, {}, "lacks"),
        (7, {}, "give the path of a recipe"),
        (recipe("evs", keep=0.5), {"video_pruning_rate": 0.5}, "exclude each other"),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_the_start(folder: Path, given: Any, options: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        start(folder, given, **options)


def test_a_model_outside_the_list_is_refused(tmp_path: Path) -> None:
    import checkpoints

    folder = checkpoints.save("gemma3", tmp_path / "gemma3")
    with pytest.raises(Exception, match="vtprune does not prune"):
        start(folder, recipe("divprune", keep=0.5))


def test_the_example_runs(folder: Path, tmp_path: Path) -> None:
    engines.noise(1).save(tmp_path / "picture.png")
    example = Path(__file__).parents[2] / "examples" / "serving" / "vllm_pruned.py"
    command = [sys.executable, str(example), str(folder), str(tmp_path / "picture.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    lengths = [int(n) for n in re.findall(r"^(\d+) tokens of the prompt", done.stdout, re.M)]
    assert done.returncode == 0, done.stderr[-2000:]
    assert lengths[1] - lengths[0] == 9, done.stdout  # of 12 visual tokens, 3 stay at a quarter
    assert lengths[1] - lengths[2] == 8
