"""An example of own data: pictures and a clip of the embedded toys, with questions that cover every metric."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vtprune.evals.accuracy.exam import words_of
from vtprune.evals.toys.video import Question as ClipQuestion

PICTURES, CLIPS, README = "data.jsonl", "video.jsonl", "README.md"
CLIP = "clip.mp4"
Row = dict[str, Any]

TEXT = """\
# Your own data for `vtprune eval`

    vtprune eval --data data.jsonl
    vtprune eval --data video.jsonl --frames 16
    vtprune eval --data data.jsonl --model PATH_OR_HUB_ID

The first two commands ask the models that vtprune carries, which know 71 words and pictures like these; they do not
understand the list of options of a multiple choice. Replace the rows by your own, one JSON object on a line, or write
the same columns to a .parquet file or with `save_to_disk` of the package datasets.

## Columns

- `question`: the question.
- `image` or `images`: the path of a picture, or a list of several; relative to this folder, or absolute. Parquet may
  hold the bytes of the file instead.
- `video`: a film, in the same forms, instead of pictures.
- `answer` or `answers`: the right answer, or a list of several. Leave it out in a whole task to measure how often the
  pruned model answers as the dense one does.
- `options` or `choices`: what a multiple-choice question offers. Its answer is a letter, the text of an option, or an
  index from 0.
- `task`: the group of samples that one score is made of; the name of the file unless it is given.
- `metric`: how the task is marked; a task has one metric.
- `id`: a name that is unique in its task; the number of the line unless it is given.

## Metrics

| Metric | Which answers are right | Used unless another is named |
|---|---|---|
| `exact` | Equal, but for case, articles, punctuation and spelled numbers. | one answer each |
| `relaxed` | A number within 5 %, or an equal text (ChartQA). | never |
| `vqa` | As many of several people said (VQA). | several answers |
| `anls` | Nearly equal, letter by letter (DocVQA). | never |
| `choice` | The right option. | with options |
| `yesno_f1` | F1 of the answer yes (POPE). | only yes and no |
| `agreement` | The answer of the dense model. | no answers |
"""


def write(folder: Path, force: bool = False) -> list[Path]:
    """Write the example to a folder, which is made if it is missing; returns the files.

    Raises ValueError where one of them is there already, unless `force` says to write over it.
    """
    from vtprune.evals.toys.video import questions

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder to write the example to")
    rows, images = _pictures()
    clips = [q for q in questions(per_capability=1, capabilities=("first", "order")) if q.video_id == 0]
    files = [folder / name for name in (PICTURES, CLIPS, README, CLIP, *images)]
    there = [file for file in files if file.exists()]
    if there and not force:
        raise ValueError(f"{there[0]} is there already: name another folder, or write over it with --force")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / name)
    _encode(folder / CLIP, clips[0])
    (folder / PICTURES).write_text(_lines(rows), encoding="utf-8")
    (folder / CLIPS).write_text(_lines(_clips(clips)), encoding="utf-8")
    (folder / README).write_text(TEXT, encoding="utf-8")
    return files


def _pictures() -> tuple[list[Row], dict[str, Image.Image]]:
    """The rows about pictures, and the pictures by the name of their file."""
    from vtprune.evals.toys.image import questions

    rows, images = [], {}
    wanted = {"color": 2, "exist": 2, "count": 2, "ocr": 1, "position": 1, "shape": 1, "easy-color": 1}
    for capability, count in wanted.items():
        for question in questions(per_capability=count, capabilities=(capability,)):
            name = f"images/{capability}-{question.image_id}.png"
            images[name] = question.image
            rows.append({"question": words_of(question.prompt), "image": name} | _label(capability, question.answer))
    return rows, images


def _label(capability: str, answer: str) -> Row:
    """The other columns of a row: every metric once, most of them chosen by what the rows hold."""
    others: dict[str, Row] = {
        "color": {"answer": answer, "task": "colours"},
        "exist": {"answer": answer, "task": "yes or no"},
        "count": {"answer": answer, "task": "counts", "metric": "relaxed"},
        "ocr": {"answer": answer, "task": "numbers", "metric": "anls"},
        "position": {"answers": [answer, answer, f"at the {answer}", "in the corner"], "task": "places"},
        "shape": {"answer": answer, "options": ["circle", "rectangle", "triangle"], "task": "shapes"},
        "easy-color": {"task": "without answers"},
    }
    return others[capability]


def _clips(questions: Sequence[ClipQuestion]) -> Iterator[Row]:
    for question in questions:
        yield {
            "question": words_of(question.prompt),
            "video": CLIP,
            "answer": question.answer,
            "task": f"clips: {question.capability}",
        }


def _encode(file: Path, question: ClipQuestion) -> None:
    """Write the clip as an MP4 of good quality."""
    import av

    frames = question.video.frames
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=round(question.video.rate), options={"crf": "8"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
