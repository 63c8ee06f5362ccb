"""Accuracy per capability: `python -m vtprune.evals.toys.image.score` prints the table of the README."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from vtprune.evals.toys.image import CAPABILITIES, Question, blind, load, questions


@dataclass
class Score:
    """Shares of `n` questions: `answer` has the right words first, `stopped` also the end token after them."""

    n: int = 0
    answer: float = 0.0
    stopped: float = 0.0


@torch.inference_mode()
def score(
    model: Any, processor: Any, asked: Sequence[Question], batch_size: int = 31, progress: bool = False
) -> dict[str, Score]:
    """Greedy answers of `model.generate` against the expected words, per capability."""
    hits: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for start in tqdm(range(0, len(asked), batch_size), disable=not progress, mininterval=5):
        batch = asked[start : start + batch_size]
        inputs = processor(
            images=[q.image for q in batch],
            text=[q.prompt for q in batch],
            return_tensors="pt",
            padding=True,
        ).to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for question, said in zip(batch, tokens, strict=True):
            words = processor.tokenizer.convert_ids_to_tokens(said)
            expected = question.answer.split()
            n = len(expected)
            right = words[:n] == expected
            hits[question.capability].append((right, right and words[n : n + 1] == ["</s>"]))
    return {
        c: Score(len(h), sum(a for a, _ in h) / len(h), sum(s for _, s in h) / len(h))
        for c in CAPABILITIES
        if (h := hits.get(c))
    }


def main(per_capability: int = 310) -> None:
    """Print dense and blind scores of the shipped checkpoint as a Markdown table."""
    model, processor = load()
    asked = questions(per_capability)
    runs = {
        "dense": asked,
        "blind: zero image": blind(asked, "zero"),
        "blind: images shuffled": blind(asked, "shuffle"),
    }
    print("| | " + " | ".join(CAPABILITIES) + " |\n" + "|---" * (len(CAPABILITIES) + 1) + "|", flush=True)
    for name, batch in runs.items():
        scores = score(model, processor, batch, progress=True)
        print(f"| {name}, answer right | " + " | ".join(f"{scores[c].answer:.3f}" for c in CAPABILITIES) + " |")
        if name == "dense":
            print("| n | " + " | ".join(str(scores[c].n) for c in CAPABILITIES) + " |")
            print("| dense, stopped right | " + " | ".join(f"{scores[c].stopped:.3f}" for c in CAPABILITIES) + " |")


if __name__ == "__main__":
    main()
