"""What a pruned model's processor of vLLM does more: it counts the tokens that will stay, before any is encoded."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from ..budget import NAMES, keep_of
from . import KEY
from .architectures import ROOM, has_one_row, recipe_of
from .plan import MODALITIES, Keep, Modality, plan_of
from .positions import LARGEST

TOLD = ("image_grid_thw", "video_grid_thw", "image_sizes")  # what is told of an item, by which its rasters are found


def field(modality: str) -> str:
    """The name of our field of an item: [keep_ratio or 0, keep_tokens or 0, tokens unpruned], float64 on the host."""
    return f"vtprune_{modality}"


def keep_in(told: torch.Tensor) -> Keep:
    """The budget that our field holds."""
    ratio, tokens, _ = told.tolist()
    return float(ratio) if ratio else int(tokens) if tokens else None


@dataclasses.dataclass
class PrunedDetails(PromptUpdateDetails):
    """The tokens that stand for an item. dropped: how many fewer than without pruning."""

    dropped: int = 0


class _Asked(threading.local):
    keep: Keep = None


class PrunedProcessor:
    """Goes before a multi-modal processor of vLLM among the bases of a class."""

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(info, *args, **kwargs)  # type: ignore[call-arg]
        config = info.ctx.model_config
        self.plan = plan_of(recipe_of(config) or "", config.hf_config)
        self._asked = _Asked()

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As long as they can become: a request may keep everything."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, "keep_ratio": 1.0})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Take the request's budget out of its options, and process what is left under it."""
        options = dict(inputs.hf_processor_mm_kwargs)
        unknown = [name for name in options if name.startswith(("keep", KEY)) and name not in NAMES]
        if unknown:
            raise ValueError(
                f"mm_processor_kwargs: {', '.join(unknown)} of a request; it may name {' or '.join(NAMES)}"
            )
        keep = keep_of(options)
        self.plan.stages(keep)  # raises where this recipe has no room for a request's budget
        for name in NAMES:
            options.pop(name, None)
        self._asked.keep = keep
        result = super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)  # type: ignore[misc]
        self._check_neighbours(result)
        return result

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        result = super()._cached_apply_hf_processor(inputs, timing_ctx)  # type: ignore[misc]
        updates = [u for items in result.prompt_updates.values() for item in items for u in item]
        self._check_room(sum(getattr(update.content, "dropped", 0) for update in updates))
        return result

    def _get_mm_hashes(self, inputs: Any) -> Any:
        mark, found = self.plan.digest(self._asked.keep), super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {m: [f"{mark}-{one}" for one in hashes] if m in MODALITIES else hashes for m, hashes in found.items()}

    def _finalize_hf_mm_data(
        self, hf_data: Mapping[str, Any], hf_kwargs: Any, passthrough_data: Mapping[str, Any], *rest: Any
    ) -> Any:
        if passthrough_data:
            raise ValueError(
                f"{', '.join(passthrough_data)}: features that were computed elsewhere are not pruned here; prune them "
                "with vtprune.select before they are sent, to an engine without a recipe"
            )
        data = super()._finalize_hf_mm_data(hf_data, hf_kwargs, passthrough_data, *rest)  # type: ignore[misc]
        keep = self._asked.keep
        ratio, tokens = (keep, 0) if isinstance(keep, float) else (0, keep or 0)
        for modality in MODALITIES:
            items = len(_sized(data, modality))
            if items:
                data[field(modality)] = torch.tensor([[ratio, tokens, 0]] * items, dtype=torch.float64)
        return data

    def _get_mm_fields_config(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        ours = {field(m): MultiModalFieldConfig.batched(m, keep_on_cpu=True) for m in MODALITIES}
        return {**super()._get_mm_fields_config(*args, **kwargs), **ours}  # type: ignore[misc]

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        whole = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [
            PromptReplacement(u.modality, u.target, partial(self._shortened, u, out_mm_kwargs, self._asked.keep))
            if u.modality in MODALITIES
            else u
            for u in whole
        ]

    def _shortened(self, update: Any, out_mm_kwargs: Any, keep: Keep, item: int) -> PrunedDetails:
        """What stands for an item once it is pruned; its size goes into our field, for those who know no pixels."""
        content = update._resolve_content(item)
        full = list(content.full)
        visual = torch.ones(len(full), dtype=torch.bool) if content.is_embed is None else content.is_embed(full)
        known = out_mm_kwargs[update.modality][item]
        n = int(visual.sum())
        if n >= LARGEST:
            raise ValueError(f"{update.modality} {item} has {n} visual tokens; positions are exact below {LARGEST}")
        told = {name: known[name].data[None] for name in TOLD if name in known}
        kept = self.plan.count(keep, update.modality, told, n)
        known[field(update.modality)].data[2] = n
        if not bool(visual.all()):  # words between frames: where they stand depends on what is kept of each
            token = full[int(visual.to(torch.int8).argmax())]
            return PrunedDetails([token] * (len(full) - n + kept), None, n - kept)
        return PrunedDetails(full[:kept], None, n - kept)

    def _check_room(self, dropped: int) -> None:
        """Text keeps its position, so it may stand further behind than the length of the pruned prompt says."""
        config = self.info.ctx.model_config  # type: ignore[attr-defined]
        # vLLM makes the table of M-RoPE so much longer itself; that of the others is in the config by now.
        room = config.hf_config.get_text_config().max_position_embeddings * (1 if has_one_row(config) else ROOM)
        if config.max_model_len + dropped > room:
            raise ValueError(
                f"{dropped} tokens of this prompt would be dropped, and text keeps its position: with max_model_len="
                f"{config.max_model_len} it could stand at {config.max_model_len + dropped} of {room} positions; lower "
                "max_model_len or send less"
            )

    def _check_neighbours(self, result: Any) -> None:
        """Positions of M-RoPE are counted on from the word before an image."""
        if has_one_row(self.info.ctx.model_config):  # type: ignore[attr-defined]
            return
        ranges = sorted((p.offset, p.offset + p.length) for ps in result["mm_placeholders"].values() for p in ps)
        ends = {0, *(end for _, end in ranges)}
        if any(start in ends for start, _ in ranges) or len(result["prompt_token_ids"]) in ends - {0}:
            raise ValueError(
                "an image or video of this prompt has no word before or behind it: write it between "
                "<|vision_start|> and <|vision_end|>, as the chat template does"
            )


def _sized(data: Mapping[str, Any], modality: Modality) -> Any:
    """Something that has one entry an item of that modality."""
    names = ("image_grid_thw", "pixel_values") if modality == "image" else ("video_grid_thw", "pixel_values_videos")
    return next((data[name] for name in names if name in data), ())
