"""`Signal`: one quantity that a method reads from an attention module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
