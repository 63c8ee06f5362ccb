"""The private parts of transformers that the server stands on: all are there, and no others are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vtprune.integrations.serve import parts

FOLDER = Path(parts.__file__).parent


def test_every_symbol_is_there() -> None:
    assert parts.missing() == []
    parts.check()


@pytest.mark.parametrize(
    ("module", "symbols", "told"),
    [
        ("nothing", {"Part": ()}, "transformers.cli.serving.nothing"),
        ("utils", {"Nothing": ("part",)}, "transformers.cli.serving.utils.Nothing"),
        ("utils", {"InferenceThread": ("nothing",)}, "transformers.cli.serving.utils.InferenceThread.nothing"),
        ("model_manager", {"ModelManager": ("models",)}, "transformers.cli.serving.model_manager.ModelManager.models"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, symbols: dict[str, tuple[str, ...]], told: str
) -> None:
    monkeypatch.setitem(parts.SURFACE, module, symbols)
    monkeypatch.setattr(parts, "OF_INSTANCES", {*parts.OF_INSTANCES, ("ModelManager", "models")})
    assert parts.missing() == [told]
    with pytest.raises(ImportError, match=f"lacks what vtprune serve stands on .*{told.rpartition('.')[2]}"):
        parts.check()


def test_no_other_module_reaches_into_transformers_serving() -> None:
    for file in FOLDER.glob("*.py"):
        text = file.read_text()
        assert file.name == "parts.py" or parts.BASE not in text, file.name
    named = {symbol for symbols in parts.SURFACE.values() for symbol in symbols}
    assert set(parts.__all__) - {"accepted", "check", "missing"} == named


def test_private_members_that_are_used_are_named() -> None:
    """Of the classes that are subclassed: what is called on `super()` or overridden with an underscore."""
    members = {member for symbols in parts.SURFACE.values() for found in symbols.values() for member in found}
    ours: set[str] = set()
    used: set[str] = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                ours.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                used |= {node.attr} if node.attr.startswith("_") and isinstance(node.ctx, ast.Load) else set()
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.attr)
    fields = {"_lock", "_stopped"}  # of our dataclass
    assert used - ours - fields <= members


@pytest.mark.parametrize("package", ["fastapi", "openai", "prometheus_client"])
def test_without_its_packages_the_command_says_which(package: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None; from vtprune.cli import app; app(['serve'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"pip install {package.replace('_', '-')}" in " ".join(done.stderr.split())


def test_importing_the_command_line_imports_no_server() -> None:
    code = "import sys, vtprune.cli; print([n for n in ('fastapi', 'uvicorn', 'openai') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
