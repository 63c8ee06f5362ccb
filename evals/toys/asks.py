"""A question, and the rule that keeps the answers balanced."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """One question: words after the image, answer, and the key under which `choices` answers balance."""

    text: str
    answer: str
    capability: str
    template: str
    key: str
    choices: int
    weight: float = 1.0

    @property
    def prompt(self) -> str:
        """The words between the image and the answer; captions go without `answer:` so their key is last."""
        return self.text if self.capability == "caption" else f"{self.text} answer:"


class Balance:
    """Online balance: an answer is admitted while it leads the least-used answer of its key by < `slack`."""

    def __init__(self, slack: int = 6) -> None:
        self.slack = slack
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)

    def admit(self, ask: Ask) -> bool:
        """Count the question and return True, or return False if its answer is ahead of the others."""
        seen = self.counts[ask.key]
        least = min(seen.values()) if len(seen) >= ask.choices else 0
        if seen[ask.answer] >= least + self.slack:
            return False
        seen[ask.answer] += 1
        return True


def admit(candidates: list[Ask], most: int, rng: random.Random, balance: Balance, kept: list[Ask]) -> None:
    """Append up to `most` of the candidates to `kept`, in random order: new ones whose answers balance."""
    rng.shuffle(candidates)
    for candidate in candidates:
        if most and candidate.text not in {k.text for k in kept} and balance.admit(candidate):
            kept.append(candidate)
            most -= 1
