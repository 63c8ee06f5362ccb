"""How numbers of an evaluation are written for people, on the screen and on the page."""

from __future__ import annotations

from vtprune.evals.report import Row

NONE = "–"


def score_text(score: float | None) -> str:
    """A score: shares of 1 in percent, sums as they are."""
    return NONE if score is None else f"{100 * score:.1f}" if abs(score) <= 1 else f"{score:.1f}"


def percent(value: float | None) -> str:
    """0.123 -> '12.3'."""
    return NONE if value is None else f"{100 * value:.1f}"


def milliseconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def times(value: float | None) -> str:
    """1.5 -> '1.50x'."""
    return NONE if value is None else f"{value:.2f}x"


def share_of(value: float | None) -> str:
    """0.123 -> '12 %'."""
    return NONE if value is None else f"{100 * value:.0f} %"


def llm_share(row: Row) -> str:
    """The share of the visual tokens in an average layer of the LLM."""
    tokens = row["visual_tokens"]
    return NONE if tokens is None or not tokens[0] else share_of(tokens[1] / tokens[0])


def flops(value: float | None) -> str:
    """0.6234 -> '0.62', of dense = 1."""
    return NONE if value is None else f"{value:.2f}"


def verdict(beats: bool | None) -> str:
    """Does a method beat random tokens?"""
    return {None: NONE, True: "yes", False: "no"}[beats]


def bounds(row: Row) -> str:
    """' (91.2 to 99.0)' behind a relative score; empty where there is no interval, and for dense."""
    if row["low"] is None or row["low"] == row["high"] == 1:
        return ""
    return f" ({percent(row['low'])} to {percent(row['high'])})"


def bounded(row: Row) -> str:
    """'96.2 % (91.2 to 99.0)'."""
    return f"{percent(row['relative'])} %{bounds(row)}"
