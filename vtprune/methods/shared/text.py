"""How well each visual token fits the prompt, on models that have no text tower paired with their vision tower."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ...core.visual import Visual


def prompt_similarity(v: Visual) -> Tensor:
    """[N] float32: the largest cosine between the token's feature and a text token's embedding, / sqrt(D).

    Ours, not a paper's: the LLM's own embeddings stand in for a text encoder. `Visual.state["note"]` says so. A prompt
    without text gives zeros.
    """
    if v.text is None or not len(v.text):
        note(v, "the prompt has no text to compare with")
        return v.x.new_zeros(v.n).float()
    note(v, "text is compared by the LLM's own embeddings, in place of a paired text encoder")
    cosine = F.normalize(v.x.float(), dim=1) @ F.normalize(v.text.float(), dim=1).mT
    largest: Tensor = cosine.amax(1) / v.x.shape[1] ** 0.5
    return largest


def note(v: Visual, what: str) -> None:
    """Add a remark to those that end in `Handle.last.notes`, once."""
    said = v.state.get("note", "")
    if what not in said:
        v.state["note"] = f"{said}; {what}" if said else what


# Words that say little about what to look for: articles, be, have and do, pronouns, question words, conjunctions and
# some prepositions. "in", "on", "of" and negations do say where to look.
_STOP = """
a an the is are was were be been being am have has had having do does did doing i you he she it we they me him her us
them my your his its our their this that these those what which who whom whose when where why how and or but so if then
question answer to for with by from at into onto upon
"""
STOP_WORDS = tuple(_STOP.split())
ANSWER_FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


def keywords(question: str, stop_words: Sequence[str] = STOP_WORDS) -> list[str]:
    """The words of a question that are no stop words, in order; all of its words, if there are no others.

    A leading "<image>" line and the two usual requests for a form of answer are left out first. Without stop words the
    text is cut at blanks only. Raises ValueError for a question without words.

    >>> keywords("<image>\\nWhat is the colour of the car?"), keywords("What is it?")
    (['colour', 'of', 'car'], ['What', 'is', 'it?'])
    """
    text = question.removeprefix("<image>\n")
    for request in ANSWER_FORMATS:
        text = text.replace(request, "")
    if not re.search(r"\w", question.removeprefix("<image>\n")):
        raise ValueError(
            f"question={question!r} has no words: pass a question, question=None for the text of the prompt, or "
            "use_text=False for the image alone"
        )
    if not stop_words:
        return (text if text.strip() else question).split()
    found = [word for word in re.findall(r"\b\w+\b", text) if word.lower() not in stop_words]
    return found or (text if text.strip() else question).split()


def questions_of(units: Sequence[Visual], question: str | tuple[str, ...], name: str) -> list[str]:
    """The question of each unit, where each prompt of the batch has one; units of one prompt share its text.

    Raises ValueError where there are not as many questions as prompts: none is guessed.
    """
    prompts: list[int] = []
    keys = [id(v) if v.text is None else id(v.text) for v in units]
    for key in keys:
        if key not in prompts:
            prompts.append(key)
    asked = (question,) if isinstance(question, str) else question
    if len(asked) != len(prompts):
        raise ValueError(
            f"{name} has {len(asked)} questions for {len(prompts)} prompts: pass question=(...) with one for each "
            "prompt of the batch, also where they are the same, or question=None, which reads each prompt's own text"
        )
    return [asked[prompts.index(key)] for key in keys]
