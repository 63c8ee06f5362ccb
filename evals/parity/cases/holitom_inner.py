"""HoliTom's merge inside the language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vtprune import patch
from vtprune.evals.parity.compare import TOLERANCE, agree, close, listed, ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.stock import cached, decode_step, left_of, run_base, stock_llava, visual_of
from vtprune.registry import create
from vtprune.types import Visual

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@case("holitom_inner_")
def holitom_inner(arrays: Arrays, folder: Path) -> str:
    """The merge on the stored states; the whole path where the official run was causal, else its scores only."""
    embeds, visual = torch.from_numpy(arrays["inputs_embeds"]), visual_of(arrays)
    model, inputs = stock_llava(np.load(folder / "model_qwen2.npz"), embeds, visual)
    causal, before, after = (
        bool(arrays["layer_Km1_is_causal"]),
        *(torch.from_numpy(arrays[f"hidden_{at}"]) for at in ("before_merge", "after_merge_and_drop")),
    )
    agree("layer K - 1 is causal", _is_causal(model, inputs, int(arrays["K"]), before), causal)
    with patch(model, "holitom_inner", layer=int(arrays["K"]), keep=left_of(arrays)) as handle:
        out = run_base(model, inputs)
        agree("cached tokens per layer", cached(out), arrays["kv_lengths_after_prefill"])
        last, decoded = handle.last, decode_step(model, out, arrays) if causal else None
    assert last is not None
    (unit,) = last.units
    assert unit.scores is not None
    same("order of the kept", ordered(unit.assignment) + visual.start, arrays["topk_order"])
    same("kept", last.index[0], arrays["kept_indices"])
    worst = [close("scores", unit.scores, arrays["score_visual"])]
    signals = {need: torch.from_numpy(arrays["score_visual"]) for need in create("holitom_inner").needs}
    merged = create("holitom_inner")(Visual(before[visual], len(unit.idx), signals=signals)).apply(before[visual])
    worst.append(close("merged states", merged, after[visual.start : visual.start + len(merged)]))
    if decoded is None:  # the official slip: that layer looked ahead
        return f"order and tokens kept; scores and merge within {max(worst):.1g}; the rest is of a layer without mask"
    worst.append(close("states", out.last_hidden_state[0, last.index[0]], arrays["last_hidden_state"]))
    return f"stock LLaVA with Qwen2, order and {decoded[1]} tokens; all within {max(worst + decoded[0]):.1g}"


def _is_causal(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], k: int, stored: Tensor) -> bool:
    """True if the stored states that enter layer k are those of the unpruned model, whose layers are causal."""
    seen: list[Tensor] = []
    see = lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    with model.get_decoder().layers[k].register_forward_pre_hook(see, with_kwargs=True):
        run_base(model, inputs)
    return bool((seen[0][0] - stored).abs().max() <= TOLERANCE)


@case("video_holitom_inner")
def video_holitom_inner(arrays: Arrays, folder: Path) -> str:
    """Kept tokens, where each dropped one goes, and the merged states."""
    hidden, row = torch.from_numpy(arrays["hidden"])[0], torch.from_numpy(arrays["attn_last"])[0].mean(0)
    start, n = int(arrays["img_start"]), int(arrays["img_len"])
    x, method, worst, counts = hidden[start : start + n], create("holitom_inner"), [], []
    for tag in sorted({name.split("_")[0] for name in arrays if name.startswith("b")}):
        keep = arrays[f"{tag}_keep"]
        inside = keep[(keep >= start) & (keep < start + n)]
        budget = round(n * (1 - real(arrays[f"{tag}_r"])))
        answer = method(Visual(x, budget, signals=dict.fromkeys(method.needs, row[start : start + n])))
        assert answer.src is not None
        assert answer.dst is not None
        same(f"kept of {tag}", answer.idx + start, inside)
        same(f"merged of {tag}", answer.src[budget:] + start, arrays[f"{tag}_merged_src"])
        same(f"targets of {tag}", answer.idx[answer.dst[budget:]] + start, arrays[f"{tag}_merged_dst"])
        whole = torch.cat([hidden[:start], answer.apply(x), hidden[start + n :]])
        worst.append(close(f"states of {tag}", whole[None], arrays[f"{tag}_hidden"]))
        counts.append(budget)
    return f"tokens and targets at {listed(counts)} of {n}; states within {max(worst):.1g}"
