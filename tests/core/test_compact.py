"""`Compaction` against slow loops over rows and positions."""

from __future__ import annotations

import pytest
import torch

from vtprune import UnsupportedCall
from vtprune.compact import Compaction, causal_mask, hide, mask_for, tensor_mask

ROWS = {
    "equal": [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]],
    "ragged": [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 1, 0, 1, 0, 1]],
    "single": [[0, 1, 1, 0, 0, 1]],
    "all": [[1, 1, 1]],
}


def cut_of(name: str) -> tuple[torch.Tensor, Compaction]:
    keep = torch.tensor(ROWS[name], dtype=torch.bool)
    return keep, Compaction.of(keep, keep.sum(1).tolist())


@pytest.mark.parametrize("name", ROWS)
def test_index_valid_and_src_say_which_token_stands_where(name: str) -> None:
    keep, c = cut_of(name)
    for b, row in enumerate(keep.tolist()):
        kept = [i for i, k in enumerate(row) if k]
        pads = c.n - len(kept)
        assert c.index[b, pads:].tolist() == kept
        if c.valid is not None:
            assert c.valid[b].tolist() == [False] * pads + [True] * len(kept)
        else:
            assert pads == 0
        for i in range(len(row)):
            before = [j for j in kept if j <= i]
            answers = kept.index(before[-1]) if before else 0
            assert c.src[b, i] == pads + answers


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", [("B", "L", 3), ("B", "L"), (2, "B", "L"), (1, "L", 3), (3, 1, "L")])
def test_cut_gathers_along_any_dimension(name: str, shape: tuple) -> None:
    keep, c = cut_of(name)
    size = {"B": keep.shape[0], "L": keep.shape[1]}
    x = torch.randn([size.get(s, s) for s in shape])
    dim = shape.index("L")
    out = c.cut(x, dim - len(shape))
    full = x.expand(*x.shape[: dim - 1], keep.shape[0], *x.shape[dim:])
    for b in range(keep.shape[0]):
        expected = full.select(dim - 1, b).index_select(dim - 1, c.index[b])
        assert torch.equal(out.select(dim - 1, b), expected)


@pytest.mark.parametrize("name", ROWS)
def test_restore_answers_every_position(name: str) -> None:
    keep, c = cut_of(name)
    h = torch.randn(keep.shape[0], c.n, 4)
    out = c.restore(h)
    for b in range(keep.shape[0]):
        assert torch.equal(out[b], h[b][c.src[b]])


def test_two_cuts_in_a_row_are_one() -> None:
    keep = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    final = torch.tensor([[1, 0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    first = Compaction.of(keep, keep.sum(1).tolist())
    inside = final.gather(1, first.index) if first.valid is None else final.gather(1, first.index) & first.valid
    second = Compaction.of(inside, inside.sum(1).tolist())
    whole = Compaction.of(final, final.sum(1).tolist())
    both = first.then(second)
    real = whole.valid if whole.valid is not None else torch.ones_like(whole.index, dtype=torch.bool)
    assert torch.equal(both.index[real], whole.index[real])
    x = torch.randn(2, 7, 3)
    assert torch.equal(second.cut(first.cut(x, 1), 1)[real], whole.cut(x, 1)[real])
    ends = torch.tensor([0, 3, 6])  # positions that stay in both rows answer for themselves
    assert torch.equal(both.src[0, ends], whole.src[0, ends])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_cut_mask_4d_lets_the_same_pairs_attend(name: str, past: int, room: int, kind: str) -> None:
    keep, c = cut_of(name)
    batch, length = keep.shape
    allowed = torch.rand(batch, 1, length, past + length + room) < 0.7
    allowed[..., past + length :] = False
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float).min)
    out = c.cut_mask(mask, past)
    out = out if kind == "bool" else out == 0
    width = past + length + room if room else past + c.n
    assert out.shape == (batch, 1, c.n, width)
    for b in range(batch):
        for q in range(c.n):
            for k in range(width):
                if k < past:
                    expected = allowed[b, 0, c.index[b, q], k]
                elif k < past + c.n:
                    real = c.valid is None or c.valid[b, k - past]
                    expected = allowed[b, 0, c.index[b, q], past + c.index[b, k - past]] & real
                else:
                    expected = torch.tensor(False)
                assert out[b, 0, q, k] == expected


@pytest.mark.parametrize("name", ROWS)
def test_cut_mask_2d(name: str) -> None:
    keep, c = cut_of(name)
    mask = (torch.rand(keep.shape[0], 2 + keep.shape[1]) < 0.5).long()
    out = c.cut_mask(mask, 2)
    assert torch.equal(out[:, :2], mask[:, :2])
    new = mask[:, 2:].gather(1, c.index)
    assert torch.equal(out[:, 2:], new if c.valid is None else new * c.valid)


def test_mask_of_one_row_serves_a_ragged_batch() -> None:
    _, c = cut_of("ragged")
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    out = c.cut_mask(causal, 0)
    assert out.shape == (3, 1, c.n, c.n)
    assert not out[1, 0, -1, : c.n - 1].any()  # one kept token: it sees itself only
    assert out[1, 0, -1, -1]


def test_causal_mask_and_hide() -> None:
    valid = torch.tensor([[False, True, True, True]])
    mask = causal_mask(valid, 2, None)
    assert mask[0, 0].tolist() == [[False, True, True, False], [False, True, True, True]]
    additive = causal_mask(valid, 2, torch.bfloat16)
    assert torch.equal(additive == 0, mask)
    assert hide(torch.ones(1, 4, dtype=torch.long), valid).tolist() == [[0, 1, 1, 1]]


def test_mask_for_each_kind_of_attention() -> None:
    valid = torch.tensor([[False, True, True]])
    assert mask_for("flash_attention_2", valid, 1, torch.float32).tolist() == [[0, 1, 1]]
    assert torch.equal(mask_for("sdpa", valid, 2, torch.float32), causal_mask(valid, 2, None))
    assert torch.equal(mask_for("eager", valid, 2, torch.bfloat16), causal_mask(valid, 2, torch.bfloat16))


def test_cuts_are_differentiable() -> None:
    keep, c = cut_of("ragged")
    x = torch.randn(*keep.shape, 2, requires_grad=True)
    c.restore(c.cut(x, 1)).sum().backward()
    real = c.valid
    assert real is not None
    assert x.grad is not None
    assert (x.grad[keep] > 0).all()
    dropped = ~keep
    dropped.scatter_(1, c.index[:, :1], False)  # the filler of a padded slot may get gradient through restore
    assert (x.grad[dropped & ~keep] == 0).all()


def test_block_masks_are_refused() -> None:
    with pytest.raises(UnsupportedCall, match="sdpa"):
        tensor_mask(object())
