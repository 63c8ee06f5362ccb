"""The five public handles of a Hugging Face VLM, and the visual tokens of one call in units of images and videos."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.core.errors import UnsupportedCall, UnsupportedModel
from vtprune.core.signal import Signal
from vtprune.core.units import Unit, runs_of_rows

from .cache_argument import NAME, renamed
from .entries import MODALITIES, Features, of_this_call
from .family import family_of
from .vit_blocks import WORKING


class Adapter:
    """Which module of `model` is what. Raises UnsupportedModel for a model that cannot be pruned exactly."""

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        self.model_type = getattr(config, "model_type", None) or type(model).__name__
        self.family = family_of(model, self.model_type, otherwise=f"plain vision transformers that work: {WORKING}; ")
        self.model = model
        self.config = config
        self.base: nn.Module = model.base_model  # type: ignore[assignment]
        self.text: nn.Module = model.get_decoder()  # type: ignore[operator]
        ids = {m: getattr(config, f"{m}_token_id", None) for m in MODALITIES}
        self.token_ids: dict[str, int] = {m: i for m, i in ids.items() if isinstance(i, int)}
        if not self.token_ids or not isinstance(getattr(self.text, "layers", None), nn.ModuleList):
            raise UnsupportedModel(
                f"{type(model).__name__}: no image token id or no list of decoder layers found; pass the "
                "...ForConditionalGeneration model itself"
            )
        self._signatures: dict[type, inspect.Signature] = {}

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers of the text model."""
        return self.text.layers  # type: ignore[return-value]

    @property
    def layer_types(self) -> list[str]:
        """Kind of each decoder layer, e.g. "full_attention"."""
        config = self.config.get_text_config(decoder=True)  # type: ignore[union-attr]
        kinds = getattr(config, "layer_types", None)
        if kinds:
            return list(kinds)
        window = getattr(config, "sliding_window", None)  # as transformers' own caches tell
        return ["full_attention" if window is None else "sliding_attention"] * len(self.layers)

    @property
    def mrope(self) -> bool:
        """True if position ids have several rows (time, height, width)."""
        config = self.config.get_text_config(decoder=True)  # type: ignore[union-attr]
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        return "mrope_section" in rope or any("mrope_section" in v for v in rope.values() if isinstance(v, dict))

    @property
    def pad_id(self) -> int | None:
        """The padding token, if the config names one."""
        ids = (getattr(c, "pad_token_id", None) for c in (self.config.get_text_config(decoder=True), self.config))  # type: ignore[union-attr]
        return next((i for i in ids if i is not None), None)

    @property
    def masks_in_base(self) -> bool:
        """True if the text model receives 4-D masks that the base model built."""
        return self.family.masks_in_base

    def attention(self) -> str:
        """Attention implementation of the text model, e.g. "sdpa"."""
        return self.config.get_text_config(decoder=True)._attn_implementation or "eager"  # type: ignore[union-attr]

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a forward call by name; the cache under `cache_argument.NAME`."""
        kwargs = kwargs if NAME in kwargs else renamed(kwargs)
        if not args:
            return kwargs
        forward = type(module).forward
        signature = self._signatures.get(type(module)) or inspect.signature(forward)
        self._signatures[type(module)] = signature
        names = [name for name in signature.parameters if name != "self"]
        if len(args) > len(names):
            raise UnsupportedCall(f"{type(module).__name__} got {len(args)} positional arguments; pass them by name")
        return {**dict(zip(names, args)), **kwargs}

    def given(self, call: dict[str, Any]) -> list[str]:
        """Modalities whose pixels or encoded features this call carries; placeholder ids of the others are text."""
        encoded = call.get("mm_encoder_outputs")
        if isinstance(encoded, Mapping):
            found = {m for m in MODALITIES if encoded.get(m) is not None}
        else:  # older transformers took the features of images alone in some families
            found = set() if encoded is None else {"image"}
        for name, value in call.items():
            if name.startswith("pixel_values") and value is not None:
                found.add("video" if name == "pixel_values_videos" else "image")
        return [m for m in MODALITIES if m in found and m in self.token_ids]

    def token_kinds(self, call: dict[str, Any], given: list[str] | None = None) -> Tensor | None:
        """[B, L] int8 on the device: 1 text, 2 image, 3 video; None if the call names no tokens or none is visual.

        given: what `given` says of the call, where it is known. Features that the caller merged into `inputs_embeds`
        are told by `mm_token_type_ids`.
        """
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        like = ids if ids is not None else None if embeds is None else embeds[..., 0]
        given = self.given(call) if given is None else given
        if like is None or not given:
            return None if ids is not None or embeds is None else self._kinds_told(call)
        kinds = torch.ones_like(like, dtype=torch.int8)
        for modality in given:
            token = self.token_ids[modality]
            if ids is not None:
                token = self.token_ids[self.family.video_token] if modality == "video" else token
                hit = ids == token
            else:
                table = self.base.get_input_embeddings()  # type: ignore[operator]
                hit = (embeds == table(torch.full((), token, device=kinds.device))).all(-1)
            kinds = kinds.masked_fill(hit, 2 + MODALITIES.index(modality))
        return kinds

    def types_of(self, call: dict[str, Any]) -> Tensor | None:
        """[B, L] token types that came with `inputs_embeds`: 0 text, 1 image, 2 video; None if none did."""
        types = next((call[name] for name in self.family.token_types if name in call), None)
        length = call["inputs_embeds"].shape[1]
        # Those of earlier turns may come along.
        return types[:, -length:] if torch.is_tensor(types) and types.shape[-1] >= length else None

    def _kinds_told(self, call: dict[str, Any]) -> Tensor | None:
        types = self.types_of(call)
        if types is None:
            return None
        kinds = torch.ones_like(call["inputs_embeds"][..., 0], dtype=torch.int8)
        for modality in self.token_ids:
            mark = MODALITIES.index(modality)
            kinds = kinds.masked_fill(types.to(kinds.device) == 1 + mark, 2 + mark)
        return kinds if bool((kinds > 1).any()) else None

    def observe(
        self, modality: str, call: dict[str, Any], output: Any, signals: list[dict[Signal, Tensor]]
    ) -> Features:
        """What a feature call returned, entry by entry (an image, a tile or a video each)."""
        pooled = getattr(output, "pooler_output", output)
        sizes = _entry_sizes(pooled)
        pixels = call.get("pixel_values_videos", call.get("pixel_values"))
        if modality == "video" and torch.is_tensor(pixels) and pixels.dim() == 5:
            frames = len(sizes) // pixels.shape[0]  # one entry per frame: join them to videos
            sizes = [sum(sizes[i : i + frames]) for i in range(0, len(sizes), frames)]
            parts = [signals[i : i + frames] for i in range(0, len(signals), frames)]
            signals = [{k: torch.cat([p[k] for p in part]) for k in part[0]} for part in parts]
        spans = self.family.spans(self.base, modality, call, sizes)
        return Features(sizes, spans, signals or [{} for _ in sizes])

    def brought(self, modality: str, call: dict[str, Any], output: Any) -> Features | None:
        """What can be told of features that `call` brings, or (output None) has merged into its embeddings.

        None where their sizes or grids are unknown: then every run of tokens is a unit.
        """
        if not self.family.is_told(self.base, modality, call):
            return None
        if output is None:
            sizes = self.family.sizes_told(self.base, modality, call)
        else:
            sizes = _entry_sizes(getattr(output, "pooler_output", output))
        if not sizes:
            return None
        spans = self.family.spans(self.base, modality, call, sizes)
        return Features(sizes, spans, [{} for _ in sizes], elsewhere=True)

    def units(self, kinds: Tensor, features: dict[str, Features | None]) -> list[Unit]:
        """Images and videos of the batch, row by row. kinds: [B, L] int8 on the host (0 = padding)."""
        found: list[Unit] = []
        for modality in self.token_ids:
            mark = 2 + MODALITIES.index(modality)
            rows = runs_of_rows(kinds == mark)
            if not any(rows):
                continue
            found += self._assign(modality, rows, features.get(modality))
        return sorted(found, key=lambda u: (u.row, u.ranges[0][0]))

    def _assign(self, modality: str, rows: Sequence[list[tuple[int, int]]], features: Features | None) -> list[Unit]:
        """Hand out the entries of `features` over the runs of visual tokens of every row, in order."""
        if features is None:
            return [Unit(b, modality, [run]) for b, runs in enumerate(rows) for run in runs]
        total = sum(length for runs in rows for _, length in runs)
        if features.elsewhere:
            features = of_this_call(features, total, len(rows))
            if features is None:
                return self._assign(modality, rows, None)
        features = self.family.entries(modality, features, total)
        captured = sum(features.sizes)
        # Beams and num_return_sequences repeat rows after the tower ran.
        repeat, rest = divmod(total, captured) if captured else (0, 1)
        if rest or repeat < 1 or len(rows) % repeat:
            raise UnsupportedCall(
                f"this call holds {total} {modality} tokens but the encoder returned {captured}: chunked prefill "
                "shows a method only part of an image; set prefill_chunk_size=None"
            )
        units: list[Unit] = []
        entry = 0
        for group in range(0, len(rows), repeat):
            first = entry
            for b in range(group, group + repeat):
                entry = first
                left = list(rows[b])
                while left:
                    taken = _take(left, features.sizes[entry])
                    if taken:
                        unit = Unit(b, modality, taken, features.spans[entry], dict(features.signals[entry]))
                        units.append(unit)
                    entry += 1
        return self.family.units(modality, units)


def _entry_sizes(pooled: Any) -> list[int]:
    """Tokens of each entry of pooled features."""
    return [math.prod(entry.shape[:-1]) for entry in pooled]


def _take(runs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Remove the first `size` positions from a list of (start, length) runs and return them."""
    taken = []
    while size:
        start, length = runs.pop(0)
        part = min(length, size)
        taken.append((start, part))
        size -= part
        if part < length:
            runs.insert(0, (start + part, length - part))
    return taken
