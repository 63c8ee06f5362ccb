"""Shared fixtures: one thread, fixed seeds, and the optional workshop directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

TRACED = 12  # cases of one test that coverage traces

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


MATRIX = "default, rest (what the default leaves out) or whole; without it whole with -k or a test's id, else default"


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ["default", "rest", "whole"]
    parser.addoption("--matrix", choices=choices, help=f"how much of the tests marked `matrix`: {MATRIX}")


def profile_of(config: pytest.Config) -> str:
    """Which part of the matrix is wanted. Who asks for cases by name gets those that they named."""
    named = config.option.keyword or any("::" in str(arg) for arg in config.args)
    return config.option.matrix or ("whole" if named else "default")


def pytest_report_header(config: pytest.Config) -> str:
    return f"matrix of methods and families: {profile_of(config)} (--matrix default|rest|whole)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what does not belong to the profile; a case does where its method or its family is named by the mark."""
    profile = profile_of(config)
    out = [item for item in items if profile != "whole" and _is_of_default(item) != (profile == "default")]
    config.hook.pytest_deselected(items=out)
    left = set(items) - set(out)
    items[:] = [item for item in items if item in left]
    if config.pluginmanager.hasplugin("_cov"):
        _trace_some(items)


def _trace_some(items: list[pytest.Item]) -> None:
    """Of a test with many cases trace a few for coverage: the others would reach the same lines, three times slower."""
    cases: dict[object, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(getattr(item, "function", item), []).append(item)
    for same in cases.values():
        step = -(-len(same) // TRACED)
        for i, item in enumerate(same):
            if i % step:
                item.add_marker("no_cover")


def _is_of_default(item: pytest.Item) -> bool:
    mark, case = item.get_closest_marker("matrix"), getattr(item, "callspec", None)
    if mark is None or case is None or not {"method", "family"} <= case.params.keys():
        return True
    return case.params["method"] in mark.kwargs["methods"] or case.params["family"] in mark.kwargs["families"]


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # Triton reads it when a kernel is first imported
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _untraced_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test is not traced, the commands that it starts are not either."""
    if request.node.get_closest_marker("no_cover"):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory with golden vectors beside the checkout; tests that want it are skipped where it is missing."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is missing: the stored outputs of the official code are not part of the package")
    return path


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel is tested."""
    return request.param


@pytest.fixture(params=[torch.nan, -torch.inf])
def poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written yet holds NaN or a score nobody can beat, or an index far out of range."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **options: object) -> Tensor:
            out = make(*args, **options)
            return out.fill_(request.param if out.is_floating_point() else 2**62)

        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poison(torch.empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        patch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
        yield


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """One implementation of the kernels, forced; uninitialised memory is NaN meanwhile, and the largest integer."""
    from vtprune.kernels import use
    from vtprune.kernels.dispatch import has_triton

    if request.param == "triton" and not has_triton():
        pytest.skip("Triton is not installed")
    if request.param == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here, so CPU tensors stay with the reference")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with use(request.param):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(False)
