"""How an answer is marked: the metrics of the benchmarks, each as the mean of parts that one sample gives.

A metric marks one answer with a few numbers, its parts, and makes the score of many answers from the mean of their
parts. One bootstrap over samples therefore serves every metric, F1 too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vtprune.evals.accuracy.marking import words
from vtprune.evals.tasks.choices import chosen
from vtprune.evals.tasks.sample import Sample

Parts = tuple[float, ...]
ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
ENOUGH_HUMANS = 3  # a VQA answer that so many people gave is entirely right


@dataclass(frozen=True)
class Metric:
    """One way of marking.

    parts(answer, sample): the k numbers that one answer gives. total(means): the score, float [...], from the means of
    the parts over samples, float [..., k]; all scores lie between 0 and 1, and more is better. first: which part is the
    sample's own mark, from 0 to 1.
    """

    name: str
    parts: Callable[[str, Sample], Parts]
    total: Callable[[np.ndarray], np.ndarray]
    first: int = 0


def same(answer: str, expected: str) -> bool:
    """Whether two answers are equal once case, articles, punctuation and spelled numbers are set aside, as in VQA."""
    letter = not words(expected)  # an answer such as "A", which is no article here
    return words(answer, letter) == words(expected, letter)


def exact(answer: str, sample: Sample) -> Parts:
    """1 if the answer equals one of the right ones (`same`), otherwise 0."""
    return (float(any(same(answer, expected) for expected in sample.answers)),)


def relaxed(answer: str, sample: Sample) -> Parts:
    """ChartQA's relaxed accuracy: a number may be 5 % off, any other text has to be equal but for its case.

    "12%" is the number 0.12 and "1,200" is 1200, as in ChartQA's scoring, which does not know the commas; a right
    answer of 0 has to be met.
    """
    return (float(any(_close(answer, expected) for expected in sample.answers)),)


def vqa(answer: str, sample: Sample) -> Parts:
    """VQA accuracy: min(people who gave this answer / 3, 1), averaged over the subsets that leave one person out.

    This is the official formula for answers of five people and more (VQA has ten). Answers of fewer people can
    not reach 3 others, so the mark is the share of the people who gave this answer: 1 where all of them did. Unlike the
    official script, which leaves texts as they are where all people agree, answers are always normalised (`same`).
    """
    n, said = len(sample.answers), sum(same(answer, expected) for expected in sample.answers)
    if n <= ENOUGH_HUMANS + 1:  # for four people the official formula is the same share
        return (said / n,)
    with_one_less, with_all = min((said - 1) / ENOUGH_HUMANS, 1), min(said / ENOUGH_HUMANS, 1)
    return ((said * with_one_less + (n - said) * with_all) / n,)


def anls(answer: str, sample: Sample) -> Parts:
    """DocVQA's ANLS: 1 - edits / length of the longer text, for the right answer that is nearest; 0 below 0.5.

    Case and the width of spaces do not count. A similarity of exactly 0.5 counts, as in the official script.
    """
    from rapidfuzz.distance import Levenshtein

    near = max(Levenshtein.normalized_similarity(_plain(answer), _plain(expected)) for expected in sample.answers)
    return (near if near >= ANLS_THRESHOLD else 0.0,)


def choice(answer: str, sample: Sample) -> Parts:
    """1 if the answer names the right option; `sample.answers` holds its letter. See `choices.chosen`."""
    return (float(chosen(answer, sample.options) in sample.answers),)


def yesno(answer: str, sample: Sample) -> Parts:
    """(right, true positive, false positive, false negative) of a yes/no question, as in POPE: "yes" is positive.

    An answer that is neither yes nor no counts as the wrong one of the two.
    """
    truth = yes_or_no(sample.answers[0])
    right = yes_or_no(answer) == truth
    positive = truth == "yes"
    return (float(right), float(right and positive), float(not right and not positive), float(not right and positive))


def yes_or_no(text: str) -> str | None:
    """ "yes" or "no": the first word of a text or, failing that, the only one of the two in it; otherwise None."""
    found = [word for word in words(text) if word in ("yes", "no")]
    return found[0] if found and (len(set(found)) == 1 or words(text)[0] == found[0]) else None


def _close(answer: str, expected: str) -> bool:
    said, right = _number(answer), _number(expected)
    if said is None or right is None:
        return _plain(answer) == _plain(expected)
    return abs(said - right) <= RELAXED_TOLERANCE * abs(right) * (1 + 1e-9)  # 1.05 is 5 % off 1 in floats too


def _number(text: str) -> float | None:
    """The number that a text consists of: "-3.5", "1,200", "12%" as 0.12."""
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip())
    found = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(%?)", plain, re.IGNORECASE)
    return None if found is None else float(found[1]) / (100 if found[2] else 1)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _mean(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def _f1(means: np.ndarray) -> np.ndarray:
    """2 tp / (2 tp + fp + fn); 0 where there is neither a positive sample nor a positive answer."""
    tp, wrong = means[..., 1], means[..., 2] + means[..., 3]
    below = 2 * tp + wrong
    return np.divide(2 * tp, below, out=np.zeros_like(tp), where=below > 0)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact", exact, _mean),
        Metric("relaxed", relaxed, _mean),
        Metric("vqa", vqa, _mean),
        Metric("anls", anls, _mean),
        Metric("choice", choice, _mean),
        Metric("yesno_f1", yesno, _f1),
    )
}
