"""Train the mid model's projector and adapter: `python -m vtprune.evals.toys.mid.train OUT`.

The tower and the language model's own weights stay as they were fetched. First the projector alone learns to say in
the language model's words what each patch shows; then projector and adapter learn to answer. `OUT/content` receives
what the pictures are made of. `vtprune.evals.toys.trainer` says how the schedule is followed and resumed; with
`--start ADAPTER` it begins at its last stage, from the weights of a saved adapter. Needs scikit-learn and scikit-image.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.evals.toys.asks import Ask, Balance
from vtprune.evals.toys.fast import prefixed_hidden
from vtprune.evals.toys.mid import content
from vtprune.evals.toys.mid.asks import training_asks
from vtprune.evals.toys.mid.labels import Alignment, Heads, make_labels
from vtprune.evals.toys.mid.model import FEATURE_LAYER, MEAN, STD, adapt, assemble
from vtprune.evals.toys.mid.scenes import Scene, heldout_rng, make_scene, training_rng
from vtprune.evals.toys.packing import Batch, lay
from vtprune.evals.toys.trainer import Job, run
from vtprune.evals.toys.trainer import Stage as Base
from vtprune.evals.toys.trainer import Trainer as BaseTrainer


@dataclass(frozen=True)
class Stage(Base):
    """One part of the schedule; `limit`: the most shapes in a picture."""

    limit: int = 6


STAGES = (
    Stage("projector", 300, batch=24, adam=2e-3, shape="late"),
    Stage("look up", 500, batch=4, adam=1e-3, limit=4),
    Stage("answer", 850, batch=4, adam=1e-3, shape="cosine"),
)


class Trainer(BaseTrainer):
    """Pictures of the packages' training content."""

    stages = STAGES
    slow = "multi_modal_projector"
    save_seconds = 300

    def __init__(self, out: Path, seed: int, scale: float, start: Path | None = None) -> None:
        self.content = content.training(content.fetch_training(out / "content"))
        super().__init__(out, seed, scale)
        self.llava: Any = self.model.base_model.model
        self.alignment = Alignment(self.tokenizer)
        self.end = self.tokenizer.eos_token_id
        if start is not None:
            self._start_from(start)
        elif not (out / "training.pt").exists():
            self._start_projector()

    def build(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        llava, self.tokenizer = assemble()
        llava.requires_grad_(False)
        words: Any = llava.get_input_embeddings()
        self.width: int = words.embedding_dim
        return adapt(llava)

    def read_outs(self) -> Heads:
        return Heads(self.width)

    def _start_projector(self) -> None:
        """Let the projector's first layer see features of mean zero and spread one."""
        rng = training_rng(self.seed, -1)
        features = self.features([make_scene(rng, self.content) for _ in range(16)]).float().flatten(0, 1)
        index = [i for i, name in enumerate(self.optimiser.names) if "linear_1" in name]
        weight, bias = (self.optimiser.masters[i] for i in index)
        scaled = weight / features.std(0)
        bias.sub_(scaled @ features.mean(0))
        weight.copy_(scaled)
        for i in index:
            self.optimiser.average[i].copy_(self.optimiser.masters[i])
        self.optimiser.load(self.optimiser.masters)

    def _start_from(self, adapter: Path) -> None:
        """Take the weights of a saved adapter and skip all stages but the last."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(self.model, load_file(adapter / "adapter_model.safetensors"))
        for values in (self.optimiser.masters, self.optimiser.average):
            for value, parameter in zip(values, self.optimiser.params, strict=True):
                value.copy_(parameter.float())
        self.done = sum(self.steps[:-1])

    @property
    def projector(self) -> Any:
        return self.llava.model.multi_modal_projector.modules_to_save["default"]

    @property
    def embeddings(self) -> Tensor:
        table: Tensor = self.llava.model.language_model.embed_tokens.weight
        return table

    @torch.no_grad()
    def features(self, scenes: Sequence[Scene]) -> Tensor:
        """bfloat16 [B, 256, 384]: what the projector receives."""
        pixels = torch.from_numpy(np.stack([s.pixels for s in scenes])).float() / 255
        pixels = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
        tower = self.llava.model.vision_tower
        seen = tower(pixels.permute(0, 3, 1, 2).to(torch.bfloat16), output_hidden_states=True)
        found: Tensor = seen.hidden_states[FEATURE_LAYER][:, 1:]
        return found

    def project(self, features: Tensor) -> Tensor:
        first, second = self.projector.linear_1, self.projector.linear_2
        return F.linear(F.gelu(F.linear(features, first.weight, first.bias)), second.weight, second.bias)

    def look(self, visual: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """The losses of what visual tokens [B, 256, d] say."""
        labels = make_labels(scenes)
        align = self.alignment.loss(visual, self.embeddings, labels)
        return {"align": align, "places": 0.5 * self.heads.loss(visual, labels)}

    def scenes(self, stage: Stage) -> tuple[random.Random, list[Scene]]:
        rng = training_rng(self.seed, self.done)
        return rng, [make_scene(rng, self.content, stage.limit) for _ in range(stage.batch)]

    def tower_work(self, stage: Stage) -> list[Job]:
        _, scenes = self.scenes(stage)

        def job(part: list[Scene]) -> dict[str, Tensor]:
            return self.look(self.project(self.features(part)), part)

        return [partial(job, scenes[i :: self.threads]) for i in range(self.threads)]

    def answer_work(self, stage: Stage, t: float) -> list[Job]:
        rng, scenes = self.scenes(stage)
        asks = [training_asks(s, rng, self.balances[0]) for s in scenes]

        def job(part: list[Scene], asked: list[list[Ask]]) -> dict[str, Tensor]:
            visual = self.project(self.features(part))
            batch = self.pack(asked, weighted=True)
            losses = {"answer": self.answer_loss(self.hidden(visual, batch), batch)}
            return losses | {name: 0.2 * loss for name, loss in self.look(visual, part).items()}

        return [partial(job, scenes[i :: self.threads], asks[i :: self.threads]) for i in range(self.threads)]

    def encoded(self, ask: Ask) -> tuple[list[int], list[int]]:
        """Token ids behind the picture; captions go without "Answer:", so that their key is last."""
        text = f"\n{ask.text}:" if ask.capability == "caption" else f"\n{ask.text}\nAnswer:"
        return self.tokenizer(text).input_ids, self.tokenizer(f" {ask.answer}").input_ids

    def pack(self, asks: list[list[Ask]], weighted: bool) -> Batch:
        start = 1 + self.llava.config.image_seq_length
        nothing = torch.zeros(0)
        return lay(nothing, asks, self.encoded, start, self.topics, weighted, (self.end, self.end))

    def hidden(self, visual: Tensor, batch: Batch) -> Tensor:
        """Final hidden states [B, Q, d] of packed questions behind the first token and the visual ones."""
        count = len(visual)
        first = self.embeddings[self.tokenizer.bos_token_id].expand(count, 1, -1)
        prefix = torch.cat([first, visual], 1)
        positions = torch.cat([torch.arange(prefix.shape[1]).expand(count, -1), batch.positions], 1)
        return prefixed_hidden(self.llava.model.language_model, prefix, batch.ids, batch.segments, positions)

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the averaged projector and adapter as a PEFT checkpoint in float16."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        state = get_peft_model_state_dict(self.model, state_dict=weights)
        folder.mkdir(parents=True, exist_ok=True)
        half = {name: value.half().contiguous() for name, value in state.items()}
        save_file(half, folder / "adapter_model.safetensors")
        self.model.peft_config["default"].save_pretrained(folder)

    def heldout(self, seed: int) -> tuple[random.Random, Callable[[random.Random], Scene]]:
        return heldout_rng(seed), partial(make_scene, content=content.heldout())

    def asked(self, drawn: Scene, rng: random.Random, balance: Balance) -> list[Ask]:
        return training_asks(drawn, rng, balance)

    def answered(self, drawn: Sequence[Scene], asks: list[list[Ask]]) -> tuple[Batch, Tensor]:
        batch = self.pack(asks, weighted=False)
        return batch, self.hidden(self.project(self.features(drawn)), batch)


def train(
    out: Path,
    *,
    resume: bool = True,
    seed: int = 0,
    scale: float = 1.0,
    start: Path | None = None,
    progress: bool = True,
) -> Path:
    """Train and return the folder of the finished adapter, `out/checkpoint`.

    `resume` continues from `out/training.pt`, which is rewritten every five minutes and at the end. `scale` multiplies
    the steps of every stage, for smoke tests. `start`: a saved adapter to begin the last stage from.
    """
    return run(Trainer(Path(out), seed, scale, start), resume, progress)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the mid model's projector and adapter (hours on two cores).")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--start", type=Path, help="a saved adapter, from which the last stage begins")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
