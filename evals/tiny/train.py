"""Train the tiny LLaVA from scratch on two CPU cores: `python -m vtprune.evals.tiny.train OUT`.

One process and one step-based schedule of six stages (`STAGES`); each stage continues from the averaged weights
of the one before with a fresh optimiser. Stopping and starting again resumes bit by bit from `OUT/training.pt`.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vtprune.evals.tiny import fast
from vtprune.evals.tiny.asks import RELATIONS, Ask, Balance, easy_ask, training_asks
from vtprune.evals.tiny.labels import Heads, alignment_loss, make_labels
from vtprune.evals.tiny.model import EOS, build_model, save
from vtprune.evals.tiny.muon import Optimiser
from vtprune.evals.tiny.packing import Batch, normalise, pack
from vtprune.evals.tiny.scenes import Scene, heldout_rng, make_scene, training_rng

MONITOR_SEED = 990001
CHECKPOINT_SECONDS = 120
PROBE_STEPS = 150
WARMUP = 20
THREADS = 2
TOWER_SCALE = 0.3  # the tower's share of the rates once it trains together with the language model


@dataclass(frozen=True)
class Stage:
    """One part of the schedule; shares are of the stage's steps.

    `batch` images a step; `muon` peak rate of Muon (AdamW: 1e-3, same shape); `easy` (from, to) share of scenes
    with at most three shapes; `counted` share of scenes built from a wanted count; `frozen` share with a fixed
    tower; `compare` adds relation questions and place captions; `two_words` share that asks only "left of" and
    "above"; `mixed` share, including that one, in which the other two words stay rarer (all four at once undid what
    the first two had taught); `weighted` turns the per-question token weights on; `shape` of the rate: "flat",
    "late" (0.6 flat, then down to 0.3) or "cosine" (0.25 flat, then down to 0.02).
    """

    name: str
    steps: int
    batch: int = 16
    muon: float = 0.02
    easy: tuple[float, float] = (0.0, 0.0)
    counted: float = 0.4
    frozen: float = 0.0
    compare: bool = True
    two_words: float = 0.0
    mixed: float = 0.0
    weighted: bool = False
    shape: str = "flat"


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


def rate(stage: Stage, t: float, step: int) -> float:
    """Multiplier of the stage's rates at share `t` of the stage, with a short warm-up."""
    warm = min(1.0, (step + 1) / WARMUP)
    if stage.shape == "late":
        return warm * (1.0 if t < 0.6 else 1.0 - 0.7 * (t - 0.6) / 0.4)
    if stage.shape == "cosine" and t > 0.25:
        return warm * (0.02 + 0.49 * (1 + math.cos(math.pi * (t - 0.25) / 0.75)))
    return warm


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


class Trainer:
    """Model, optimiser, data and counters of one run."""

    def __init__(self, out: Path, seed: int, scale: float) -> None:
        self.out, self.seed = out, seed
        self.steps = [max(2, round(stage.steps * scale)) for stage in STAGES]
        self.model: Any = build_model(seed)
        self.heads = Heads(128)
        self.module = nn.ModuleDict({"model": self.model, "heads": self.heads}).to(torch.bfloat16)
        self.optimiser = Optimiser(self.module, slow="vision_tower")
        self.balance, self.easy_balance = Balance(6), Balance(4)
        self.easy = EasyTrain()
        self.topics: dict[str, int] = {}
        self.means: dict[str, float] = {}
        self.history: list[dict[str, object]] = []
        # Two threads with half a batch each beat one batch split inside every operation: nothing waits for the
        # slower core several hundred times a step.
        self.threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,))
        self.done = 0
        self.seconds = 0.0

    def close(self) -> None:
        """End the worker threads and give torch its threads back."""
        self.pool.shutdown()
        torch.set_num_threads(self.threads_before)

    def locate(self, step: int) -> tuple[int, int]:
        """(stage index, step within the stage) of a global step."""
        for i, count in enumerate(self.steps):
            if step < count:
                return i, step
            step -= count
        raise ValueError(f"the schedule has {sum(self.steps)} steps")

    def tower_work(self, stage: Stage) -> list[Callable[[], dict[str, Tensor]]]:
        """The tower alone on a batch of scenes, as one job per thread."""
        rng = training_rng(self.seed, self.done)
        scenes = [make_scene(rng, counted=stage.counted) for _ in range(stage.batch)]

        def job(part: list[Scene]) -> dict[str, Tensor]:
            features, cls = fast.tower_features(self.model, normalise([s.pixels for s in part]))
            return self.heads.losses(features, cls, make_labels(part))

        return [partial(job, scenes[i::THREADS]) for i in range(THREADS)]

    def answer_work(self, stage: Stage, t: float) -> list[Callable[[], dict[str, Tensor]]]:
        """Packed questions on scenes and one or two easy-VQA images, as one job per thread."""
        rng = training_rng(self.seed, self.done)
        easy_share = stage.easy[0] + (stage.easy[1] - stage.easy[0]) * t
        relations = RELATIONS
        if t < stage.mixed:
            relations = RELATIONS[:2] if t < stage.two_words else RELATIONS[:2] * 2 + RELATIONS
        borrowed = 2 if rng.random() < 0.4 else 1
        scenes = [
            make_scene(rng, easy=rng.random() < easy_share, counted=stage.counted)
            for _ in range(stage.batch - borrowed)
        ]
        asks = [training_asks(s, rng, self.balance, relations, stage.compare) for s in scenes]
        easy = [self.easy.sample(rng, self.easy_balance) for _ in range(borrowed)]
        jobs: list[Callable[[], dict[str, Tensor]]] = []
        for i in range(THREADS):
            mine, others = scenes[i::THREADS], easy[THREADS - 1 - i :: THREADS]
            pixels = [s.pixels for s in mine] + [image for image, _ in others]
            batch = pack(pixels, asks[i::THREADS] + [a for _, a in others], self.topics, stage.weighted)
            jobs.append(partial(self.answer_job, batch, mine, t < stage.frozen, stage.compare))
        return jobs

    def answer_job(self, batch: Batch, scenes: list[Scene], frozen: bool, compare: bool) -> dict[str, Tensor]:
        """Losses of one thread's images; the first `len(scenes)` of them have dense labels."""
        with torch.set_grad_enabled(not frozen):
            features, cls = fast.tower_features(self.model, batch.pixels)
        visual = fast.project(self.model, features)
        losses = {"answer": self.answer_loss(visual, batch)}
        labels, n = make_labels(scenes), len(scenes)
        table = self.model.get_input_embeddings().weight
        losses["align"] = 0.3 * alignment_loss(visual[:n], table, labels, digits=compare)
        if not frozen:
            losses["tower"] = 0.3 * torch.stack(list(self.heads.losses(features[:n], cls[:n], labels).values())).sum()
        return losses

    def answer_loss(self, visual: Tensor, batch: Batch) -> Tensor:
        """Token-weighted cross-entropy of the answers; keeps a running mean per topic for the log."""
        hidden = fast.question_hidden(self.model, visual, batch.ids, batch.segments, batch.positions)
        asked = batch.labels >= 0
        logits = (hidden[asked] @ self.model.get_input_embeddings().weight.T).float()
        loss = F.cross_entropy(logits, batch.labels[asked], reduction="none")
        weights, topics = batch.weights[asked], batch.topics[asked]
        for name, topic in self.topics.items():
            mine = loss.detach()[(topics == topic) & (batch.labels[asked] != EOS)]
            if len(mine):
                self.means[name] = self.means.get(name, mine.mean().item()) * 0.97 + 0.03 * mine.mean().item()
        return (loss * weights).sum() / weights.sum()

    def gradients(self, job: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, float], tuple[Tensor | None, ...]]:
        """Run one job and differentiate its summed losses; runs in a worker thread."""
        losses = job()
        total = torch.stack(list(losses.values())).sum()
        grads = torch.autograd.grad(total, self.optimiser.params, allow_unused=True)
        return {name: loss.item() for name, loss in losses.items()}, grads

    def step(self) -> dict[str, float]:
        """One optimiser step; returns the losses, averaged over the threads."""
        index, local = self.locate(self.done)
        stage, t = STAGES[index], local / self.steps[index]
        if local == 0 and self.done:
            self.optimiser.restart()
        work = self.tower_work(stage) if index == 0 else self.answer_work(stage, t)
        results = list(self.pool.map(self.gradients, work))
        for p, *parts in zip(self.optimiser.params, *(grads for _, grads in results)):
            known = [g for g in parts if g is not None]
            p.grad = torch.stack(known).sum(0) / THREADS if known else None
        factor = rate(stage, t, local)
        self.optimiser.step(stage.muon * factor, 1e-3 * factor, 1.0 if index == 0 else TOWER_SCALE)
        self.done += 1
        return {name: sum(losses[name] for losses, _ in results) / THREADS for name in results[0][0]}

    def save(self) -> None:
        """Write the resumable state and, in `out/checkpoint`, the averaged weights in the stock format."""
        state = {
            "done": self.done,
            "seed": self.seed,
            "steps": self.steps,
            "optimiser": self.optimiser.state(),
            "balance": [{k: dict(c) for k, c in b.counts.items()} for b in (self.balance, self.easy_balance)],
            "topics": self.topics,
            "means": self.means,
            "history": self.history,
            "seconds": self.seconds,
        }
        temporary = self.out / "training.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "training.pt")
        average = dict(zip(self.optimiser.names, self.optimiser.average, strict=True))
        whole = build_model()
        weights = {k.removeprefix("model."): v for k, v in average.items() if k.startswith("model.")}
        whole.load_state_dict(weights | {"lm_head.weight": weights["model.language_model.embed_tokens.weight"]})
        save(whole, self.out / "checkpoint")
        (self.out / "history.json").write_text(json.dumps(self.history, indent=1))

    def resume(self) -> None:
        """Continue from `out/training.pt` if it is there."""
        path = self.out / "training.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        begun = next(i for i in range(len(STAGES)) if state["done"] <= sum(state["steps"][: i + 1])) + 1
        # A stage that has not begun may still change its length; a rate that has been followed may not.
        if state["seed"] != self.seed or state["steps"][:begun] != self.steps[:begun]:
            raise ValueError(f"{path} belongs to seed {state['seed']} and steps {state['steps']}: use another folder")
        self.optimiser.load_state(state["optimiser"])
        for balance, counts in zip((self.balance, self.easy_balance), state["balance"], strict=True):
            for key, counter in counts.items():
                balance.counts[key].update(counter)
        self.done, self.topics, self.means = state["done"], state["topics"], state["means"]
        self.history, self.seconds = state["history"], state["seconds"]

    @torch.no_grad()
    def probe(self, scenes: int = 48) -> dict[str, float]:
        """Share of monitoring questions whose every token the averaged weights get right, per capability."""
        rng, balance = heldout_rng(MONITOR_SEED), Balance(1)
        right: dict[str, list[float]] = defaultdict(list)
        self.optimiser.load(self.optimiser.average)
        for _ in range(scenes // 16):
            drawn = [make_scene(rng) for _ in range(16)]
            asks = [training_asks(s, rng, balance, RELATIONS, True) for s in drawn]
            batch = pack([s.pixels for s in drawn], asks, self.topics, False)
            visual = fast.project(self.model, fast.tower_features(self.model, batch.pixels)[0])
            hidden = fast.question_hidden(self.model, visual, batch.ids, batch.segments, batch.positions)
            best = (hidden @ self.model.get_input_embeddings().weight.T).argmax(-1)
            wrong = (best != batch.labels) & (batch.labels >= 0) & (batch.labels != EOS)
            for b, image_asks in enumerate(asks):
                for segment, ask in enumerate(image_asks):
                    name = ask.template if ask.capability in ("caption", "helper") else ask.capability
                    right[name].append(float(not wrong[b][batch.segments[b] == segment].any()))
        self.optimiser.load(self.optimiser.masters)
        return {name: round(sum(hits) / len(hits), 3) for name, hits in sorted(right.items())}


def _ticks(trainer: Trainer, progress: bool) -> Iterator[tqdm]:
    total = sum(trainer.steps)
    with tqdm(total=total, initial=trainer.done, disable=not progress, mininterval=5, dynamic_ncols=True) as bar:
        while trainer.done < total:
            yield bar
            bar.update()


def _run(trainer: Trainer, progress: bool) -> None:
    """Step to the end of the schedule, logging every 50 steps and saving every two minutes."""
    started = saved = time.monotonic()
    before = trainer.seconds
    for bar in _ticks(trainer, progress):
        losses = trainer.step()
        now = time.monotonic()
        trainer.seconds = before + now - started
        stage = STAGES[trainer.locate(trainer.done - 1)[0]]
        bar.set_postfix_str(f"{stage.name} " + " ".join(f"{k} {v:.3f}" for k, v in losses.items()), refresh=False)
        finished = trainer.done == sum(trainer.steps)
        if trainer.done % 50 == 0 or finished:
            entry: dict[str, object] = {
                "step": trainer.done,
                "stage": stage.name,
                "seconds": round(trainer.seconds),
            }
            entry["losses"] = {k: round(v, 3) for k, v in (losses | trainer.means).items()}
            if stage.batch == 16 and (trainer.done % PROBE_STEPS == 0 or finished):
                entry["right"] = trainer.probe()
            trainer.history.append(entry)
            if progress:
                tqdm.write(json.dumps(entry))
        if now - saved > CHECKPOINT_SECONDS or finished:
            trainer.save()
            saved = time.monotonic()


def train(out: Path, *, resume: bool = True, seed: int = 0, scale: float = 1.0, progress: bool = True) -> Path:
    """Train and return the folder of the finished checkpoint, `out/checkpoint`.

    `resume` continues from `out/training.pt`, which is rewritten every two minutes and at the end. `scale`
    multiplies the steps of every stage, for smoke tests. Needs the `easy-vqa` package.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(out, seed, scale)
    try:
        if resume:
            trainer.resume()
        _run(trainer, progress)
    finally:
        trainer.close()
    return out / "checkpoint"


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Train the tiny LLaVA (about an hour on two CPU cores).")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    train(options.out, seed=options.seed, scale=options.scale)
