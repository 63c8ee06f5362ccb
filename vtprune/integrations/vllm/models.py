"""The pruned models: a class each for vLLM's own, its processor and what differs in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava, llava_next, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.select import Selected
from .model import PrunedModel
from .plan import Modality
from .positions import with_places
from .processor import PrunedProcessor


def _processed(processor: type, info: type, dummy_inputs: type) -> Any:
    """Register a model with a processor that counts what is kept."""
    ours = type(f"Pruned{processor.__name__}", (PrunedProcessor, processor), {})
    return MULTIMODAL_REGISTRY.register_processor(ours, info=info, dummy_inputs=dummy_inputs)


@_processed(llava.LlavaMultiModalProcessor, llava.LlavaProcessingInfo, llava.LlavaDummyInputsBuilder)
class PrunedLlava(PrunedModel, llava.LlavaForConditionalGeneration):
    one_row, tower, placeholders = True, "vision_tower", ("image_token_index",)


@_processed(llava_next.LlavaNextMultiModalProcessor, llava_next.LlavaNextProcessingInfo, llava.LlavaDummyInputsBuilder)
class PrunedLlavaNext(PrunedModel, llava_next.LlavaNextForConditionalGeneration):
    one_row, tower, placeholders = True, "vision_tower", ("image_token_index",)


@_processed(
    llava_onevision.LlavaOnevisionMultiModalProcessor,
    llava_onevision.LlavaOnevisionProcessingInfo,
    llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(PrunedModel, llava_onevision.LlavaOnevisionForConditionalGeneration):
    one_row, tower, placeholders = True, "vision_tower", ("image_token_index", "video_token_index")


@_processed(qwen2_vl.Qwen2VLMultiModalProcessor, qwen2_vl.Qwen2VLProcessingInfo, qwen2_vl.Qwen2VLDummyInputsBuilder)
class PrunedQwen2VL(PrunedModel, qwen2_vl.Qwen2VLForConditionalGeneration):
    pass


@_processed(
    qwen2_5_vl.Qwen2_5_VLMultiModalProcessor,
    qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5VL(PrunedModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    pass


@_processed(qwen3_vl.Qwen3VLMultiModalProcessor, qwen3_vl.Qwen3VLProcessingInfo, qwen3_vl.Qwen3VLDummyInputsBuilder)
class PrunedQwen3VL(PrunedModel, qwen3_vl.Qwen3VLForConditionalGeneration):
    """A video is its frames with a timestamp before each; so the words travel with the kept tokens, as features."""

    def _tokens(self, modality: Modality, n: int, item: dict[str, Tensor]) -> list[int]:
        if modality == "image":
            return super()._tokens(modality, n, item)
        frames = int(item["video_grid_thw"][0])
        config = self.config
        layout = qwen3_vl.Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[n // frames] * frames,
            timestamps=item["timestamps"].tolist(),
            tokenizer=self._tokenizer,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
            select_token_id=True,
        )
        return list(layout.full)

    def _rows(self, modality: Modality, x: Tensor, one: Selected, item: dict[str, Tensor]) -> Tensor:
        if modality == "image":
            return super()._rows(modality, x, one, item)
        tokens = self._tokens(modality, one.n, item)
        ids = torch.tensor(tokens, device=x.device)
        visual = ids == self.config.video_token_id
        stays = ~visual
        stays[visual.nonzero().flatten().index_select(0, one.idx)] = True
        rows = x.new_zeros(int(stays.sum()), x.shape[1])  # what else travels with a token is zero for words
        rows[visual[stays]] = torch.cat([one.features, x.index_select(0, one.idx)[:, one.features.shape[1] :]], 1)
        words = self.language_model.embed_input_ids(ids[~visual])
        rows[~visual[stays], : words.shape[1]] = words.to(rows)
        places = self._positions_of(modality, tokens, item).to(x.device)[:, stays]
        return with_places(rows, places)
