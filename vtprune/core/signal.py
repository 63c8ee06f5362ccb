"""`Signal`: one quantity that a method asks for; `SignalKind`: what is known of all signals of one name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from torch import Tensor

from .errors import VtpruneError

Place = Literal["tower", "llm", "vit"]
Source = Literal["attention", "states", "modules", "layer", "rotary", "embeddings", "heads", "carried"]
Asks = Literal["all", "last", "words"]
# One of N tokens, of their C or d channels, of the T tokens of the text behind the first image, of the H query heads or
# of the G groups of them that share keys and values.
SHAPES = ("[N]", "[N, C]", "[N, d]", "[N, G]", "[N, T]", "[N, H, T]", "[T]", "[T, C]", "[H]")


@dataclass(frozen=True)
class Signal:
    """One quantity that a method reads while the model runs, without changing what the model computes.

    kind: the name of a registered signal, such as "cls", "received" or "last_row". `vtprune.signals` has a row for each
        of them, which says what it is, its shape, and where it can be read.
    layer: for seam "llm" the tower layer: an int counts as in Python (-1 is the last); None is the layer whose output
        feeds the projector; a float in (0, 1) is a share of the depth L: layer round(layer * L) counted from 1, or
        where the tower attends within windows the next one that attends to the whole image. For a stage at decoder
        layer or tower block k it is the offset from k (an int; -1 is the layer that ran just before,
        0 inside the LLM the layer itself, on all that enters it).
    without_cls: True asks only towers without a CLS token, as a fallback that costs nothing elsewhere.
    optional: True asks a vision tower only where it can be read, before the LLM; the method does without elsewhere: on
        a tower of unknown layout, and with features that came encoded.

    Raises ValueError on a float outside (0, 1).
    """

    kind: str
    layer: int | float | None = -1
    without_cls: bool = False
    optional: bool = False

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
        said = [f"layer {layer}", *["without CLS"] * self.without_cls, *["if readable"] * self.optional]
        return f"{self.kind} ({', '.join(said)})"


@dataclass(frozen=True)
class SignalKind:
    """What is known of the signals of one name: a row of the registry, made by `vtprune.signals.signal`.

    name: what `Signal.kind` says. shape: what a method sees of one unit, one of `SHAPES`: N tokens, C or d channels, T
        tokens of the text behind the row's first image, H query heads.
    where: the places that can read it. "tower": a layer of a VLM's vision tower, for a stage before the LLM or at a
        later block; "llm": a decoder layer, for a stage at that layer or a later one; "vit": a block of a plain vision
        transformer, which shows no values.
    source: what `read` is given, of a batch of B rows, and what it returns:
        "attention": a `LayerAttention`; a tensor [B, *shape], where N are the tokens of the layer, or B tensors [T].
        "states": the hidden states [B, N, C] that the projector reads ("tower" only); [B, *shape].
        "modules": what enters and what leaves a module [B, N, D] twice, and which tokens are real [B, N]; [B, *shape].
            It is read of the layer's attention and of its MLP, and the two are added ("llm" only).
        "layer": a `LayerPass`, what enters and what leaves the layer; [B, *shape], or B tensors for "[T]" and "[T, C]"
            ("llm" only).
        "rotary": (cos, sin) [B or 1, N, d] and the `Prompt`; [B, *shape] ("llm" only).
        "embeddings": what enters the first decoder layer [B, N, D] and the `Prompt`; B tensors [T] ("llm" only).
        "heads": the output of every head [B, N, H, d] and which tokens are real [B, N]; [B, H] ("llm" only).
        "carried": nothing; the engine itself puts it among the signals.
    read: the function with the formula. doc: its docstring.
    of_cls: it is the CLS token's, so towers without one do not have it; `read` leaves out the column of the CLS token.
    over_queries: it is a mean over the queries of one attention product. Where a tower packs windows and images of
        different sizes, such means are comparable only as sums.
    so_far: it is the sum over that layer and all layers before it.
    rope: its function asks for `LayerAttention.rope` ("attention" inside the LLM).
    vit: which quantity of `vtprune.reduction.Tokens` stands for it in a plain vision transformer, in place of `read`.
    asks: whose queries its function reads of an attention product inside the LLM: those of all tokens; of the "last" of
        each row's prompt; or of the "words", the text behind its first image. With the latter two it reads no values,
        and where the layer has not run yet, the other queries and all values are not computed.

    Raises ValueError or TypeError where these do not fit together.
    """

    name: str
    shape: str
    where: tuple[Place, ...]
    source: Source
    read: Callable[..., Any]
    doc: str
    of_cls: bool = False
    over_queries: bool = False
    so_far: bool = False
    rope: bool = False
    vit: str | None = None
    asks: Asks = "all"

    def __post_init__(self) -> None:
        # For the registry, which tells plug-ins by their modules, a row is at home where its function is.
        self.__dict__.update(
            __module__=self.read.__module__,
            __qualname__=getattr(self.read, "__qualname__", self.name),
            __doc__=self.doc,
        )
        told = f"@signal({self.name!r})"
        if self.shape not in SHAPES:
            raise ValueError(f"{told}: shape={self.shape!r}, choose one of {', '.join(SHAPES)}")
        if isinstance(self.where, str) or not set(self.where) <= set(get_args(Place)):
            raise ValueError(f"{told}: where={self.where!r}, give a tuple of {', '.join(get_args(Place))}")
        if self.source not in get_args(Source):
            raise ValueError(f"{told}: source={self.source!r}, choose one of {', '.join(get_args(Source))}")
        shown = {"attention": {"tower", "llm", "vit"}, "states": {"tower"}, "carried": set()}.get(self.source, {"llm"})
        if not set(self.where) <= shown:
            raise ValueError(
                f"{told}: where={self.where!r}, but source={self.source!r} is read in "
                f"{' and '.join(sorted(shown)) or 'no place'}"
            )
        if not set(self.where) <= {"llm"} and not self.per_token_only:
            raise ValueError(f"{told}: shape={self.shape!r} stands inside the LLM only, where is {self.where!r}")
        if (self.source == "heads") != (self.shape == "[H]"):
            raise ValueError(f"{told}: source='heads' and shape='[H]' go together")
        if self.source == "embeddings" and not self.of_words:
            raise ValueError(f"{told}: source='embeddings' and a shape of words, '[T]' or '[T, C]', go together")
        if self.of_words and self.source not in ("embeddings", "attention", "layer"):
            raise ValueError(f"{told}: shape={self.shape!r} is for the sources 'embeddings', 'attention' and 'layer'")
        if self.so_far and (self.source not in ("attention", "heads") or self.of_words):
            raise ValueError(f"{told}: so_far=True is for the sources 'attention' and 'heads', and not for words")
        if self.rope and (self.source, self.where) != ("attention", ("llm",)):
            raise ValueError(f"{told}: rope=True is for the source 'attention' inside the LLM")
        elsewhere = (self.source, self.where) != ("attention", ("llm",))
        if self.asks not in get_args(Asks) or (self.asks != "all" and elsewhere):
            raise ValueError(
                f"{told}: asks={self.asks!r}: choose {' or '.join(map(repr, get_args(Asks)))}, the latter two for the "
                "source 'attention' inside the LLM"
            )
        if not self.doc:
            raise ValueError(f"{told}: its function has no docstring, which says what the signal is")

    @property
    def per_token(self) -> bool:
        """True if it has a row for each of the unit's tokens."""
        return self.shape.startswith("[N")

    @cached_property
    def of_words(self) -> bool:
        """True if it is of the text behind the row's first image alone."""
        return self.shape.startswith("[T")

    @property
    def per_token_only(self) -> bool:
        """True if it is of the tokens alone, and not of text or heads beside them."""
        return self.shape in ("[N]", "[N, C]", "[N, d]", "[N, G]")

    @property
    def vector(self) -> bool:
        """True if it is a vector a token; a score a token otherwise."""
        return self.per_token and self.shape != "[N]"

    @property
    def per_word(self) -> bool:
        """True if its last dimension is the text behind the row's first image."""
        return self.shape.endswith("T]")

    def __call__(self, *given: Any) -> Any:
        """What `read` makes of its source; VtpruneError, naming the signal, if that has not the shape it should."""
        x = self.read(*given)
        if self.source == "attention" and not self.of_words:
            (attention,) = given
            n, dims = attention.n - self.of_cls, 1 + len(self.shape.split(","))
            if not isinstance(x, Tensor) or x.dim() != dims or (x.shape[0], x.shape[1]) != (attention.q.shape[0], n):
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise VtpruneError(
                    f"signal {self.name!r} of {self.__module__} answered {got} for {attention.q.shape[0]} rows of "
                    f"{attention.n} tokens: it must be a tensor [B, {self.shape[1:]}"
                    f"{', where N leaves out the CLS token' if self.of_cls else ''}"
                )
        return x


# Which tokens stages in the vision tower left, carried to the LLM among the signals: 1 kept, 0 dropped, -1 a newline.
KEPT = Signal("kept")
