"""Triton kernels compile for GPUs that are not here: the interpreter lets pass what the compiler would refuse.

A script of its own, because Triton decides when it is first imported whether kernels are interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPACT = {
    "keep": "*u8", "index": "*i64", "valid": "*u8", "src": "*i64", "cu_seqlens": "*i32", "L": "i32", "N": "i32",
    "hidden": "*bf16", "hidden_out": "*bf16", "hidden_b": "i32", "hidden_l": "i32", "hidden_d": 1, "D": "i32",
    "ids": "*i64", "ids_out": "*i64", "ids_p": "i32", "ids_b": "i32", "ids_l": 1, "planes": "i32",
    "mask": "*i64", "mask_out": "*i64", "mask_b": "i32", "mask_k": 1, "past": "i32", "room": "i32",
    "visual": "*u8", "visual_out": "*u8", "layers": ("*bf16",) * 3, "layers_out": ("*bf16",) * 3,
    "S": "i32", "S_out": "i32", "W": "i32", "LAYERS": 3, "SCAN": 512, "BLOCK_L": 16, "BLOCK_D": 128,
}  # fmt: skip
NOTHING = dict.fromkeys(("valid", "ids", "ids_out", "mask", "mask_out", "visual", "visual_out"))
MERGE = {
    "out": "*bf16", "x": "*bf16", "stride_n": "i32", "stride_d": 1, "src": "*i64", "w": "*fp32", "bounds": "*i64",
    "D": "i32", "BLOCK_E": 8, "BLOCK_D": 128,
}  # fmt: skip

# Module of vtprune.kernels, its kernel, and the type of every argument; what is no type is a constant.
KERNELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "compact": ("compact", "_compact", COMPACT),
    "compact, states alone": ("compact", "_compact", COMPACT | NOTHING | {"layers": (), "layers_out": (), "LAYERS": 0}),
    "compact, strides beyond int32": ("compact", "_compact", COMPACT | {"hidden_b": "i64", "hidden_d": "i64"}),
    "merge": ("merge", "_merge", MERGE),
    "merge, float32": ("merge", "_merge", MERGE | {"out": "*fp32", "x": "*fp32", "stride_d": "i32"}),
}


def test_every_kernel_compiles() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, Path(__file__)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.splitlines() == list(KERNELS)


def main() -> None:
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    for name, (module, kernel, arguments) in KERNELS.items():
        fn = getattr(import_module(f"vtprune.kernels.{module}.triton"), kernel)
        assert list(arguments) == list(fn.arg_names), name
        typed = {k: v if isinstance(v, str | tuple) else "constexpr" for k, v in arguments.items()}
        constants = {k: v for k, v in arguments.items() if typed[k] == "constexpr"}
        built = compile(ASTSource(fn, typed, constexprs=constants), target=GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"], name
        print(name)


if __name__ == "__main__":
    main()
