"""Our methods beside stored outputs of the official codes: `python -m vtprune.evals.parity DIRECTORY`."""

from vtprune.evals.parity.compare import Mismatch, agree, close, real, same
from vtprune.evals.parity.registry import Arrays, Runner, _runners, case
from vtprune.evals.parity.runner import Row, main, run, show
from vtprune.evals.parity.stock import stock_llava

__all__ = [
    "Arrays",
    "Mismatch",
    "Row",
    "Runner",
    "_runners",
    "agree",
    "case",
    "close",
    "main",
    "real",
    "run",
    "same",
    "show",
    "stock_llava",
]
