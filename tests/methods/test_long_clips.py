"""A long clip: no rule before the LLM makes a tensor of N x N, and the size of its blocks changes no choice."""

from __future__ import annotations

import pytest
import torch
from greedy import Watch
from torch import Tensor

import vtprune
from vtprune import Signal, Visual
from vtprune.kernels.facility_greedy import reference as facility
from vtprune.kernels.farthest_point import reference as farthest
from vtprune.kernels.volume_coverage import reference as volume
from vtprune.methods.pre_llm import token_correlation
from vtprune.methods.shared import density_peaks, doubles, nearest, thinning
from vtprune.signals import kind_of

NAMES = [cls.name for cls in vtprune.methods() if cls.seam == "pre_llm"]
GRID, WIDTH = (32, 8, 8), 16
N = 32 * 8 * 8
COVERED = 64  # rows that `volcov` covers


def clip(budget: int = N // 10) -> Visual:
    """Still scenes of eight frames with noise, and all signals."""
    g = torch.Generator().manual_seed(0)
    scenes = torch.randn(4, 1, 64, WIDTH, generator=g).expand(-1, 8, -1, -1).reshape(N, WIDTH)
    x = scenes + 0.5 * torch.randn(N, WIDTH, generator=g)
    shapes = {"[N]": (N,), "[N, C]": (N, 24), "[N, d]": (N, 8)}
    needs: set[Signal] = {need for name in NAMES for need in vtprune.create(name).needs}
    signals = {need: torch.rand(shapes[kind_of(need).shape], generator=g) for need in sorted(needs, key=str)}
    words = torch.randn(5, WIDTH, generator=g)
    return Visual(x, budget, GRID, video=True, signals=signals, text=words)


def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held at a time is small, and this clip counts as long."""
    for module, constant, value in (
        (facility, "BLOCK", 32),
        (facility, "HELD_BYTES", 4 * 50 * N),
        (farthest, "GRAM_BYTES", 4 * 512**2),
        (farthest, "MATRIX_ROWS", 512),
        (farthest, "BLOCK_BYTES", 4 * 32 * N),
        (volume, "BLOCK", 32),
        (volume, "COVERED_BYTES", 4 * COVERED * N),
        (volume, "FEW", COVERED),
        (token_correlation, "ROWS", 32),
        (density_peaks, "CACHED", 2**15),
        (doubles, "ROWS", 7),
        (nearest, "CELLS", 7 * N),
        (nearest, "BLOCK", 32),
        (thinning, "CELLS", 7 * N),
    ):
        monkeypatch.setattr(module, constant, value)


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_grows_with_the_square(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    v = clip()
    whole = vtprune.create(name)(v)
    in_small_blocks(monkeypatch)
    with Watch() as watch:
        answer = vtprune.create(name)(v)
    assert watch.largest <= N * 128  # twice a frame; the guesses of `farthest_point` hold 512 x 512
    if name in ("auto", "volcov"):
        return  # covers a part of a long clip
    for part in ("idx", "order", "src", "dst"):
        one, other = (getattr(a, part) for a in (whole, answer))
        assert (one is None and other is None) or torch.equal(one, other), part


def test_likest_tokens_are_those_of_a_stable_sort() -> None:
    """With many equal likenesses, in blocks of any size."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randint(-1, 2, (60, 3), generator=g).float()
    centres, among = torch.randperm(60, generator=g)[:9], torch.rand(60, generator=g) < 0.4
    bias = torch.randint(2, (60,), generator=g).float()
    like = (keys[centres] @ keys.T + bias).masked_fill(~among, -torch.inf).scatter(1, centres[:, None], -torch.inf)
    expected = like.argsort(dim=1, descending=True, stable=True)
    for few in (1, 7, 60):
        assert torch.equal(nearest.likest(keys, centres, few, among=among, bias=bias), expected[:, :few])
    assert nearest.likest(keys, centres[:0], 4).shape == (0, 4)


def test_mean_likeness_is_that_of_the_matrix() -> None:
    unit = torch.nn.functional.normalize(torch.randn(50, 6, dtype=torch.float64) + 1, dim=1)
    alike = unit @ unit.T
    torch.testing.assert_close(doubles.mean_likeness(unit, itself=True), alike.triu().mean())
    torch.testing.assert_close(doubles.mean_likeness(unit, itself=False), alike.triu(1).sum() / (50 * 49 / 2))


def test_what_is_whole_is_not_copied() -> None:
    """An image alone in its row, and its signals, are read where they lie."""
    x, keys = torch.randn(64, 8), torch.randn(64, 4)
    seen: list[Tensor] = []

    class Spy(vtprune.Method):
        needs = (Signal("keys", -1),)

        def __call__(self, v: Visual) -> vtprune.Assignment:
            seen.extend([v.x, v.signals[self.needs[0]]])
            return vtprune.Assignment(torch.arange(v.budget or 1))

    vtprune.select(x, vtprune.Stage("pre_llm", Spy(), keep=3), grid=(1, 8, 8), signals={"keys": keys})
    assert [t.data_ptr() for t in seen] == [x.data_ptr(), keys.data_ptr()]
