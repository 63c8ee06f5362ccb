"""Registration by decorator, creation by name, plug-ins through entry points."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from vtprune import Assignment, Method, Visual, registry
from vtprune.cli import app

PAPER = "https://example.org/paper"


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests register into a copy."""
    vtprune.methods()
    monkeypatch.setattr(registry.METHODS, "known", dict(registry.METHODS.known))
    yield
    registry.METHODS.forget()


class First(Method):
    """Keeps the first tokens."""

    step: int = 1

    def __call__(self, v: Visual) -> Assignment:
        assert v.budget is not None
        return Assignment(torch.arange(0, v.budget * self.step, self.step))


def test_a_registered_class_becomes_a_frozen_dataclass() -> None:
    @vtprune.register("first", paper=PAPER, seam="pre_llm")
    class Stepped(First):
        step: int = 1

    assert (Stepped.name, Stepped.paper, Stepped.seam) == ("first", PAPER, "pre_llm")
    method = vtprune.create("first", step=2)
    assert method(Visual(torch.zeros(9, 2), 3)).idx.tolist() == [0, 2, 4]
    assert Stepped in vtprune.methods()


def test_the_function_survives_imports_of_the_package() -> None:
    """`vtprune.methods` is a function and a package; importing the package must not hide the function."""
    import vtprune.methods.raster

    assert vtprune.methods() == registry.methods()


def test_the_list_is_sorted_and_documented() -> None:
    names = [cls.name for cls in vtprune.methods()]
    assert names == sorted(names)
    assert {"average_pool", "divprune", "fastv", "random", "todre", "uniform"} <= set(names)
    for cls in vtprune.methods():
        assert cls.paper.startswith("https://")
        assert cls.seam in registry.SEAMS
        assert isinstance(cls().needs, tuple)


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'divprune'.*taken by vtprune\.methods\.pre_llm\.divprune\.DivPrune"):
        vtprune.register("divprune", paper=PAPER, seam="pre_llm")(First)


def test_the_same_class_may_be_imported_twice() -> None:
    """A reload defines the class again under the same module and name."""
    again = type("First", (First,), {"__module__": First.__module__, "__qualname__": "First"})
    vtprune.register("first", paper=PAPER, seam="pre_llm")(First)
    assert vtprune.register("first", paper=PAPER, seam="pre_llm")(again) is registry.get("first")


def test_the_paper_is_required() -> None:
    with pytest.raises(TypeError, match="paper"):
        vtprune.register("first", seam="pre_llm")  # type: ignore[call-arg]
    for paper in ("", "arXiv 2503.02175"):
        with pytest.raises(ValueError, match="must be a URL"):
            vtprune.register("first", paper=paper, seam="pre_llm")(First)


def test_the_seam_must_be_known() -> None:
    with pytest.raises(ValueError, match="seam='decode', choose one of pre_llm, in_llm"):
        vtprune.register("first", paper=PAPER, seam="decode")(First)


@pytest.mark.parametrize("thing", [int, lambda v: v, First()])
def test_only_methods_can_be_registered(thing: object) -> None:
    with pytest.raises(TypeError, match=r"must be a class derived from vtprune\.Method"):
        vtprune.register("first", paper=PAPER, seam="pre_llm")(thing)  # type: ignore[type-var]


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(
        ValueError, match=r"unknown method 'divprun' \(did you mean 'divprune'\?\).*average_pool.*uniform"
    ):
        vtprune.create("divprun")
    with pytest.raises(ValueError, match="unknown method 'xyz'; choose one of: "):
        vtprune.create("xyz")


def test_an_unknown_option_lists_the_options() -> None:
    with pytest.raises(TypeError, match="todre has no option 'pivt'; valid options: objective, pivot, seed, memory"):
        vtprune.create("todre", pivt="cls")
    with pytest.raises(TypeError, match="uniform has no option 'seed'; valid options: none"):
        vtprune.create("uniform", seed=1)


def install(folder: Path, name: str, code: str, entry: str, group: str = "vtprune.methods") -> None:
    """A minimal distribution, as pip would lay it out."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


PLUGIN = '''
import torch, vtprune

{decorator}
class Last(vtprune.Method):
    """Keeps the last tokens."""

    def __call__(self, v):
        return vtprune.Assignment(torch.arange(v.n - v.budget, v.n))
'''


def test_plug_ins_are_found_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decorator = f'@vtprune.register("last", paper="{PAPER}", seam="pre_llm")'
    install(tmp_path, "vtprune_last", PLUGIN.format(decorator=decorator), "last = vtprune_last:Last")
    monkeypatch.syspath_prepend(tmp_path)
    registry.METHODS.forget()
    assert "last" in [cls.name for cls in vtprune.methods()]
    assert vtprune.create("last")(Visual(torch.zeros(5, 1), 2)).idx.tolist() == [3, 4]


def test_a_plug_in_may_name_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decorator = f'@vtprune.register("tail", paper="{PAPER}", seam="pre_llm")'
    install(tmp_path, "vtprune_tail", PLUGIN.format(decorator=decorator), "tail = vtprune_tail")
    monkeypatch.syspath_prepend(tmp_path)
    registry.METHODS.forget()
    assert vtprune.create("tail").name == "tail"


BROKEN = {
    "raises": ("raise RuntimeError('no licence')", "{0}", "RuntimeError: no licence"),
    "leaves": ("import sys; sys.exit(3)", "{0}", "SystemExit: 3"),
    "misses": ("import no_such_package", "{0}:Last", "No module named 'no_such_package'"),
    "names nothing": ("", "{0}:Last", "AttributeError"),
    "is a function": ("def last():\n    raise AssertionError('called')", "{0}:last", "function .* registers no method"),
    "is empty": ("", "{0}", "a module and registers no method"),
    "is a number": ("last = 7", "{0}:last", "int 7 and registers no method"),
    "is bare": (PLUGIN.format(decorator=""), "{0}:Last", r"not registered: decorate it with @vtprune\.register"),
    "takes a name": (
        PLUGIN.format(decorator=f'@vtprune.register("divprune", paper="{PAPER}", seam="pre_llm")'),
        "{0}:Last",
        r"'divprune'\): the name is taken by vtprune\.methods",
    ),
    "cannot tell its needs": (
        PLUGIN.format(decorator=f'@vtprune.register("faulty", paper="{PAPER}", seam="pre_llm")')
        + "\n    @property\n    def needs(self):\n        raise KeyError('layer')",
        "{0}",
        "KeyError: 'layer'",
    ),
    "breaks off": (
        PLUGIN.format(decorator=f'@vtprune.register("half", paper="{PAPER}", seam="pre_llm")') + "\n1 / 0",
        "{0}",
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_plug_in_that_fails_takes_nothing_else_down(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, entry, reason = BROKEN[case]
    module = "vtprune_" + case.replace(" ", "_")
    names = [cls.name for cls in vtprune.methods()]
    install(tmp_path, module, code, f"faulty = {entry.format(module)}")
    decorator = f'@vtprune.register("sound", paper="{PAPER}", seam="pre_llm")'
    install(tmp_path, f"{module}_sound", PLUGIN.format(decorator=decorator), f"sound = {module}_sound")
    monkeypatch.syspath_prepend(tmp_path)
    registry.METHODS.forget()
    with pytest.warns(RuntimeWarning, match=rf"(?s)plug-in 'faulty' \({module}.*{reason}") as warned:
        assert [cls.name for cls in vtprune.methods()] == sorted([*names, "sound"])
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        assert vtprune.create("sound").name == "sound"
        assert vtprune.create("divprune").name == "divprune"
    assert len(warned) == 1
    with pytest.raises(ValueError, match=rf"(?s)method 'faulty' is not there: plug-in 'faulty'.*{reason}"):
        vtprune.create("faulty")
    if case == "breaks off":
        with pytest.raises(ValueError, match=r"'half' is not there: plug-in 'faulty'.*ZeroDivisionError"):
            vtprune.create("half")
    (failure,) = registry.failures()
    listed = CliRunner().invoke(app, ["methods", "--json"])
    assert listed.exit_code == 0
    assert [row["name"] for row in json.loads(listed.stdout)["methods"]] == sorted([*names, "sound"])
    assert failure in listed.stderr


def test_two_plug_ins_of_one_name_are_both_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decorator = f'@vtprune.register("twin", paper="{PAPER}", seam="pre_llm")'
    for name in ("vtprune_twin_a", "vtprune_twin_b"):
        install(tmp_path, name, PLUGIN.format(decorator=decorator), f"twin = {name}")
    monkeypatch.syspath_prepend(tmp_path)
    registry.METHODS.forget()
    with pytest.warns(RuntimeWarning, match="plug-in 'twin'.*the name is taken by vtprune_twin_"):
        assert vtprune.create("twin").name == "twin"


def test_a_plug_in_whose_module_was_imported_before_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decorator = f'@vtprune.register("early", paper="{PAPER}", seam="pre_llm")'
    install(tmp_path, "vtprune_early", PLUGIN.format(decorator=decorator), "early = vtprune_early")
    monkeypatch.syspath_prepend(tmp_path)
    import_module("vtprune_early")
    registry.METHODS.forget()
    assert vtprune.create("early").name == "early"
    assert registry.failures() == []


FAMILY = """
from dataclasses import dataclass
from vtprune.registry import {registry}

@dataclass(frozen=True)
class Family:
    tokens: int

{registry}.add({name!r}, Family(7), "add({name!r})")
"""


@pytest.mark.parametrize("name", ["FAMILIES", "SIGNALS"])
def test_families_and_signals_come_by_entry_points_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, group = getattr(registry, name), {"FAMILIES": "vtprune.families", "SIGNALS": "vtprune.signals"}[name]
    made.load()  # our own must be known before a copy stands in: their modules are imported once only
    monkeypatch.setattr(made, "known", dict(made.known))
    module = f"vtprune_{name.lower()}"
    install(tmp_path, module, FAMILY.format(registry=name, name="toy"), f"toy = {module}", group)
    install(tmp_path, f"{module}_bad", "raise RuntimeError('no licence')", f"bad = {module}_bad", group)
    install(tmp_path, f"{module}_idle", "", f"idle = {module}_idle", group)
    monkeypatch.syspath_prepend(tmp_path)
    made.forget()
    with pytest.warns(RuntimeWarning, match="was left out") as warned:
        assert made.get("toy").tokens == 7
    assert len(warned) == 2
    with pytest.raises(ValueError, match=rf"{made.kind} 'bad' is not there: plug-in 'bad'.*RuntimeError: no licence"):
        made.get("bad")
    with pytest.raises(ValueError, match=f"'idle' is not there.*a module and registers no {made.kind}"):
        made.get("idle")
    with pytest.raises(ValueError, match=f"unknown {made.kind} 'toi' .*did you mean 'toy'.*choose one of: .*toy"):
        made.get("toi")
    made.forget()


def test_two_instances_of_one_class_are_two_things() -> None:
    """A name is taken, also by an instance of the class of the other; the names that are taken are listed."""
    made: registry.Registry[Counter[str]] = registry.Registry("bag", "vtprune.bags")
    one = Counter("a")
    made.add("one", one, "add('one')")
    made.add("two", Counter("b"), "add('two')")
    made.add("one", one, "add('one')")
    with pytest.raises(ValueError, match=r"add\('one'\): the name is taken by collections.Counter; .*taken: one, two"):
        made.add("one", Counter("a"), "add('one')")
    assert made.all() == [Counter("a"), Counter("b")]


def test_trust_is_marked_and_neither_inherited_nor_read_from_a_name() -> None:
    """A method of this package is trusted; one that derives from it, or stands in a module called so, is not."""
    for cls in vtprune.methods():
        assert not cls.__module__.startswith("vtprune.methods") or "_trusted" in cls.__dict__, cls
    ours = vtprune.create("divprune")
    assert ours.trusted

    class Derived(type(ours)):  # type: ignore[misc]
        pass

    class Posing(First):
        pass

    Posing.__module__ = "vtprune.methods.posing"
    assert not Derived().trusted
    assert not vtprune.register("posing", paper=PAPER, seam="pre_llm")(Posing)().trusted


def test_a_method_does_not_renumber_by_itself() -> None:
    class Mine(vtprune.Method):
        positions = "compact"

    with pytest.raises(TypeError, match=r"positions='compact' would change nothing.*official_positions"):
        vtprune.register("mine", paper=PAPER, seam="pre_llm")(Mine)
