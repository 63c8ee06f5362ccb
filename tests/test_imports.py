"""Imports run downwards only, and in no circle; files and classes stay short enough to be read at once.

Read from the source, with the folders that pyproject.toml maps.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).resolve().parent.parent


def packages() -> dict[str, Path]:
    """Every package that is shipped, and its folder."""
    if tomllib is None:
        pytest.skip("the standard library reads TOML from Python 3.11 on")
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {}
    for package in tool["packages"]:
        base = max((b for b in tool["package-dir"] if package == b or package.startswith(b + ".")), key=len)
        found[package] = ROOT / tool["package-dir"][base] / package[len(base) + 1 :].replace(".", "/")
    return found


def modules() -> dict[str, Path]:
    """Every module that is shipped, by its name."""
    found = {}
    for package, folder in packages().items():
        for file in folder.glob("*.py"):
            found[package if file.stem == "__init__" else f"{package}.{file.stem}"] = file
    return found


def imports(tree: ast.AST, functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run; those of functions only if asked for, those under TYPE_CHECKING never."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (part for child in node.orelse for part in imports(ast.Module([child], []), functions))
        elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, functions)


def targets(name: str, file: Path, known: dict[str, Path], functions: bool) -> set[str]:
    """What a module imports: our modules by name, others by the name of their package."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in imports(ast.parse(file.read_text()), functions):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            full = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        found |= {one if one.split(".")[0] == "vtprune" else one.split(".")[0] for one in full}
    return found - {name}


KNOWN = modules() if tomllib else {}
LAZY = {name: targets(name, file, KNOWN, functions=True) for name, file in KNOWN.items()}
EAGER = {name: targets(name, file, KNOWN, functions=False) for name, file in KNOWN.items()}
STANDARD = sys.stdlib_module_names if tomllib else frozenset()

# Folder: what its modules may import of ours, and which packages of others; function-level imports count too.
RULES: dict[str, tuple[str, str]] = {
    "vtprune.kernels": (r"vtprune\.kernels(\..*)?", r"torch|triton"),
    "vtprune.core": (r"vtprune\.(kernels|core)(\..*)?", r"torch"),
    "vtprune.registry": (r"vtprune\.core(\..*)?", r""),
    "vtprune.methods": (r"vtprune\.(kernels|core|methods)(\..*)?|vtprune\.registry", r"torch"),
    "vtprune.signals": (r"vtprune\.(kernels|core|signals)(\..*)?|vtprune\.registry", r"torch"),
    "vtprune.recipe": (r"vtprune\.core(\..*)?|vtprune\.registry", r""),
    "vtprune.selection": (r"vtprune\.(core|signals)(\..*)?|vtprune\.recipe", r"torch"),
    "vtprune.stream": (r"vtprune\.(kernels|core)(\..*)?|vtprune\.(recipe|registry|selection)", r"torch"),
    "vtprune.model_adapters": (r"vtprune\.(core|model_adapters)(\..*)?|vtprune\.registry", r"torch|transformers|timm"),
    "vtprune.integrations.budget": (r"vtprune\.recipe", r""),
    "vtprune.integrations.lmms_eval": (r"vtprune\.integrations\.lmms_.*", r"lmms_eval"),
    "vtprune.integrations.lmms_counts": (r"vtprune\.core(\..*)?", r"lmms_eval"),
    "vtprune.integrations.lmms_wrapper": (
        r"vtprune\.(core|integrations)(\..*)?|vtprune\.(handle|parsing|recipe)",
        r"lmms_eval|PIL",
    ),
    # Stands where the Hugging Face engine stands, in another engine, and shares its way from patches to tokens.
    "vtprune.integrations.vllm": (
        r"vtprune\.(core|signals|model_adapters|integrations\.(vllm|budget))(\..*)?|"
        r"vtprune\.(recipe|selection|hf\.tower_signals)",
        r"torch|transformers|vllm",
    ),
    # Loads models and draws what they keep as the command line does, so it stands as high.
    "vtprune.integrations.serve": (
        r"vtprune(\.(core|evals|integrations\.(serve|budget))(\..*)?|\.(handle|panels|pictures|places|recipe|types))?",
        r"torch|transformers|PIL|jinja2|av|fastapi|starlette|uvicorn|openai|prometheus_client|ray",
    ),
    "vtprune.hf": (
        r"vtprune\.(kernels|core|signals|model_adapters|hf)(\..*)?|vtprune\.registry",
        r"torch|transformers|timm",
    ),
}
# (module, what it imports): why it may.
ALLOWED: dict[tuple[str, str], str] = {
    ("vtprune.core.result", "vtprune.show"): "a picture is drawn where it is asked for, and not before",
    ("vtprune.core.result", "vtprune.summary"): "so is what a notebook shows",
    ("vtprune.hf.vit_last", "vtprune.show"): "as of `Last`",
    ("vtprune.hf.vit_last", "vtprune.summary"): "as of `Last`",
    ("vtprune.recipe", "vtprune"): "the version that is written into a recipe, read when one is made",
}


@pytest.mark.parametrize("folder", RULES)
def test_arrows_run_downwards(folder: str) -> None:
    ours, others = RULES[folder]
    inside = [name for name in KNOWN if name == folder or name.startswith(folder + ".")]
    assert inside
    wrong = []
    for name in inside:
        for target in sorted(LAZY[name]):
            rule = ours if target.split(".")[0] == "vtprune" else others
            standard = target in STANDARD or target == "__future__"
            if not standard and not re.fullmatch(rule, target) and (name, target) not in ALLOWED:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_exceptions_are_still_needed() -> None:
    for name, target in ALLOWED:
        assert target in LAZY[name], f"{name} no longer imports {target}"


def test_no_circle() -> None:
    """Of what modules import as they are imported. A package stands for its `__init__` alone."""
    left = {name: {t for t in found if t in KNOWN} for name, found in EAGER.items()}
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    # What is left leads into a circle or stands in one: take away what only leads there.
    while outer := [name for name in left if not any(name in found for other, found in left.items() if other != name)]:
        for name in outer:
            del left[name]
    assert not left, {name: sorted(found & left.keys()) for name, found in left.items()}


# What is still too long: lines of a file, or lines and methods of a class. It may shrink, and leaves the list when it
# has shrunk enough.
TOO_LONG: dict[str, int] = {}
TOO_LARGE: dict[str, tuple[int, int]] = {}
LINES, CLASS_LINES, METHODS = 400, 250, 25


def sources() -> Iterator[Path]:
    """Every Python file of what is shipped."""
    for folder in ("vtprune", "model_adapters", "kernels", "evals"):
        yield from (ROOT / folder).rglob("*.py")


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert len(lines) > 100
    long = {path: n for path, n in lines.items() if n > LINES}
    assert not long.keys() - TOO_LONG.keys(), f"more than {LINES} lines: {long}"
    assert not TOO_LONG.keys() - long.keys(), "these are short by now: take them off the list"
    assert all(n <= TOO_LONG[path] for path, n in long.items()), f"these grew: {long}"


def classes(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """Name, lines and number of methods of every class, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1, methods


def test_classes_are_small() -> None:
    large = {}
    for path in sources():
        for name, lines, methods in classes(ast.parse(path.read_text())):
            if lines > CLASS_LINES or methods > METHODS:
                large[f"{path.relative_to(ROOT)} {name}"] = (lines, methods)
    assert not large.keys() - TOO_LARGE.keys(), f"more than {CLASS_LINES} lines or {METHODS} methods: {large}"
    assert not TOO_LARGE.keys() - large.keys(), "these are small by now: take them off the list"
    for name, (lines, methods) in large.items():
        most_lines, most_methods = TOO_LARGE[name]
        assert lines <= most_lines, f"{name} grew"
        assert methods <= most_methods, f"{name} grew"


def test_the_counter_of_classes_counts() -> None:
    tree = ast.parse("class A:\n    x = 1\n    def f(self):\n        class B:\n            async def g(self): ...\n")
    assert sorted(classes(tree)) == [("A", 5, 1), ("B", 2, 1)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vtprune.tower.TowerStages", "vtprune.hf.tower.TowerStages"),
        ("vtprune.tower.places", "vtprune.hf.tower_plan.blocks_of_stage"),
        ("vtprune.vit.VitLast", "vtprune.hf.vit_last.VitLast"),
        ("vtprune.vit.VitSession", "vtprune.hf.vit.VitPatch"),
        ("vtprune.compilers.announce", "vtprune.hf.compilers.announce"),
        ("vtprune.covering.cover", "vtprune.core.covering.cover"),
        ("vtprune.hf.cache.renamed", "vtprune.model_adapters.cache_argument.renamed"),
        ("vtprune.tap.interface_of", "vtprune.model_adapters.attention_interface.interface_of"),
        ("vtprune.model_adapters.vits.vit_of", "vtprune.model_adapters.vit_blocks.vit_of"),
        ("vtprune.model_adapters.generic.Adapter", "vtprune.model_adapters.base.Adapter"),
    ],
)
def test_old_paths_lead_to_the_same_things(old: str, new: str) -> None:
    found = [getattr(import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in (old, new)]
    assert found[0] is found[1]


def test_the_reader_sees_what_there_is(tmp_path: Path) -> None:
    """Relative imports, names that are modules, functions, and what only a type checker reads."""
    file = tmp_path / "b.py"
    file.write_text(
        "from __future__ import annotations\nimport os.path\nfrom . import c\nfrom .c import name\nfrom ..d import e\n"
        "from vtprune.x import y\ndef f():\n    from . import late\nif TYPE_CHECKING:\n    from . import typed\n"
        "else:\n    from . import real\nclass A:\n    import torch.nn\n"
        "try:\n    import numpy\nexcept ImportError:\n    pass\n"
    )
    known = {f"vtprune.{name}": file for name in ("a.c", "a.late", "a.typed", "a.real", "d.e", "x.y")}
    eager = targets("vtprune.a.b", file, known, functions=False)
    assert eager == {
        "__future__", "os", "torch", "numpy", "vtprune.a.c", "vtprune.d.e", "vtprune.x.y", "vtprune.a.real",
    }  # fmt: skip
    assert targets("vtprune.a.b", file, known, functions=True) == eager | {"vtprune.a.late"}
