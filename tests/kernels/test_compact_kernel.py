"""`compact` against slow loops over rows and positions, and against the cuts it replaces, on every implementation."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from conftest import no_gpu
from torch import Tensor

from vtprune.compact import Compaction
from vtprune.evals.speed import bench_kernels
from vtprune.kernels import Compacted, compact, recording, use
from vtprune.kernels.dispatch import has_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(
    keep: Tensor, d: int = 5, dtype: torch.dtype = torch.float32, planes: int = 3, past: int = 4, room: int = 3
) -> dict[str, Any]:
    """Every argument there is, for a keep mask [B, L]."""
    batch, length = keep.shape
    visual = torch.rand(batch, length) < 0.6
    return {
        "keep": keep,
        "counts": keep.sum(1).tolist(),
        "hidden": torch.randn(batch, length, d).to(dtype),
        "position_ids": torch.randint(10**6, (planes, batch, length)),
        "mask": torch.randint(2, (batch, past + length + room)),
        "past": past,
        "visual": visual,
        "deepstack": [torch.randn(int(visual.sum()), 7).to(dtype) for _ in range(3)],
        "kept_visual": int((visual & keep).sum()),
    }


def mask_of(*counts: int, length: int) -> Tensor:
    """[B, L] bool with these row sums."""
    return torch.stack([torch.randperm(length) < c for c in counts])


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(v) for v in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in arguments.items()}


def same(got: Compacted, want: Compacted) -> None:
    """Bit for bit."""
    for field in fields(Compacted):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, list):
            assert len(a) == len(b), field.name
            assert all(torch.equal(x.cpu(), y) for x, y in zip(a, b)), field.name
        elif b is None:
            assert a is None, field.name
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert torch.equal(a.cpu(), b), field.name


def oracle(
    keep: Tensor, counts: list[int], hidden: Tensor, position_ids: Tensor, mask: Tensor, past: int, visual: Tensor,
    deepstack: list[Tensor], kept_visual: int,
) -> Compacted:  # fmt: skip
    """Row by row, token by token."""
    (batch, length), n = keep.shape, max(counts)
    index, valid, src, new_mask, stays, rows, sums, row_of = [], [], [], [], [], [], [0], 0
    for b in range(batch):
        kept = [i for i in range(length) if keep[b, i]]
        dropped = [i for i in range(length) if not keep[b, i]]
        pads = n - len(kept)
        index.append((dropped[-pads:] if pads else []) + kept)
        valid.append([False] * pads + [True] * len(kept))
        before = [sum(k <= i for k in kept) for i in range(length)]
        src.append([min(pads + max(seen - 1, 0), n - 1) for seen in before])
        row, new = mask[b].tolist(), mask[b].tolist()[past : past + length]
        room = row[past + length :]
        grown = [0] * (length - n) if room else []
        new_mask.append(row[:past] + [0] * pads + [new[i] for i in kept] + room + grown)
        stays.append([False] * pads + [bool(visual[b, i]) for i in kept])
        for i in range(length):
            if visual[b, i]:
                rows += [row_of] if keep[b, i] else []
                row_of += 1
        sums.append(sums[-1] + len(kept))
    assert (row_of, len(rows)) == (len(deepstack[0]), kept_visual)
    return Compacted(
        index=torch.tensor(index),
        valid=torch.tensor(valid) if min(counts) < n else None,
        src=torch.tensor(src),
        hidden=torch.stack([h[i] for h, i in zip(hidden, index)]),
        position_ids=torch.stack([torch.stack([p[i] for p, i in zip(plane, index)]) for plane in position_ids]),
        mask=torch.tensor(new_mask, dtype=mask.dtype),
        visual=torch.tensor(stays),
        deepstack=[layer[rows] for layer in deepstack],
        cu_seqlens=torch.tensor(sums, dtype=torch.int32),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "length", "d"),
    [((1,), 1, 1), ((1, 2), 2, 3), ((1,), 2, 1030), ((63, 1, 20), 63, 70), ((64,), 576, 33), ((110, 7), 1000, 20)],
)
def test_everything_equals_the_oracle(
    counts: tuple[int, ...], length: int, d: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    arguments = problem(mask_of(*counts, length=length), d, dtype)
    with recording() as ran:
        same(compact(**on(device, arguments)), oracle(**arguments))
    assert ran == {"compact": backend}


@pytest.mark.parametrize("counts", [(9, 9), (9, 1), (1, 1), (0, 4), (3, 0, 9, 0)])
def test_rows_that_keep_everything_one_token_or_none(counts: tuple[int, ...], backend: str, device: str) -> None:
    arguments = problem(mask_of(*counts, length=9))
    same(compact(**on(device, arguments)), oracle(**arguments))


@pytest.mark.parametrize("counts", [(5, 5), (9, 2), (4,)])
@pytest.mark.parametrize(("past", "room"), [(0, 0), (3, 0), (0, 40), (2, 5)])
def test_it_replaces_the_separate_cuts(
    counts: tuple[int, ...], past: int, room: int, backend: str, device: str
) -> None:
    arguments = problem(mask_of(*counts, length=40), past=past, room=room)
    c = Compaction.of(arguments["keep"], arguments["counts"])
    visual = c.cut(arguments["visual"], 1)
    visual = visual if c.valid is None else visual & c.valid
    scattered = []
    for layer in arguments["deepstack"]:
        full = layer.new_zeros(*arguments["visual"].shape, layer.shape[1])
        full[arguments["visual"]] = layer
        scattered.append(c.cut(full, 1)[visual])
    want = Compacted(
        index=c.index,
        valid=c.valid,
        src=c.src,
        hidden=c.cut(arguments["hidden"], 1),
        position_ids=c.cut(arguments["position_ids"], -1),
        mask=c.cut_mask(arguments["mask"], past),
        visual=visual,
        deepstack=scattered,
        cu_seqlens=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
    )
    same(compact(**on(device, arguments)), want)


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 1), (2, 3)])
def test_position_ids_of_any_layout(shape: tuple[int, ...], backend: str, device: str) -> None:
    keep = mask_of(4, 6, 1, length=17)
    ids = torch.randint(99, (*shape, 17), dtype=torch.int32)
    got = compact(keep.to(device), [4, 6, 1], torch.randn(3, 17, 2, device=device), ids.to(device))
    want = Compaction.of(keep, [4, 6, 1]).cut(ids, -1)
    assert got.position_ids is not None
    assert got.position_ids.dtype == ids.dtype
    assert torch.equal(got.position_ids.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float16])
def test_masks_of_any_dtype(dtype: torch.dtype, backend: str, device: str) -> None:
    arguments = problem(mask_of(4, 6, length=17))
    arguments["mask"] = arguments["mask"].to(dtype)
    same(compact(**on(device, arguments)), oracle(**arguments))


def test_what_is_not_there_stays_away(backend: str, device: str) -> None:
    keep = mask_of(4, 6, length=17).to(device)
    got = compact(keep, [4, 6], torch.randn(2, 17, 3, device=device))
    assert (got.position_ids, got.mask, got.visual, got.deepstack) == (None, None, None, [])
    assert compact(keep, [4, 6], torch.randn(2, 17, 0, device=device)).hidden.shape == (2, 6, 0)


def test_strided_arguments(backend: str, device: str) -> None:
    arguments = problem(mask_of(9, 30, length=50), d=24)
    strided = on(device, arguments)
    for name in ("keep", "mask", "visual"):
        strided[name] = strided[name].repeat_interleave(2, 1)[:, ::2]
    strided["hidden"] = strided["hidden"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided["position_ids"] = strided["position_ids"].transpose(0, 2).contiguous().transpose(0, 2)
    strided["deepstack"] = [layer.T.contiguous().T for layer in strided["deepstack"]]
    assert not any(strided[name].is_contiguous() for name in ("keep", "mask", "visual", "hidden", "position_ids"))
    same(compact(**strided), oracle(**arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="virtual memory of the host stands in for the GPU's")
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("rows", [1, 3])
def test_states_beyond_two_to_the_31_elements(rows: int) -> None:
    step = 2**30 + 8
    storage = torch.empty(2 * step + 16, dtype=torch.uint8)  # untouched pages cost nothing
    hidden = storage.as_strided((1, 3, 16) if rows == 1 else (3, 1, 16), (step, step, 1))
    hidden.copy_(torch.randint(255, hidden.shape))
    keep = torch.ones(hidden.shape[:2], dtype=torch.bool)
    with use("triton"):
        got = compact(keep, keep.sum(1).tolist(), hidden)
    assert torch.equal(got.hidden, hidden)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("wrong", [[1, 1], [3, 9], [9, 9]])
def test_wrong_counts_on_a_device_touch_no_other_memory(wrong: list[int]) -> None:
    """Where nobody can check them, every index written stays in range."""
    from vtprune.kernels.compact import triton

    arguments = problem(mask_of(4, 6, length=17)) | {"counts": wrong}
    arguments["kept_visual"] = 1
    got = triton.compact(**arguments)
    assert got.index.amin() >= 0
    assert got.index.amax() < 17
    assert got.src.amax() < max(wrong)


def test_gradients_flow_where_they_are_asked_for(device: str) -> None:
    keep = mask_of(4, 4, length=9)
    hidden = torch.randn(2, 9, 3, device=device, requires_grad=True)
    compact(keep.to(device), [4, 4], hidden).hidden.sum().backward()
    assert torch.equal(hidden.grad.cpu(), keep[..., None].expand(2, 9, 3).float())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": torch.ones(2, 6)}, "keep .* bool"),
        ({"keep": torch.ones(6, dtype=torch.bool)}, r"keep \[B, L\]"),
        ({"counts": [3]}, "2 row sums"),
        ({"counts": [3, 7]}, r"in 0\.\.6"),
        ({"counts": [-1, 3]}, r"in 0\.\.6"),
        ({"counts": [0, 0]}, "not all 0"),
        ({"counts": [3, 4]}, r"not the row sums of keep, \[3, 2\]"),
        ({"keep": torch.ones(0, 6, dtype=torch.bool), "counts": []}, "not all 0"),
        ({"keep": torch.ones(2, 0, dtype=torch.bool), "counts": [0, 0]}, "not all 0"),
        ({"hidden": torch.ones(2, 5, 4)}, r"hidden \[2, 6, D\]"),
        ({"hidden": torch.ones(2, 6)}, r"hidden \[2, 6, D\]"),
        ({"position_ids": torch.ones(3, 6)}, r"position_ids \[3, 6\]"),
        ({"position_ids": torch.ones(6)}, r"position_ids \[6\]"),
        ({"mask": torch.ones(2, 1, 6, 6)}, r"mask \[2, 1, 6, 6\]"),
        ({"mask": torch.ones(2, 9), "past": 4}, r"K >= past \+ L = 10"),
        ({"past": -1}, "past=-1"),
        ({"visual": torch.ones(2, 5, dtype=torch.bool)}, r"visual must be \[2, 6\]"),
        ({"visual": None}, "need visual"),
        ({"kept_visual": None}, "kept_visual=None"),
        ({"kept_visual": 13}, r"in 0\.\.12"),
        ({"kept_visual": 4}, "5 of them kept"),
        ({"deepstack": [torch.ones(11, 2)]}, "deepstack has 11 rows"),
        ({"deepstack": [torch.ones(12, 2), torch.ones(12, 3)]}, "one shape"),
        ({"deepstack": [torch.ones(12)]}, r"\[S, W\]"),
        ({"mask": torch.ones(2, 9, device="meta")}, "several devices"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    keep = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 1, 0, 0, 1]]).bool()
    good = {
        "keep": keep,
        "counts": [3, 2],
        "hidden": torch.ones(2, 6, 4),
        "visual": torch.ones_like(keep),
        "deepstack": [torch.ones(12, 2)],
        "kept_visual": 5,
    }
    with pytest.raises(ValueError, match=message):
        compact(**{**good, **change})


@pytest.mark.gpu
@no_gpu
def test_on_a_gpu_nobody_waits_and_a_graph_replays_it() -> None:
    arguments = on("cuda", problem(mask_of(40, 64, length=576), d=256, dtype=torch.bfloat16))
    want = compact(**arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        compact(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = compact(**arguments)
    graph.replay()
    assert torch.equal(got.hidden, want.hidden)
    assert torch.equal(got.cu_seqlens, want.cu_seqlens)


def test_the_benchmark_refuses_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        bench_kernels.kernels("cuda")
