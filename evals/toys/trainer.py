"""What training the tiny models has in common: stages, resumable steps, jobs on threads, averaged weights.

One process and one step-based schedule; each stage continues from the averaged weights of the one before with a fresh
optimiser. Stopping and starting again resumes bit by bit from `OUT/training.pt`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vtprune.evals.toys.asks import Ask, Balance
from vtprune.evals.toys.muon import Optimiser
from vtprune.evals.toys.packing import Batch
from vtprune.evals.toys.words import EOS

CHECKPOINT_SECONDS = 120
MONITOR_SEED = 990001
MONITOR_BATCHES, MONITOR_BATCH = 3, 16
PROBE_STEPS = 150
WARMUP = 20
TOWER_SCALE = 0.3  # the tower's share of the rates once it trains together with the language model
Job = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Stage:
    """One part of the schedule.

    `batch` examples a step; `muon` and `adam` peak rates of Muon and AdamW; `shape` of both: "flat", "late" (0.6
    flat, then down to 0.3) or "cosine" (0.25 flat, then down to 0.02).
    """

    name: str
    steps: int
    batch: int = 16
    muon: float = 0.02
    adam: float = 1e-3
    shape: str = "flat"


def rate(stage: Stage, t: float, step: int) -> float:
    """Multiplier of the stage's rates at share `t` of the stage, with a short warm-up."""
    warm = min(1.0, (step + 1) / WARMUP)
    if stage.shape == "late":
        return warm * (1.0 if t < 0.6 else 1.0 - 0.7 * (t - 0.6) / 0.4)
    if stage.shape == "cosine" and t > 0.25:
        return warm * (0.02 + 0.49 * (1 + math.cos(math.pi * (t - 0.25) / 0.75)))
    return warm


class Trainer:
    """Model, optimiser, data and counters of one run; a model's own trainer says what it learns from.

    The first stage of `stages` trains the vision tower alone. `slow` is in the names of the tower's parameters,
    `slacks` are those of the balances of answers.
    """

    stages: Sequence[Stage]
    slow: str
    slacks: tuple[int, ...] = (6,)
    threads = 2
    end = EOS  # the token that ends an answer
    save_seconds = CHECKPOINT_SECONDS

    def __init__(self, out: Path, seed: int, scale: float) -> None:
        self.out, self.seed = out, seed
        self.steps = [max(2, round(stage.steps * scale)) for stage in self.stages]
        model = self.build(seed)  # seeds what follows too
        self.heads = self.read_outs()
        self.module = nn.ModuleDict({"model": model, "heads": self.heads}).to(torch.bfloat16)
        self.model: Any = self.module.model
        self.optimiser = Optimiser(self.module, slow=self.slow)
        self.balances = [Balance(slack) for slack in self.slacks]
        self.topics: dict[str, int] = {}
        self.means: dict[str, float] = {}
        self.history: list[dict[str, object]] = []
        # Two threads with half a batch each beat one batch split inside every operation: nothing waits for the
        # slower core several hundred times a step.
        self.threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.done = 0
        self.seconds = 0.0

    def tower_work(self, stage: Any) -> list[Job]:
        """The tower alone, as one job per thread that returns its losses."""
        raise NotImplementedError

    def answer_work(self, stage: Any, t: float) -> list[Job]:
        """Questions at share `t` of the stage, as one job per thread that returns its losses."""
        raise NotImplementedError

    def build(self, seed: int = 0) -> Any:
        """A fresh model of the kind."""
        raise NotImplementedError

    def read_outs(self) -> Any:
        """Fresh heads that read labels out of the tower, used in training only."""
        raise NotImplementedError

    def write(self, model: Any, folder: Path) -> None:
        """Save a model in the stock format."""
        raise NotImplementedError

    def heldout(self, seed: int) -> tuple[random.Random, Callable[[random.Random], Any]]:
        """The generator of held-out examples, and what draws one from it."""
        raise NotImplementedError

    def asked(self, drawn: Any, rng: random.Random, balance: Balance) -> list[Ask]:
        """All kinds of question about one example."""
        raise NotImplementedError

    def answered(self, drawn: Sequence[Any], asks: list[list[Ask]]) -> tuple[Batch, Tensor]:
        """A batch of examples and questions, unweighted, and the final hidden states [B, Q, d]."""
        raise NotImplementedError

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the averaged weights of the model in the stock format."""
        whole = self.build()
        tied = {"lm_head.weight": weights["model.language_model.embed_tokens.weight"]}
        whole.load_state_dict(weights | tied)
        self.write(whole, folder)

    def monitored(self) -> Iterator[tuple[Batch, Tensor]]:
        """Held-out batches and their final hidden states [B, Q, d], for `probe`."""
        rng, make = self.heldout(MONITOR_SEED)
        balance = Balance(1)
        for _ in range(MONITOR_BATCHES):
            drawn = [make(rng) for _ in range(MONITOR_BATCH)]
            yield self.answered(drawn, [self.asked(one, rng, balance) for one in drawn])

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

    def answer_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Token-weighted cross-entropy of the answers; keeps a running mean per topic for the log."""
        asked = batch.labels >= 0
        logits = (hidden[asked] @ self.model.get_input_embeddings().weight.T).float()
        loss = F.cross_entropy(logits, batch.labels[asked], reduction="none")
        weights, topics = batch.weights[asked], batch.topics[asked]
        for name, topic in self.topics.items():
            mine = loss.detach()[(topics == topic) & (batch.labels[asked] != self.end)]
            if len(mine):
                self.means[name] = self.means.get(name, mine.mean().item()) * 0.97 + 0.03 * mine.mean().item()
        return (loss * weights).sum() / weights.sum()

    def gradients(self, job: Job) -> tuple[dict[str, float], tuple[Tensor | None, ...]]:
        """Run one job and differentiate its summed losses; runs in a worker thread."""
        losses = job()
        total = torch.stack(list(losses.values())).sum()
        grads = torch.autograd.grad(total, self.optimiser.params, allow_unused=True)
        return {name: loss.item() for name, loss in losses.items()}, grads

    def step(self) -> dict[str, float]:
        """One optimiser step; returns the losses, averaged over the threads."""
        index, local = self.locate(self.done)
        stage, t = self.stages[index], local / self.steps[index]
        if local == 0 and self.done:
            self.optimiser.restart()
        work = self.tower_work(stage) if index == 0 else self.answer_work(stage, t)
        results = list(self.pool.map(self.gradients, work))
        for p, *parts in zip(self.optimiser.params, *(grads for _, grads in results)):
            known = [g for g in parts if g is not None]
            p.grad = torch.stack(known).sum(0) / self.threads if known else None
        factor = rate(stage, t, local)
        self.optimiser.step(stage.muon * factor, stage.adam * factor, 1.0 if index == 0 else TOWER_SCALE)
        self.done += 1
        return {name: sum(losses[name] for losses, _ in results) / self.threads for name in results[0][0]}

    def save(self) -> None:
        """Write the resumable state and, in `out/checkpoint`, the averaged weights in the stock format."""
        state = {
            "done": self.done,
            "seed": self.seed,
            "steps": self.steps,
            "optimiser": self.optimiser.state(),
            "balance": [{k: dict(c) for k, c in b.counts.items()} for b in self.balances],
            "topics": self.topics,
            "means": self.means,
            "history": self.history,
            "seconds": self.seconds,
        }
        temporary = self.out / "training.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "training.pt")
        average = dict(zip(self.optimiser.names, self.optimiser.average, strict=True))
        weights = {k.removeprefix("model."): v for k, v in average.items() if k.startswith("model.")}
        self.export(weights, self.out / "checkpoint")
        (self.out / "history.json").write_text(json.dumps(self.history, indent=1))

    def resume(self) -> None:
        """Continue from `out/training.pt` if it is there."""
        path = self.out / "training.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        begun = next(i for i in range(len(self.stages)) if state["done"] <= sum(state["steps"][: i + 1])) + 1
        # A stage that has not begun may still change its length; a rate that has been followed may not.
        if state["seed"] != self.seed or state["steps"][:begun] != self.steps[:begun]:
            raise ValueError(f"{path} belongs to seed {state['seed']} and steps {state['steps']}: use another folder")
        self.optimiser.load_state(state["optimiser"])
        for balance, counts in zip(self.balances, state["balance"], strict=True):
            for key, counter in counts.items():
                balance.counts[key].update(counter)
        self.done, self.topics, self.means = state["done"], state["topics"], state["means"]
        self.history, self.seconds = state["history"], state["seconds"]

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """Share of monitoring questions whose every token the averaged weights get right, per capability."""
        right: dict[str, list[float]] = defaultdict(list)
        self.optimiser.load(self.optimiser.average)
        for batch, hidden in self.monitored():
            best = (hidden @ self.model.get_input_embeddings().weight.T).argmax(-1)
            wrong = (best != batch.labels) & (batch.labels >= 0) & (batch.labels != self.end)
            for b, asks in enumerate(batch.asks):
                for segment, ask in enumerate(asks):
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
        index = trainer.locate(trainer.done - 1)[0]
        name = trainer.stages[index].name
        bar.set_postfix_str(f"{name} " + " ".join(f"{k} {v:.3f}" for k, v in losses.items()), refresh=False)
        finished = trainer.done == sum(trainer.steps)
        if trainer.done % 50 == 0 or finished:
            entry: dict[str, object] = {"step": trainer.done, "stage": name, "seconds": round(trainer.seconds)}
            entry["losses"] = {k: round(v, 3) for k, v in (losses | trainer.means).items()}
            if index and (trainer.done % PROBE_STEPS == 0 or finished):
                entry["right"] = trainer.probe()
            trainer.history.append(entry)
            if progress:
                tqdm.write(json.dumps(entry))
        if now - saved > trainer.save_seconds or finished:
            trainer.save()
            saved = time.monotonic()


def run(trainer: Trainer, resume: bool, progress: bool) -> Path:
    """Train to the end of the schedule and return the folder of the finished checkpoint, `out/checkpoint`."""
    trainer.out.mkdir(parents=True, exist_ok=True)
    try:
        if resume:
            trainer.resume()
        _run(trainer, progress)
    finally:
        trainer.close()
    return trainer.out / "checkpoint"


def command(train: Callable[..., Path], description: str) -> None:
    """The command line of a toy's training script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    train(options.out, seed=options.seed, scale=options.scale)
