"""The mid model: a LLaVA of real parts and real depth in a small closed world, with held-out questions.

    model, processor = load()
    for question in questions(per_capability=10):
        inputs = processor(images=[question.image], text=[question.prompt], return_tensors="pt")
        model.generate(**inputs)

A pretrained DINOv2-small tower and a pretrained SmolLM2-135M-Instruct (30 layers), joined by a projector and an adapter
that were trained here, on pictures of 224 x 224 (256 visual tokens). It answers about shapes, digits and garments and
about nothing else. The parts are fetched from the package registry at first use. How it was trained, what it scores and
which licences its parts have: README.md beside this file.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.evals.toys.questions import AboutPicture, Visible, blind, check_wanted

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["ADAPTER", "CAPABILITIES", "Question", "Visible", "blind", "load", "questions"]

ADAPTER = Path(__file__).parent / "adapter"
CAPABILITIES = (
    "color",
    "shape",
    "count",
    "position",
    "relation",
    "exist",
    "digit",
    "garment",
    "parity",
    "worn",
)
_SHARES: dict[str, dict[str, int]] = {
    "color": {"color": 1},
    "shape": {"shape": 1},
    "count": {"count": 1, "count kind": 1},
    "position": {"where": 1},
    "relation": {"left of": 1, "right of": 1, "above": 1, "below": 1},
    "exist": {"exist COLOR": 1, "exist SHAPE": 1, "exist COLOR SHAPE": 2},
    "digit": {"digit": 1},
    "garment": {"garment": 1},
    "parity": {"parity": 1},
    "worn": {"worn": 1},
}


class Question(AboutPicture):
    """One question about a picture of 224 x 224."""

    def blank(self) -> Question:
        """The same question about a picture of the mean colour, which is zero once normalised."""
        from PIL import Image

        from vtprune.evals.toys.mid.model import MEAN
        from vtprune.evals.toys.mid.scenes import SIDE

        mean = tuple(round(255 * value) for value in MEAN)
        return replace(self, image=Image.new("RGB", (SIDE, SIDE), mean), image_id=-1)


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in the stock classes, our adapter merged in, in eval mode; float32 unless `dtype` says otherwise.

    The first call downloads and converts the pretrained parts (183 MB, kept in ~/.cache/vtprune). Raises ImportError
    where the extra "mid" is not installed and RuntimeError where the parts cannot be had.
    """
    import torch

    from vtprune.evals.toys.mid.model import assemble, build_processor, merge

    assembled, tokenizer = assemble()
    model: Any = merge(assembled, ADAPTER)
    return model.to(device=device, dtype=dtype or torch.float32), build_processor(tokenizer)


def questions(
    per_capability: int = 100, seed: int = 777001, capabilities: Iterable[str] | None = None
) -> list[Question]:
    """Held-out questions, answers balanced per template, in the order of `CAPABILITIES`.

    The pictures are drawn from digits, garments and photographs that training never sees. The same arguments give the
    same questions. Raises ValueError for an unknown capability.
    """
    from PIL import Image

    from vtprune.evals.toys.drawing import draw
    from vtprune.evals.toys.mid.asks import ASKERS
    from vtprune.evals.toys.mid.content import heldout
    from vtprune.evals.toys.mid.scenes import Scene, heldout_rng, make_scene

    wanted = check_wanted(per_capability, capabilities, CAPABILITIES)
    askers = {c: ASKERS[c] for c in CAPABILITIES if c in wanted}
    found: dict[str, list[Question]] = {c: [] for c in askers}

    def make(rng: random.Random) -> Scene:
        return make_scene(rng, heldout())

    for number, scene, ask in draw(make, heldout_rng(seed), askers, _SHARES, per_capability, {}):
        prompt = f"<|im_start|><image>\n{ask.text}\nAnswer:"
        question = Question(Image.fromarray(scene.pixels), number, prompt, ask.answer, ask.capability, ask.template)
        found[ask.capability].append(question)
    return [q for c in askers for q in found[c]]
