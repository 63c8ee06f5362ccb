"""Marks of answers: what VQA's scoring lets pass passes, and nothing that is another answer does."""

from __future__ import annotations

import pytest

from vtprune.evals.accuracy.marking import mark, words
from vtprune.evals.toys import image as tiny
from vtprune.evals.toys import video as tiny_video

SAME = [
    ("A dog.", "dog"),
    ("the dog", "a dog"),
    ("an orange", "orange"),
    ("Three", "3"),
    ("none", "0"),
    ("1,000", "1000"),
    ("12,345,678.5", "12345678.5"),
    (".5", "0.5"),
    ("−5", "-5"),  # a minus sign and a hyphen
    ("it is", "It is!"),
    ("dont", "don't"),
    ("Don’t", "don't"),
    ("oclock", "o'clock"),
    ("U.S.A.", "USA"),
    ("t-shirt", "t shirt"),
    ("Café", "café"),
    ("cafe\u0301", "café"),  # an accent as a character of its own
    ("STRASSE", "Straße"),
    ("ＲＥＤ", "red"),  # full width
    ("٤٢", "42"),  # Arabic digits
    ("½", "1/2"),
    ("**red**", "red"),
    ("'red'", "red"),
    ("красный.", "Красный"),
    ("4 7", "47"),
    ("5 %", "5%"),
    ("A", "a"),
    ("👍️", "👍"),
    ("?", "?"),
]
OTHER = [
    ("-5", "5"),
    ("5", "-5"),
    ("3.5", "35"),
    ("3.5", "3"),
    ("47", "4"),
    ("4", "47"),
    ("1,5", "15"),
    ("1/2", "12"),
    ("3-5", "35"),
    ("10:30", "1030"),
    ("1.2.3", "123"),
    ("3.5mm", "35mm"),
    ("caf", "café"),
    ("cafe", "café"),
    ("красный", "синий"),
    ("猫", "犬"),
    ("猫头鹰", "猫"),
    ("हिन्दी", "हन्दा"),  # vowel signs are no letters to `re`
    ("كلب", "قطة"),
    ("👍", "👎"),
    ("5", "5%"),
    ("$5", "5"),
    ("category", "cat"),
    ("B", "A"),
    ("", "yes"),
    ("yes", ""),
    ("!", "?"),
    ("well", "we'll"),
    ("theory", "the"),
]


@pytest.mark.parametrize(("said", "answer"), SAME)
def test_the_same_answer_in_other_writing(said: str, answer: str) -> None:
    assert mark(said, True, answer) == (True, True)
    assert mark(answer, True, said) == (True, True)
    assert mark(said, False, answer) == (True, False)


@pytest.mark.parametrize(("said", "answer"), OTHER)
def test_another_answer(said: str, answer: str) -> None:
    assert mark(said, True, answer) == (False, False)


@pytest.mark.parametrize(
    ("said", "answer"), [("a dog on the grass", "dog"), ("4. It", "4"), ("5%", "5"), ("A. The cat", "A"), ("4 7", "4")]
)
def test_an_answer_may_go_on(said: str, answer: str) -> None:
    assert mark(said, True, answer) == (True, False)


def test_the_embedded_answers_are_plain_words() -> None:
    """So the tables made before this way of marking stand: in these words nothing is dropped or joined."""
    asked = [tiny.questions(per_capability=40), tiny_video.questions(per_capability=20)]
    for answer in {q.answer for questions in asked for q in questions}:
        assert answer.isascii()
        assert "".join(words(answer)) == answer.replace(" ", "")
