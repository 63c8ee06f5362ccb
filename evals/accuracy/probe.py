"""What a plan costs: a few of the questions, one at a time, dense and pruned in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from vtprune.evals.accuracy.exam import prepare
from vtprune.evals.accuracy.plans import Plan
from vtprune.evals.costs import vision_flops
from vtprune.evals.report import Row
from vtprune.evals.tasks.recorder import Call, Recorder
from vtprune.types import VtpruneError

if TYPE_CHECKING:
    from vtprune.evals.toys.questions import Visible as Question

PROMPTS = 16
COSTS = ("llm_share", "tower_share", "flops", "ttft")  # the fields of a row that tell its cost, of dense = 1
EQUAL = 0.005  # two average shares that are no further apart are one
STEPS = 12  # halvings of the range in which `keep` is looked for


class CostProbe:
    """Runs a few prompts of an exam one at a time and tells what they cost.

    questions: of which evenly spaced ones are taken, `prompts` at most; each is about one picture or video.
    """

    def __init__(self, model: Any, processor: Any, questions: Sequence[Question], prompts: int = PROMPTS) -> None:
        self.model = model
        count = min(prompts, len(questions))
        chosen = [questions[i * len(questions) // count] for i in range(count)]
        self.inputs = [prepare(model, processor, [q.prompt], [q.seen]) for q in chosen]
        self._dense: tuple[int, list[int | None]] | None = None

    def cost(self, plan: Plan) -> Row:
        """{"llm_share", "tower_share", "flops", "ttft"}: means over the prompts, of dense = 1.

        The shares are those of the visual tokens in an average layer. "ttft" is the median over prompts of the time
        against the dense one measured just before or after it. "flops" is None where `text_cost` cannot tell.
        """
        if plan.method is None:
            return dict.fromkeys(COSTS, 1.0)
        self._run(Plan("dense", None, 1.0), self.inputs[0])  # warm up
        calls, ratios = [], []
        for i, inputs in enumerate(self.inputs):
            dense = None if i % 2 else self._run(Plan("dense", None, 1.0), inputs)
            call = self._run(plan, inputs)
            dense = dense or self._run(Plan("dense", None, 1.0), inputs)
            calls.append(call)
            ratios.append(call.seconds["ttft"] / dense.seconds["ttft"])
        with plan.applied(self.model):
            vision = vision_flops(self.model, self.inputs[0])
        return {
            "llm_share": fmean(after / before for before, after in (call.visual_tokens for call in calls)),
            "tower_share": fmean(call.tower_share for call in calls),
            "flops": self._of_dense(vision, [call.llm_flops for call in calls]),
            "ttft": median(ratios),
        }

    def share(self, plan: Plan) -> float:
        """The share of the visual tokens in an average layer of the LLM, on the first prompt."""
        before, after = self._run(plan, self.inputs[0]).visual_tokens
        return after / before

    def equal(self, plan: Plan, known: Mapping[float | int, float] | None = None) -> Plan | float | None:
        """The plan with the `keep` at which its average share over the LLM's layers is what its `keep` says.

        Found by halving the range of `keep` on the first prompt, unless it is among the known ones: {keep: share}. None
        where the plan does so as it is; a float, the least share that it comes down to, where no `keep` does: its
        layers before the first stage hold too many.
        """
        before = self._run(plan, self.inputs[0]).visual_tokens[0]
        wanted = plan.keep if isinstance(plan.keep, float) else plan.keep / before
        if abs(self.share(plan) - wanted) <= EQUAL:
            return None
        for keep, found in (known or {}).items():
            if abs(found - wanted) <= EQUAL:
                return dataclasses.replace(plan, keep=keep, equal=wanted)
        low, high = 1 / before, 1.0
        tried: dict[float, float] = {}
        for step in range(STEPS + 1):
            keep = round((low + high) / 2, 4) if step else low
            try:
                tried[keep] = self.share(dataclasses.replace(plan, keep=keep))
            except (VtpruneError, ValueError):  # too little for this method
                low = keep
                continue
            if not step and tried[keep] > wanted + EQUAL:
                return tried[keep]
            low, high = (keep, high) if tried[keep] < wanted else (low, keep)
        if not tried:
            return 1.0
        keep = min(tried, key=lambda k: (abs(tried[k] - wanted), k))
        if abs(tried[keep] - wanted) > 2 * EQUAL:
            return min(tried.values())
        return dataclasses.replace(plan, keep=keep, equal=wanted)

    def _run(self, plan: Plan, inputs: dict[str, Any]) -> Call:
        """One prefill."""
        with plan.applied(self.model) as handle, Recorder(self.model, handle) as recorder, torch.inference_mode():
            self.model(**inputs, logits_to_keep=1)
            return recorder.taken.pop()

    def _of_dense(self, vision: int, llm: Sequence[int | None]) -> float | None:
        if self._dense is None:
            runs = [self._run(Plan("dense", None, 1.0), inputs).llm_flops for inputs in self.inputs]
            self._dense = vision_flops(self.model, self.inputs[0]), runs
        before, full = self._dense
        ours, theirs = ([n for n in runs if n is not None] for runs in (llm, full))
        return (vision + fmean(ours)) / (before + fmean(theirs)) if ours and theirs else None
