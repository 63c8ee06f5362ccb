"""Train the tiny LLaVA from scratch on two CPU cores: `python -m vtprune.evals.toys.image.train OUT`.

`STAGES` is its schedule; `vtprune.evals.toys.trainer` says how it is followed and resumed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune.evals.toys.asks import Ask, Balance
from vtprune.evals.toys.image import fast
from vtprune.evals.toys.image.asks import RELATIONS, easy_ask, training_asks
from vtprune.evals.toys.image.labels import Heads, alignment_loss, make_labels
from vtprune.evals.toys.image.model import build_model, save
from vtprune.evals.toys.image.packing import normalise, pack
from vtprune.evals.toys.image.scenes import Scene, heldout_rng, make_scene, training_rng
from vtprune.evals.toys.packing import Batch
from vtprune.evals.toys.trainer import Job, command, run
from vtprune.evals.toys.trainer import Stage as Base
from vtprune.evals.toys.trainer import Trainer as BaseTrainer


@dataclass(frozen=True)
class Stage(Base):
    """One part of the schedule; shares are of the stage's steps.

    `easy` (from, to) share of scenes with at most three shapes; `counted` share of scenes built from a wanted count;
    `frozen` share with a fixed tower; `compare` adds relation questions and place captions; `two_words` share that
    asks only "left of" and "above"; `mixed` share, including that one, in which the other two words stay rarer (all
    four at once undid what the first two had taught); `weighted` turns the per-question token weights on.
    """

    easy: tuple[float, float] = (0.0, 0.0)
    counted: float = 0.4
    frozen: float = 0.0
    compare: bool = True
    two_words: float = 0.0
    mixed: float = 0.0
    weighted: bool = False


STAGES = (
    Stage("tower", 850, batch=32, muon=0.01, shape="late"),
    Stage("look up", 430, easy=(0.85, 0.85), frozen=1.0, compare=False),
    Stage("compare", 400, easy=(0.5, 0.3), frozen=0.75, two_words=1.0, mixed=1.0),
    Stage("joint", 430, easy=(0.3, 0.15), two_words=0.33, mixed=0.33, weighted=True),
    Stage(
        "anneal",
        1800,
        muon=0.01,
        easy=(0.15, 0.15),
        counted=0.5,
        two_words=0.08,
        mixed=0.24,
        weighted=True,
        shape="cosine",
    ),
    Stage("settle", 380, muon=0.006, easy=(0.1, 0.1), counted=0.5, weighted=True, shape="cosine"),
    Stage("polish", 600, muon=0.008, easy=(0.05, 0.05), counted=0.6, weighted=True, shape="cosine"),
)


class EasyTrain:
    """The train split of easy-VQA, read from the installed `easy-vqa` package."""

    def __init__(self) -> None:
        import easy_vqa
        from PIL import Image

        paths = easy_vqa.get_train_image_paths()
        self.asks: dict[int, list[Ask]] = defaultdict(list)
        for text, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
            self.asks[image].append(easy_ask(text, answer))
        self.ids = sorted(self.asks)
        self.pixels = {i: np.asarray(Image.open(paths[i]).convert("RGB")) for i in self.ids}

    def sample(self, rng: random.Random, balance: Balance) -> tuple[np.ndarray, list[Ask]]:
        """One image and its admitted questions."""
        image = rng.choice(self.ids)
        return self.pixels[image], [ask for ask in self.asks[image] if balance.admit(ask)]


class Trainer(BaseTrainer):
    """Scenes and the train split of easy-VQA."""

    stages = STAGES

    slow = "vision_tower"
    slacks = (6, 4)

    def __init__(self, out: Path, seed: int, scale: float) -> None:
        super().__init__(out, seed, scale)
        self.easy = EasyTrain()

    def build(self, seed: int = 0) -> Any:
        return build_model(seed)

    def read_outs(self) -> Heads:
        return Heads(128)

    def write(self, model: Any, folder: Path) -> None:
        save(model, folder)

    def tower_work(self, stage: Stage) -> list[Job]:
        """The tower alone on a batch of scenes, as one job per thread."""
        rng = training_rng(self.seed, self.done)
        scenes = [make_scene(rng, counted=stage.counted) for _ in range(stage.batch)]

        def job(part: list[Scene]) -> dict[str, Tensor]:
            features, cls = fast.tower_features(self.model, normalise([s.pixels for s in part]))
            return self.heads.losses(features, cls, make_labels(part))

        return [partial(job, scenes[i :: self.threads]) for i in range(self.threads)]

    def answer_work(self, stage: Stage, t: float) -> list[Job]:
        """Packed questions on scenes and one or two easy-VQA images, as one job per thread."""
        rng = training_rng(self.seed, self.done)
        easy_share = stage.easy[0] + (stage.easy[1] - stage.easy[0]) * t
        relations: tuple[str, ...] = RELATIONS
        if t < stage.mixed:
            relations = RELATIONS[:2] if t < stage.two_words else RELATIONS[:2] * 2 + RELATIONS
        borrowed = 2 if rng.random() < 0.4 else 1
        scenes = [
            make_scene(rng, easy=rng.random() < easy_share, counted=stage.counted)
            for _ in range(stage.batch - borrowed)
        ]
        asks = [training_asks(s, rng, self.balances[0], relations, stage.compare) for s in scenes]
        easy = [self.easy.sample(rng, self.balances[1]) for _ in range(borrowed)]
        jobs: list[Job] = []
        for i in range(self.threads):
            mine, others = scenes[i :: self.threads], easy[self.threads - 1 - i :: self.threads]
            pixels = [s.pixels for s in mine] + [image for image, _ in others]
            batch = pack(pixels, asks[i :: self.threads] + [a for _, a in others], self.topics, stage.weighted)
            jobs.append(partial(self.answer_job, batch, mine, t < stage.frozen, stage.compare))
        return jobs

    def answer_job(self, batch: Batch, scenes: list[Scene], frozen: bool, compare: bool) -> dict[str, Tensor]:
        """Losses of one thread's images; the first `len(scenes)` of them have dense labels."""
        with torch.set_grad_enabled(not frozen):
            features, cls = fast.tower_features(self.model, batch.pixels)
        visual = fast.project(self.model, features)
        hidden = fast.question_hidden(self.model, visual, batch.ids, batch.segments, batch.positions)
        losses = {"answer": self.answer_loss(hidden, batch)}
        labels, n = make_labels(scenes), len(scenes)
        table = self.model.get_input_embeddings().weight
        losses["align"] = 0.3 * alignment_loss(visual[:n], table, labels, digits=compare)
        if not frozen:
            losses["tower"] = 0.3 * torch.stack(list(self.heads.losses(features[:n], cls[:n], labels).values())).sum()
        return losses

    def heldout(self, seed: int) -> tuple[random.Random, Callable[[random.Random], Scene]]:
        return heldout_rng(seed), make_scene

    def asked(self, drawn: Scene, rng: random.Random, balance: Balance) -> list[Ask]:
        return training_asks(drawn, rng, balance, RELATIONS, True)

    def answered(self, drawn: Sequence[Scene], asks: list[list[Ask]]) -> tuple[Batch, Tensor]:
        batch = pack([s.pixels for s in drawn], asks, self.topics, False)
        visual = fast.project(self.model, fast.tower_features(self.model, batch.pixels)[0])
        return batch, fast.question_hidden(self.model, visual, batch.ids, batch.segments, batch.positions)


def train(out: Path, *, resume: bool = True, seed: int = 0, scale: float = 1.0, progress: bool = True) -> Path:
    """Train and return the folder of the finished checkpoint, `out/checkpoint`.

    `resume` continues from `out/training.pt`, which is rewritten every two minutes and at the end. `scale`
    multiplies the steps of every stage, for smoke tests. Needs the `easy-vqa` package.
    """
    return run(Trainer(Path(out), seed, scale), resume, progress)


def main() -> None:
    """The command line."""
    command(train, "Train the tiny LLaVA (about an hour on two CPU cores).")


if __name__ == "__main__":
    main()
