"""A tiny Qwen2.5-VL that is really trained on clips, its held-out questions and its blind controls.

    model, processor = load()
    for question in questions(per_capability=10):
        clip = question.video
        inputs = processor(
            videos=[clip.frames], video_metadata=[clip.metadata], text=[question.prompt], return_tensors="pt"
        )
        model.generate(**inputs)

A toy of 1.1 M parameters for 16 frames of 48 x 48 pixels: good for seeing what a pruning method loses when order and
motion count, not for claims about real models. How it was trained and what it scores: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.toys.questions import blind, check_wanted
from vtprune.evals.video import Video

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

__all__ = ["CAPABILITIES", "CHECKPOINT", "Question", "blind", "load", "questions"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
_SHARES = {
    "first": {"first": 1, "last": 1},
    "order": {"order": 1},
    "direction": {"direction": 1},
    "count": {"count": 1},
    "shape": {"shape": 1},
}
CAPABILITIES = tuple(_SHARES)


@dataclass(frozen=True)
class Question:
    """One question: a `video` of 16 frames of 48 x 48, the full prompt for the processor and the expected words."""

    video: Video
    video_id: int
    prompt: str
    answer: str
    capability: str
    template: str

    @property
    def seen(self) -> Video:
        """What the question is about."""
        return self.video

    @property
    def source(self) -> int:
        """Number of the clip: questions that share it share the clip."""
        return self.video_id

    def blank(self) -> Question:
        """The same question about a clip of the mean colour, which is zero once normalised."""
        from vtprune.evals.toys.video.model import MEAN_RGB

        return replace(self, video=as_video(np.full_like(self.video.frames, MEAN_RGB)), video_id=-1)

    def about(self, other: Question) -> Question:
        """The same question about the clip of another one."""
        return replace(self, video=other.video, video_id=other.video_id)


def as_video(frames: NDArray[np.uint8]) -> Video:
    """Generated frames [16, 48, 48, 3] as if they had been read from a file."""
    from vtprune.evals.toys.video.clips import FPS

    order = np.arange(len(frames))
    return Video(frames, order / FPS, order, len(frames), FPS)


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The shipped checkpoint in the stock classes, in eval mode; float32 unless `dtype` says otherwise.

    Raises ImportError without torchvision, which the stock video processor needs.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        raise ImportError("the tiny video model needs torchvision for its processor: pip install 'vtprune[video]'")
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype or torch.float32)
    return model.to(device).eval(), Qwen2_5_VLProcessor.from_pretrained(CHECKPOINT)


def questions(
    per_capability: int = 310, seed: int = 777001, capabilities: Iterable[str] | None = None
) -> list[Question]:
    """Held-out questions, answers balanced per template, in the order of `CAPABILITIES`.

    `first` asks for the colour that came first or last, `order` whether one came before another, `direction`
    which way a shape moves, `count` how many appear, `shape` which one a colour has. The same arguments give the same
    questions. Raises ValueError for an unknown capability.
    """
    from vtprune.evals.toys.drawing import draw
    from vtprune.evals.toys.video.asks import ASKERS
    from vtprune.evals.toys.video.clips import heldout_rng, make_clip

    wanted = check_wanted(per_capability, capabilities, CAPABILITIES)
    askers = {c: ASKERS[c] for c in CAPABILITIES if c in wanted}
    found = [
        Question(as_video(clip.frames), number, _full_prompt(ask.text), ask.answer, ask.capability, ask.template)
        for number, clip, ask in draw(make_clip, heldout_rng(seed), askers, _SHARES, per_capability, {})
    ]
    return sorted(found, key=lambda q: CAPABILITIES.index(q.capability))


def _full_prompt(words: str) -> str:
    return f"<s> <|vision_start|> <|video_pad|> <|vision_end|> {words} answer:"
