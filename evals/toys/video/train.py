"""Train the tiny Qwen2.5-VL from scratch on one CPU core: `python -m vtprune.evals.toys.video.train OUT`.

`STAGES` is its schedule; `vtprune.evals.toys.trainer` says how it is followed and resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune.evals.toys.asks import Ask, Balance
from vtprune.evals.toys.packing import Batch, lay, word_by_word
from vtprune.evals.toys.trainer import Job, Trainer, command, run
from vtprune.evals.toys.trainer import Stage as Base
from vtprune.evals.toys.video import fast
from vtprune.evals.toys.video.asks import training_asks
from vtprune.evals.toys.video.clips import SLOTS, Clip, heldout_rng, make_clip, training_rng
from vtprune.evals.toys.video.labels import Heads, alignment_loss, make_labels
from vtprune.evals.toys.video.model import VOCABULARY, WIDTH, build_model, save


@dataclass(frozen=True)
class Stage(Base):
    """One part of the schedule; `frozen` share of its steps with a fixed tower, `compare` as in `captions`."""

    frozen: float = 0.0
    compare: bool = False


TOWER_SLOTS = 4  # the tower sees slots apart from each other, so half of a clip's will do while it trains alone
STAGES = (
    Stage("tower", 500, adam=3e-3, shape="late"),
    Stage("look up", 300, frozen=1.0),
    Stage("joint", 150),
    Stage("anneal", 333, muon=0.015, shape="cosine"),
    Stage("compare", 405, compare=True),
    Stage("settle", 280, muon=0.015, compare=True, shape="cosine"),
)


class VideoTrainer(Trainer):
    """Generated clips, their questions and captions."""

    stages = STAGES
    slow = ".visual."
    threads = 1

    def build(self, seed: int = 0) -> Any:
        return build_model(seed)

    def read_outs(self) -> Heads:
        return Heads(WIDTH)

    def write(self, model: Any, folder: Path) -> None:
        save(model, folder)

    def tower_work(self, stage: Stage) -> list[Job]:
        """The tower alone on a batch of clips, as one job per thread."""
        rng = training_rng(self.seed, self.done)
        clips = [make_clip(rng) for _ in range(stage.batch)]
        slots = torch.tensor(sorted(rng.sample(range(SLOTS), TOWER_SLOTS)))
        return [partial(self.tower_job, clips[i :: self.threads], slots) for i in range(self.threads)]

    def tower_job(self, clips: list[Clip], slots: Tensor) -> dict[str, Tensor]:
        """Losses of one thread's clips without questions, in some of their slots."""
        visual = fast.visual_tokens(self.model, fast.patches([c.frames for c in clips])[:, slots])
        labels = {k: v.unflatten(1, (SLOTS, -1))[:, slots].flatten(1) for k, v in make_labels(clips).items()}
        losses = self.heads.losses(visual, labels)
        losses["align"] = 0.3 * alignment_loss(visual, self.model.get_input_embeddings().weight, labels)
        return losses

    def answer_work(self, stage: Stage, t: float) -> list[Job]:
        """Packed questions on clips, as one job per thread."""
        rng = training_rng(self.seed, self.done)
        clips = [make_clip(rng) for _ in range(stage.batch)]
        asks = [training_asks(c, rng, self.balances[0], stage.compare) for c in clips]
        gap = rng.choice((0, 2))
        jobs: list[Job] = []
        for i in range(self.threads):
            mine = clips[i :: self.threads]
            pixels = fast.patches([c.frames for c in mine])
            batch = lay(pixels, asks[i :: self.threads], word_by_word(VOCABULARY), 1, self.topics, True)
            jobs.append(partial(self.answer_job, batch, mine, t < stage.frozen, gap))
        return jobs

    def answer_job(self, batch: Batch, clips: list[Clip], frozen: bool, gap: int) -> dict[str, Tensor]:
        """Losses of one thread's clips."""
        with torch.set_grad_enabled(not frozen):
            visual = fast.visual_tokens(self.model, batch.pixels)
        hidden = fast.question_hidden(self.model, visual, batch.ids, batch.segments, batch.positions, gap)
        losses = {"answer": self.answer_loss(hidden, batch)}
        labels = make_labels(clips)
        losses["align"] = 0.3 * alignment_loss(visual, self.model.get_input_embeddings().weight, labels)
        if not frozen:
            losses["tower"] = 0.3 * torch.stack(list(self.heads.losses(visual, labels).values())).sum()
        return losses

    def heldout(self, seed: int) -> tuple[random.Random, Callable[[random.Random], Clip]]:
        return heldout_rng(seed), make_clip

    def asked(self, drawn: Clip, rng: random.Random, balance: Balance) -> list[Ask]:
        return training_asks(drawn, rng, balance, True)

    def answered(self, drawn: Sequence[Clip], asks: list[list[Ask]]) -> tuple[Batch, Tensor]:
        batch = lay(fast.patches([c.frames for c in drawn]), asks, word_by_word(VOCABULARY), 1, self.topics, False)
        visual = fast.visual_tokens(self.model, batch.pixels)
        return batch, fast.question_hidden(self.model, visual, batch.ids, batch.segments, batch.positions)


def train(out: Path, *, resume: bool = True, seed: int = 0, scale: float = 1.0, progress: bool = True) -> Path:
    """Train and return the folder of the finished checkpoint, `out/checkpoint`.

    `resume` continues from `out/training.pt`, which is rewritten every two minutes and at the end. `scale`
    multiplies the steps of every stage, for smoke tests.
    """
    return run(VideoTrainer(Path(out), seed, scale), resume, progress)


def main() -> None:
    """The command line."""
    command(train, "Train the tiny Qwen2.5-VL (about an hour on one CPU core).")


if __name__ == "__main__":
    main()
