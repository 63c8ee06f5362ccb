"""Families of vision-language models: one file each, one list of all, plug-ins that bring theirs."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import families as tiny
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vtprune import Stage, UnsupportedModel, create, patch
from vtprune.model_adapters import Family, families
from vtprune.model_adapters.family import failures, family
from vtprune.model_adapters.llava import Llava
from vtprune.registry import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_list(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests register into a copy."""
    families()
    monkeypatch.setattr(FAMILIES, "known", dict(FAMILIES.known))
    yield
    FAMILIES.forget()


# -- the list


def test_the_list_names_status_and_note() -> None:
    found = families()
    assert [known.model_type for known in found] == sorted(known.model_type for known in found)
    by_status: dict[str, set[str]] = {}
    for known in found:
        by_status.setdefault(known.status, set()).add(known.model_type)
        assert known.note
        assert issubclass(known.family, Family)
    assert by_status["tested"] == {tiny.FAMILIES[name].config().model_type for name in tiny.NAMES}
    assert {"vipllava", "glm46v", "qwen3_vl_moe", "aya_vision"} <= by_status["same shape"]
    assert {"mllama", "gemma3n", "llama4", "blip-2"} <= by_status["refused"]
    assert set(by_status) == {"tested", "same shape", "refused"}


def test_a_tested_family_knows_its_tower() -> None:
    for known in families():
        if known.status == "tested":
            assert known.family.image_layout is not None, known.model_type


def strings(tree: ast.AST) -> Iterator[str]:
    """All strings of a file but its docstrings, and the modules that it imports from elsewhere."""
    documents = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                documents.add(statement.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documents:
            yield node.value
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))


def test_a_model_type_is_named_in_its_own_file_only() -> None:
    """vtprune/, model_adapters/ and kernels/; evals/ makes models of some types, but compares none.

    integrations/ names models as other libraries call them, some of which are model types too.
    """
    homes: dict[str, Path] = {}
    for known in families():
        homes[known.model_type] = Path(str(inspect.getsourcefile(known.family))).resolve()
    named = {model_type: re.compile(rf"(?<![\w-]){re.escape(model_type)}(?![\w-])") for model_type in homes}
    seen = dict.fromkeys(homes, 0)
    files = [path for name in ("vtprune", "model_adapters", "kernels") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 100
    for path in (path for path in files if "integrations" not in path.parts):
        for text in strings(ast.parse(path.read_text())):
            for model_type in (model_type for model_type, pattern in named.items() if pattern.search(text)):
                assert path.resolve() == homes[model_type], f"{path} names {model_type!r}: {text!r}"
                seen[model_type] += 1
    assert all(seen.values())
    for path in (ROOT / "evals").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            for part in (part for side in compared for part in ast.walk(side)):
                assert not (isinstance(part, ast.Constant) and part.value in homes), f"{path}:{part.lineno}"


# -- registration


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'llava', but the name is taken by vtprune\.model_adapters\.llava\.Llava"):

        @family
        class Mine(Family):
            tested = ("mine", "llava")

    assert "mine" not in [known.model_type for known in families()]


def test_the_same_class_may_be_imported_twice() -> None:
    again = type("Llava", (Llava,), {"__module__": Llava.__module__, "__qualname__": "Llava", "tested": ("llava",)})
    assert family(again) is again
    assert next(known.family for known in families() if known.model_type == "llava") is again


@pytest.mark.parametrize("thing", [int, lambda base: base, Llava()])
def test_only_families_can_be_registered(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a class derived from vtprune\.model_adapters\.Family"):
        family(thing)


def test_model_types_stand_in_the_class_itself() -> None:
    with pytest.raises(TypeError, match=r"lists no model types: set tested, same_shape or refused"):

        @family
        class Heir(Llava):
            pass

    with pytest.raises(TypeError, match=r"tested='mine' must be a tuple of model types: \('mine',\)"):

        @family
        class Word(Llava):
            tested = "mine"

    with pytest.raises(ValueError, match="lists 'mine' more than once"):

        @family
        class Twice(Llava):
            tested = ("mine",)
            refused: ClassVar = {"mine": "it is not"}


# -- a family of somebody else


class HouseConfig(LlavaConfig):
    model_type = "house_llava"


class HouseForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = HouseConfig


def house() -> Any:
    """The tiny LLaVA under another model type, with the same weights."""
    stock = tiny.model("llava")
    settings = {k: v for k, v in stock.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    model = HouseForConditionalGeneration._from_config(HouseConfig(**settings), attn_implementation="sdpa").eval()
    model.load_state_dict(stock.state_dict())
    assert model.config.model_type == model.base_model.config.model_type == "house_llava"
    return model


STAGES: dict[str, Any] = {
    "before the LLM": lambda: [Stage("llm", create("divprune"), keep=0.25)],
    "inside the LLM": lambda: [Stage(2, create("fastv"), keep=0.25)],
    "by signals of the tower": lambda: [Stage("llm", create("visionzip"), keep=0.4)],
    "in the tower": lambda: [Stage(("vit", 1), create("topk_cls"), keep=0.5)],
}


@pytest.mark.parametrize("where", STAGES)
def test_one_class_is_all_that_a_family_needs(where: str) -> None:
    """Registered, the stranger does what the stock model does, tensor for tensor."""
    model, batch = house(), tiny.inputs("llava", rows=(2, 0, 1))
    with pytest.raises(UnsupportedModel, match=r"HouseFor.*\(house_llava\) is not a vision-language model vtprune kno"):
        patch(model, "divprune", keep=0.25)

    @family
    class House(Llava):
        tested = ("house_llava",)
        note = "a house of its own"

    assert ("house_llava", "tested", "a house of its own", House) in [
        (known.model_type, known.status, known.note, known.family) for known in families()
    ]
    with torch.no_grad(), patch(tiny.model("llava"), STAGES[where]()) as handle:
        expected = tiny.model("llava")(**batch).logits
        kept = [unit.idx for unit in handle.last.units]
    with torch.no_grad(), patch(model, STAGES[where]()) as handle:
        found = model(**batch).logits
        assert all(torch.equal(a, b.idx) for a, b in zip(kept, handle.last.units, strict=True))
    assert torch.equal(found, expected)
    sizes = [len(unit) for row in batch.units for unit in row]
    assert len(kept) == len(sizes) == 3
    assert all(0 < len(idx) < size for idx, size in zip(kept, sizes))


def test_of_a_family_of_the_same_shape_nothing_is_known_of_the_tower() -> None:
    @family
    class House(Llava):
        same_shape = ("house_llava",)

    model, batch = house(), tiny.inputs("llava")
    with torch.no_grad(), patch(model, "divprune", keep=0.25) as handle:
        model(**batch)
        assert len(handle.last.units[0].idx) == round(0.25 * len(batch.units[0][0]))
    with pytest.raises(
        UnsupportedModel, match=r"no image layout is known for model type 'house_llava'.*one of: .*llava"
    ):
        patch(model, "visionzip", keep=0.25)


def test_a_refusal_gives_the_reason() -> None:
    @family
    class House(Family):
        refused: ClassVar = {"house_llava": "its walls are bare"}

    with pytest.raises(UnsupportedModel, match=r"\(house_llava\) cannot be pruned: its walls are bare; tested"):
        patch(house(), "divprune", keep=0.25)


# -- plug-ins


PLUGIN = """
from vtprune.model_adapters.family import Family, family
from vtprune.model_adapters.llava import Llava

{decorator}
class House(Llava):
    tested = ("{model_type}",)
"""


def install(folder: Path, name: str, code: str, entry: str) -> None:
    """A minimal distribution, as pip would lay it out."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vtprune.families]\n{entry}\n")


@pytest.mark.parametrize("entry", ["{0}", "{0}:House"])
def test_plug_ins_are_found_by_entry_point(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"family_{len(entry)}"
    code = PLUGIN.format(decorator="@family", model_type="house_llava")
    install(tmp_path, module, code, f"house = {entry.format(module)}")
    monkeypatch.syspath_prepend(tmp_path)
    FAMILIES.forget()
    model = house()
    with torch.no_grad(), patch(model, "divprune", keep=0.25) as handle:
        model(**tiny.inputs("llava"))
        assert handle.last.units
    assert failures() == []


BROKEN = {
    "raises": ("raise RuntimeError('no licence')", "{0}", "RuntimeError: no licence"),
    "leaves": ("import sys; sys.exit(3)", "{0}", "SystemExit: 3"),
    "is a function": (
        "def house():\n    raise AssertionError('called')",
        "{0}:house",
        "function .* registers no family",
    ),
    "is empty": ("", "{0}", "a module and registers no family"),
    "is bare": (PLUGIN.format(decorator="", model_type="bare"), "{0}:House", "the class is not registered"),
    "takes a name": (
        PLUGIN.format(decorator="@family", model_type="llava"),
        "{0}",
        r"'llava', but the name is taken by vtprune\.model_adapters\.llava\.Llava",
    ),
    "cannot be made": (
        PLUGIN.format(decorator="@family", model_type="house_llava")
        + "\n    def __init__(self):\n        raise KeyError('roof')",
        "{0}",
        "KeyError: 'roof'",
    ),
    "breaks off": (
        PLUGIN.format(decorator="@family", model_type="house_llava") + "\n1 / 0",
        "{0}",
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plug_in_that_fails_takes_nothing_else_down(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, entry, reason = BROKEN[case]
    module = "families_" + case.replace(" ", "_")
    names = [known.model_type for known in families()]
    install(tmp_path, module, code, f"faulty = {entry.format(module)}")
    sound = PLUGIN.format(decorator="@family", model_type="sound")
    install(tmp_path, f"{module}_sound", sound, f"sound = {module}_sound")
    monkeypatch.syspath_prepend(tmp_path)
    FAMILIES.forget()
    with pytest.warns(RuntimeWarning, match=rf"(?s)plug-in 'faulty' \({module}.*{reason}") as warned:
        assert [known.model_type for known in families()] == sorted([*names, "sound"])
    assert len(warned) == 1
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        (failure,) = failures()
        assert module in failure
        patch(tiny.model("llava"), "divprune", keep=0.25).remove()
    if case in ("cannot be made", "breaks off"):
        with pytest.raises(UnsupportedModel, match=rf"(?s)house_llava\) cannot be pruned: plug-in 'faulty'.*{reason}"):
            patch(house(), "divprune", keep=0.25)


def test_a_plug_in_may_look_up_families_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from vtprune.model_adapters import families\nassert families()\n"
    code += PLUGIN.format(decorator="@family", model_type="house_llava")
    install(tmp_path, "families_looking", code, "looking = families_looking")
    monkeypatch.syspath_prepend(tmp_path)
    FAMILIES.forget()
    assert "house_llava" in [known.model_type for known in families()]
    assert failures() == []


def test_old_names_still_lead_to_the_list() -> None:
    from vtprune.model_adapters import generic

    found = families()
    assert [known.model_type for known in found if known.status == "tested"] == generic.TESTED
    assert [known.model_type for known in found if known.status == "same shape"] == generic.SAME_SHAPE
    assert generic.REFUSED["mllama"] == "its image tokens are not in the sequence (cross-attention)"
    with pytest.raises(AttributeError, match="has no attribute 'LAYOUTS'"):
        generic.LAYOUTS  # noqa: B018
