"""What the benchmark's numbers mean: one way to run a model, beside the limits of card and stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from vtprune.evals.report import Row
from vtprune.evals.speed.flops import Card, TextCost, ideal_llm
from vtprune.recipe import Recipe
from vtprune.types import Method

SELECTION_SHARE = 0.02  # of the dense prefill: what a selection may cost


@dataclass(frozen=True)
class Variant:
    """One way to run the model: dense (no method), a method at a keep or a recipe, and how the text model prefills."""

    label: str
    method: Method | Recipe | None = None
    keep: float | int | None = None
    prefill: str = "eager"


@dataclass
class Samples:
    """What was measured of one variant, a value a repeat; seconds unless named otherwise (see `meter.Phases`)."""

    ttft: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    selector: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    kv_bytes: int = 0
    peak_bytes: int | None = None
    vision_flops: int = 0


@dataclass(frozen=True)
class Limits:
    """What a speed-up is divided by.

    vision: seconds of tower and projector. floors: seconds of a one-token forward pass, by way of prefill.
    """

    card: Card
    text: TextCost
    vision_flops: int
    vision: float
    floors: dict[str, float]
    batch: int

    def ideal(self, lengths: int | Sequence[int], vision_flops: int | None = None) -> float:
        """Seconds to the first token at the card's peak; lengths as in `TextCost.prefill`, text tokens included."""
        vision = self.vision_flops if vision_flops is None else vision_flops
        return vision / self.card.flops + self.ideal_prefill(lengths)

    def ideal_prefill(self, lengths: int | Sequence[int]) -> float:
        """Seconds of the LLM's share of it."""
        return ideal_llm(self.card, self.text, lengths, self.batch)

    def step_bytes(self, lengths: int | Sequence[int]) -> int:
        """Bytes that a decode step reads: the weights, and the keys and values of every row."""
        return self.text.weight_bytes + self.batch * self.text.kv_bytes(lengths)

    def selection_budget(self, dense: Sequence[int], pruned: Sequence[int]) -> float:
        """Seconds a selector may take: 2 % of the ideal dense prefill or 5 % of the ideal pruned TTFT."""
        return min(SELECTION_SHARE * self.ideal_prefill(dense), 0.05 * self.ideal(pruned))

    def stack(self, prefill: str) -> float:
        """Seconds to the first token if the LLM cost no more than the forward pass of one token."""
        return self.vision + self.floors[prefill]

    def to_json(self) -> Row:
        """Everything, to draw the limits from a file."""
        return asdict(self)

    @classmethod
    def of(cls, saved: Row) -> Limits:
        """Read what `to_json` wrote."""
        return cls(**{**saved, "card": Card(**saved["card"]), "text": TextCost(**saved["text"])})


def row_of(variant: Variant, s: Samples, dense: Samples, limits: Limits, text_tokens: int) -> Row:
    """One flat row. Every speed-up is against dense with the same prefill, and stands with its share of both limits."""
    full = dense.lengths
    budget = limits.selection_budget(full, s.lengths) if variant.method is not None else None
    selector = median(s.selector) if s.selector else None
    spent = selector / median(dense.prefill) if selector is not None else None
    ideal, step_bytes = limits.ideal(s.lengths, s.vision_flops), limits.step_bytes
    best = limits.ideal(full) / ideal, limits.ideal_prefill(full) / limits.ideal_prefill(s.lengths)
    return {
        "method": variant.label,
        "prefill": variant.prefill,
        "keep": 1.0 if variant.method is None else variant.keep,
        "kept_by_layer": [n - text_tokens for n in s.lengths],
        "ttft_ms": 1e3 * median(s.ttft),
        "ttft_ms_all": [1e3 * t for t in s.ttft],
        "vision_ms": 1e3 * median(s.encode),
        "cut_ms": 1e3 * median(s.cut),
        "prefill_ms": 1e3 * median(s.prefill),
        "selector_ms": _ms(selector),
        "selector_of_prefill": spent,
        "selector_affordable": spent <= SELECTION_SHARE if spent is not None else None,
        "selector_budget_ms": _ms(budget),
        "decode_ms_per_token": 1e3 * median(s.step),
        "kv_bytes": s.kv_bytes,
        "peak_bytes": s.peak_bytes,
        "flops": limits.batch * limits.text.prefill(s.lengths) + s.vision_flops,
        "ideal_ttft_ms": 1e3 * ideal,
        **_gain("ttft", dense.ttft, s.ttft, best[0], limits.stack(variant.prefill)),
        **_gain("prefill", dense.prefill, s.prefill, best[1], limits.floors[variant.prefill]),
        **_gain("decode", dense.step, s.step, step_bytes(full) / step_bytes(s.lengths), limits.floors["eager"]),
    }


def _gain(name: str, dense: Sequence[float], pruned: Sequence[float], roofline: float, floor: float) -> Row:
    """A speed-up and its share of the two limits; floor: the seconds that the stack cannot go below.

    Dense and pruned are compared within a round, which saw the same machine; the median is over rounds.
    """
    speedup = median(a / b for a, b in zip(dense, pruned))
    return {
        f"{name}_speedup": speedup,
        f"{name}_of_roofline": speedup / roofline,
        f"{name}_of_stack": speedup / (median(dense) / floor),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
