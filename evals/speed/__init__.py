"""What pruning saves: timings of whole models and of single parts, beside the limits of the card and of the stack."""

from vtprune.evals.speed.flops import Card, TextCost, ideal_llm
from vtprune.evals.speed.limits import SELECTION_SHARE, Limits, Samples, Variant, row_of
from vtprune.evals.speed.tables import BLOCK, HEADER, NOTES, BenchReport, kept, load, notes_of, plot, refreshed, table

__all__ = [
    "BLOCK",
    "HEADER",
    "NOTES",
    "SELECTION_SHARE",
    "BenchReport",
    "Card",
    "Limits",
    "Samples",
    "TextCost",
    "Variant",
    "ideal_llm",
    "kept",
    "load",
    "notes_of",
    "plot",
    "refreshed",
    "row_of",
    "table",
]
