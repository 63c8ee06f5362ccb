"""Nothing waits for the device, in a method or between projector and LLM: a pretended GPU here, a real one in
test_gpu.py.
"""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from test_methods import visual
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune.core import prompt as prompts
from vtprune.core import units
from vtprune.hf import hooks, prefill
from vtprune.kernels import deferring, host, use
from vtprune.model_adapters.generic import Features
from vtprune.types import Signal, Span
from vtprune.units import parts_of

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2")
# These make their picks on the host, from the grid or a seed, where a pretended tensor has no values to work with.
WAITING = ("average_pool", "random", "uniform")
# These cut a video into segments on the host, at the price of one transfer a video (two where it is said).
SEGMENTING = ("fastvid", "flashvid", "holitom", "prunevid")
# Of the others, those that wait on purpose. A method that joins them says so in its docstring and tells here why.
ON_PURPOSE = {
    "dycoke_kv": "whether the gaze has moved decides whether there is anything to choose at a decode step",
    "token_transforming": "how many new tokens an old one feeds depends on the data",
}
ADVICE = """{name} waits for the device, by `{operation}` at
  {place}
so that a GPU stands still until the host has read a number. What waits: `.item()`, `.tolist()`, `int(t)`, `bool(t)`,
`if t > 0`, indexing with a tensor of no dimensions (`x[t.argmax()]`) or with a mask (`x[mask]`), `nonzero()`, `.cpu()`.
Instead: `x.index_select(0, t.argmax().view(1))`, `torch.where(mask, x, 0)`, `topk` and `sort` for what is best, and
`check(holds, error)` of vtprune.kernels for a condition that must hold. Counts come from `v.budget` and from shapes."""


class Waits(TorchDispatchMode):
    """Names of the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITS or by_mask:  # before the call: a pretended tensor has no value to answer with
            self._note(name)
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and _crosses(args, out):
            self._note(name)
        return out

    def _note(self, name: str) -> None:
        ours = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
        self.seen.append(name)
        self.places.append(f"{ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}")


def _crosses(args: Any, out: Any) -> bool:
    devices = {t.device.type for t in (*args, out) if isinstance(t, Tensor) and t.dim()}
    return len(devices) > 1


class Pretended:
    """The copy to the host that a pretended GPU cannot make; what is read was put there before."""

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def __call__(self, x: Tensor) -> Pretended:
        return self

    def read(self) -> Tensor:
        return self.host


def on_gpu(unit: vtprune.Visual) -> vtprune.Visual:
    """The same unit without its values, on a pretended GPU."""

    def moved(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    return dataclasses.replace(unit, x=moved(unit.x), signals={kind: moved(s) for kind, s in unit.signals.items()})


def waits_of(method: vtprune.Method, monkeypatch: pytest.MonkeyPatch) -> Waits:
    """What a method makes the host wait for when it chooses for an image and a video."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # there is no driver to start
    monkeypatch.setattr(host, "HostCopy", lambda flags: Pretended(torch.ones(flags.shape, dtype=torch.bool)))
    units = [visual(30, 7, 1, grid=(1, 5, 6)), visual(60, 11, 2, grid=(4, 3, 5))]
    waits = Waits()
    with FakeTensorMode(allow_non_fake_inputs=True), use("reference"), deferring():
        units = [on_gpu(unit) for unit in units]
        try:
            with waits:
                method.batch(units)
        except (DataDependentOutputException, DynamicOutputShapeException):
            assert waits.seen, "a wait that `WAITS` does not name"
    return waits


@pytest.mark.parametrize(
    "name", [m.name for m in vtprune.methods() if m.name not in {*WAITING, *SEGMENTING, *ON_PURPOSE}]
)
def test_no_method_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = waits_of(vtprune.create(name), monkeypatch)
    for operation, place in zip(waits.seen, waits.places, strict=True):
        pytest.fail(ADVICE.format(name=name, operation=operation, place=place), pytrace=False)


@pytest.mark.parametrize("name", ON_PURPOSE)
def test_exceptions_are_still_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits_of(vtprune.create(name), monkeypatch).seen, f"{name} waits no longer: take it off the list"


@dataclasses.dataclass(frozen=True)
class _Waiting(vtprune.Method):
    """Does one of the things that nobody may do, on purpose."""

    name = "waiting"
    fault: str = ""

    def __call__(self, v: vtprune.Visual) -> vtprune.Assignment:
        score = v.x.norm(dim=-1)
        if self.fault == "index":
            v.x[score.argmax()]
        elif self.fault == "item":
            score.max().item()
        elif self.fault == "mask":
            v.x[score > 1]
        elif self.fault == "if" and score.max() > 3:
            score = -score
        elif self.fault == "nonzero":
            (score > 1).nonzero()
        elif self.fault == "cpu":
            score.cpu()
        return vtprune.Assignment(score.topk(v.budget or 1).indices.sort().values)


@pytest.mark.parametrize("fault", ["index", "item", "mask", "if", "nonzero", "cpu", ""])
def test_the_watch_names_the_line_that_waits(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = waits_of(_Waiting(fault=fault), monkeypatch)
    assert bool(waits.seen) == bool(fault)
    if fault:
        lines = {"index": "v.x[score.argmax()]", "mask": "v.x[score > 1]", "item": "score.max().item()"}
        assert waits.places[0].startswith(f"{Path(__file__)}:")
        assert lines.get(fault, fault) in waits.places[0]


@pytest.mark.parametrize(
    "method", [m.name for m in vtprune.methods() if m.seam == "pre_llm" and m.name not in WAITING + SEGMENTING]
)
def test_no_host_waits_on_the_pre_llm_path(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.model("llava_next")
    n, length = 16 + 3 * 5, 40
    spans = (Span(0, (1, 4, 4)), Span(16, (1, 3, 4), newline=True, tiles=((3,), (2, 2))))
    code = torch.ones(1, length, dtype=torch.int8)
    code[0, 4 : 4 + n] = 2
    pretended = FakeTensorMode(allow_non_fake_inputs=True)

    def there_too(function: Any) -> Any:
        def on_the_device(*args: Any) -> Any:
            with pretended:
                return function(*args)

        return on_the_device

    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # there is no driver to start
    for name in ("begin", "arange_of"):
        monkeypatch.setattr(units, name, there_too(getattr(units, name)))
    monkeypatch.setattr(prefill, "HostCopy", Pretended(code))
    monkeypatch.setattr(prompts, "Clock", _NoClock)
    monkeypatch.setattr(prompts, "capturing", lambda device: False)
    monkeypatch.setattr(prompts, "DeferredChecks", _NoChecks)
    with vtprune.patch(model, method, keep=0.25) as handle, use("reference"), torch.no_grad():
        patch, stage = handle._session, handle.stages[0]
        parts_of(spans, n, stage.per, stage.newlines, False)  # once per layout, on the host
        for _ in range(2):  # the first run may copy the tokens of the parts, once per layout
            with pretended:
                call = {
                    "inputs_embeds": torch.randn(1, length, 32, device="cuda"),
                    "attention_mask": torch.ones(1, length, dtype=torch.int64, device="cuda"),
                    "position_ids": torch.arange(length, device="cuda")[None],
                }
                signals = {need: _signal(need, n) for need in patch.plan.tower_needs}
                there = torch.ones(1, length, dtype=torch.int8, device="cuda")
                begun = prefill.Prefill(patch.adapter, patch.plan, there)
                begun.start_host_copies(call)
            prefill.open_prompt(begun, call, {"image": Features([n], [spans], [signals])})
            with pretended, Waits() as waits:
                assert prefill.run_before_llm(begun)
                cut = hooks.cut_text_call(begun, call)
            assert cut["inputs_embeds"].device.type == "cuda"
            assert cut["inputs_embeds"].shape[1] < length
    assert waits.seen == []


def _signal(need: Signal, n: int) -> Tensor:
    return torch.rand(*(n, 8)[: 1 if need.kind in ("cls", "cls_full", "cls_logits", "received") else 2], device="cuda")


class _NoClock:
    def __init__(self, device: torch.device) -> None: ...

    def stop(self) -> _NoClock:
        return self


class _NoChecks:
    def __init__(self, checks: Any) -> None: ...


def test_the_watch_sees_what_waits() -> None:
    with FakeTensorMode(), Waits() as waits:
        x = torch.ones(3, device="cuda")
        x.cpu()
        torch.ones(3).to("cuda")
        x.index_select(0, torch.zeros(1, dtype=torch.int64, device="cuda"))
    assert waits.seen == ["_to_copy", "_to_copy"]
