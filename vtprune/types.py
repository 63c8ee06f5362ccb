"""What a method sees (`Visual`), needs (`Signal`) and answers (`Assignment`), and where it acts (`Stage`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from .kernels import check, merge

Positions = Literal["keep", "compact"]
Per = Literal["image", "crop", "frame", "sample"]
Newlines = Literal["compete", "keep", "drop"]
Phase = Literal["prefill", "decode"]
Of = Literal["tokens", "heads"]
Rounding = Literal["nearest", "down"]
Where = str | int | tuple[str, int | slice]


class VtpruneError(Exception):
    """Base class of everything vtprune raises on purpose."""


class UnsupportedModel(VtpruneError):
    """The model cannot be pruned exactly; the message names the cause and the way out."""


class UnsupportedCall(VtpruneError):
    """The model can be pruned, but not in this call; the message names the cause and the way out."""


@dataclass(frozen=True)
class Signal:
    """One quantity read from an attention module while the model runs, without changing what it computes.

    kind: "cls" (the CLS token's softmax row, mean over heads, [N]; absent on towers without CLS),
        "cls_full" (the same row of one head as wide as the tower: softmax of q.k / sqrt(C), [N]; absent likewise),
        "received" (mean softmax weight each token receives from all queries, mean over heads, [N]),
        "queries" / "keys" / "values" (heads concatenated, [N, C]), "mean_keys" (mean over heads, [N, d]); all as the
        attention product sees them, that is after rotary embedding and norms where the tower has any,
        "cls_value" (softmax of v_CLS . v_j over all tokens, mean over heads, [N]; absent likewise),
        "mean_query" (softmax row of the mean query, mean over heads, [N]), "value_norm" (L1 norm of the values' mean
        over heads, [N]),
        "hidden" (the tower's states that the projector reads, before it, [N, C]; layer None only),
        "last_row" (the softmax row of the prompt's last query restricted to the unit's tokens, mean over heads, [N]),
        "last_visual" (the same over the sample's visual tokens only, each head's row summing to 1), "last_value" (the
        same of v_last . v_j / sqrt(d)),
        "from_text" (the mean of the rows of all text behind the first visual token, [N]), "to_text" (the share of its
        attention that a visual token gives to that text, [N]), "transition" (how much a layer turns and stretches a
        token: sum over its attention and its MLP of |out| / |in| times the softmax of 1 - cos(in, out) over the
        sample's tokens, where `in` is the module's normalised input and `out` what it adds, [N]; of layers that ran
        before only), of the T tokens of that text "text_rows" (their softmax rows, mean over heads, [N, T]),
        "text_rows_by_head" ([N, H, T]), "rope_weight" (q.k / sqrt(d) that rotary positions alone give to queries and
        keys of ones, [N, T]) and "relevance" (mean over the row's visual tokens of the softmax of x . x_t over that
        text, of the embeddings entering the LLM, [T]), "page_rank" (root mean square over heads of five steps of
        PageRank among all tokens of this call, on softmax(10 q.k / sqrt(d)), [N]), "received_so_far" (softmax weight
        that all queries of this call gave to a token in that layer and all before it, as far as they still were there:
        summed over queries and layers, mean over heads, [N]; layer -1 only); these twelve inside the LLM only.
        Of attention heads, there as well: "head_output" (sum of |output| of a head before the output projection, over
        its channels, the tokens of this call and the layers so far, [H]; layer -1 only).
    layer: for seam "llm" the tower layer: an int counts as in Python (-1 is the last); None is the layer whose output
        feeds the projector; a float in (0, 1) is a share of the depth L: layer round(layer * L) counted from 1, or
        where the tower attends within windows the next one that attends to the whole image. For a stage at decoder
        layer or tower block k it is the offset from k (an int; -1 is the layer that ran just before,
        0 inside the LLM the layer itself, on all that enters it).
    without_cls: True asks only towers without a CLS token, as a fallback that costs nothing elsewhere.

    Raises ValueError on a float outside (0, 1).
    """

    kind: Literal[
        "cls", "cls_full", "cls_value", "received", "mean_query", "queries", "keys", "mean_keys", "values",
        "value_norm", "hidden", "last_row", "last_visual", "last_value", "from_text", "to_text", "transition", "kept",
        "relevance", "text_rows", "text_rows_by_head", "rope_weight", "page_rank", "received_so_far", "head_output",
    ]  # fmt: skip
    layer: int | float | None = -1
    without_cls: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layer, float) and not 0.0 < self.layer < 1.0:
            raise ValueError(
                f"layer={self.layer} is no share of the depth: use a float in (0, 1), an int, or None for the layer "
                "that feeds the projector"
            )

    @property
    def offset(self) -> int:
        """`layer` for a stage inside the LLM, where only an int has a meaning; ValueError otherwise."""
        if not isinstance(self.layer, int):
            raise ValueError(f"{self}: inside the LLM a signal's layer is an int, the offset from the stage's layer")
        return self.layer

    def __str__(self) -> str:
        """For people: "cls (layer -1)"."""
        where = "at {:g} of the depth" if isinstance(self.layer, float) else "{}"
        layer = "that feeds the projector" if self.layer is None else where.format(self.layer)
        return f"{self.kind} (layer {layer}{', without CLS' if self.without_cls else ''})"


# Which tokens stages in the vision tower left, carried to the LLM among the signals: 1 kept, 0 dropped, -1 a newline.
KEPT = Signal("kept")


@dataclass(frozen=True)
class Span:
    """A run of a unit's tokens in raster order: t frames of h rows of w tokens, starting at token `start`.

    newline: one extra token ends every row (any-resolution mosaics of LLaVA-NeXT); it belongs to the span.
    tiles: heights and widths, in tokens, of the crops that a mosaic was put together from; () for a single crop.
    """

    start: int
    grid: tuple[int, int, int]
    newline: bool = False
    tiles: tuple[tuple[int, ...], tuple[int, ...]] | tuple[()] = ()

    def __len__(self) -> int:
        t, h, w = self.grid
        return t * h * (w + self.newline)


@dataclass(frozen=True)
class Visual:
    """What a method sees of ONE unit (an image, a frame or a whole sample; the stage says which).

    x: [N, D] projected features (before the LLM) or hidden states (inside it), in the model's dtype.
    budget: tokens to keep, 1 <= budget <= N; None if the method decides.
    grid: (t, h, w) when all N tokens form one raster, else None.
    spans: runs with a raster of their own (crops, mosaics); tokens outside every span are separators.
    video: True for a video, and for all images of a row together (per="sample"): spans of equal size that follow each
        other are then its frames. False for an image, whose spans are crops.
    signals: what `Method.needs` asked for; a "cls" signal is missing when the tower has no CLS token.
    text: [M, D] embeddings of the sample's text tokens, or None.
    state: made by the seam for one forward pass and shared by the stages of one method; in the tower, one per unit.
    block: (k, last) inside the vision tower: the tokens are about to enter block k, and the budget is due at block
        `last` (k itself, unless the stage is a schedule); None elsewhere.
    """

    x: Tensor
    budget: int | None
    grid: tuple[int, int, int] | None = None
    spans: tuple[Span, ...] = ()
    video: bool = False
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    text: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)
    block: tuple[int, int] | None = None

    @property
    def n(self) -> int:
        """Number of visual tokens of the unit."""
        return self.x.shape[0]


@dataclass(frozen=True)
class Assignment:
    """Which tokens stay, and what flows into them: x' = A x.

    idx: [K] kept positions, ascending, distinct, int64. A merged token stands at the position of its representative.
    order: [K] the same positions in the order they were picked, or None if the method has no order.
    src, dst, w: sparse merge weights; row `dst` (0..K-1, along `idx`) of x' sums w * x[src]. None: x' = x[idx].
    scores: [N] float32 score per token for inspection, or None.
    """

    idx: Tensor
    order: Tensor | None = None
    src: Tensor | None = None
    dst: Tensor | None = None
    w: Tensor | None = None
    scores: Tensor | None = None

    @property
    def merges(self) -> bool:
        """True if kept tokens are weighted sums and not plain copies."""
        return self.src is not None

    def apply(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [K, ...]; merges accumulate in float32 and return in x's dtype."""
        if self.src is None or self.dst is None or self.w is None:
            return x.index_select(0, self.idx)
        return merge(x, self.src, self.dst, self.w, self.idx.shape[0])


class Method(ABC):
    """A pruning rule: a frozen dataclass of options and one call, `Visual -> Assignment`.

    Class attributes `paper` (URL) and `seam` ("pre_llm", "in_llm" or "in_vit") are set by `vtprune.register`; `per`,
    `newlines` and `positions` are the method's own policy, which a `Stage` may override. `video`: it compares frames,
    so a still image leaves it little to go by.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    seam: ClassVar[str] = "pre_llm"
    per: ClassVar[Per] = "image"
    newlines: ClassVar[Newlines] = "compete"
    positions: ClassVar[Positions] = "keep"
    video: ClassVar[bool] = False
    # When a stage inside the LLM asks: while the prompt is read, at every step of decoding, or both. At decode a unit
    # is a row, `x` is empty, the signal is the new token's "last_row" of the layer before, and `state` stays with the
    # cache from step to step (tensors of one row). A method asked at both times lets dropped tokens come back.
    phases: ClassVar[tuple[Phase, ...]] = ("prefill",)
    # What a stage inside the LLM chooses among. "heads": a unit is a row with visual tokens, its N "tokens" the H query
    # heads that still speak, `x` is [N, 0]; from the stage's layer on, at decode too, the output of the others is zero.
    of: ClassVar[Of] = "tokens"
    # How a share of n tokens becomes a count: "nearest" is round(share * n), half to even; "down" cuts off, as int().
    # It is that of the official code, so a share means the count that it means there.
    rounding: ClassVar[Rounding] = "nearest"

    @property
    def adaptive(self) -> bool:
        """True if the method decides how many tokens stay where no budget is given."""
        return False

    @property
    def needs(self) -> tuple[Signal, ...]:
        """Signals the method reads; may depend on its options."""
        return ()

    @property
    def by_patch(self) -> bool:
        """True if inside the tower it chooses among single patches, also where several become one visual token."""
        return False

    @property
    def reweighs(self) -> bool:
        """True if `reweigh` changes the attention of all decoder layers, in every call while the model is patched."""
        return False

    def reweigh(self, rows: Tensor, seen: Tensor) -> Tensor:
        """Other softmax rows in place of rows [B, H, R, N] float32, whose queries may see seen [B, 1 or H, R] keys."""
        return rows

    @property
    def exact(self) -> bool:
        """False if an answer may hold fewer tokens than its budget or all there are, as a few official codes do."""
        return True

    @abstractmethod
    def __call__(self, v: Visual) -> Assignment:
        """Choose (or merge into) exactly `v.budget` tokens."""

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        """All units of one forward pass; override where a batched form is faster. Must equal one call per unit."""
        return [self(v) for v in units]

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        """The published schedule of the method; most act at one place only. depth: decoder layers of the model."""
        return [Stage(self.default_where(), self, keep=keep)]

    def default_where(self) -> Where:
        """Where the method acts when the user names only the method."""
        return "llm"


@dataclass(frozen=True)
class Stage:
    """One place where tokens are dropped or merged.

    where: "llm" (between projector and LLM), an int k (the hidden states entering decoder layer k), or ("vit", k)
        (those entering block k of the vision tower; k = depth: leaving its last block). Only blocks whose output is
        used count, a negative k counts from the last of them. ("vit", slice) is a schedule: the method is asked at
        every block of the slice and has to reach its budget at the last (a stop beyond depth includes k = depth). In
        the tower a token is what becomes one visual token (2 x 2 patches in Qwen2-VL), and budgets are per crop (row
        of the tower's batch) or packed image.
    method: the rule.
    keep: float in (0, 1] = share of a unit's visual tokens as the model sees them unpruned, made a count as
        `Method.rounding` says; int >= 1 = tokens per unit (more than there are keeps all); None = the method decides.
    keep_total: the same for all units of a row together, shared out in proportion to their size, each at least one.
    per: what one unit is: "image" (an image or a whole video; SmolVLM and Idefics3: a tile, because text stands between
        tiles), "crop" (overview and tiles of an any-resolution image), "frame", or "sample" (all visual tokens of a
        row; for methods that compare frames each clip of the row, see `clips`). None = the method's default.
    clips: with per="sample", how many images each clip has, in order over the rows of the batch, where a family writes
        the frames of a video as images (InternVL, SmolVLM): the unit is then a clip, for any method; a video, or an
        image that is no frame, counts 1. None: methods that compare frames (`Method.video`) tell clips by what stands
        between images of one size. They are one clip as long as it is the processor's separator, of which no more than
        its label changes ("Frame2: ", a timestamp); other words begin a new clip, and so does a label that comes again
        ("Frame1" behind "Frame8"). Two clips of one frame each, or without labels and words between, cannot be told
        apart: say clips=(1, 1). To all other methods a sample is the whole row.
    newlines: tokens outside every raster, such as the ends of a mosaic's rows. "compete" makes them tokens like any
        other (per="image" and "sample"; a tile of per="crop" brings those at its right edge), "keep" keeps them beside
        the budget, "drop" drops them with the first token that goes. None = the method's default.
    positions: "keep" leaves the original position ids (gaps), "compact" renumbers; None = the method's default.
    """

    where: Where
    method: Method
    keep: float | int | None = None
    keep_total: float | int | None = None
    per: Per = None  # type: ignore[assignment]
    newlines: Newlines = None  # type: ignore[assignment]
    positions: Positions | None = None
    clips: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"method={self.method!r} is not a vtprune Method: pass vtprune.create('divprune') or an instance of a "
                "class registered with @vtprune.register"
            )
        object.__setattr__(self, "keep", check_keep(self.keep))
        object.__setattr__(self, "keep_total", check_keep(self.keep_total, "keep_total"))
        if isinstance(self.where, Integral) and not isinstance(self.where, bool):
            object.__setattr__(self, "where", int(self.where))
        if self.keep is not None and self.keep_total is not None:
            raise TypeError(f"keep={self.keep} and keep_total={self.keep_total}: give one of them")
        for name, valid in (("per", get_args(Per)), ("newlines", get_args(Newlines))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.method, name))
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, valid))}")
        if self.clips is not None:
            object.__setattr__(self, "clips", check_clips(self.clips, self.per))
        if self.positions not in (None, *get_args(Positions)):
            raise ValueError(f"positions={self.positions!r}: choose 'keep' or 'compact'")

    @property
    def compact(self) -> bool:
        """True if kept tokens are renumbered: as asked for, else as the method's default says."""
        return (self.positions or self.method.positions) == "compact"

    @property
    def keeps_all(self) -> bool:
        """True if the share of tokens to keep is 1.0."""
        keep = self.keep if self.keep_total is None else self.keep_total
        return isinstance(keep, float) and keep == 1.0

    @property
    def policy(self) -> str:
        """How budgets are dealt out, in words: "per crop, newlines dropped, positions kept"."""
        share = ", one total a row" if self.keep_total is not None else ""
        newlines = {"compete": "compete", "keep": "kept", "drop": "dropped"}[self.newlines]
        clips = "" if self.clips is None else f" in clips of {', '.join(map(str, self.clips))}"
        return (
            f"per {self.per}{clips}{share}, newlines {newlines}, positions {'renumbered' if self.compact else 'kept'}"
        )

    def budgets(self, sizes: Sequence[int]) -> list[int | None]:
        """Tokens to keep of the units of one row, which have sizes[i] tokens unpruned: 1..sizes[i] each.

        Raises ValueError if keep_total is less than the number of units.
        """
        if self.keep_total is None:
            return [None if self.keep is None else budget(self.keep, n, self.method.rounding) for n in sizes]
        total = budget(self.keep_total, sum(sizes), self.method.rounding)
        if total < len(sizes):
            raise ValueError(
                f"keep_total={self.keep_total} gives {total} tokens to {len(sizes)} units (per={self.per!r}): at least "
                "one each is needed; raise it, or use per='sample'"
            )
        # Everybody gets one token first; what is left is shared in proportion to what each could still take.
        return [1 + more for more in spread(total - len(sizes), [n - 1 for n in sizes])]


def ask(stage: Stage, views: Sequence[Visual], least: bool = False) -> list[Assignment]:
    """What the method of a stage answers, checked (`check_answers`), for units that it must not have changed.

    least: budgets are what must be left at least, as before the last block of a schedule.
    """
    name = stage.method.name or type(stage.method).__name__
    ours = type(stage.method).__module__.startswith("vtprune.")
    given = [(what, x, _mark(x, ours)) for view in views for what, x in _tensors(view)]
    answers = stage.method.batch(views)
    for what, x, mark in given:
        if not _unchanged(x, mark):
            raise VtpruneError(
                f"{name} changed {what} of a unit in place, which other units and the model read as well: make a new "
                "tensor of it"
            )
    check_answers(stage, views, answers, least)
    return answers


def _tensors(view: Visual) -> Iterator[tuple[str, Tensor]]:
    yield "v.x", view.x
    if view.text is not None:
        yield "v.text", view.text
    for signal, x in view.signals.items():
        yield f"the signal {signal.kind!r} in v.signals", x


def _mark(x: Tensor, ours: bool) -> int | Tensor | None:
    """What tells whether a tensor was changed: its version, or a copy where inference mode counts none."""
    if not x.is_inference():
        return x._version
    return None if ours else x.clone()


def _unchanged(x: Tensor, mark: int | Tensor | None) -> bool:
    return mark is None or (torch.equal(x, mark) if isinstance(mark, Tensor) else x._version == mark)


def check_answers(stage: Stage, views: Sequence[Visual], answers: Sequence[Assignment], least: bool = False) -> None:
    """Raise VtpruneError unless every answer is an assignment of its budget to its unit; `least` as in `ask`.

    What only the device knows is one deferrable check.
    """
    name = stage.method.name or type(stage.method).__name__
    if not isinstance(answers, Sequence) or len(answers) != len(views):
        count = len(answers) if isinstance(answers, Sequence) else type(answers).__name__
        raise VtpruneError(f"{name}.batch answered {count} of {len(views)} units")
    for view, answer in zip(views, answers):
        idx = getattr(answer, "idx", None)
        if not isinstance(answer, Assignment) or not _is(idx, 1, view.x.device, torch.int64):
            raise VtpruneError(
                f"{name} must answer an Assignment with idx [K] int64, not {answer!r:.80}, on {view.x.device}"
            )
        _check_count(stage, name, view, len(answer.idx), least)
        fault = _shape_fault(view, answer)
        if fault:
            raise VtpruneError(
                f"{name} answered {fault} for a unit of {view.n} tokens of which it keeps {len(answer.idx)}"
            )
    conditions = _conditions(views, answers)
    if conditions:
        check(torch.cat([c.flatten() for c in conditions]).all(), lambda: _fault(name, views, answers))


def _check_count(stage: Stage, name: str, view: Visual, count: int, least: bool) -> None:
    exact, budget = stage.method.exact, view.budget
    if budget is None:
        return
    most = view.n if least or (not exact and count >= view.n) else budget
    if count > most or (count < budget and (exact or least)):
        raise VtpruneError(f"{name} kept {count} tokens of {view.n}, but its budget is {budget}")


def _is(x: Any, dims: int, device: torch.device, dtype: torch.dtype | None) -> bool:
    """True for a tensor of so many dimensions there; dtype None stands for any floating one."""
    if not isinstance(x, Tensor) or x.dim() != dims or x.device != device:
        return False
    return x.is_floating_point() if dtype is None else x.dtype == dtype


def _shape_fault(view: Visual, a: Assignment) -> str | None:
    """What the host sees is wrong with everything but idx."""
    k, device = len(a.idx), view.x.device
    if a.order is not None and not (_is(a.order, 1, device, torch.int64) and len(a.order) == k):
        return f"order={_said(a.order)}, not [{k}] int64 on {device}"
    if a.scores is not None and not (_is(a.scores, 1, device, None) and len(a.scores) == view.n):
        return f"scores={_said(a.scores)}, not [{view.n}] floating on {device}"
    parts = {"src": a.src, "dst": a.dst, "w": a.w}
    if all(part is None for part in parts.values()):
        return None
    missing = [part for part, x in parts.items() if x is None]
    if missing:
        return f"src, dst and w without {' and '.join(missing)}"
    if view.x.shape[1] == 0:
        return "src, dst and w, which have no meaning at decode and for heads,"
    for part, x in parts.items():
        if not _is(x, 1, device, None if part == "w" else torch.int64) or len(x) != len(a.src):  # type: ignore[arg-type]
            return f"{part}={_said(x)}, not [{len(a.src)}] {'floating' if part == 'w' else 'int64'} on {device}"  # type: ignore
    return None


def _said(x: Any) -> str:
    return f"{list(x.shape)} {str(x.dtype)[6:]} on {x.device}" if isinstance(x, Tensor) else f"{x!r:.40}"


def _conditions(views: Sequence[Visual], answers: Sequence[Assignment]) -> list[Tensor]:
    """What must hold of all answers together, as tensors on the device."""
    idx, hit, rows, weights = [], [], [], []
    size = start = 0  # tokens and output rows of the units before
    for view, a in zip(views, answers):
        k = len(a.idx)
        idx.append(torch.cat([a.idx[:1] + 1, a.idx.diff(), view.n - a.idx[-1:]]))
        if a.order is not None:
            hit.append((a.idx, a.order, view.n, size))
        if a.src is not None and a.dst is not None and a.w is not None:
            idx += [a.src + 1, view.n - a.src, a.dst + 1, k - a.dst]
            rows.append(a.dst.clamp(0, max(0, k - 1)) + start)
            start += k
            weights.append(a.w)
        size += view.n
    found = [torch.cat(idx) > 0] if idx else []
    if weights:
        found.append(torch.cat([w.isfinite() for w in weights]))
        rows_hit = torch.zeros(start, dtype=torch.bool, device=weights[0].device)
        found.append(rows_hit.index_fill_(0, torch.cat(rows), True) if start else rows_hit)
    if hit:
        picked = torch.zeros(size, dtype=torch.bool, device=hit[0][0].device)
        picked.index_fill_(0, torch.cat([order.clamp(0, n - 1) + at for _, order, n, at in hit]), True)
        found.append(picked.index_select(0, torch.cat([idx.clamp(0, n - 1) + at for idx, _, n, at in hit])))
    return found


def _fault(name: str, views: Sequence[Visual], answers: Sequence[Assignment]) -> VtpruneError:
    """The error that names the first answer with a fault that the device found."""
    view, a = next((v, a) for v, a in zip(views, answers) if not all(bool(c.all()) for c in _conditions([v], [a])))
    n, k = view.n, len(a.idx)
    steps = torch.cat([a.idx[:1] + 1, a.idx.diff(), n - a.idx[-1:]])
    if not bool((steps > 0).all()):
        return VtpruneError(
            f"{name} answered idx={a.idx.tolist()!r:.80} for a unit of {n} tokens: kept positions must be distinct, "
            f"ascending and within 0..{n - 1}; sort them (Assignment.order holds pick order)"
        )
    for part, x, most in (("src", a.src, n), ("dst", a.dst, k)):
        if x is not None and not bool(((x >= 0) & (x < most)).all()):
            return VtpruneError(f"{name} answered {part}={x.tolist()!r:.80}: they must be within 0..{most - 1}")
    if a.w is not None and a.dst is not None:
        if not bool(a.w.isfinite().all()):
            return VtpruneError(f"{name} answered merge weights w={a.w.tolist()!r:.80}: they must be finite numbers")
        empty = sorted(set(range(k)) - set(a.dst.tolist()))
        if empty:
            return VtpruneError(
                f"{name} answered dst without {empty!r:.80}: nothing flows into those of its {k} kept tokens, which "
                "would be zero; give each its own position as a source"
            )
    order = [] if a.order is None else a.order.tolist()
    return VtpruneError(f"{name} answered order={order!r:.80}, no permutation of idx={a.idx.tolist()!r:.80}")


def check_clips(clips: Any, per: Per) -> tuple[int, ...]:
    """The numbers of frames as a tuple; raises unless they are ints >= 1 and units are samples."""
    if isinstance(clips, str) or not isinstance(clips, Sequence) or not all(type(n) is int for n in clips):
        raise TypeError(f"clips={clips!r}: give the number of frames of each clip, such as clips=(8, 8)")
    if not clips or min(clips) < 1:
        raise ValueError(f"clips={clips!r}: a clip has at least one frame, such as clips=(8, 8)")
    if per != "sample":
        raise ValueError(f"clips={clips!r} divides samples, but the units are per={per!r}: use per='sample'")
    return tuple(clips)


def check_keep(keep: object, name: str = "keep") -> float | int | None:
    """keep as a Python number, also from NumPy's; raises unless it is None, a float in (0, 1] or an int >= 1."""
    ways = "use a float in (0, 1] (share of the visual tokens) or an int >= 1 (tokens per unit)"
    if keep is None:
        return None
    if isinstance(keep, bool) or not isinstance(keep, Real):
        item = "; call its .item()" if hasattr(keep, "item") and getattr(keep, "ndim", None) == 0 else ""
        raise TypeError(f"{name}={keep!r} is a {type(keep).__name__}: {ways}{item}")
    if isinstance(keep, Integral):
        if keep < 1:
            raise ValueError(f"{name}={keep} keeps nothing: {ways}")
        return int(keep)
    share = float(keep)
    if not (math.isfinite(share) and 0.0 < share <= 1.0):
        raise ValueError(f"{name}={keep} is outside the valid range: {ways}")
    return share


def budget(keep: float | int, n: int, rounding: Rounding = "nearest") -> int:
    """A count itself, or a share of n tokens as a count (see `Method.rounding`); clamped to 1..n.

    >>> budget(0.5, 7), budget(0.5, 7, "down")
    (4, 3)
    """
    if isinstance(keep, Integral):
        return max(1, min(int(keep), n))
    return max(1, min(int(float(keep) * n) if rounding == "down" else round(float(keep) * n), n))


def spread(total: int, sizes: Sequence[int]) -> Iterator[int]:
    """Share `total` over blocks in proportion to `sizes` (largest remainder; ties to the lower index)."""
    whole = max(1, sum(sizes))
    exact = [total * s / whole for s in sizes]
    floor = [int(e) for e in exact]
    rest = sorted(range(len(sizes)), key=lambda i: (floor[i] - exact[i], i))
    for i in rest[: total - sum(floor)]:
        floor[i] += 1
    yield from floor
