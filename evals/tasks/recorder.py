"""What the prefills of a model cost, measured from outside: tokens, seconds and memory, whoever calls the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from vtprune.evals.costs import llm_flops, tower_share
from vtprune.evals.speed.meter import Allocated, Phases, now
from vtprune.model_adapters.base import Adapter

if TYPE_CHECKING:
    from vtprune import Handle

MIB = 2**20


@dataclass
class Call:
    """One prefill of one prompt.

    prompt_tokens, visual_tokens: (as fed, as the LLM ran on them: the mean over its layers). seconds: "ttft" from the
    vision tower's first step to the logits; its parts "encode" (tower, projector, embeddings), "cut" (the patch at the
    text model's door) and "prefill" (the text model); and "select", what methods took wherever they stand.
    tower_share: of the visual tokens, in an average block of the tower. llm_flops: None where `text_cost` cannot tell.
    """

    prompt_tokens: tuple[int, float]
    visual_tokens: tuple[int, float]
    seconds: dict[str, float] = field(default_factory=dict)
    tower_share: float = 1.0
    llm_flops: int | None = None

    def line(self) -> dict[str, Any]:
        """As the line of a sample holds it."""
        return {
            "visual_tokens": list(self.visual_tokens),
            "prompt_tokens": list(self.prompt_tokens),
            "tower_share": [self.tower_share],
            "llm_flops": None if self.llm_flops is None else [self.llm_flops],
            "seconds": dict(self.seconds),
        }


class Recorder:
    """Collects a `Call` for every prefill of `model` inside a `with` block, in `taken`; prompts one at a time.

    handle: of the patch in force, None where nothing is pruned. Works by hooks on this one model, which go again; on a
    GPU the model is waited for before and after each prefill.
    """

    def __init__(self, model: Any, handle: Handle | None = None) -> None:
        self.model, self.handle = model, handle
        self.taken: list[Call] = []
        self._adapter = Adapter(model)
        self._phases = Phases(model.get_decoder(), model.device)
        self._counts: tuple[int, int] | None = None
        self._begun: float | None = None

    def __enter__(self) -> Recorder:
        self._phases.__enter__()
        text = self.model.get_decoder()
        parts = [part for part in self.model.base_model.children() if part is not text]
        self._undo = [
            *(part.register_forward_pre_hook(self._begin, prepend=True) for part in parts),
            self.model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._undo:
            hook.remove()
        self._phases.__exit__()

    def _begin(self, *_: Any) -> None:
        """Start the clock at the first part that runs: `generate` encodes the pictures before it calls the model."""
        if self._begun is None:
            self._begun = now(self.model.device)
            self._phases.restart()

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._adapter.bind(model, args, kwargs)
        ids = call.get("input_ids")
        kinds = self._adapter.token_kinds(call)
        self._counts = None
        if ids is None or kinds is None or ids.shape[-1] < 2:
            self._begun = None
            return  # a decode step, or a prompt without pictures
        if len(ids) > 1:
            raise ValueError(f"{len(ids)} prompts in one call: tokens and times are recorded of one prompt at a time")
        mask = call.get("attention_mask")  # some processors pad a single prompt too, and padding is nothing pruned
        fed = int(mask.sum()) if mask is not None and mask.shape == ids.shape else ids.shape[-1]
        self._counts = fed, int((kinds > 1).sum())
        self._begin()

    def _after(self, model: Any, *_: Any) -> None:
        counts, begun = self._counts, self._begun
        self._counts = self._begun = None  # parts that run in a decode step start no clock
        if counts is None or begun is None:
            return
        seconds = {"ttft": now(model.device) - begun}
        seconds.update(zip(("encode", "cut", "prefill"), self._phases.seconds))
        last = self.handle.last if self.handle is not None else None
        seconds["select"] = last.seconds if last is not None else 0.0
        fed, visual = counts
        ran = fmean(last.lengths) if last is not None else float(fed)
        tower = tower_share(last) if last is not None else 1.0
        flops = llm_flops(model, fed, self.handle if last is not None else None)
        self.taken.append(Call((fed, ran), (visual, visual - (fed - ran)), seconds, tower, flops))


def peak_mib(model: Any, call: Callable[[], Any]) -> float:
    """MiB that `call` holds at once beyond what was there before; on a CPU every operator is counted, which is slow."""
    if model.device.type != "cuda":
        with Allocated() as allocated:
            call()
        return allocated.peak / MIB
    held = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    call()
    return (torch.cuda.max_memory_allocated(model.device) - held) / MIB
