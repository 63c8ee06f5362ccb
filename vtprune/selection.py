"""`select`: prune features that you encoded yourself; `count`: how many tokens stay, before anything is encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from .core.method import Method, Newlines, Per, Positions, Stage
from .core.select import Selected, count_stages, rows_of, run_stages
from .core.signal import Signal
from .core.units import Unit
from .core.visual import Span
from .recipe import Recipe, given_stages, method_of
from .signals import kinds

T = TypeVar("T")
Grid = tuple[int, int, int]
SPANS = "a tuple of vtprune.Span"


def select(
    features: Tensor | Sequence[Tensor],
    method: str | Method | Stage | Sequence[Stage] | Recipe,
    *,
    keep: float | int | None = None,
    keep_total: float | int | None = None,
    grid: Grid | Sequence[Grid | None] | None = None,
    spans: Sequence[Span] | Sequence[Sequence[Span]] | None = None,
    video: bool | Sequence[bool] | None = None,
    signals: Mapping[Any, Tensor] | Sequence[Mapping[Any, Tensor]] | None = None,
    text: Tensor | Sequence[Tensor | None] | None = None,
    rows: Sequence[int] | None = None,
    per: Per | None = None,
    newlines: Newlines | None = None,
    positions: Positions | None = None,
    clips: Sequence[int] | None = None,
    **options: Any,
) -> list[Selected]:
    """What `patch` keeps of visual tokens before the LLM, of features that you hold: one `Selected` an image.

    features: [N, D] of one image or video, in raster order, as the LLM gets them (behind the projector), in any
        floating dtype and on any device; or a list of them. All of one call have D, the dtype and the device in common.
    method: a name from `vtprune.methods()`, a `Method`, a `Stage`, a list of them, or a `Recipe`. By name only that
        rule runs; stages of a published schedule inside the tower or the LLM are the engine's to run.
    keep, keep_total: the budget, as for `patch`; keep_total is one for all units of a row.
    grid: (t, h, w) with t * h * w = N, one for all images or a list of one each; None in it: unknown.
    spans: in place of `grid`, the rasters inside an image: a tuple of `Span` (crops, mosaics whose rows end with a
        newline token), or a list of one tuple an image.
    video: which images are videos, one bool for all or one each; None: those whose grid has t > 1.
    signals: what the method reads of the vision tower (`method.needs`), by `Signal` or by its kind, such as "cls":
        tensors of first dimension N; a list of such dicts for a list of images. A method names what is missing.
    text: [M, D] embeddings of the text that stands beside the images; a list of one a row.
    rows: the row (sample) of each image, ascending from 0. None: all images stand in one row. It matters to
        per="sample", keep_total, clips and text.
    per, newlines, positions, clips: as for `Stage`. positions changes nothing here: it is for whoever numbers tokens.
    options: of the method, with a name.

    Returns a list of `Selected`, also for one image: `idx` [K] int64 ascending, `features` [K, D] with merges applied,
    `order` [K] or None, `scores` [N] float32 or None, `notes`. Units that keep all they have are not asked.
    Raises ValueError and TypeError for bad arguments, each naming the value and the valid ones; UnsupportedCall where
    clips do not fit; VtpruneError where a method answers out of range.

    >>> (image,) = vtprune.select(features, "divprune", keep=0.25, grid=(1, 24, 24))
    >>> image.features                                              # [144, D]
    >>> signals = [{"cls": cls_a, "mean_keys": keys_a}, {"cls": cls_b, "mean_keys": keys_b}]
    >>> vtprune.select([a, b], "visionzip", keep=64, signals=signals)
    """
    policy = {"keep_total": keep_total, "per": per, "newlines": newlines, "positions": positions, "clips": clips}
    images, units, words = laid_out(features, grid, spans, video, signals, text, rows)
    return run_stages(images, units, stages_of(method, keep, policy, options), words)


def count(
    method: str | Method | Stage | Sequence[Stage] | Recipe,
    grid: Grid | Sequence[Grid | None] | None = None,
    keep: float | int | None = None,
    *,
    keep_total: float | int | None = None,
    sizes: int | Sequence[int] | None = None,
    spans: Sequence[Span] | Sequence[Sequence[Span]] | None = None,
    video: bool | Sequence[bool] | None = None,
    rows: Sequence[int] | None = None,
    per: Per | None = None,
    newlines: Newlines | None = None,
    positions: Positions | None = None,
    clips: Sequence[int] | None = None,
    **options: Any,
) -> int | list[int]:
    """How many visual tokens `select`, or `patch` before the LLM, leaves of an image; known before it is encoded.

    grid: (t, h, w) of one image or video, in tokens as the LLM gets them, or a list of one each.
    sizes: N, the tokens of an image, or a list of one each; needed where no grid is known, and where tokens stand
        behind the last of the spans. None: as many as the grid has, or up to the end of the last span.
    All else is as for `select`.

    Returns an int for one image; a list of ints where grid, spans or sizes is a list of one for each image.
    Raises ValueError and TypeError as `select` does, and ValueError where only features can tell: a method that
    decides how many tokens stay, or may keep fewer than its budget; images that compete for one budget (the error
    says how many they keep together); and stages behind such a competition.

    >>> vtprune.count("divprune", (1, 24, 24), 0.25)
    144
    >>> vtprune.count("visionzip", [(1, 24, 24), (1, 12, 20)], keep=64)
    [64, 64]
    """
    listed = [g for g, one in ((grid, _is_grid), (spans, _are_spans), (sizes, _is_size)) if _is_list(g, one)]
    images = len(listed[0]) if listed else 1  # type: ignore[arg-type]
    policy = {"keep_total": keep_total, "per": per, "newlines": newlines, "positions": positions, "clips": clips}
    stages = stages_of(method, keep, policy, options)
    units = _units(_sizes(sizes, grid, spans, images), grid, spans, video, [{}] * images, rows)
    found = count_stages(units, stages)
    return found if listed else found[0]


def laid_out(
    features: Any, grid: Any, spans: Any, video: Any, signals: Any, text: Any, rows: Any
) -> tuple[list[Tensor], list[Unit], list[Tensor | None]]:
    """The features of each image, the images in their rows and the text of each row, of the arguments of `select`."""
    images = _images(features)
    units = _units([len(x) for x in images], grid, spans, video, _signals(signals, images), rows)
    return images, units, _text(text, images[0], units[-1].row + 1)


def stages_of(method: Any, keep: Any, policy: dict[str, Any], options: dict[str, Any]) -> list[Stage]:
    """The stages before the LLM that the arguments of `select` name."""
    where = {name: value for name, value in policy.items() if value is not None}
    stages = given_stages(method, keep, {**where, **options})
    if stages is not None:
        return stages
    made = method_of(method, keep, where.get("keep_total"), options)
    if made.seam != "pre_llm" or made.default_where() != "llm":
        raise ValueError(
            f"{made.name} acts inside a model (seam {made.seam!r}), and features stand before the LLM: choose one "
            "of seam 'pre_llm' (see vtprune.methods()), or pass Stage('pre_llm', ...) if you have the signals it reads"
        )
    return [Stage("pre_llm", made, keep=keep, **where)]


def _is_list(value: Any, is_one: Any) -> bool:
    """True for one value each of several images; a value for a single image may be a sequence as well."""
    return isinstance(value, Sequence) and not isinstance(value, str) and not is_one(value)


def _sizes(sizes: Any, grid: Any, spans: Any, images: int) -> list[int]:
    """The tokens of each image: as given, or as many as its raster or its spans hold."""
    if not images:
        raise ValueError("grid, spans or sizes is an empty list: pass what there is of at least one image")
    given = _each(sizes, images, _is_size, "sizes", "an int >= 1")
    grids = _each(grid, images, _is_grid, "grid", "(t, h, w)")
    found = []
    for i, (n, size, own) in enumerate(zip(given, grids, _each(spans, images, _are_spans, "spans", SPANS))):
        if n is None and size is None and not own:
            raise ValueError(
                f"image {i} has neither a grid nor spans nor a size: pass grid=(t, h, w), "
                "or sizes=N where the raster is unknown"
            )
        ends = [span.start + len(span) for span in own or ()]
        found.append(n or (max(ends) if ends else math.prod(size)))
    return found


def _units(sizes: list[int], grid: Any, spans: Any, video: Any, signals: list[Any], rows: Any) -> list[Unit]:
    """The images of a call, checked, side by side in their rows."""
    images = len(sizes)
    parts = _spans(spans, _each(grid, images, _is_grid, "grid", "(t, h, w)"), sizes, images)
    moving = [any(s.grid[0] > 1 for s in own) for own in parts]
    if video is not None:
        moving = [bool(v) for v in _each(video, images, lambda v: isinstance(v, bool), "video", "True or False")]
    return rows_of(sizes, parts, moving, signals, _rows(rows, images))


def _images(features: Any) -> list[Tensor]:
    images = [features] if isinstance(features, Tensor) else features
    if not isinstance(images, Sequence) or not images or not all(isinstance(x, Tensor) for x in images):
        raise TypeError(f"features={features!r:.80}: pass a tensor [N, D] of one image, or a list of them")
    for i, x in enumerate(images):
        like = images[0]
        if x.dim() != 2 or not x.is_floating_point() or 0 in x.shape:
            raise ValueError(f"features of image {i} are {_said(x)}: they must be [N, D] floating, N and D >= 1")
        if (x.shape[1], x.dtype, x.device) != (like.shape[1], like.dtype, like.device):
            raise ValueError(f"features of image {i} are {_said(x)}, of image 0 {_said(like)}: D, dtype, device differ")
    return list(images)


def _said(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype)[6:]} on {x.device}"


def _each(value: Any, count: int, fits: Any, name: str, what: str) -> list[Any]:
    """One value for all images, or one each, as a list."""
    if value is None or fits(value):
        return [value] * count
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(v is None or fits(v) for v in value):
        raise TypeError(f"{name}={value!r:.80}: pass {what}, or a list of one for each image")
    if len(value) != count:
        raise ValueError(f"{name} holds {len(value)} entries for {count} images: pass one for each")
    return list(value)


def _is_grid(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(type(n) is int and n > 0 for n in value)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _spans(spans: Any, grids: list[Any], sizes: list[int], count: int) -> list[tuple[Span, ...]]:
    """The rasters of each image, checked against its size."""
    if spans is None:
        for i, (size, n) in enumerate(zip(grids, sizes)):
            if size is not None and math.prod(size) != n:
                raise ValueError(
                    f"grid={tuple(size)} of image {i} has {math.prod(size)} tokens, but the image has {n}: say where "
                    "rasters and newlines stand with spans=(Span(start, (t, h, w), newline=...), ...)"
                )
        return [() if size is None else (Span(0, tuple(size)),) for size in grids]
    if any(size is not None for size in grids):
        raise TypeError("grid and spans: give one of them")
    found = [tuple(own or ()) for own in _each(spans, count, _are_spans, "spans", SPANS)]
    for i, (own, n) in enumerate(zip(found, sizes)):
        end = 0
        for span in sorted(own, key=lambda s: s.start):
            if span.start < end or span.start + len(span) > n:
                raise ValueError(
                    f"{span} of image {i} holds tokens {span.start}..{span.start + len(span) - 1}: spans of an image "
                    f"must not overlap and stand within its {n} tokens"
                )
            end = span.start + len(span)
    return found


def _are_spans(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(s, Span) for s in value)


def _rows(rows: Sequence[int] | None, count: int) -> list[int]:
    if rows is None:
        return [0] * count
    found = list(rows)
    steps = [b - a for a, b in zip([0, *found], found)]
    if len(found) != count or found[0] != 0 or not set(steps) <= {0, 1}:
        raise ValueError(
            f"rows={found!r:.80}: give the row of each of the {count} images, ascending from 0 without gaps"
        )
    return found


def _signals(signals: Any, images: list[Tensor]) -> list[dict[Signal, Tensor]]:
    given = [{}] * len(images) if signals is None else signals
    if isinstance(given, Mapping) and len(images) == 1:
        given = [given]
    if not isinstance(given, Sequence) or not all(isinstance(own, Mapping) for own in given):
        raise TypeError("signals: pass a dict of tensors for one image, and a list of such dicts for a list of images")
    if len(given) != len(images):
        raise ValueError(f"signals holds {len(given)} entries for {len(images)} images: pass one for each")
    return [_Signals.of(own, x, i) for i, (own, x) in enumerate(zip(given, images))]


class _Signals(dict[Signal, Tensor]):
    """Signals of one image; one that was given by its kind stands for that kind of every layer."""

    kinds: Mapping[str, Tensor]

    @classmethod
    def of(cls, given: Mapping[Any, Tensor], x: Tensor, image: int) -> _Signals:
        """Checked against the features [N, D] of the image."""
        for key, value in given.items():
            kind = key.kind if isinstance(key, Signal) else key
            known = [row.name for row in kinds()]
            if kind not in known:
                raise ValueError(f"signals of image {image} name {key!r}: use a Signal or one of {', '.join(known)}")
            if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != len(x) or value.device != x.device:
                said = _said(value) if isinstance(value, Tensor) else repr(value)[:40]
                raise ValueError(f"signal {kind!r} of image {image} is {said}, not [{len(x)}, ...] on {x.device}")
        made = cls({key: value for key, value in given.items() if isinstance(key, Signal)})
        made.kinds = {key: value for key, value in given.items() if isinstance(key, str)}
        return made

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, Signal) and key.kind in self.kinds)

    def __missing__(self, key: Signal) -> Tensor:
        return self.kinds[key.kind]


def _text(text: Any, like: Tensor, rows: int) -> list[Tensor | None]:
    given = [text] * rows if text is None or (isinstance(text, Tensor) and rows == 1) else text
    if not isinstance(given, Sequence) or len(given) != rows:
        raise ValueError(
            f"text: pass embeddings [M, D] for one row, or a list of one (or None) for each of {rows} rows"
        )
    for x in given:
        if x is not None and not (isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == like.shape[1]):
            said = _said(x) if isinstance(x, Tensor) else repr(x)[:40]
            raise ValueError(f"text is {said}: it must be [M, {like.shape[1]}], as wide as the features")
    return [None if x is None else x.to(like.device) for x in given]
