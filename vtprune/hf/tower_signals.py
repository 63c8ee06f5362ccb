"""Signals of the vision tower for stages before the LLM, carried over to the visual tokens that the LLM sees.

The tower works on patches of tiles, windows or packed images; the LLM sees merged patches, mosaics without their
padding, pooled frames and newlines. Scores travel the way the features do: through the family's own packing where it
has one, and by the mean over the merged patches elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UnsupportedCall, UnsupportedModel
from ..core.signal import Signal
from ..kernels.clock import timed
from ..model_adapters.tower_layout import Call, Modality, TowerCall, per_entry, sizes_of, tower_of
from ..model_adapters.towers import attention_modules, feature_layer, has_cls, layer_index, layout_of
from ..signals import kind_of, kinds
from .attention_probe import probe, read
from .compilers import announce, outside_while_busy

S = TypeVar("S", bound="TowerSignals")


def tower_rows(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, packed: bool) -> Tensor:
    """A signal of an attention product in a tower, [T, N, C] float32 with a row for each of its tokens, CLS included.

    packed: the tower runs many images as one row. Means over queries are sums then, because windows and images of any
    size can be added up as sums.
    """
    with timed(q.device):
        x = read(name, q, k, v, mask, scaling).float()
    kind = kind_of(name)
    if kind.of_cls:
        x = F.pad(x, (1, 0))  # the CLS token has no score of its own
    if kind.over_queries and packed:
        x = x * q.shape[2]
    return _as_columns(x)


def _as_columns(x: Tensor) -> Tensor:
    """[T, N] or [T, N, C] -> [T, N, C]."""
    return x if x.dim() == 3 else x.unsqueeze(-1)


class _Buffers(threading.local):
    """What one thread has collected during a features call; a copy starts empty."""

    parts: dict[Signal, list[Tensor]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Buffers:
        return _Buffers()

    def __reduce__(self) -> Any:
        return _Buffers, ()


def reader_of(make: Callable[[Sequence[Signal]], S], needs: Iterable[Signal]) -> S | None:
    """What reads these signals; without the optional ones where they cannot be had, None if nothing is left to read.

    make: `TowerSignals` of one tower, given the signals. Raises UnsupportedModel as it does.
    """
    wanted = list(needs)
    needed = [signal for signal in wanted if not signal.optional]
    try:
        return make(wanted) if wanted else None
    except UnsupportedModel:
        if len(needed) == len(wanted):
            raise
        return reader_of(make, needed)


class TowerSignals:
    """Reads what methods need from the layers of one tower, and answers per image.

    base: the VLM's base model (`model.base_model`). modality: which `get_{modality}_features` is observed.
    needs: signals by kind and tower layer. Those of a CLS token are left out on towers without one,
        those `without_cls` on the others.
    Raises UnsupportedModel if the family's token layout is unknown or a layer does not exist.

        signals = TowerSignals(model.base_model, "image", method.needs)
        undo = signals.install()
        signals.start()
        output = model.base_model.get_image_features(**call)
        per_image = signals.finish(call, output)   # [{Signal: [n] or [n, C]}, ...]
    """

    def __init__(self, base: nn.Module, modality: Modality, needs: Iterable[Signal]) -> None:
        self.base, self.modality = base, modality
        self.layout = layout_of(base, modality)
        self.tower = tower_of(base, modality)
        self.layers = attention_modules(self.tower)
        cls = has_cls(self.tower)
        readable = (s for s in needs if not (s.without_cls if cls else kind_of(s).of_cls))
        self.needs = tuple(dict.fromkeys(readable))
        self.index = {signal: self._index(signal) for signal in self.needs}
        self._local = _Buffers()
        # Where stages shorten the tower: (layer, kind, rows read there [T, n, C]) -> rows for all its tokens.
        self.restore: Callable[[int, str, Tensor], Tensor] | None = None

    def _index(self, signal: Signal) -> int:
        """The layer a signal is read at, 0-based."""
        depth = len(self.layers)
        kind = kind_of(signal)
        if "tower" not in kind.where:
            where = "inside the LLM" if "llm" in kind.where else " and ".join(kind.where) or "nowhere"
            raise UnsupportedModel(
                f"signal {signal.kind!r} is read {where}, and not of a layer of the vision tower: a stage before the "
                f"LLM can read {', '.join(row.name for row in kinds() if 'tower' in row.where)}"
            )
        if kind.source == "states" and signal.layer is not None:
            raise ValueError(
                f"signal {signal.kind!r} of layer {signal.layer}: it is what the projector reads, use layer=None"
            )
        index = layer_index(self.base, self.tower, depth, signal.layer)
        if not 0 <= index < depth:
            raise UnsupportedModel(
                f"tower layer {index if signal.layer is None else signal.layer} does not exist: "
                f"{type(self.tower).__name__} has {depth} layers with readable attention (valid: {-depth}..{depth - 1}"
                "); set the method's layer accordingly"
            )
        return index

    def install(self) -> list[Callable[[], None]]:
        """Probe the needed layers; the returned functions undo it."""
        undo: list[Callable[[], None]] = []
        for signal, index in self.index.items():
            if kind_of(signal).source == "states":
                source = self.layout.states(self.tower)
                detach = source.register_forward_hook(partial(self._read_states, signal)).remove
            else:
                source = self.layers[index]
                detach = probe(source, partial(self._read_product, signal))
            undo.append(partial(_both, detach, announce(source, self.busy)))
        return undo

    def busy(self) -> bool:
        """True while this thread collects."""
        return self._local.parts is not None

    def start(self) -> None:
        """Begin to collect, in this thread, with empty buffers."""
        self._local.parts = {signal: [] for signal in self.needs}

    def stop(self) -> None:
        """Collect no more, whatever became of the call."""
        self._local.parts = None

    @outside_while_busy
    def _read_product(
        self,
        signal: Signal,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        if self._local.parts is None:  # outside a features call (recomputation in backward, say) nobody listens
            return
        x = tower_rows(signal.kind, q, k, v, mask, scaling, self.layout.packed is not None)
        self._local.parts[signal].append(x)

    @outside_while_busy
    def _read_states(self, signal: Signal, module: nn.Module, args: Any, output: Any) -> None:
        if self._local.parts is None:
            return
        states, layer = getattr(output, "hidden_states", None), feature_layer(self.base)
        if states is not None and layer is not None:
            x = states[layer]
        else:
            x = getattr(output, "last_hidden_state", output)
        x = x.detach().reshape(-1, *x.shape[-2:])
        x = kind_of(signal)(x).float()
        self._local.parts[signal].append(_as_columns(x))

    def finish(self, call: Call, output: Any) -> list[dict[Signal, Tensor]]:
        """One dict per entry of `output.pooler_output`: scores [n], vectors [n, C], all float32.

        n: the entry's tokens as the LLM sees them, in that order; newlines get zeros. "received" is the mean
        over the queries of the tile, or of the whole image where the tower packs images, windowed or not.
        call: bound arguments of the features call. Raises UnsupportedModel if a layer showed nothing, UnsupportedCall
        if the call lets the projector read another layer than the config says.
        """
        parts, self._local.parts = self._local.parts or {}, None
        asked = call.get("vision_feature_layer")
        fixed = getattr(cast(Any, self.base).config, "vision_feature_layer", None)
        moved = asked not in (None, fixed)
        needs = [s for s in self.needs if not s.optional or (parts.get(s) and not (moved and s.layer is None))]
        if moved and any(s.layer is None for s in needs):
            raise UnsupportedCall(
                f"this call asks for vision_feature_layer={asked}, but the signals were set up for {fixed}: set "
                "model.config.vision_feature_layer, then vtprune.patch again"
            )
        sizes = sizes_of(output)
        f = TowerCall(self.base, self.tower, call, f"{self.modality}_grid_thw", sizes)
        columns = {signal: self._entries(f, signal, parts.get(signal, [])) for signal in needs}
        return [{signal: column[i] for signal, column in columns.items()} for i in range(len(sizes))]

    def _entries(self, f: TowerCall, signal: Signal, parts: list[Tensor]) -> list[Tensor]:
        family = f.base.config.model_type
        if not parts:
            raise UnsupportedModel(
                f"layer {self.index[signal]} of the {family} vision tower did not run or did not pass the "
                f"attention interface, so its {signal.kind!r} cannot be read; choose a method without signals"
            )
        x = torch.cat([part.flatten(0, 1) for part in parts])[None] if self.layout.packed else torch.cat(parts)
        if self.restore is not None:
            x = self.restore(self.index[signal], signal.kind, x)
        rows = per_entry(f, self.layout, self.modality, x)
        if kind_of(signal).vector:
            return rows
        scores = [row[:, 0] for row in rows]
        if kind_of(signal).over_queries and self.layout.packed:
            merged = x.shape[1] // sum(map(len, scores))
            return [score / (merged * len(score)) for score in scores]
        return scores


def _both(first: Callable[[], None], second: Callable[[], None]) -> None:
    """Two undos in one."""
    first()
    second()
