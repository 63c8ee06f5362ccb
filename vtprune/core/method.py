"""`Method`: a pruning rule; `Stage`: where it acts and how many tokens it keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar, get_args

from torch import Tensor

from .signal import Signal
from .visual import Assignment, Visual

Positions = Literal["keep", "compact"]
Per = Literal["image", "crop", "frame", "sample"]
Newlines = Literal["compete", "keep", "drop"]
Phase = Literal["prefill", "decode"]
Of = Literal["tokens", "heads"]
Rounding = Literal["nearest", "down"]
Where = str | int | tuple[str, int | slice]
M = TypeVar("M", bound="type[Method]")


class Method(ABC):
    """A pruning rule: a frozen dataclass of options and one call, `Visual -> Assignment`.

    Class attributes `paper` (URL) and `seam` ("pre_llm", "in_llm" or "in_vit") are set by `vtprune.register`; `per` and
    `newlines` are the method's own policy, which a `Stage` may override. `video`: it compares frames, so a still image
    leaves it little to go by.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    seam: ClassVar[str] = "pre_llm"
    per: ClassVar[Per] = "image"
    newlines: ClassVar[Newlines] = "compete"
    # What the official code does with position ids. A stage keeps them unless it is told to renumber.
    official_positions: ClassVar[Positions] = "keep"
    video: ClassVar[bool] = False
    # It looks at the question, in `Visual.text` or in what text attends to inside the LLM. So what it keeps of an image
    # depends on the question, and a server may not use it again for another one.
    reads_text: ClassVar[bool] = False
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
    def resolved(self) -> Method:
        """The method that a stage holds when it is given this one: itself, unless it is a name for another one."""
        return self

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

    @property
    def window(self) -> int | None:
        """How many frames of a video it looks at together, beside the one before them (`Visual.before`); None: all.

        Whole windows, and the budget that is their share, lead to the same choice without the rest of the video, so a
        `vtprune.Stream` may ask about them alone.
        """
        return None

    @property
    def trusted(self) -> bool:
        """True if tests show that it never changes its input nor answers out of range, so checks need not wait.

        Its answers are then judged once the device has worked on, and tensors of inference mode are not copied to see
        whether they changed. It is a mark of the class itself (`trust`), which a class derived from it does not have.
        """
        return "_trusted" in type(self).__dict__

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


def trust(cls: M) -> M:
    """Mark a class of methods as `Method.trusted`."""
    cls._trusted = True  # type: ignore[attr-defined]
    return cls


@dataclass(frozen=True)
class Stage:
    """One place where tokens are dropped or merged.

    where: "pre_llm" (between projector and LLM; stored as "llm", the older word for the same place), an int k (the
        hidden states entering decoder layer k), or ("vit", k) (those entering block k of the vision tower; k = depth:
        leaving its last block). Only blocks whose output is used count, a negative k counts from the last of them.
        ("vit", slice) is a schedule: the method is asked at every block of the slice and has to reach its budget at the
        last (a stop beyond depth includes k = depth). In the tower a token is what becomes one visual token (2 x 2
        patches in Qwen2-VL), and budgets are per crop (row of the tower's batch) or packed image.
    method: the rule, or in its place the one that it stands for (`Method.resolved`).
    keep: float in (0, 1] = share of a unit's visual tokens as the model sees them unpruned, made a count as
        `Method.rounding` says; int >= 1 = tokens per unit (more than there are keeps all); None = the method decides.
    keep_total: the same for all units of a row together, shared out in proportion to their size, each at least one.
    per: what one unit is: "image" (an image or a whole video; a tile in families that write text between tiles),
        "crop" (overview and tiles of an any-resolution image), "frame", or "sample" (all visual tokens of a row; for
        methods that compare frames each clip of the row, see `clips`). None = the method's default.
    clips: with per="sample", how many images each clip has, in order over the rows of the batch, where a family writes
        the frames of a video as images: the unit is then a clip, for any method; a video, or an
        image that is no frame, counts 1. None: methods that compare frames (`Method.video`) tell clips by what stands
        between images of one size. They are one clip as long as it is the processor's separator, of which no more than
        its label changes ("Frame2: ", a timestamp); other words begin a new clip, and so does a label that comes again
        ("Frame1" behind "Frame8"). Two clips of one frame each, or without labels and words between, cannot be told
        apart: say clips=(1, 1). To all other methods a sample is the whole row.
    newlines: tokens outside every raster, such as the ends of a mosaic's rows. "compete" makes them tokens like any
        other (per="image" and "sample"; a tile of per="crop" brings those at its right edge), "keep" keeps them beside
        the budget, "drop" drops them with the first token that goes. None = the method's default.
    positions: "keep" leaves the original position ids (gaps), "compact" renumbers what is left, as the official code of
        some methods does (`Method.official_positions`). None = "keep".
    """

    where: Where
    method: Method
    keep: float | int | None = None
    keep_total: float | int | None = None
    per: Per = None  # type: ignore[assignment]
    newlines: Newlines = None  # type: ignore[assignment]
    positions: Positions = None  # type: ignore[assignment]
    clips: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"method={self.method!r} is not a vtprune Method: pass vtprune.create('divprune') or an instance of a "
                "class registered with @vtprune.register"
            )
        object.__setattr__(self, "method", self.method.resolved)
        object.__setattr__(self, "keep", check_keep(self.keep))
        object.__setattr__(self, "keep_total", check_keep(self.keep_total, "keep_total"))
        if isinstance(self.where, Integral) and not isinstance(self.where, bool):
            object.__setattr__(self, "where", int(self.where))
        if self.where == "pre_llm":
            object.__setattr__(self, "where", "llm")
        if self.keep is not None and self.keep_total is not None:
            raise TypeError(f"keep={self.keep} and keep_total={self.keep_total}: give one of them")
        for name, valid in (("per", get_args(Per)), ("newlines", get_args(Newlines))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.method, name))
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, valid))}")
        if self.clips is not None:
            object.__setattr__(self, "clips", check_clips(self.clips, self.per))
        object.__setattr__(self, "positions", "keep" if self.positions is None else self.positions)
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions={self.positions!r}: choose 'keep' or 'compact'")

    @cached_property
    def needs(self) -> tuple[Signal, ...]:
        """The signals that its method reads."""
        return self.method.needs

    @cached_property
    def trusted(self) -> bool:
        """As of its method (`Method.trusted`)."""
        return self.method.trusted

    @cached_property
    def exact(self) -> bool:
        """As of its method (`Method.exact`)."""
        return self.method.exact

    @cached_property
    def compact(self) -> bool:
        """True if kept tokens are renumbered."""
        return self.positions == "compact"

    @cached_property
    def keeps_all(self) -> bool:
        """True if the share of tokens to keep is 1.0."""
        keep = self.keep if self.keep_total is None else self.keep_total
        return isinstance(keep, float) and keep == 1.0

    @cached_property
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
