"""The parity tool: on the stored outputs where they are, and on small vectors made here that must pass or fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch

from vtprune.evals import parity

FAMILIES = (
    *("divprune_", "fastv_kvcache", "fastv_prefill", "flowcut_", "flowcutqwen_", "hiprune_", "recoverable_"),
    *(
        "aim_inllm",
        "dycoke_kv_",
        "video_aim_prune",
        "video_dycoke_kv_",
        "holitom_inner_",
        "pyramiddrop_",
        "sparsevlm_",
        "spatten_llm_kv",
        "todre_spec_",
        "transprune_",
        "video_holitom_inner",
    ),
    *("video_aim_merge", "video_aim_image", "video_dycoke_ttm", "video_fastvid", "video_holitom_edge"),
    *("video_holitom_outer", "video_prunevid", "video_vidcom2"),
    *("leaders_prumerge_", "leaders_prunesid_", "leaders_vispruner_", "leaders_vscan_"),
    *("video_llava_pool", "visionzip_", "diffrate_", "ssm_scan_", "tome_", "topvim_prune_", "zerotprune_spec_"),
)


def divprune_vector(n: int = 20) -> dict[str, Any]:
    x = torch.randn(n, 8)
    arrays: dict[str, Any] = {"features": x.numpy(), "budgets": np.array([3, 8])}
    for k in (3, 8):
        order = oracles.divprune(x, k)
        arrays |= {f"order_{k}": np.array(order), f"kept_{k}": np.array(sorted(order))}
    return arrays


def todre_vector(n: int = 20, thumbnail: int = 6) -> dict[str, Any]:
    x, cls = torch.randn(n, 8), torch.rand(n)
    pivot = oracles.todre_pivot(x, "cls", range(thumbnail), cls)
    arrays: dict[str, Any] = {
        "features": x.numpy(),
        "cls_attention": cls.numpy(),
        "thumbnail_tokens": np.array(thumbnail),
        "pivot": np.array(pivot),
        "budgets": np.array([5]),
    }
    for name, objective in (("maxsum", "maxsum"), ("kcenter", "maxmin")):
        order = oracles.diverse(x, 5, objective, pivot)
        arrays |= {f"order_{name}_k5": np.array(order), f"keep_{name}_k5": np.array(sorted(order))}
    return arrays


def pool_vector() -> dict[str, Any]:
    x = torch.randn(2, 25, 4)
    frames = x.view(2, 5, 5, 4).permute(0, 3, 1, 2)
    bilinear = torch.nn.functional.interpolate(frames, size=(3, 3), mode="bilinear")
    average = torch.nn.functional.avg_pool2d(frames, 2)
    outs = {"bilinear": bilinear, "average": average}
    return {"x": x.numpy(), **{f"out_{k}": v.flatten(2).transpose(1, 2).numpy() for k, v in outs.items()}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, arrays in (
        ("divprune_a", divprune_vector()),
        ("todre_spec_a", todre_vector()),
        ("video_llava_pool_a", pool_vector()),
        ("model_weights", {"w": np.zeros(1)}),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    return tmp_path


def corrupt(path: Path, key: str, change: Any) -> None:
    arrays = dict(np.load(path))
    arrays[key] = change(arrays[key])
    np.savez(path, **arrays)


def statuses(folder: Path, *only: str) -> dict[str, str]:
    return {row.case: row.status for row in parity.run(folder, only)}


def test_every_stored_output_of_the_known_families(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = shared / "golden"
    code = parity.main([str(golden), "--only", *FAMILIES, "--json"])
    seen = json.loads(capsys.readouterr().out)
    assert [c for c in seen["cases"] if c["status"] != "passed"] == []
    assert code == 0
    assert seen["passed"] == sum(path.name.startswith(FAMILIES) for path in golden.glob("*.npz")) >= len(FAMILIES)


def test_good_vectors_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 passed, 0 failed, 0 unknown" in out
    assert "divprune_a" in out
    assert "model_weights" not in out


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("divprune_a", "order_8", lambda a: a[::-1], "order at 8"),
        ("divprune_a", "kept_3", lambda a: a + 1, "kept at 3"),
        ("divprune_a", "features", lambda a: np.roll(a, 1, 0), "order at 3"),
        ("divprune_a", "features", lambda a: a * np.nan, "ValueError: feature rows of unit 0"),
        ("divprune_a", "budgets", lambda a: a + 1, "KeyError"),
        ("todre_spec_a", "pivot", lambda a: a + 1, "pivot"),
        ("todre_spec_a", "keep_kcenter_k5", lambda a: a[:-1], "5 against 4 stored"),
        ("video_llava_pool_a", "out_average", lambda a: a + 2e-4, "average: differs by 0.0002"),
        ("video_llava_pool_a", "out_bilinear", lambda a: a[:, :-1], "shape"),
        ("video_llava_pool_a", "out_bilinear", lambda a: a * np.nan, "bilinear: differs by nan"),
    ],
)
def test_a_wrong_vector_fails(
    name: str, key: str, change: Any, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt(folder / f"{name}.npz", key, change)
    assert parity.main([str(folder), "--json"]) == 1
    seen = json.loads(capsys.readouterr().out)
    assert (seen["passed"], seen["failed"]) == (2, 1)
    (failed,) = (c for c in seen["cases"] if c["status"] == "failed")
    assert failed["case"] == name
    assert message in failed["detail"]


def test_unknown_prefixes_are_counted_and_harmless(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(folder / "unheard_of.npz", x=np.zeros(1))
    assert parity.main([str(folder)]) == 0
    assert "3 passed, 0 failed, 1 unknown" in capsys.readouterr().out


def test_only_selects_by_prefix(folder: Path) -> None:
    assert statuses(folder, "divprune") == {"divprune_a": "passed"}
    assert set(statuses(folder, "todre", "video")) == {"todre_spec_a", "video_llava_pool_a"}


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--only", "unheard_of"]])
def test_nothing_that_ran_is_no_success(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(folder / "unheard_of.npz", x=np.zeros(1))
    assert parity.main([str(folder), *arguments]) == 1
    assert "known prefixes: " in capsys.readouterr().err


def test_a_missing_directory_is_no_success(tmp_path: Path) -> None:
    assert parity.main([str(tmp_path / "missing")]) == 1


def test_an_unreadable_file_is_a_failed_case(folder: Path) -> None:
    (folder / "divprune_b.npz").write_bytes(b"no archive")
    assert statuses(folder) | {"divprune_b": "failed"} == statuses(folder)


def test_repeated_official_picks_are_compared_up_to_the_repeat(folder: Path) -> None:
    """The official loop returned token 4 twice; ours must agree before, and be distinct after."""
    path = folder / "divprune_a.npz"

    def repeat(order: np.ndarray) -> np.ndarray:
        return np.concatenate([order[:5], order[:1], order[5:7]])

    corrupt(path, "order_8", repeat)
    (row,) = parity.run(folder, ["divprune"])
    assert row.status == "passed"
    assert "1 compared up to the first repeated official pick" in row.detail
    corrupt(path, "order_8", lambda a: np.concatenate([a[1:2], a[:1], a[2:]]))
    assert statuses(folder, "divprune") == {"divprune_a": "failed"}


def test_a_prefix_has_one_case() -> None:
    with pytest.raises(ValueError, match=r"@case\('divprune_'\): the prefix is taken by divprune"):
        parity.case("divprune_")(lambda arrays, folder: "")


def test_the_longest_prefix_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_runners", dict(parity._runners))
    parity.case("divprune_a")(lambda arrays, folder: "the special one")
    assert next(row.detail for row in parity.run(folder) if row.case == "divprune_a") == "the special one"
