"""What the launches of the kernels compile to for an H100 that is not here: the interpreter lets pass what a compiler
refuses.

Triton decides when it is first imported whether kernels are interpreted, so this file is also a script. It makes the
calls below on CPU tensors, with a driver that names the GPU and launches that are compiled and not run: signatures,
constants, and what is known of alignment are those of real launches. The answers of the calls are meaningless.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = tuple[str, Any]  # a name, and a function without arguments


class Compiled(NamedTuple):
    """launches: the kernels that each call starts, in order. ptx: the code of all variants of each kernel.

    missed: kernels and functions of the folder that no launch uses.
    """

    launches: dict[str, list[str]]
    ptx: dict[str, list[str]]
    missed: list[str]


@cache
def compiled(folder: str) -> Compiled:
    """Compile what the calls of a folder of `kernels` launch. Fails with the compiler's message."""
    with TemporaryDirectory() as made:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": made}
        ran = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return Compiled(**json.loads(ran.stdout))


def folders() -> list[str]:
    """The folders of `kernels` that have Triton kernels."""
    from vtprune import kernels

    return sorted(path.parent.name for at in kernels.__path__ for path in Path(at).glob("*/triton.py"))


# -- the calls: every kernel in every form that it is compiled in -----------------------------------------------------


def attention() -> Iterator[Call]:
    from vtprune.kernels.attention.triton import attention_received, attention_rows

    def received(dtype: torch.dtype, d: int, mask: Tensor | None) -> Tensor:
        return attention_received(*tokens(dtype, d), mask, 0.1, None)

    def rows(dtype: torch.dtype, d: int, mask: Tensor | None) -> Tensor:
        return attention_rows(*tokens(dtype, d), mask, 0.1)

    def tokens(dtype: torch.dtype, d: int) -> tuple[Tensor, Tensor]:
        return torch.ones(2, 4, 100, d, dtype=dtype), torch.ones(2, 2, 100, d, dtype=dtype)

    yield "rows", lambda: rows(torch.float32, 16, None)  # full products of more channels take long to compile
    yield "rows, half", lambda: rows(torch.bfloat16, 64, torch.ones(100, 100).bool())
    yield "received", lambda: received(torch.float32, 16, None)
    yield "received, half", lambda: received(torch.bfloat16, 64, torch.zeros(100, 100).bfloat16())


def compact() -> Iterator[Call]:
    from vtprune.kernels.compact.triton import compact

    keep = torch.ones(2, 40).bool()
    hidden, ids, mask = torch.ones(2, 40, 128).bfloat16(), torch.ones(3, 2, 40).long(), torch.ones(2, 50).long()
    layers = [torch.ones(80, 64).bfloat16()] * 3
    yield "all", lambda: compact(keep, [20, 10], hidden, ids, mask, 5, keep, layers, 20)
    yield "states alone", lambda: compact(keep, [20, 20], hidden, None, None, 0, None, [], 0)
    far = torch.ones(1, 40, 256).bfloat16().as_strided((1, 40, 128), (2**40, 256, 2))
    yield "strides beyond int32", lambda: compact(keep[:1], [20], far, None, None, 0, None, [], 0)


def dpp_greedy() -> Iterator[Call]:
    from vtprune.kernels.dpp_greedy.triton import dpp_greedy

    for n in (576, 577, 1):
        yield f"{n} rows", lambda n=n: dpp_greedy([torch.ones(n, 64)], [1])


def facility_greedy() -> Iterator[Call]:
    from vtprune.kernels.facility_greedy.triton import facility_greedy

    x, some = [torch.rand(576, 64)], [torch.ones(576).bool()]
    yield "fast", lambda: facility_greedy(x, [2], memory="fast")
    yield "one row", lambda: facility_greedy([x[0][:1]], [1])
    yield "low, all given", lambda: facility_greedy(
        x, [2], rows=[torch.ones(3, 576)], weights=[torch.ones(576)], temperature=0.2, combine="add", excluded=some,
        memory="low",
    )  # fmt: skip


def farthest_point() -> Iterator[Call]:
    from vtprune.kernels.farthest_point.triton import farthest_point

    x, half, odd = torch.ones(576, 1024), torch.ones(576, 1024).bfloat16(), torch.ones(577, 1024)
    yield "float32", lambda: farthest_point([x], [1])
    yield "odd", lambda: farthest_point([odd], [1], weights=[torch.ones(577)], first=[0])
    yield "one row", lambda: farthest_point([x[:1]], [1])
    yield "half", lambda: farthest_point([half, odd.bfloat16()], [1, 1])
    yield "half, low", lambda: farthest_point([half], [2], memory="low", objective="maxsum")


def merge() -> Iterator[Call]:
    from vtprune.kernels.merge.triton import merge

    pairs = torch.arange(20), torch.arange(20), torch.ones(20)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(20, 256, dtype=dtype)
        yield f"{dtype}", lambda x=x: merge(x, *pairs, 20)
        yield f"{dtype}, strided", lambda x=x: merge(x[:, ::2], *pairs, 20)


def page_rank() -> Iterator[Call]:
    from vtprune.kernels.page_rank.triton import page_rank

    for dtype in (torch.float32, torch.bfloat16):
        q, start = torch.ones(2, 6, 197, 64, dtype=dtype), torch.ones(2, 6, 197)
        yield f"{dtype}", lambda q=q, start=start: page_rank(q, q, None, 0.1, 5, start, 0.1)
    many = torch.ones(1, 2, 300, 64).bfloat16()
    yield "many tokens", lambda: page_rank(many, many, None, 0.1, 5, torch.ones(1, 2, 300), 0.0)


def volume_coverage() -> Iterator[Call]:
    from vtprune.kernels.volume_coverage.triton import volume_coverage

    for memory in ("fast", "low"):
        yield memory, lambda memory=memory: volume_coverage([torch.ones(576, 64)], [2], memory=memory)
    yield "odd", lambda: volume_coverage([torch.ones(577, 64)], [1])
    yield "one row", lambda: volume_coverage([torch.ones(1, 64)], [1])


# -- the script -------------------------------------------------------------------------------------------------------


class _Driver:
    """An H100, as far as the compiler asks."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(folder: str) -> None:
    from importlib import import_module
    from pkgutil import iter_modules

    import triton
    from triton.runtime.jit import JITFunction

    from vtprune.kernels import deferring

    triton.runtime.driver.set_active(_Driver())
    run = JITFunction.run
    started: list[JITFunction] = []
    made: dict[str, dict[int, str]] = {}

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        built = run(kernel, *args, grid=grid, warmup=True, **options)
        assert built.asm["cubin"]
        started.append(kernel)
        made.setdefault(kernel.__name__, {})[id(built)] = built.asm["ptx"]
        return built

    JITFunction.run = compile_only
    launches = {}
    with deferring():
        for name, call in globals()[folder]():
            begin = len(started)
            call()
            launches[name] = [kernel.__name__ for kernel in started[begin:]]

    reached: set[int] = set()
    waiting = list(started)
    while waiting:
        kernel = waiting.pop()
        if id(kernel) not in reached:
            reached.add(id(kernel))
            named = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
            waiting += [used for used in named if isinstance(used, JITFunction)]
    package = import_module(f"vtprune.kernels.{folder}")
    modules = [import_module(f"{package.__name__}.{found.name}") for found in iter_modules(package.__path__)]
    own = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, JITFunction) and f.module == m.__name__}
    missed = [f.__name__ for at, f in own.items() if at not in reached]
    print(json.dumps({"launches": launches, "ptx": {k: list(v.values()) for k, v in made.items()}, "missed": missed}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
