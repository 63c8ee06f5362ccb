"""Between projector and LLM nothing waits for the device: a pretended GPU here, a real one in test_gpu.py."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune.core import prompt as prompts
from vtprune.core import units
from vtprune.hf import hooks, prefill
from vtprune.kernels import use
from vtprune.model_adapters.generic import Features
from vtprune.types import Signal, Span
from vtprune.units import parts_of

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2")
# These make their picks on the host, from the grid or a seed, where a pretended tensor has no values to work with.
WAITING = ("average_pool", "random", "uniform")
# These cut a video into segments on the host, at the price of one transfer a video (two where it is said).
SEGMENTING = ("fastvid", "holitom", "prunevid")


class Waits(TorchDispatchMode):
    """Names of the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        moved = name in ("_to_copy", "copy_") and _crosses(args, out)
        if name in WAITS or by_mask or moved:
            self.seen.append(name)
        return out


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
    return torch.rand(*(n, 8)[: 1 if need.kind in ("cls", "cls_full", "received") else 2], device="cuda")


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
