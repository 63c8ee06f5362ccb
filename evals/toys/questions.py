"""What the questions of both toys have in common, and their blind controls."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Self

    from vtprune.evals.video import Video

Seen = TypeVar("Seen", bound="Visible")


class Visible(Protocol):
    """A question about a picture or a video, `seen`, which can be taken away or swapped."""

    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def capability(self) -> str: ...
    @property
    def source(self) -> int: ...
    @property
    def seen(self) -> Image.Image | Video: ...
    def blank(self) -> Any: ...
    def about(self, other: Any) -> Any: ...


@dataclass(frozen=True)
class AboutPicture:
    """One question about an RGB `image`: the full prompt text for the processor and the expected words.

    What a picture of nothing is, `blank`, is for the model that is asked to say.
    """

    image: Image.Image
    image_id: int
    prompt: str
    answer: str
    capability: str
    template: str

    @property
    def seen(self) -> Image.Image:
        """What the question is about."""
        return self.image

    @property
    def source(self) -> int:
        """Number of the picture: questions that share it share the picture."""
        return self.image_id

    def about(self, other: Self) -> Self:
        """The same question about the picture of another one."""
        return replace(self, image=other.image, image_id=other.image_id)


def check_wanted(per_capability: int, wanted: Iterable[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The wanted capabilities, all that are known unless some are named; ValueError for an unknown one or no count."""
    chosen = tuple(known if wanted is None else wanted)
    unknown = set(chosen) - set(known)
    if unknown:
        raise ValueError(f"unknown capabilities {sorted(unknown)}; choose from {', '.join(known)}")
    if per_capability < 1:
        raise ValueError(f"per_capability={per_capability} must be at least 1")
    return chosen


def blind(questions: Sequence[Seen], mode: str = "zero", seed: int = 0) -> list[Seen]:
    """The same questions without their picture (or clip), for the score a guesser gets.

    `mode="zero"`: the mean colour, which is zero once normalised. `mode="shuffle"`: the picture of another question
    of the same capability, never the question's own picture.
    """
    if mode == "zero":
        return [q.blank() for q in questions]
    if mode != "shuffle":
        raise ValueError(f"mode={mode!r} must be 'zero' or 'shuffle'")
    out = list(questions)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        groups[question.capability].append(i)
    for capability, members in groups.items():
        sources = sorted({questions[i].source for i in members})
        random.Random(f"{seed}/{capability}").shuffle(sources)
        ranks = {source: rank for rank, source in enumerate(sources)}
        members.sort(key=lambda i: ranks[questions[i].source])
        # Members of one picture are neighbours now, so a rotation by the longest run gives each another picture.
        shift = max(Counter(questions[i].source for i in members).values())
        if 2 * shift > len(members):
            raise ValueError(f"too few pictures among the {capability} questions to shuffle them")
        for place, i in enumerate(members):
            out[i] = out[i].about(questions[members[(place + shift) % len(members)]])
    return out
