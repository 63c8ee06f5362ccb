"""CDPruner against a restatement of its paper in float64, with relevance from three sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Visual
from vtprune.evals import parity
from vtprune.methods.pre_llm.cdpruner import paired_relevance
from vtprune.methods.text import prompt_similarity


def crops(count: int = 3, n: int = 30, d: int = 24, p: int = 12, m: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Features [crops, n, d], embeddings of the patches [crops, n, p] and of the segments of the text [m, p]."""
    g = torch.Generator().manual_seed(count * n + m)
    x = torch.randn(count, n, d, generator=g) + torch.randn(d, generator=g)
    e = torch.randn(count, n, p, generator=g) * torch.linspace(0.5, 2, count)[:, None, None]
    return x, e, torch.randn(m, p, generator=g)


def unit(x: Tensor) -> Tensor:
    return x.double() / x.double().norm(dim=-1, keepdim=True)


def restated(x: Tensor, e: Tensor, t: Tensor, k: int, normalize: str) -> list[list[int]]:
    """https://arxiv.org/abs/2506.10967, section 3, by determinants; x: [crops, N, D]."""
    r = -(unit(e) @ unit(t).T).mean(-1)
    over = (0, 1) if normalize == "batch" else 1
    low, high = r.amin(over, keepdim=True), r.amax(over, keepdim=True)
    r = (r - low + 1e-6) / (high - low)
    found = []
    for rows, weight in zip(unit(x), r):
        kernel = weight[:, None] * (rows @ rows.T) * weight
        picks: list[int] = []
        for _ in range(k):
            grown = [
                float(torch.linalg.slogdet(kernel[[*picks, j]][:, [*picks, j]]).logabsdet) if j not in picks else -1e9
                for j in range(len(rows))
            ]
            picks.append(max(range(len(rows)), key=lambda j: (grown[j], -j)))
        found.append(picks)
    return found


def orders(method: vtprune.Method, x: Tensor, k: int) -> list[list[int]]:
    answers = method.batch([Visual(crop, k) for crop in x])
    assert all(answer.idx.tolist() == sorted(answer.order.tolist()) for answer in answers if answer.order is not None)
    return [answer.order.tolist() for answer in answers if answer.order is not None]


@pytest.mark.parametrize("normalize", ["image", "batch"])
def test_equals_the_restatement(normalize: str) -> None:
    x, e, t = crops()

    def paired(units: Sequence[Visual]) -> list[Tensor]:
        return [paired_relevance(crop, t) for crop in e]

    method = vtprune.create("cdpruner", relevance=paired, normalize=normalize)
    assert orders(method, x, 8) == restated(x, e, t, 8, normalize)


def test_crops_of_a_batch_share_one_scale_or_have_their_own() -> None:
    x, e, t = crops()
    found = [paired_relevance(crop, t) for crop in e]
    alone = [
        orders(vtprune.create("cdpruner", relevance=lambda units, r=r: [r], normalize=how), crop[None], 8)[0]
        for how in ("image", "batch")
        for crop, r in zip(x, found)
    ]
    assert alone[:3] == alone[3:]  # nothing else in the batch
    assert orders(vtprune.create("cdpruner", relevance=lambda units: found), x, 8) == alone[:3]
    together = vtprune.create("cdpruner", relevance=lambda units: found, normalize="batch")
    assert orders(together, x, 8) != alone[:3]


def test_relevance_of_the_prompt_is_ours_and_says_so() -> None:
    x = crops(1)[0]
    text = torch.randn(4, x.shape[2], generator=torch.Generator().manual_seed(5))
    v = Visual(x[0], 9, text=text)
    answer = vtprune.create("cdpruner")(v)
    r = prompt_similarity(Visual(x[0], 9, text=text))
    given = vtprune.create("cdpruner", relevance=lambda units: [r])(Visual(x[0], 9))
    assert torch.equal(answer.idx, given.idx)
    assert "LLM's own embeddings" in v.state["note"]
    other = vtprune.create("cdpruner")(Visual(x[0], 9, text=-text))
    assert not torch.equal(answer.idx, other.idx)
    alone = vtprune.create("cdpruner", relevance="none")(Visual(x[0], 9, text=text))
    empty = Visual(x[0], 9)
    assert torch.equal(vtprune.create("cdpruner")(empty).idx, alone.idx)
    assert "no text" in empty.state["note"]


def test_the_dpp_alone_reads_no_text() -> None:
    assert vtprune.create("cdpruner").reads_text
    assert vtprune.create("cdpruner", relevance=lambda units: []).reads_text
    assert not vtprune.create("cdpruner", relevance="none").reads_text


def test_more_tokens_than_the_rank_and_a_constant_relevance() -> None:
    """Officially NaN: 27 distinct tokens of 32 with 16 channels."""
    x = crops(1, n=60, d=16)[0]
    for k in (16, 32, 60):
        method = vtprune.create("cdpruner", relevance=lambda units: [torch.full((60,), 0.3)])
        answer = method(Visual(x[0], k))
        assert len(set(answer.idx.tolist())) == k
        assert torch.equal(answer.idx, vtprune.create("cdpruner", relevance="none")(Visual(x[0], k)).idx)


def test_bad_options_and_answers() -> None:
    with pytest.raises(ValueError, match="relevance='clip': choose 'prompt', 'none', or a function"):
        vtprune.create("cdpruner", relevance="clip")
    with pytest.raises(ValueError, match="normalize='crop': choose 'image' or 'batch'"):
        vtprune.create("cdpruner", normalize="crop")
    method = vtprune.create("cdpruner", relevance=lambda units: [torch.zeros(3)])
    with pytest.raises(ValueError, match=r"relevance answered \[3\]: it owes one value to each of 5 tokens"):
        method(Visual(torch.randn(5, 4), 2))
    method = vtprune.create("cdpruner", relevance=lambda units: [torch.full((5,), torch.nan)])
    with pytest.raises(ValueError, match="relevance scores of unit 0 hold 5 NaN or Inf"):
        method(Visual(torch.randn(5, 4), 2))


def stored(path: Path, official: list[list[int]], x: Tensor, e: Tensor, t: Tensor) -> None:
    mask = np.zeros((len(x), x.shape[1]), dtype=bool)
    np.put_along_axis(mask, np.array(official), True, 1)
    arrays = {"features": x.numpy(), "image_embeds": e.numpy(), "text_embeds": t.numpy(), "budgets": np.array([8])}
    np.savez(path / "leaders_cdpruner_small.npz", **arrays, order_8=np.array(official), mask_8=mask)


def test_the_parity_case(tmp_path: Path) -> None:
    x, e, t = crops()
    official = restated(x, e, t, 8, "batch")
    stored(tmp_path, official, x, e, t)
    (row,) = parity.run(tmp_path)
    assert (row.status, row.detail) == ("passed", "picks and order at 8 of 30, 3 crop(s), 2 segment(s) of text")
    official[1][2:4] = official[1][3:1:-1]
    stored(tmp_path, official, x, e, t)
    (row,) = parity.run(tmp_path)
    assert row.status == "failed"
    assert "order of crop 1 at 8" in row.detail
