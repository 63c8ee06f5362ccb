"""What a prefill computed, told by what it left behind: shares of the visual tokens by layer, and FLOPs.

Every number is read from `Handle.last` and from a call that was made, none from what a recipe asks for.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from vtprune.core.cost import looks, text_cost
from vtprune.evals.speed.flops import counted

if TYPE_CHECKING:
    from vtprune import Handle, Last

NOTES = (
    "tower, LLM: the share of the visual tokens in an average layer of the vision tower and of the LLM, as the layers "
    "ran; rows are ordered by the LLM's share.",
    "FLOPs: of tower, projector and LLM prefill, of dense = 1 (2 x MAC; what a method itself computes is not counted). "
    "TTFT: time to the first token, of dense = 1, measured in turns with dense on prompts of one question.",
)


def llm_by_layer(last: Last, fed: int, visual: int) -> list[int]:
    """Visual tokens that each decoder layer ran on, of a call with one prompt: `fed` tokens, `visual` visual."""
    return [length - (fed - visual) for length in last.lengths]


def tower_share(last: Last) -> float:
    """The share of the visual tokens in an average block of the vision tower; 1.0 where no stage acts there.

    A token is what becomes one visual token; tokens beside the patches (CLS, registers) do not count.
    """
    found, left = 0, 0.0
    chains: dict[tuple[str, int, int, int | None], list[tuple[int, int, int]]] = {}
    for unit in last.tower_units:
        assert isinstance(unit.where, tuple)
        block = unit.where[1]
        assert isinstance(block, int), "a result names one block"
        key = unit.modality, unit.row, unit.image, unit.part
        chains.setdefault(key, []).append((block, unit.n, len(unit.idx)))
    for (modality, *_), steps in chains.items():
        depth = len(last.tower_lengths[modality])
        steps = sorted(steps)
        ends = [*(block for block, _, _ in steps[1:]), depth]
        found += steps[0][1] * depth
        left += steps[0][1] * steps[0][0] + sum(k * (end - block) for (block, _, k), end in zip(steps, ends))
    return left / found if found else 1.0


def llm_share(last: Last, fed: int, visual: int) -> float:
    """The share of the visual tokens in an average decoder layer."""
    return fmean(llm_by_layer(last, fed, visual)) / visual


def prefill_flops(model: Any, inputs: Mapping[str, Any], handle: Handle | None) -> int | None:
    """FLOPs of the prefill of one prompt, as the model is patched now: those of the vision side and of the LLM.

    inputs: what the model takes, one row. handle: of the patch in force, which has run these inputs. None where
    `text_cost` knows nothing of the LLM.
    """
    fed = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].shape[1]
    llm = llm_flops(model, fed, handle)
    return None if llm is None else vision_flops(model, inputs) + llm


def llm_flops(model: Any, fed: int, handle: Handle | None) -> int | None:
    """FLOPs of the LLM in the last prefill of one prompt of `fed` tokens, from the lengths that its layers ran.

    A stage that reads the layer it stands at pays the keys of what it drops.
    """
    text = text_cost(model.config.get_text_config())
    if text is None:
        return None
    lengths, stages = ([fed] * text.layers, []) if handle is None else (handle.last.lengths, handle.stages)
    return text.prefill(lengths) + looks(text, stages, [fed, *lengths])


def vision_flops(model: Any, inputs: Mapping[str, Any]) -> int:
    """FLOPs of tower and projector on these inputs, as the model is patched now; 0 where the inputs hold no pixels."""
    total = 0
    for modality in ("image", "video"):
        encode = getattr(model.base_model, f"get_{modality}_features", None)
        if encode is None:
            continue
        takes = inspect.signature(encode).parameters
        call = {k: v for k, v in inputs.items() if k in takes}
        if any(k.startswith("pixel_values") for k in call):
            with torch.inference_mode():
                total += counted(lambda encode=encode, call=call: encode(**call, return_dict=True))  # type: ignore[misc]
    return total
