"""What a pruned model of vLLM does more: it drops visual tokens behind the tower, and says where the others stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

from ...core.errors import UnsupportedModel
from ...core.select import Selected
from ...hf.tower_signals import reader_of
from . import positions
from .architectures import recipe_of
from .plan import MODALITIES, Modality, plan_of
from .processor import TOLD, field, keep_in
from .signals import EngineSignals

OF_ITEM = (*TOLD, "second_per_grid_ts", "timestamps")  # what is told of an item beside its pixels, by which it stands


class PrunedModel:
    """Goes before a model of vLLM among the bases of a class.

    one_row: a token has one position. tower: the module that sees images and videos. placeholders: names in the config
    of the token ids that stand for visual tokens.
    """

    supports_multimodal_pruning = True
    supports_mrope = True
    one_row: ClassVar[bool] = False
    tower: ClassVar[str] = "visual"
    placeholders: ClassVar[Sequence[str]] = ("image_token_id", "video_token_id")

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.is_multimodal_pruning_enabled = False  # vLLM's own, behind the same tower
        self._plan = plan_of(recipe_of(vllm_config.model_config) or "", vllm_config.model_config.hf_config)
        self._reading: dict[str, EngineSignals] = {}
        needs = list(self._plan.needs)
        if needs:
            attentions = [m for m in getattr(self, self.tower).modules() if isinstance(m, MMEncoderAttention)]
            if any("FLASHINFER" in str(module.attn_backend) for module in attentions):
                needs = [need for need in needs if not need.optional]
                if needs:
                    raise UnsupportedModel(
                        f"the recipe reads {needs[0]}, and FlashInfer lays out the tower's attention in a way that is "
                        "not read here: choose another mm_encoder_attn_backend, or a method that reads none"
                    )
            for modality in self.modalities:
                make = partial(EngineSignals, self._plan.base, modality, attentions=attentions)
                reading = reader_of(make, needs)
                if reading is not None:
                    self._reading[modality] = reading
                    reading.install()

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What this model sees."""
        ids = [getattr(self.config, name, None) for name in self.placeholders]  # type: ignore[attr-defined]
        return tuple(m for m, token in zip(MODALITIES, ids) if token is not None)

    # -- features

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features of images or videos, each [K, D + 6]: what is kept, and where it stands in its image."""
        told = {m: kwargs.pop(field(m)) for m in MODALITIES if kwargs.get(field(m)) is not None}
        if not told:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        ((modality, fields),) = told.items()
        reading = self._reading.get(modality)
        if reading is not None:
            reading.start()
        try:
            whole = list(super().embed_multimodal(**kwargs))  # type: ignore[misc]
            width = self.config.get_text_config().hidden_size  # type: ignore[attr-defined]
            main = [x[:, :width] for x in whole]
            found = reading.finish(kwargs, SimpleNamespace(pooler_output=main)) if reading else [{} for _ in main]
        finally:
            if reading is not None:
                reading.stop()
        items = [self._item(kwargs, i) for i in range(len(whole))]
        calls = [{name: value[None] for name, value in item.items() if name in TOLD} for item in items]
        chosen: list[Selected] = []
        keeps = [keep_in(told) for told in fields]
        # By type too: 1 and 1.0 are equal, and one of them keeps a single token, the other all.
        for _, group in groupby(range(len(whole)), lambda i: (type(keeps[i]), keeps[i])):
            a, b = (at := list(group))[0], at[-1] + 1
            keep = keeps[a]
            chosen += self._plan.select(keep, modality, main[a:b], calls[a:b], found[a:b])
        return tuple(self._rows(modality, x, one, item) for x, one, item in zip(whole, chosen, items))

    def _item(self, kwargs: dict[str, Any], i: int) -> dict[str, Tensor]:
        """What is told of item i."""
        return {name: torch.as_tensor(kwargs[name][i]) for name in OF_ITEM if kwargs.get(name) is not None}

    def _rows(self, modality: Modality, x: Tensor, one: Selected, item: dict[str, Tensor]) -> Tensor:
        """The kept rows of an item: merged features, what else travels with a token as it was, and the place."""
        rows = torch.cat([one.features, x.index_select(0, one.idx)[:, one.features.shape[1] :]], 1)
        return positions.with_places(rows, self._places(modality, one, item).to(rows.device))

    def _places(self, modality: Modality, one: Selected, item: dict[str, Tensor]) -> Tensor:
        """[3, K] positions of the kept tokens of an item, counted from where it begins."""
        if self.one_row:
            idx = torch.arange(len(one.idx), device=one.idx.device) if self._plan.renumbers else one.idx
            return idx.expand(3, -1)
        whole = self._positions_of(modality, self._tokens(modality, one.n, item), item)
        return whole.to(one.idx.device).index_select(1, one.idx)

    # -- positions

    def _tokens(self, modality: Modality, n: int, item: dict[str, Tensor]) -> list[int]:
        """Token ids of an unpruned item of n visual tokens."""
        name = self.placeholders[MODALITIES.index(modality)]
        return [getattr(self.config, name)] * n  # type: ignore[attr-defined]

    def _positions_of(self, modality: Modality, tokens: list[int], item: dict[str, Tensor]) -> Tensor:
        """[3, L] positions of an item that stands alone, by the model's own rule."""
        data = {name: SimpleNamespace(data=value) for name, value in item.items()}
        alone = SimpleNamespace(modality=modality, data=data, mm_position=SimpleNamespace(offset=0, length=len(tokens)))
        whole: Tensor = super().get_mrope_input_positions(tokens, [alone])[0]  # type: ignore[misc]
        return whole

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, L] of a pruned prompt, and what decoding adds to its length: text stands where it stood."""
        tokens, moved, lengths, done = [], [], [], 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            at, data = feature.mm_position, feature.data
            item = {name: torch.as_tensor(data[name].data) for name in OF_ITEM if name in data}
            n = at.length if self._plan.renumbers and self.one_row else int(data[field(feature.modality)].data[2])
            whole = self._tokens(feature.modality, n, item)
            tokens += input_tokens[done : at.offset]
            place = dataclasses.replace(at, offset=len(tokens), length=len(whole), is_embed=None)
            moved.append(dataclasses.replace(feature, mm_position=place))
            lengths.append((at.offset, at.length, len(whole)))
            tokens, done = tokens + whole, at.offset + at.length
        tokens += input_tokens[done:]
        if self.one_row:
            unpruned = torch.arange(len(tokens)).expand(3, -1)
        else:
            unpruned = super().get_mrope_input_positions(tokens, moved)[0]  # type: ignore[misc]
        return positions.begin(unpruned, lengths, len(input_tokens), self.one_row)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """Features [K, D] without the places that came with them, the positions [3, N] that follow, and the delta."""
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        known = [getattr(self.config, name, None) for name in self.placeholders]  # type: ignore[attr-defined]
        tokens = torch.tensor([token for token in known if token is not None], device=ids.device)
        parts = [positions.without_places(rows) for rows in multimodal_embeddings]
        places = torch.cat([p for _, p in parts], 1) if parts else ids.new_zeros(3, 0)
        visual = torch.isin(ids, tokens)
        after, delta = positions.arrive(
            mrope_positions, visual, places.to(ids.device), num_computed_tokens, self.one_row
        )
        return [features for features, _ in parts], after, delta

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's own; of the three rows a model with one position a token gets the first."""
        own = positions[0] if self.one_row and positions.dim() == 2 else positions
        return super().forward(input_ids, own, *args, **kwargs)  # type: ignore[misc]
