"""Cache layers that store fewer tokens than they answer for.

After a pruned prefill each layer of the cache is replaced by a copy of itself whose class also inherits `Pruned`:
storage is physical (what was kept), every answer about length is logical (what the caller fed). That one trick keeps
`generate`, several turns, beams and manual loops right, because all of them ask the cache where they are.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..core.compaction import Compaction
from ..core.errors import UnsupportedCall
from ..model_adapters.cache_argument import NAME as NAME
from ..model_adapters.cache_argument import renamed as renamed
from .once import once

# What `crop` takes: how many tokens go, negative; older versions take the length that is left as well.
COUNTS_LEFT = "max_length" in signature(DynamicLayer.crop).parameters


class _Inside(threading.local):
    """Per thread: `on` while a patched model is running, which alone may extend ragged pruned layers."""

    on = False


inside = _Inside()


class Pruned:
    """Mixed into a cache layer.

    dropped: tokens the layer answers for but does not store (the same number for every row).
    prefix: stored tokens at the last pruning; what is stored behind them was appended since, nothing dropped.
    tail: tokens at the end of the prefix that are stored as they were fed: the text behind the last visual token.
    valid: [B, prefix] bool, False where a row stores padding; None if every stored prefix token is real.
    rebuild_mask: the mask the caller keeps has other zeros in the prefix than what is stored there.
    position_offset: [B] int64, how much lower than the logical position a new token's position id is
        (positions="compact"). layer_position_offset: [B] int64, how much lower still it is at this layer, behind a
        stage that renumbers. None: not at all.
    own_tokens: it stores other tokens than the layer that masks are sized by (`reference_layer`).
    heads: [B, H] bool, False for query heads whose output is zero here; None if all speak.

    Of layers behind a stage that acts at decode, while it shows a selection of what it stores:

        full_kv  | all keys and values of the prompt, and of tokens that came back |      keys | visible | appended |

    full_kv: those keys and values. visible: the cut of them that the layer shows. real: [B, P] bool, which of them are
        no padding.

    Where tokens come back, nothing stands aside: the mask of a step hides what was not chosen.

    came: at which logical length each of the `prefix` tokens came back, -1 for those stored since they were fed; () if
        none came back. returning: how many of the next keys are of tokens that come back and join the prefix, and what
        `valid` and `came` are then; None if none.
    selection: the `DecodeSelection` of the stage that acts here, or None. gate: at the first layer those of all layers,
        which may refuse a crop before anything is cropped.
    """

    dropped: int
    prefix: int
    valid: Tensor | None
    rebuild_mask: bool
    tail: int = 0
    position_offset: Tensor | None
    layer_position_offset: Tensor | None
    own_tokens: bool = False
    heads: Tensor | None = None
    full_kv: tuple[Tensor, Tensor] | None = None
    visible: Compaction | None = None
    real: Tensor | None = None
    came: tuple[int, ...] = ()
    returning: tuple[int, Tensor | None, tuple[int, ...]] | None = None
    selection: Any = None
    gate: tuple[Any, ...] = ()
    keys: Tensor
    values: Tensor

    @property
    def needs_patch(self) -> bool:
        """True if only a patched model can mask, place, silence or choose for what comes next."""
        needs = (self.valid, self.position_offset, self.layer_position_offset, self.visible, self.heads)
        return self.own_tokens or any(x is not None for x in needs)

    @property
    def own_arguments(self) -> bool:
        """True if a single new token needs other arguments at this layer: for padding, position ids or silent heads."""
        return self.valid is not None or self.layer_position_offset is not None or self.heads is not None

    def get_seq_length(self) -> Any:
        """Tokens fed so far, dropped ones included."""
        return super().get_seq_length() + self.dropped  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Stored width, and the offset at which it starts among all tokens fed."""
        length, offset = super().get_mask_sizes(query_length)  # type: ignore[misc]
        return (length - self.dropped if _counts_logically(type(self)) else length), offset + self.dropped

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the base class; refuses to continue where only a patched model can mask or place the new tokens."""
        if not inside.on and self.needs_patch:
            raise UnsupportedCall(
                "this cache was filled by a patched model and its rows or layers kept different numbers of tokens (or "
                "compact positions, silent heads, or a choice made at every decode step), so an unpatched model would "
                "mask it wrongly: continue with the patched model, or start a new cache"
            )
        if self.returning:
            key_states, value_states = self._take_back(*self.returning, key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        """Empty: nothing is stored, nothing dropped."""
        self.dropped, self.prefix, self.valid, self.rebuild_mask, self.own_tokens = 0, 0, None, False, False
        self.position_offset = self.layer_position_offset = self.heads = None
        self.full_kv = self.visible = self.real = self.selection = None
        self.returning, self.tail, self.came, self.gate = None, 0, (), ()
        super().reset()  # type: ignore[misc]

    def crop(self, tokens: int) -> None:
        """As the base class; what came back for the tokens that go leaves with them.

        Raises UnsupportedCall where more goes than stands behind the last visual token, unless it is everything.
        """
        length = int(self.get_seq_length())
        if tokens > 0 and not COUNTS_LEFT:
            super().crop(tokens)  # type: ignore[misc]
            return
        remove = min(length, -tokens if tokens <= 0 else max(0, length - tokens))
        if remove == length > 0:
            self.reset()
            return
        since = self._since()
        if remove > since + self.tail:
            raise UnsupportedCall(
                f"cropping {remove} tokens reaches behind the last {since + self.tail}, which this cache stores as "
                "fed, into the visual tokens of a pruned prompt: copy.deepcopy the cache before the turn that you "
                "want to take back, crop less, or crop everything"
            )
        if not remove:
            self._crop_stored(0)
            return
        for selection in self.gate:
            selection.check_crop(length - remove)
        if self.selection is not None:
            self.selection.crop(length - remove)
        self.cut(length - remove)

    def cut(self, length: int) -> None:
        """Store what was stored when so many tokens had been fed; everything stored is shown."""
        self.show_all()
        remove = int(self.get_seq_length()) - length
        if any(at >= length for at in self.came):
            self._drop_columns([i for i, at in enumerate(self.came) if at < length])
        short = max(0, remove - self._since())
        self._crop_stored(remove)
        self.prefix, self.tail = self.prefix - short, self.tail - short
        self.valid = self.valid if self.valid is None or not short else self.valid[:, : self.prefix]
        self.came = self.came[: self.prefix]

    def _crop_stored(self, remove: int) -> None:
        dropped, self.dropped = self.dropped, 0  # the base class counts what is stored
        try:
            super().crop(-remove)  # type: ignore[misc]
        finally:
            self.dropped = dropped

    def _since(self) -> int:
        """Tokens fed since the last pruning."""
        return int(self.get_seq_length()) - self.dropped - self.prefix

    def _drop_columns(self, left: list[int]) -> None:
        """Store only the tokens `left` of the prefix, and all behind it; the others had been dropped once."""
        gone = self.prefix - len(left)
        index = torch.tensor([*left, *range(self.prefix, stored(self))], device=self.keys.device)
        self.keys, self.values = self.keys.index_select(2, index), self.values.index_select(2, index)
        self.valid = None if self.valid is None else self.valid[:, left]
        self.prefix, self.dropped = self.prefix - gone, self.dropped + gone
        self.came = tuple(self.came[i] for i in left)

    def show_all(self) -> None:
        """Show all that is stored, where the layer shows a selection."""
        self.returning = None  # of a step that was interrupted: they did not come
        if self.visible is None:
            return
        assert self.real is not None
        length = self.get_seq_length()
        if self.full_kv is not None:
            self._gather(None)
            self.prefix, self.dropped = self.real.shape[1], length - stored(self)
        self.valid = None if bool(self.real.all()) else self.real
        self.full_kv = self.visible = self.real = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda t: t.repeat_interleave(repeats, dim=0))
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda t: t[indices])
        super().batch_select_indices(indices)  # type: ignore[misc]

    def _select(self, rows: Any) -> None:
        for name in ("valid", "position_offset", "layer_position_offset", "heads", "real"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else rows(held))
        self.full_kv = None if self.full_kv is None else (rows(self.full_kv[0]), rows(self.full_kv[1]))
        if self.visible is not None:  # no longer what any selection of the stage says: it is made anew
            self.visible = Compaction(rows(self.visible.index), self.valid, rows(self.visible.src))
        if self.selection is not None:
            self.selection.select(rows)

    def _take_back(
        self, new: int, valid: Tensor | None, came: tuple[int, ...], keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take all that stands behind the prefix off the store; return it behind the `new` first keys and values."""
        at, self.returning = self.prefix, None
        keys = torch.cat([keys[:, :, :new], self.keys[:, :, at:], keys[:, :, new:]], 2)
        values = torch.cat([values[:, :, :new], self.values[:, :, at:], values[:, :, new:]], 2)
        self.keys, self.values = self.keys[:, :, :at], self.values[:, :, :at]
        self.prefix, self.dropped, self.valid, self.came = at + new, self.dropped - new, valid, came
        self.rebuild_mask = self.rebuild_mask or valid is not None
        return keys, values

    def _gather(self, index: Tensor | None) -> None:
        """Keys and values of `full_kv`, at index [B, n] or all, in place of the first `prefix` that are shown."""
        assert self.full_kv is not None
        self.keys, self.values = (
            torch.cat([x if index is None else _along(x, index), held[:, :, self.prefix :]], 2)
            for x, held in zip(self.full_kv, (self.keys, self.values))
        )

    def __reduce__(self) -> Any:
        return _rebuild, (type(self).__mro__[2], self.__dict__)


def _counts_logically(cls: type) -> bool:
    """True if the layer's own `get_mask_sizes` is built on `get_seq_length`, which `Pruned` overrides."""
    return cls.__mro__[2].get_mask_sizes is DynamicLayer.get_mask_sizes  # type: ignore[attr-defined]


@lru_cache
def _pruned_class(base: type) -> type:
    # `_layer_type` would register the class as transformers' default for its kind of layer.
    return type(f"Pruned{base.__name__}", (Pruned, base), {"_layer_type": None})


# Attributes of layers that were pickled by version 0.1, under their names of today.
RENAMED = {
    "remask": "rebuild_mask", "shift": "position_offset", "lag": "layer_position_offset", "uneven": "own_tokens",
    "aside": "full_kv", "shown": "visible", "back": "returning", "recall": "selection",
}  # fmt: skip


def _rebuild(base: type, state: dict[str, Any]) -> Any:
    layer: Any = object.__new__(_pruned_class(base))
    layer.__dict__.update(
        state if RENAMED.keys().isdisjoint(state) else {RENAMED.get(k, k): v for k, v in state.items()}
    )
    return layer


def state(cache: Any, i: int) -> Pruned | None:
    """The pruned layer i of a cache, or None."""
    layers = getattr(cache, "layers", ())
    layer = layers[i] if i < len(layers) else None
    return layer if isinstance(layer, Pruned) else None


def reference_layer(cache: Any) -> int:
    """The layer that transformers sizes full-attention masks by: the first that is neither sliding nor linear."""
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if hasattr(layer, "keys") and not getattr(layer, "is_sliding", False):
            return i
    return 0


def shrink(
    cache: Any,
    i: int,
    *,
    past: int,
    fed: int,
    ran: int,
    valid: Tensor | None,
    rebuild_mask: bool,
    position_offset: Tensor | None,
    tail: int = 0,
    layer_position_offset: Tensor | None = None,
    own_tokens: bool = False,
    heads: Tensor | None = None,
    made: dict[Any, Any] | None = None,
) -> None:
    """Tell layer i that this call fed it `fed` tokens of which it stored `ran`.

    past: logical length before the call. tail: how many of the last are stored as they were fed.
    valid: [B, ran] of the new tokens, or None. rebuild_mask, own_tokens: see `Pruned`.
    position_offset, layer_position_offset: by how much this call lowered the ids of what follows, which adds to what
    earlier calls did.
    heads: as in `Pruned`, in place of what an earlier call said; None leaves that.
    made: what other layers of this call say, so that those that say the same share it, and what is made of it later.
    """
    made = {} if made is None else made
    layer = cache.layers[i]
    if not hasattr(layer, "get_mask_sizes") or getattr(layer, "keys", None) is None:
        return  # linear-attention state has no tokens
    was = state(cache, i)
    before = past - (was.dropped if was else 0)
    old = was.valid if was else None
    if old is not None or valid is not None:
        now, device = valid, layer.keys.device
        valid = once(made, ("valid", old, now, before, ran), lambda: _all_valid(old, now, before, ran, device))
    new = layer if was else _rebuild(type(layer), layer.__dict__)
    new.dropped = (was.dropped if was else 0) + fed - ran
    new.prefix, new.valid = before + ran, valid
    new.rebuild_mask = rebuild_mask or valid is not None or (was.rebuild_mask if was else False)
    new.position_offset = _sum(was.position_offset if was else None, position_offset)
    lowered, more = was.layer_position_offset if was else None, layer_position_offset
    new.layer_position_offset = lowered
    if more is not None:
        new.layer_position_offset = once(made, ("lowered", lowered, more), lambda: _sum(lowered, more))
    new.own_tokens = own_tokens or (was.own_tokens if was else False)
    new.heads = heads if heads is not None else new.heads
    new.tail = tail
    new.came = (*new.came, *[-1] * (new.prefix - len(new.came))) if new.came else ()
    cache.layers[i] = new


def _all_valid(old: Tensor | None, new: Tensor | None, before: int, ran: int, device: torch.device) -> Tensor:
    """[B, before + ran] bool: what is no padding, of `before` tokens that were stored and of those that ran now."""
    batch = (new if new is not None else old).shape[0]  # type: ignore[union-attr]
    ones = torch.ones(batch, before + ran, dtype=torch.bool, device=device)
    if old is not None:
        ones[:, : old.shape[1]] = old
    if new is not None:
        ones[:, before:] = new.to(device)
    return ones


def set_gate(cache: Any) -> None:
    """Let the layer that is cropped first know of all stages at decode, any of which may refuse."""
    first = state(cache, reference_layer(cache))
    if first is not None:
        held = [getattr(layer, "selection", None) for layer in cache.layers if isinstance(layer, Pruned)]
        first.gate = tuple(selection for selection in held if selection is not None)


def stored(layer: Any) -> int:
    """Tokens a layer without preallocated storage holds, or shows."""
    return layer.keys.shape[2]


def roll_back(cache: Any, length: int) -> None:
    """Let a cache hold what it held at a length, after a call that was not completed (and pruned nothing on it yet).

    Layers whose states cannot be taken back (windows, linear attention) are emptied with all others at length 0, and
    left as transformers leaves them otherwise.
    """
    fixed = [x for x in cache.layers if getattr(x, "is_sliding", False) or not hasattr(x, "get_mask_sizes")]
    if fixed and length:
        return
    for layer in cache.layers:
        if layer in fixed:
            layer.reset()
        elif isinstance(layer, Pruned):
            layer.cut(length)
        elif (grown := int(layer.get_seq_length()) - length) > 0:
            layer.crop(-grown)


def _along(x: Tensor, index: Tensor) -> Tensor:
    """x [B, G, P, d] at index [B or 1, n]."""
    index = index.to(x.device)[:, None, :, None]
    return x.gather(2, index.expand(x.shape[0], x.shape[1], -1, x.shape[3]))


def _sum(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    if before is None or now is None:
        return now if before is None else before
    return before + now.to(before.device)


def is_static(layer: Any) -> bool:
    """True for layers with preallocated storage."""
    return bool(getattr(layer, "is_compileable", False))
