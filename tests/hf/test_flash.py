"""What a flash-attention kernel would be given, checked on CPU by one written with sdpa.

No flash kernel runs here, so this shows the contract only: padding masks are [B, K] over the stored keys (or None), and
position ids have no gaps, because transformers takes gaps for packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterator

import families
import pytest
import reference
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import vtprune
from vtprune import Stage

seen: list[tuple[int, torch.Tensor | None, torch.Tensor | None]] = []


def padded_causal(module, query, key, value, attention_mask=None, *, scaling=None, position_ids=None, **_):
    """[B, H, Q, d] x [B, G, K, d] with a padding mask [B, K] or None, causal from the lower right corner."""
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        assert attention_mask.shape[1] >= keys
        attention_mask = attention_mask[:, -keys:]
    seen.append((queries, position_ids, attention_mask))
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :].bool()
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, allowed, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def model() -> Iterator[torch.nn.Module]:
    AttentionInterface.register("flash_on_paper", padded_causal)
    AttentionMaskInterface.register("flash_on_paper", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    model = families.fresh("llava")
    model.get_decoder().config._attn_implementation = "flash_on_paper"
    yield model
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("flash_on_paper", None)


STAGES = {
    "before": [Stage("llm", vtprune.create("divprune"), keep=0.4)],
    "inside": [Stage(2, vtprune.create("fastv"), keep=0.3)],
    "received": [Stage(1, vtprune.create("spatten"), keep=0.6), Stage(2, vtprune.create("spatten"), keep=0.3)],
    "both": [Stage("llm", vtprune.create("divprune"), keep=0.6), Stage(2, vtprune.create("fastv"), keep=0.3)],
}


@pytest.mark.parametrize("rows", [(1,), (2, 0, 1)])
@pytest.mark.parametrize("stages", STAGES)
@torch.no_grad()
def test_padding_masks_and_positions(model, stages: str, rows: tuple[int, ...]) -> None:
    dense = families.model("llava")
    with vtprune.patch(dense, STAGES[stages]):
        _, expected = reference.greedy(dense, families.inputs("llava", rows), 4)
    seen.clear()
    with vtprune.patch(model, STAGES[stages]):
        _, actual = reference.greedy(model, families.inputs("llava", rows), 4)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    prefill = [(q, ids) for q, ids, _ in seen if q > 1]
    assert len(prefill) == len(model.get_decoder().layers)
    for _, ids in prefill:
        assert ids is None or (ids.diff() == 1).all()
