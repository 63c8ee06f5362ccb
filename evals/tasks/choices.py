"""Which option of a multiple-choice question an answer means: the label of a data set, or what a model said."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vtprune.evals.accuracy.marking import words
from vtprune.evals.tasks.sample import LETTERS

_OPEN, _CLOSE = r"[\s(\[*\"']*", r"[\s)\].:,;!*\"']*"
_ALONE = re.compile(rf"{_OPEN}([A-Za-z]){_CLOSE}")
# "B. a dog", "(B) a dog", "B: a dog": a letter that is marked as one at the beginning.
_MARKED = re.compile(r"\s*(?:[(\[*]+([A-Za-z])[)\]*]+|([A-Z])[.):])(?=\s|$)")
# "A dog" and "I think" begin with a word; "A because ..." begins with a letter.
_REASON = r"because|since|as|is"
_NAMED = re.compile(
    rf"\b(?:answer|option|choice)(?:\s+is|\s+would\s+be)?\s*:?{_OPEN}"
    rf"(?:([B-HJ-Z])|([AI])(?!\s+(?!(?:{_REASON})\b)\w))(?![\w-]|'\w)",
    re.IGNORECASE,
)


def chosen(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a model's answer names, or None where it names none.

    Understood are, in this order: a letter alone ("B", "(b)", "B."), the text of an option, a marked letter before
    other text ("B. a dog"), a letter behind the words "answer", "option" or "choice", and a longer answer in which the
    text of exactly one option occurs. A letter inside a word is none, and neither is the article of "A dog".
    """
    known = LETTERS[: len(options)]
    for letter in _letter(_ALONE.fullmatch(answer)), _same_text(answer, options), _letter(_MARKED.match(answer)):
        if letter and letter in known:
            return letter
    named = [letter for match in _NAMED.finditer(answer) if (letter := _letter(match)) and letter in known]
    return named[-1] if named else _inside(answer, options)


def labelled(label: str, options: Sequence[str]) -> str:
    """The letter of the right option from a label: a letter, the text of an option, or an index from 0 to n - 1.

    Raises ValueError for a label that is none of them, and for one that means two different options.
    """
    text = label.strip()
    places = {i for i, option in enumerate(options) if option.strip() == text}
    if len(text) == 1 and text.upper() in LETTERS[: len(options)]:
        places.add(LETTERS.index(text.upper()))
    if text.isdecimal() and int(text) < len(options):
        places.add(int(text))
    if not places:
        last = LETTERS[len(options) - 1]
        raise ValueError(
            f"the answer {label!r} is no option: give a letter from A to {last}, the text of an option, or an index "
            f"from 0 to {len(options) - 1}"
        )
    if len(places) > 1:
        meant = " and ".join(LETTERS[i] for i in sorted(places))
        raise ValueError(f"the answer {label!r} may mean the options {meant}: write it as a letter or text of one only")
    return LETTERS[places.pop()]


def _letter(match: re.Match[str] | None) -> str | None:
    return next((group.upper() for group in match.groups() if group), None) if match else None


def _words(text: str) -> list[str]:
    """The words of a text without articles, unless it consists of them."""
    return words(text) or words(text, articles=True)


def _same_text(answer: str, options: Sequence[str]) -> str | None:
    said = _words(answer)
    return next((letter for letter, option in zip(LETTERS, options) if said and _words(option) == said), None)


def _inside(answer: str, options: Sequence[str]) -> str | None:
    """The only option whose words occur in the answer; an option inside another that occurs does not count."""
    said = f" {' '.join(words(answer))} "
    texts = {letter: f" {' '.join(words(option))} " for letter, option in zip(LETTERS, options)}
    found = {letter: text for letter, text in texts.items() if text.strip() and text in said}
    longest = [a for a, text in found.items() if not any(text in other and text != other for other in found.values())]
    return longest[0] if len(longest) == 1 else None
