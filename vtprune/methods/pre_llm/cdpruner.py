"""CDPruner: tokens that are unlike each other and fit the question, by greedy MAP of a determinantal point process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.kernels import check_finite, dpp_greedy

from ...core.method import Method, Newlines, Per, Positions
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of, check_choices, select
from ..shared.text import prompt_similarity

Source = Literal["prompt", "none"]
Similarities = Callable[[Sequence[Visual]], Sequence[Tensor]]
Normalize = Literal["image", "batch"]
LEAST = 1e-6


def paired_relevance(image: Tensor, text: Tensor) -> Tensor:
    """[N] float32: minus the mean cosine of each token's embedding with the segments of the text.

    image: [N, P] embeddings of the patches in the joint space of a vision tower and its text tower. text: [M, P]
    embeddings of the M segments of the question. Minus, because CLIP's patches are least like the texts that they show.
    """
    return -(normalize(image.float(), dim=1) @ normalize(text.float(), dim=1).mT).mean(1)


@register("cdpruner", paper="https://arxiv.org/abs/2506.10967", seam="pre_llm")
@dataclass(frozen=True)
class CDPruner(Method):
    """Greedy picks that enlarge the determinant of r_i S_ij r_j most; see `vtprune.kernels.dpp_greedy`.

    S: [N, N] cosines of the projected tokens x [N, D]. r: [N] relevance to the question, shifted so that the least of
    it is 1e-6. As in the official code each crop has its own budget and newlines are dropped. The official code
    renumbers position ids, positions="compact". Where it picks tokens twice because the budget exceeds the rank of the
    kernel, the picks begin anew among the tokens left.

    relevance: where r comes from. Officially from the text tower that is paired with the vision tower (CLIP), which no
        VLM holds: give a function of your own, units of one call -> one tensor [N] each, larger where a token matters
        more; `paired_relevance` makes it of both embeddings. "prompt" takes the LLM's own embeddings in place of it,
        which is ours and noted in `Visual.state["note"]`. "none" gives all tokens the same r: the DPP alone, which does
        not depend on the question.
    normalize: over which tokens the least relevance is taken. "image": those of the unit. "batch": of all units of a
        call, as officially, so that what stays of a crop depends on what else is in the batch.
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "drop"
    official_positions: ClassVar[Positions] = "compact"

    relevance: Source | Similarities = "prompt"
    normalize: Normalize = "image"

    def __post_init__(self) -> None:
        check_choices(self, normalize=Normalize)
        if not callable(self.relevance) and self.relevance not in ("prompt", "none"):
            raise ValueError(
                f"relevance={self.relevance!r}: choose 'prompt', 'none', or a function of the units of a call that "
                "answers with one tensor [N] each"
            )

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        """Whether the choice depends on the question."""
        return self.relevance != "none"

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        relevance = self._relevance(units)
        orders = dpp_greedy([v.x for v in units], budgets, relevance=relevance)
        return [select(order, None if relevance is None else r) for order, r in zip(orders, relevance or orders)]

    def _relevance(self, units: Sequence[Visual]) -> list[Tensor] | None:
        """[N] float32 of every unit, at least 1e-6; None where all tokens matter alike."""
        if self.relevance == "none" or not units:
            return None
        given = self.relevance(units) if callable(self.relevance) else [prompt_similarity(v) for v in units]
        found = [r.float() for r in given]
        for v, r in zip(units, found, strict=True):
            if r.shape != (v.n,):
                raise ValueError(f"relevance answered {list(r.shape)}: it owes one value to each of {v.n} tokens")
        check_finite(found, "relevance scores")
        least = [r.amin() for r in found]
        if self.normalize == "batch":
            least = [torch.stack(least).amin()] * len(found)
        # The official code divides by the range, too. The DPP sees ratios only, so a constant relevance is no 0 / 0.
        return [r - low + LEAST for r, low in zip(found, least)]
