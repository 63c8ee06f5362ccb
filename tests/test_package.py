"""The package as users get it: a light import, a wheel that holds everything, a checkout that harms nobody."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import vtprune

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("vtprune", "model_adapters", "kernels", "evals")
IMPORT_ALL = """
import importlib, json, pkgutil, vtprune
found = [info.name for info in pkgutil.walk_packages(vtprune.__path__, "vtprune.")]
names = [name for name in found if not name.endswith("__main__")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:  # what runs inside vLLM imports it
        if missing.name != "vllm" or not name.startswith("vtprune.integrations.vllm."):
            raise
print(json.dumps({"file": vtprune.__file__, "names": names, "methods": [m.name for m in vtprune.methods()]}))
"""


def python(code: str, *, executable: str = sys.executable, cwd: Path = ROOT, path: str = "") -> str:
    """Output of a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked(*folders: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_import_is_light(tmp_path: Path) -> None:
    heavy = ("transformers", "timm", "matplotlib", "scipy", "typer", "PIL", "torchvision")
    code = f"import sys, vtprune; print([m for m in {heavy} if m in sys.modules])"
    assert python(code, cwd=tmp_path).strip() == "[]"


def test_listing_methods_needs_no_transformers(tmp_path: Path) -> None:
    code = "import sys, vtprune; assert len(vtprune.methods()) >= 6; print('transformers' in sys.modules)"
    assert python(code, cwd=tmp_path).strip() == "False"


def test_top_level_holds_what_was_agreed() -> None:
    folders = {name.split("/")[0] for name in tracked() if "/" in name}
    agreed = {*SOURCES, "tests", "examples"}
    assert agreed <= folders
    assert folders - agreed <= {".ci", ".github", "benchmarks"}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= set(tracked())


def test_every_import_path_has_one_name() -> None:
    """model_adapters/, kernels/ and evals/ are vtprune.*; from elsewhere than the root they exist under no other."""
    code = """
import importlib.util, vtprune.model_adapters, vtprune.kernels, vtprune.evals
print([n for n in ("model_adapters", "evals") if importlib.util.find_spec(n) is not None])
"""
    assert python(code, cwd=ROOT / "examples").strip() == "[]"


def test_only_the_command_line_and_the_server_import_evaluations() -> None:
    """Whoever prunes loads nothing of what measures it, and evaluations may change without the rest.

    The server is a command, too: it loads models and reads films as the others do.
    """
    sources = [name for name in tracked("vtprune", "model_adapters", "kernels") if name.endswith(".py")]
    assert sources
    for name in sources:
        nodes = list(ast.walk(ast.parse((ROOT / name).read_text())))
        named = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        named += [f"{node.module}.{a.name}" for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names]
        named += [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        up = [module for module in named if module.startswith(("vtprune.evals", "vtprune.cli"))]
        assert not up or name.startswith(("vtprune/cli/", "vtprune/integrations/serve/")), f"{name} imports {up[0]}"


OLD_NAMES = {
    "accuracy": ("marking", "vit", "vit_data", "vit_search"),
    "speed": (
        *("bench", "bench_attention", "bench_hooks", "bench_kernels", "bench_selection", "bench_video"),
        *("flops", "geometries", "meter", "prefill"),
    ),
    "toys.image": ("asks", "fast", "model", "packing", "scenes", "score", "train"),
    "toys.video": ("asks", "clips", "fast", "model", "train"),
}
TOYS = {"toys.image": "tiny", "toys.video": "tiny_video"}


def test_old_names_hold_the_objects_of_today() -> None:
    """Modules of evals/ moved into folders by subject: under an old name lie the same classes and functions."""
    pairs = [
        (f"{TOYS[folder]}.{name}" if folder in TOYS else name, f"{folder}.{name}")
        for folder, names in OLD_NAMES.items()
        for name in names
    ]
    for old, new in [*pairs, *((old, new) for new, old in TOYS.items())]:
        before, now = (importlib.import_module(f"vtprune.evals.{name}") for name in (old, new))
        names = [name for name, value in vars(before).items() if not (name.startswith("_") or inspect.ismodule(value))]
        assert names, old
        for name in names:
            assert getattr(before, name) is getattr(now, name), f"{old}.{name}"


@pytest.mark.parametrize("name", ["bench_video", "tiny.train", "tiny_video.train"])
def test_old_names_run_as_programmes(name: str) -> None:
    command = [sys.executable, "-m", f"vtprune.evals.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr
    assert {"bench_video": "HoliTom", "tiny.train": "LLaVA"}.get(name, "Qwen2.5-VL") in done.stdout


STAND_IN = """
class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls()


class Stub(metaclass=Anything):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, decorated=None, *args, **kwargs):
        return decorated

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub()

    __or__ = __ror__ = lambda self, other: self


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Stub
"""


def test_root_folder_with_hugging_face_kernels_installed(tmp_path: Path) -> None:
    """Started from the repository root, `import kernels` would find our folder where transformers wants theirs."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    information = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
    code = """
import sys
sys.path.append("tests")
import torch, vtprune, vtprune.kernels
from transformers.utils import is_kernels_available
import families, kernels

assert is_kernels_available()
model, batch = families.model("llava"), families.inputs("llava")
with vtprune.patch(model, "divprune", keep=0.5) as handle:
    model(**batch)
print(handle.last.index.shape[1] < batch["input_ids"].shape[1])
print(kernels.__file__)
print(vtprune.kernels.__file__)
"""
    pruned, theirs, ours = python(code, path=str(tmp_path)).split()
    assert pruned == "True"
    assert theirs == str(tmp_path / "kernels" / "__init__.py")
    assert ours == str(ROOT / "kernels" / "__init__.py")


def test_root_folder_without_hugging_face_kernels() -> None:
    assert "model" in python("import transformers, vtprune, kernels; print(transformers.AutoModel.__name__.lower())")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what git tracks, as a fresh clone would build it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "-q", "-w", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_every_source_file(wheel: Path) -> None:
    """A subpackage that pyproject.toml forgets would be missing from the wheel only, where no other test looks."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in tracked(*SOURCES):
        if name.endswith(".py") or "/checkpoint/" in name or "/easy_vqa/" in name:
            expected = name if name.startswith("vtprune/") else f"vtprune/{name}"
            assert expected in inside, f"{name} is not in the wheel: list its package in pyproject.toml"
    assert "vtprune/py.typed" in inside
    assert not {name.split("/")[0] for name in inside} - {"vtprune"} - {f"{wheel.name.split('-py3')[0]}.dist-info"}


@pytest.mark.slow
def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Installed without its dependencies into a fresh environment, which then borrows them from ours."""
    import json

    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    binary = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([binary, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    borrowed = os.pathsep.join(dict.fromkeys(p for p in sys.path if p.endswith("-packages")))
    borrowed = borrowed or sysconfig.get_path("purelib")
    answer = json.loads(python(IMPORT_ALL, executable=str(binary), cwd=tmp_path, path=borrowed).splitlines()[-1])
    assert Path(answer["file"]).is_relative_to(place)
    assert {"vtprune.kernels", "vtprune.model_adapters", "vtprune.evals"} <= set(answer["names"])
    assert "divprune" in answer["methods"]
    command = [str(binary), "-m", "vtprune.cli", "methods"]
    shown = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": borrowed}, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "divprune" in shown.stdout


def test_the_command_line_is_there_before_torch() -> None:
    """Help and the completion of a shell would take seconds."""
    code = "import sys, vtprune, vtprune.cli; print({'torch', 'transformers'} & set(sys.modules), dir(vtprune))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("set() ")
    assert all(repr(name) in told for name in vtprune.__all__)


def test_public_names_and_modules_are_there_when_asked_for() -> None:
    for name in vtprune.__all__:
        assert getattr(vtprune, name).__module__.startswith("vtprune."), name
    assert set(vtprune._HOMES) <= set(vtprune.__all__)
    assert vtprune.kernels is sys.modules["vtprune.kernels"]
    for name in ("nothing", "__nothing__"):
        with pytest.raises(AttributeError, match=f"module 'vtprune' has no attribute '{name}'"):
            getattr(vtprune, name)
