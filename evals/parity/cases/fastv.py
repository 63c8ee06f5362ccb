"""FastV: the prefill and a decode step on the cache that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune import patch
from vtprune.evals.parity.compare import agree, close, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.stock import decode_step, left_of, llama_of, run_base

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from vtprune.handle import Handle


@case("fastv_prefill")
def fastv(arrays: Arrays, folder: Path) -> str:
    """The whole path: a stock LLaVA with the stored decoder weights, patched, one prefill."""
    model, inputs = llama_of(arrays, folder)
    full = close("unpruned states", run_base(model, inputs).last_hidden_state[0], arrays["last_hidden_state_full"])
    with patch(model, "fastv", layer=int(arrays["K"]), keep=int(arrays["keep"])) as handle:
        worst, _ = _fastv_prefill(model, inputs, arrays, handle)
    kept, length = len(arrays["kept_indices"]), inputs["input_ids"].shape[1]
    return f"stock LLaVA, {kept} of {length} tokens kept; scores and states within {max(full, worst):.1g}"


@case("fastv_kvcache_decode")
def fastv_decode(arrays: Arrays, folder: Path) -> str:
    """Prefill and one decode step on the returned cache: its lengths, the keys of layer K, the new token's states."""
    model, inputs = llama_of(arrays, folder)
    with patch(model, "fastv", layer=int(arrays["K"]), keep=left_of(arrays)) as handle:
        worst, out = _fastv_prefill(model, inputs, arrays, handle)
        keys = close("keys of layer K", out.past_key_values.layers[int(arrays["K"])].keys[0], arrays["keys_layer_K"])
        decoded, cached = decode_step(model, out, arrays)
    agree("id of the decoded token", inputs["input_ids"].shape[1], arrays["decode_position_id"])
    return f"stock LLaVA, {cached} tokens; all within {max(worst, keys, *decoded):.1g}"


def _fastv_prefill(
    model: LlavaForConditionalGeneration, inputs: dict[str, Any], arrays: Arrays, handle: Handle
) -> tuple[float, Any]:
    """Largest difference of scores and states, and the output; kept tokens must be equal."""
    out = run_base(model, inputs)
    last = handle.last
    assert last is not None
    scores = last.units[0].scores
    assert scores is not None
    same("kept", last.index[0], arrays["kept_indices"])
    states = out.last_hidden_state[0, last.index[0]]
    return max(
        close("scores", scores, arrays["score_visual"]), close("states", states, arrays["last_hidden_state"])
    ), out
