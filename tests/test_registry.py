"""Registration by decorator, creation by name, plug-ins through entry points."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vtprune
from vtprune import Assignment, Method, Visual, registry

PAPER = "https://example.org/paper"


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests register into a copy."""
    vtprune.methods()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    yield
    registry._load.cache_clear()


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


def install(folder: Path, name: str, code: str, entry: str) -> None:
    """A minimal distribution, as pip would lay it out."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vtprune.methods]\n{entry}\n")


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
    registry._load.cache_clear()
    assert "last" in [cls.name for cls in vtprune.methods()]
    assert vtprune.create("last")(Visual(torch.zeros(5, 1), 2)).idx.tolist() == [3, 4]


def test_a_plug_in_may_name_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decorator = f'@vtprune.register("tail", paper="{PAPER}", seam="pre_llm")'
    install(tmp_path, "vtprune_tail", PLUGIN.format(decorator=decorator), "tail = vtprune_tail")
    monkeypatch.syspath_prepend(tmp_path)
    registry._load.cache_clear()
    assert vtprune.create("tail").name == "tail"


def test_a_plug_in_without_decorator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "vtprune_bare", PLUGIN.format(decorator=""), "bare = vtprune_bare:Last")
    monkeypatch.syspath_prepend(tmp_path)
    registry._load.cache_clear()
    with pytest.raises(ValueError, match=r"plug-in 'bare'.*not registered.*@vtprune\.register"):
        vtprune.methods()
