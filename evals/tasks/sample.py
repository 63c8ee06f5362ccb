"""One question of an evaluation: its pictures or its film, its answers, and how an answer is marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from vtprune.evals.video import Video

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Sample:
    """A question, read but not yet decoded.

    id: unique in its task. task: the group of samples that one score is made of. images: pictures, each as a path, the
    bytes of a file, or decoded; video: a film in the same forms, instead of images. frames: how many are taken from it.
    answers: the right ones; empty where there is no label. options: what a multiple-choice question offers. metric: a
    name of `vtprune.evals.tasks.metrics.METRICS`. where: file and line, for messages.
    """

    id: str
    task: str
    question: str
    images: tuple[Any, ...] = ()
    video: Any = None
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    metric: str = "agreement"
    frames: int = 8
    where: str = ""

    # Decoded anew each time: the pictures of some thousand samples would not fit into memory.
    @property
    def pictures(self) -> list[Image.Image]:
        """The pictures, decoded, upright and in RGB; none where the question is about a film."""
        from PIL import Image

        from vtprune import pictures

        return [one if isinstance(one, Image.Image) else pictures.read(one)[0] for one in self.images]

    @property
    def film(self) -> Video | None:
        """`frames` frames of the film, spread evenly; None where the question is about pictures."""
        from vtprune.evals.video import Video, read

        return self.video if self.video is None or isinstance(self.video, Video) else read(self.video, self.frames)

    @property
    def prompt(self) -> str:
        """The question as it is put to the model: with lettered options, if there are some."""
        if not self.options:
            return self.question
        listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options)]
        return "\n".join([self.question, *listed, "Answer with the option's letter from the given choices directly."])


def by_task(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of every task, in the order in which they came."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.task, []).append(sample)
    return found
