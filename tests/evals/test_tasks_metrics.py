"""Every metric against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vtprune.evals.tasks.choices import chosen, labelled
from vtprune.evals.tasks.metrics import METRICS, yes_or_no
from vtprune.evals.tasks.sample import Sample

PETS = ("cat", "dog", "red fox")


def mark(metric: str, said: str, *answers: str, options: tuple[str, ...] = ()) -> tuple[float, ...]:
    return METRICS[metric].parts(said, Sample("1", "t", "what ?", answers=answers, options=options, metric=metric))


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("Cat.", ("cat",), 1),
        ("the cat", ("a cat",), 1),
        ("two", ("2",), 1),
        ("1,000", ("1000",), 1),
        ("dog", ("cat", "dog"), 1),
        ("cat food", ("cat",), 0),
        ("cats", ("cat",), 0),
        ("", ("cat",), 0),
        ("A", ("A",), 1),
        ("B", ("A",), 0),
        ("-5", ("5",), 0),
    ],
)
def test_exact(said: str, answers: tuple[str, ...], right: int) -> None:
    assert mark("exact", said, *answers) == (right,)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("105", "100", 1),  # the border itself
        ("1.05", "1", 1),  # which floats miss
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-98", "-100", 1),
        ("98", "-100", 0),
        ("0", "0.0", 1),
        ("0.001", "0", 0),
        ("12%", "0.12", 1),
        ("12 %", "12%", 1),
        ("12%", "12", 0),  # ChartQA's scoring reads it as 0.12
        ("1,210", "1200", 1),
        ("Blue", "blue", 1),
        ("blue.", "blue", 0),
        ("about 100", "100", 0),
        ("nan", "nan", 1),
        ("2_0", "20", 0),
    ],
)
def test_relaxed(said: str, answer: str, right: int) -> None:
    assert mark("relaxed", said, answer) == (right,)
    assert mark("relaxed", said, "something else", answer) == (right,)


@pytest.mark.parametrize(
    ("times", "people", "expected"),
    [
        # Of ten people: one said it, so nine subsets hold 1 and one holds 0: (9 * 1/3 + 0) / 10
        (0, 10, 0.0),
        (1, 10, 0.3),
        (2, 10, 0.6),  # (8 * 2/3 + 2 * 1/3) / 10
        (3, 10, 0.9),  # (7 * 1 + 3 * 2/3) / 10
        (4, 10, 1.0),
        (10, 10, 1.0),
        (3, 5, 0.8),  # (2 * 1 + 3 * 2/3) / 5
        (2, 4, 0.5),  # the official formula and the share are one: (2 * 2/3 + 2 * 1/3) / 4
        (3, 4, 0.75),
        (1, 3, 1 / 3),
        (1, 2, 0.5),
        (1, 1, 1.0),
    ],
)
def test_vqa(times: int, people: int, expected: float) -> None:
    answers = ["The cat!"] * times + ["dog"] * (people - times)
    assert mark("vqa", "cat", *answers) == pytest.approx((expected,))


@pytest.mark.parametrize(("times", "people"), [(m, n) for n in range(4, 12) for m in range(n + 1)])
def test_vqa_is_the_mean_over_subsets(times: int, people: int) -> None:
    answers = ["cat"] * times + ["dog"] * (people - times)
    subsets = [answers[:i] + answers[i + 1 :] for i in range(people)]
    official = sum(min(one.count("cat") / 3, 1) for one in subsets) / people
    assert mark("vqa", "cat", *answers) == pytest.approx((official,))


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        ("Invoice 12", ("invoice  12",), 1.0),
        ("abcd", ("abce",), 0.75),
        ("abcd", ("abxy",), 0.5),  # the border counts
        ("abcde", ("abxyz",), 0.0),  # 0.4
        ("abcd", ("xxxx", "abce"), 0.75),  # the nearest one
        ("ab", ("abc",), 2 / 3),  # the longer one is the measure
        ("", ("abc",), 0.0),
    ],
)
def test_anls(said: str, answers: tuple[str, ...], expected: float) -> None:
    assert mark("anls", said, *answers) == pytest.approx((expected,))


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        (" B.\n", "B"),
        ("B)", "B"),
        ("**B**", "B"),
        ("B. dog", "B"),
        ("(b) dog", "B"),
        ("B: it barks", "B"),
        ("The answer is B", "B"),
        ("The answer is B.", "B"),
        ("the answer is (b).", "B"),
        ("Answer: C", "C"),
        ("Answer: 'B'", "B"),
        ("the answer is d", None),
        ("Option B is right", "B"),
        ("The answer is B-52", None),
        ("The answer is A because it purrs", "A"),
        ("Not option A; the answer is C", "C"),
        ("dog", "B"),
        ("The Dog.", "B"),
        ("It is a red fox", "C"),
        ("A dog", "B"),  # the article is no choice
        ("A bird", None),
        ("The answer is a dog", "B"),
        ("The answer is a bird", None),
        ("The answer is A bird", None),
        ("Beagle", None),  # nor is a letter in a word
        ("A-frame", None),
        ("The answer is because", None),
        ("a cat or a dog", None),
        ("D", None),  # only three options
        ("Z. dog", "B"),
        ("catalogue", None),
        ("", None),
        ("?", None),
    ],
)
def test_choice(said: str, letter: str | None) -> None:
    assert chosen(said, PETS) == letter
    for right in "ABC":
        assert mark("choice", said, right, options=PETS) == (float(letter == right),)


def test_choice_between_texts_inside_each_other() -> None:
    assert chosen("it is dark red", ("red", "dark red")) == "B"
    assert chosen("it is red", ("red", "dark red")) == "A"
    assert chosen("B", ("B", "A")) == "B"  # the prompt asks for a letter
    assert chosen("3", ("1", "2", "3")) == "C"


@pytest.mark.parametrize(
    ("label", "letter"), [("B", "B"), ("b", "B"), ("dog", "B"), ("red fox", "C"), ("0", "A"), ("2", "C")]
)
def test_labels_of_choices(label: str, letter: str) -> None:
    assert labelled(label, PETS) == letter


def test_labels_that_mean_nothing_or_two_things() -> None:
    with pytest.raises(ValueError, match="'bird' is no option: give a letter from A to C"):
        labelled("bird", PETS)
    with pytest.raises(ValueError, match="'3' is no option"):
        labelled("3", PETS)
    with pytest.raises(ValueError, match="'2' may mean the options B and C"):
        labelled("2", ("1", "2", "3"))
    assert labelled("3", ("1", "2", "3")) == "C"
    with pytest.raises(ValueError, match="'A' may mean the options A and B"):
        labelled("A", ("B", "A"))


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("Yes", "yes"),
        ("yes, it is no cat", "yes"),
        ("No.", "no"),
        ("The answer is yes", "yes"),
        ("There is no dog", "no"),
        ("either yes or no", None),
        ("maybe", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_yes_or_no(said: str, heard: str | None) -> None:
    assert yes_or_no(said) == heard


@pytest.mark.parametrize(
    ("said", "truth", "parts"),
    [
        ("yes", "yes", (1, 1, 0, 0)),
        ("no", "yes", (0, 0, 0, 1)),
        ("yes", "no", (0, 0, 1, 0)),
        ("no", "No", (1, 0, 0, 0)),
        ("perhaps", "yes", (0, 0, 0, 1)),
        ("perhaps", "no", (0, 0, 1, 0)),
    ],
)
def test_yesno_parts(said: str, truth: str, parts: tuple[int, ...]) -> None:
    assert mark("yesno_f1", said, truth) == parts


def test_f1_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives: 6 / (6 + 1 + 2)
    asked = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "yes")] * 2 + [("no", "no")] * 4
    parts = np.array([mark("yesno_f1", said, truth) for said, truth in asked])
    metric = METRICS["yesno_f1"]
    assert metric.total(parts.mean(0)) == pytest.approx(6 / 9)
    assert parts[:, metric.first].mean() == 0.7


def test_f1_of_many_draws_at_once_and_of_no_positive() -> None:
    means = np.array([[[1, 0.5, 0, 0], [0.5, 0, 0, 0]], [[0.2, 0.1, 0.2, 0.2], [0, 0, 0.5, 0.5]]])
    assert METRICS["yesno_f1"].total(means) == pytest.approx(np.array([[1, 0], [1 / 3, 0]]))


@pytest.mark.parametrize("name", ["exact", "relaxed", "vqa", "anls", "choice"])
def test_other_scores_are_means(name: str) -> None:
    assert METRICS[name].name == name
    assert METRICS[name].total(np.array([[0.25], [0.5]])).tolist() == [0.25, 0.5]
