"""Sheets of pictures: what every method keeps of an image or a clip, and what the model then answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

import vtprune
from vtprune.evals.accuracy import mark, prepare, words_of
from vtprune.panels import kept_units, panels
from vtprune.show import GAP, INK, MARK, TITLE, contact_sheet, draw

GOOD = (0, 128, 60)
WIDTH = 1600  # pixels, so that a sheet fits a screen


def gallery(
    model: Any, processor: Any, questions: Sequence[Any], methods: Sequence[str], keep: float | int, side: int = 176
) -> Image.Image:
    """A sheet of four questions, `WIDTH` pixels wide at most: what each method keeps, the answer under every picture.

    Each question's pictures, the whole one first, wrap into as many lines as they need.
    """
    asked = _spread(questions, 4)
    font = ImageFont.load_default(14)
    columns: list[str | None] = [None, *methods]
    across = min(len(columns), (WIDTH - GAP) // (side + GAP))
    lines = -(-len(columns) // across)
    cell = side + 2 * TITLE  # a name, the picture, an answer
    height = TITLE + lines * cell + GAP
    sheet = Image.new("RGB", (GAP + across * (side + GAP), GAP + len(asked) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for r, question in enumerate(asked):
        top = GAP + r * height
        asks = words_of(question.prompt).partition("\n")[0]  # a chat prompt ends in a line for the answer
        pen.text((GAP, top), f"{asks}  ({question.answer})", fill=INK, font=font)
        for i, name in enumerate(columns):
            line, column = divmod(i, across)
            x, y = GAP + column * (side + GAP), top + TITLE + line * cell
            picture, said = _answered(model, processor, question, name, keep, side)
            pen.text((x, y), name or "all tokens", fill=INK, font=font)
            sheet.paste(picture.resize((side, side)), (x, y + TITLE))
            good = mark(said, True, question.answer)[0]
            pen.text((x, y + TITLE + side + 2), said, fill=GOOD if good else MARK, font=font)
    return sheet


def film_gallery(
    model: Any, processor: Any, questions: Sequence[Any], methods: Sequence[str], keep: float | int
) -> Image.Image:
    """One clip, asked one question: a contact sheet for each method with the model's answer in its title."""
    question = questions[0]
    inputs = prepare(model, processor, [question.prompt], [question.seen])
    sheets = []
    for name in methods:
        with vtprune.patch(model, name, keep=keep) as handle:
            said = _said(model, processor, inputs)
            units = kept_units(handle.last)
        sheets.append(contact_sheet(question.seen, units, f"{name} says {said}", side=96))
    head = f"{words_of(question.prompt)}  ({question.answer}; all tokens: {_said(model, processor, inputs)})"
    size = (max(s.width for s in sheets), TITLE + GAP + sum(s.height for s in sheets))
    out = Image.new("RGB", size, "white")
    ImageDraw.Draw(out).text((GAP, GAP // 2), head, fill=INK, font=ImageFont.load_default(15))
    y = TITLE + GAP
    for sheet in sheets:
        out.paste(sheet, (0, y))
        y += sheet.height
    return out


def _said(model: Any, processor: Any, inputs: Any) -> str:
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _answered(
    model: Any, processor: Any, question: Any, name: str | None, keep: float | int, side: int
) -> tuple[Image.Image, str]:
    """The picture of what a method (None: dense) leaves, and what the model then answers."""
    inputs = prepare(model, processor, [question.prompt], [question.seen])
    picture = question.image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    if name is None:
        return picture, _said(model, processor, inputs)
    with vtprune.patch(model, name, keep=keep) as handle:
        said = _said(model, processor, inputs)
    unit = kept_units(handle.last)[0]
    return draw(question.image, panels(unit, question.image.width / question.image.height)[0], side), said


def _spread(questions: Sequence[Any], count: int) -> list[Any]:
    """One question each of `count` evenly spaced kinds, on different images where there are enough."""
    kinds = list(dict.fromkeys(q.capability for q in questions))
    count = min(count, len(kinds))
    chosen: list[Any] = []
    for i in range(count):
        kind = [q for q in questions if q.capability == kinds[i * len(kinds) // count]]
        new = [q for q in kind if q.image_id not in {c.image_id for c in chosen}]
        chosen.append((new or kind)[0])
    return chosen
