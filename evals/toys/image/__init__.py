"""A tiny LLaVA that is really trained, its held-out questions and its blind controls.

    model, processor = load()
    for question in questions(per_capability=10):
        inputs = processor(images=[question.image], text=[question.prompt], return_tensors="pt")
        model.generate(**inputs)

A toy of 2.28 M parameters and 71 words for 64 x 64 pictures: good for seeing what a pruning method loses, not for
claims about real models. How it was trained and what it scores: README.md beside this file.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.evals.toys.questions import AboutPicture, Visible, blind, check_wanted

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = [
    "CAPABILITIES", "CHAT_TEMPLATE", "CHECKPOINT", "EASY_LIMIT", "FOLDER", "Question", "Visible", "blind", "load",
    "questions",
]  # fmt: skip

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "checkpoint"
CAPABILITIES = (
    "color",
    "shape",
    "count",
    "count-kind",
    "position",
    "relation",
    "exist",
    "ocr",
    "easy-color",
    "easy-shape",
    "easy-yesno",
)
# Asks as the model was taught to be asked, in small letters and with every mark a word of its own.
CHAT_TEMPLATE = """<s> {% for m in messages %}{% if m.content is string %}{{ m.content | lower | replace('?', ' ?') }} \
{% else %}{% for c in m.content %}{% if c.type == 'image' %}<image> \
{% else %}{{ c.text | lower | replace('?', ' ?') }} {% endif %}{% endfor %}{% endif %}{% endfor %}answer:"""
EASY_LIMIT = 312  # shipped easy-VQA questions per easy-* capability
_SHARES: dict[str, dict[str, int]] = {
    "color": {"color": 1},
    "shape": {"shape": 1},
    "count": {"count": 1},
    "count-kind": {"count SHAPEs": 1, "count COLOR shapes": 1},
    "position": {"where": 3, "left or right": 1, "top or bottom": 1},
    "relation": {"left of": 1, "right of": 1, "above": 1, "below": 1},
    "exist": {"exist COLOR": 1, "exist SHAPE": 1, "exist COLOR SHAPE": 2},
    "ocr": {"ocr": 1},
}


class Question(AboutPicture):
    """One question about a picture of 64 x 64."""

    def blank(self) -> Question:
        """The same question about a picture of the mean colour, which is zero once normalised."""
        from PIL import Image

        from vtprune.evals.toys.image.model import MEAN_RGB

        return replace(self, image=Image.new("RGB", (64, 64), MEAN_RGB), image_id=-1)


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The shipped checkpoint in the stock classes, in eval mode; float32 unless `dtype` says otherwise."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model: Any = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype or torch.float32)
    return model.to(device).eval(), LlavaProcessor.from_pretrained(CHECKPOINT)


def questions(
    per_capability: int = 310, seed: int = 777001, capabilities: Iterable[str] | None = None
) -> list[Question]:
    """Held-out questions, answers balanced per template, in the order of `CAPABILITIES`.

    `count` asks how many shapes there are in all, `count-kind` how many of one shape or colour. The easy-* ones are
    drawn from the shipped test images of easy-VQA and end at 312 per capability. The same arguments give the same
    questions. Raises ValueError for an unknown capability or more easy-* questions than there are.
    """
    wanted = check_wanted(per_capability, capabilities, CAPABILITIES)
    drawn = [c for c in CAPABILITIES if c in wanted and c in _SHARES]
    easy = [c for c in CAPABILITIES if c in wanted and c not in _SHARES]
    if easy and per_capability > EASY_LIMIT:
        raise ValueError(
            f"per_capability={per_capability} exceeds the {EASY_LIMIT} shipped questions of {', '.join(easy)}: "
            f"lower it or leave these capabilities out"
        )
    found = _drawn(per_capability, seed, drawn)
    for capability in easy:
        found[capability] = _easy(per_capability, seed, capability)
    return [q for c in CAPABILITIES if c in wanted for q in found[c]]


def _full_prompt(words: str) -> str:
    return f"<s> <image> {words} answer:"


def _drawn(count: int, seed: int, capabilities: Sequence[str]) -> dict[str, list[Question]]:
    """Questions about synthetic scenes: at most one per scene and capability."""
    from PIL import Image

    from vtprune.evals.toys.drawing import draw
    from vtprune.evals.toys.image.asks import ASKERS
    from vtprune.evals.toys.image.scenes import heldout_rng, make_scene

    rng = heldout_rng(seed)
    found: dict[str, list[Question]] = {c: [] for c in capabilities}
    # Two-digit numbers have 90 answers: insisting on one round after another would need thousands of scenes.
    askers, slack = {c: ASKERS[c] for c in capabilities}, {"ocr": 4}
    for number, scene, ask in draw(make_scene, rng, askers, _SHARES, count, slack):
        image = Image.fromarray(scene.pixels)
        prompt = _full_prompt(ask.text)
        found[ask.capability].append(Question(image, number, prompt, ask.answer, ask.capability, ask.template))
    return found


@cache
def _easy_images() -> dict[int, Image.Image]:
    from PIL import Image

    with zipfile.ZipFile(FOLDER / "easy_vqa" / "images.zip") as archive:
        names = archive.namelist()
        return {int(n[:-4]): Image.open(io.BytesIO(archive.read(n))).convert("RGB") for n in names}


def _easy(count: int, seed: int, capability: str) -> list[Question]:
    """Balanced draw from the shipped easy-VQA questions; yes / no answers come in pairs of one wording."""
    rows = [
        r for r in json.loads((FOLDER / "easy_vqa" / "questions.json").read_text()) if r["capability"] == capability
    ]
    rng = random.Random(f"easy/{seed}/{capability}")
    rng.shuffle(rows)
    stacks: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = row["question"] if capability == "easy-yesno" else ""
        stacks[key][row["answer"]].append(row)
    # One row of every answer per round and key keeps any prefix balanced.
    rounds = [pair for stack in stacks.values() for pair in zip(*(stack[a] for a in sorted(stack)), strict=True)]
    rng.shuffle(rounds)
    picked = [row for pair in rounds for row in pair][:count]
    images = _easy_images()
    return [
        Question(images[r["image"]], r["image"], _full_prompt(r["question"]), r["answer"], capability, capability)
        for r in picked
    ]
