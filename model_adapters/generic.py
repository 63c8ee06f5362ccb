"""The five public handles of a Hugging Face VLM, and the visual tokens of one call in units of images and videos."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vtprune.cache import renamed
from vtprune.types import Signal, Span, UnsupportedCall, UnsupportedModel

from .layouts import is_told, sizes_told, spans_of
from .vits import WORKING

MODALITIES: tuple[Literal["image", "video"], ...] = ("image", "video")
# By model_type. "tested": in our conformance suite; "same shape": read in transformers' source, same call shape.
TESTED = [
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_next_video",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "glm4v",
    "internvl",
    "smolvlm",
    "idefics3",
    "gemma3",
    "paligemma",
    "mistral3",
]
SAME_SHAPE = [
    "aya_vision",
    "cohere2_vision",
    "got_ocr2",
    "fast_vlm",
    "lfm2_vl",
    "ovis2",
    "perception_lm",
    "video_llama_3",
    "vipllava",
    "glm46v",
    "qwen3_vl_moe",
]
REFUSED = {
    "mllama": "its image tokens are not in the sequence (cross-attention)",
    "florence2": "it is an encoder-decoder",
    "blip-2": "its language model is a whole CausalLM or encoder-decoder",
    "instructblip": "its language model is a whole CausalLM or encoder-decoder",
    "gemma3n": "its per-layer inputs would have to be cut too",
    "gemma4": "its per-layer inputs would have to be cut too",
    "llama4": "its language model is a whole CausalLM",
    "granite4_vision": "its deepstack layout differs",
}
# These build 4-D masks from the padding mask before they call the text model.
MASKS_IN_BASE = ("gemma3", "paligemma")
# These write the frames of a video with the id of images.
FRAMES_ARE_IMAGES = ("glm4v", "glm46v")
# These name the types of tokens (1 where an image is) otherwise.
IMAGE_TYPES = {"gemma3": "token_type_ids"}


@dataclass
class Unit:
    """An image or a video of one row: where its n tokens stand, and what is known about them.

    row: batch row. ranges: [(start, length)] in the row, in the unit's own order. spans: rasters inside the unit.
    signals: tensors of first dimension n.
    """

    row: int
    modality: str
    ranges: list[tuple[int, int]]
    spans: tuple[Span, ...] = ()
    signals: dict[Signal, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return sum(length for _, length in self.ranges)

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(t, h, w) if the unit is one raster without separators."""
        whole = len(self.spans) == 1 and not self.spans[0].newline and len(self.spans[0]) == self.n
        return self.spans[0].grid if whole else None


@dataclass
class Features:
    """One observed `get_{image,video}_features` call: sizes, spans and signals of every entry it returned.

    tower: what stages inside the tower did (`vtprune.tower.TowerRun`), if there were any. kernels, clocks: which
    kernels ran meanwhile, and how long the signals took. elsewhere: the call brought the features, or has them merged
    into its embeddings, so there are no signals, and what is known of them is what the call says.
    """

    sizes: list[int]
    spans: list[tuple[Span, ...]]
    signals: list[dict[Signal, Tensor]]
    tower: Any = None
    kernels: dict[str, Any] = field(default_factory=dict)
    clocks: list[Any] = field(default_factory=list)
    elsewhere: bool = False


class Adapter:
    """Which module of `model` is what. Raises UnsupportedModel for a model that cannot be pruned exactly."""

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        self.model_type = getattr(config, "model_type", None) or type(model).__name__
        families = ", ".join(TESTED)
        if self.model_type in REFUSED:
            raise UnsupportedModel(
                f"{type(model).__name__} ({self.model_type}) cannot be pruned: {REFUSED[self.model_type]}; "
                f"tested families: {families}"
            )
        if self.model_type not in TESTED + SAME_SHAPE:
            raise UnsupportedModel(
                f"{type(model).__name__} ({self.model_type}) is not a vision-language model vtprune knows; tested "
                f"families: {families}; same call shape: {', '.join(SAME_SHAPE)}; plain vision transformers that work: "
                f"{WORKING}; pass the whole model, no part of it"
            )
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
        return self.model_type in MASKS_IN_BASE

    def attention(self) -> str:
        """Attention implementation of the text model, e.g. "sdpa"."""
        return self.config.get_text_config(decoder=True)._attn_implementation or "eager"  # type: ignore[union-attr]

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a forward call by name; the cache under `vtprune.cache.NAME`."""
        kwargs = renamed(kwargs)
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
        else:  # Idefics3 and SmolVLM once took the features of images alone
            found = set() if encoded is None else {"image"}
        for name, value in call.items():
            if name.startswith("pixel_values") and value is not None:
                found.add("video" if name == "pixel_values_videos" else "image")
        return [m for m in MODALITIES if m in found and m in self.token_ids]

    def features_given(self, call: dict[str, Any]) -> bool:
        """True if this call carries pixels or encoded features (and not merely placeholder ids)."""
        return bool(self.given(call))

    def visual_code(self, call: dict[str, Any]) -> Tensor | None:
        """[B, L] int8 on the device: 1 text, 2 image, 3 video; None if the call names no tokens or none is visual.

        Features that the caller merged into `inputs_embeds` are told by `mm_token_type_ids`.
        """
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        like = ids if ids is not None else None if embeds is None else embeds[..., 0]
        given = self.given(call)
        if like is None or not given:
            return None if ids is not None or embeds is None else self._merged_code(call)
        code = torch.ones_like(like, dtype=torch.int8)
        for modality in given:
            token = self.token_ids[modality]
            if ids is not None:
                token = self.token_ids["image"] if self.model_type in FRAMES_ARE_IMAGES else token
                hit = ids == token
            else:
                table = self.base.get_input_embeddings()  # type: ignore[operator]
                hit = (embeds == table(torch.full((), token, device=code.device))).all(-1)
            code = code.masked_fill(hit, 2 + MODALITIES.index(modality))
        return code

    def types_of(self, call: dict[str, Any]) -> Tensor | None:
        """[B, L] token types that came with `inputs_embeds`: 0 text, 1 image, 2 video; None if none did."""
        types = call.get("mm_token_type_ids", call.get(IMAGE_TYPES.get(self.model_type, "")))
        length = call["inputs_embeds"].shape[1]
        # Those of earlier turns may come along.
        return types[:, -length:] if torch.is_tensor(types) and types.shape[-1] >= length else None

    def _merged_code(self, call: dict[str, Any]) -> Tensor | None:
        types = self.types_of(call)
        if types is None:
            return None
        code = torch.ones_like(call["inputs_embeds"][..., 0], dtype=torch.int8)
        for modality in self.token_ids:
            mark = MODALITIES.index(modality)
            code = code.masked_fill(types.to(code.device) == 1 + mark, 2 + mark)
        return code if bool((code > 1).any()) else None

    def observe(
        self, modality: str, call: dict[str, Any], output: Any, signals: list[dict[Signal, Tensor]]
    ) -> Features:
        """What a feature call returned, entry by entry (an image, a tile or a video each)."""
        pooled = getattr(output, "pooler_output", output)
        sizes = _sizes_of(pooled)
        pixels = call.get("pixel_values_videos", call.get("pixel_values"))
        if modality == "video" and torch.is_tensor(pixels) and pixels.dim() == 5:
            frames = len(sizes) // pixels.shape[0]  # one entry per frame: join them to videos
            sizes = [sum(sizes[i : i + frames]) for i in range(0, len(sizes), frames)]
            parts = [signals[i : i + frames] for i in range(0, len(signals), frames)]
            signals = [{k: torch.cat([p[k] for p in part]) for k in part[0]} for part in parts]
        spans = spans_of(self.base, self.model_type, modality, call, sizes)
        return Features(sizes, spans, signals or [{} for _ in sizes])

    def brought(self, modality: str, call: dict[str, Any], output: Any) -> Features | None:
        """What can be told of features that `call` brings, or (output None) has merged into its embeddings.

        None where their sizes or grids are unknown: then every run of tokens is a unit.
        """
        if not is_told(self.base, self.model_type, modality, call):
            return None
        if output is None:
            sizes = sizes_told(self.base, self.model_type, modality, call)
        else:
            sizes = _sizes_of(getattr(output, "pooler_output", output))
        if not sizes:
            return None
        spans = spans_of(self.base, self.model_type, modality, call, sizes)
        return Features(sizes, spans, [{} for _ in sizes], elsewhere=True)

    def units(self, code: Tensor, features: dict[str, Features | None]) -> list[Unit]:
        """Images and videos of the batch, row by row. code: [B, L] int8 on the host (0 = padding)."""
        found: list[Unit] = []
        for modality in self.token_ids:
            mark = 2 + MODALITIES.index(modality)
            rows = [runs_of(row == mark) for row in code]
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
            features = _of_this_call(features, total, len(rows))
            if features is None:
                return self._assign(modality, rows, None)
        if self.model_type == "llava_onevision" and modality == "video" and total % sum(features.sizes):
            features = _with_newline(features)  # older transformers (seen: 5.17) append it after encoding
        if self.model_type in ("smolvlm", "idefics3"):
            features = _by_tile(features)  # an entry is all that a row of pixels holds, which may be several samples
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
        if self.model_type in ("smolvlm", "idefics3"):
            return _splitruns_of(units)
        return _joinruns_of(units) if self.model_type == "internvl" and modality == "image" else units


def _sizes_of(pooled: Any) -> list[int]:
    """Tokens of each entry of pooled features."""
    return [int(entry.reshape(-1, entry.shape[-1]).shape[0]) for entry in pooled]


def _of_this_call(features: Features, total: int, rows: int) -> Features | None:
    """Those of so many tokens that stand in this call: grids may be those of earlier turns too, or of other rows."""
    if sum(features.sizes) and total % sum(features.sizes) == 0 and rows % (total // sum(features.sizes)) == 0:
        return features
    for first in range(1, len(features.sizes)):
        if sum(features.sizes[first:]) == total:
            return Features(features.sizes[first:], features.spans[first:], features.signals[first:], elsewhere=True)
    return None


def _with_newline(features: Features) -> Features:
    """Every entry with one separator token behind it; signals have a row for it already."""
    return Features([n + 1 for n in features.sizes], features.spans, features.signals)


def _take(runs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Remove the first `size` positions from a list of (start, length) runs and return them."""
    taken = []
    while size:
        start, length = runs.pop(0)
        take = min(length, size)
        taken.append((start, take))
        size -= take
        if take < length:
            runs.insert(0, (start + take, length - take))
    return taken


def _by_tile(features: Features) -> Features:
    """An entry for each raster where entries are nothing but rasters side by side."""
    sizes: list[int] = []
    spans: list[tuple[Span, ...]] = []
    signals: list[dict[Signal, Tensor]] = []
    for n, parts, own in zip(features.sizes, features.spans, features.signals):
        whole = sum(len(span) for span in parts) == n
        for span in parts if whole else ():
            sizes.append(len(span))
            spans.append((Span(0, span.grid, span.newline, span.tiles),))
            signals.append({k: v[span.start : span.start + len(span)] for k, v in own.items()})
        if not whole:
            sizes, spans, signals = [*sizes, n], [*spans, parts], [*signals, own]
    return Features(sizes, spans, signals, elsewhere=features.elsewhere)


def _splitruns_of(units: list[Unit]) -> list[Unit]:
    """One unit per run: where text stands between tiles, each tile is pruned by itself."""
    out: list[Unit] = []
    for u in units:
        start = 0
        for run in u.ranges:
            signals = {k: v[start : start + run[1]] for k, v in u.signals.items()}
            spans = tuple(Span(0, s.grid) for s in u.spans if s.start == start and len(s) == run[1])
            out.append(Unit(u.row, u.modality, [run], spans, signals))
            start += run[1]
    return out


def _joinruns_of(units: list[Unit]) -> list[Unit]:
    """One unit per run: tiles that stand side by side are one image."""
    out: list[Unit] = []
    for u in units:
        last = out[-1] if out else None
        if last is None or last.row != u.row or sum(last.ranges[-1]) != u.ranges[0][0]:
            out.append(u)
            continue
        spans = tuple(Span(s.start + last.n, s.grid, s.newline) for s in u.spans)
        signals = {k: torch.cat([v, u.signals[k]]) for k, v in last.signals.items()}
        joined = (last.ranges[0][0], last.n + u.n)
        out[-1] = Unit(u.row, u.modality, [joined], last.spans + spans, signals)
    return out


def runs_of(hit: Tensor) -> list[tuple[int, int]]:
    """(start, length) of every run of True in a host vector."""
    edges = torch.diff(torch.nn.functional.pad(hit.to(torch.int8), (1, 1))).nonzero().flatten().tolist()
    return [(a, b - a) for a, b in zip(edges[::2], edges[1::2])]
