"""Samples put to one model, one at a time: its answers, and what each cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from vtprune import panels, show
from vtprune.evals.accuracy.exam import turn
from vtprune.evals.costs import vision_flops
from vtprune.evals.tasks.cells import DENSE, Cell
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.tasks.metrics import METRICS
from vtprune.evals.tasks.recorder import Recorder, peak_mib
from vtprune.evals.tasks.sample import Sample, by_task
from vtprune.places import boxes

DRAWN = 6  # pictures of changed answers that a cell leaves for the report


class OwnData:
    """A model and the samples that it is asked: what the grid runs cell by cell.

    new_tokens: tokens to generate at most. Raises ValueError where a sample is about a film and the model takes none.
    """

    resumable = True  # from sample to sample; a harness that runs a whole task can only begin it again

    def __init__(self, model: Any, processor: Any, samples: Sequence[Sample], new_tokens: int = 16) -> None:
        self.model, self.processor, self.new_tokens = model, processor, new_tokens
        self.samples = by_task(samples)
        filmed = next((sample for sample in samples if sample.video is not None), None)
        if filmed is not None and getattr(processor, "video_processor", None) is None:
            raise ValueError(
                f"{filmed.where}: a video, and {type(processor).__name__} has no video processor: name a model that "
                "takes videos, or take pictures out of the film and list them as images"
            )

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """Name, metric and number of samples of every task."""
        return [
            {"name": name, "metric": samples[0].metric, "n": len(samples), "source": "file"}
            for name, samples in self.samples.items()
        ]

    def answers(self, task: str, cell: Cell, done: int = 0, stop: int | None = None) -> Iterator[Line]:
        """A line for every sample from `done` to `stop`, as it is answered."""
        with cell.applied(self.model) as handle, Recorder(self.model, handle) as recorder:
            for sample in islice(self.samples[task], done, stop):
                yield self._line(sample, recorder)

    def score(self, task: str, lines: Sequence[Line]) -> float | None:
        """The score of a task, None where its samples have no labels."""
        import numpy as np

        metric = METRICS.get(self.samples[task][0].metric)
        return None if metric is None else float(metric.total(np.array([line["parts"] for line in lines]).mean(0)))

    def peak_mib(self, task: str, cell: Cell) -> float:
        """MiB that the prefill of the first sample holds at once, weights not counted."""
        inputs = self._inputs(self.samples[task][0])
        with cell.applied(self.model), torch.inference_mode():
            return peak_mib(self.model, lambda: self.model(**inputs, logits_to_keep=1))

    def vision_flops(self, task: str, cell: Cell) -> int:
        """FLOPs of tower and projector on the first sample."""
        with cell.applied(self.model):
            return vision_flops(self.model, self._inputs(self.samples[task][0]))

    def draw(self, task: str, cell: Cell, folder: ResultFolder) -> None:
        """Draw what was kept of the first samples that pruning made the model answer anew."""
        if cell.method is None:
            return
        before = {line["id"]: line["answer"] for line in folder.lines_of(task, DENSE.name)}
        after = {line["id"]: line["answer"] for line in folder.lines_of(task, cell.name)}
        changed = [s for s in self.samples[task] if s.id in before and before[s.id] != after.get(s.id)]
        with cell.applied(self.model) as handle, torch.inference_mode():
            if not all("prefill" in stage.method.phases for stage in handle.stages):
                return  # what is chosen at decode drops nothing of the prompt
            for sample in changed[:DRAWN]:
                self.model(**self._inputs(sample), logits_to_keep=1)
                sheet = self._sheet(sample, panels.kept_units(handle.last), cell.title)
                if sheet is not None:
                    file = folder.picture(task, cell.name, sample.id)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    sheet.save(file)

    def _sheet(self, sample: Sample, units: list[panels.Kept], title: str) -> Any:
        """The drawing; None where the tokens cannot be placed on the picture."""
        film = sample.film
        if film is not None:
            return show.contact_sheet(film, units, title)
        if len(sample.images) != 1:
            return None
        (picture,) = sample.pictures
        unit = panels.joined(units)
        asked = turn(self.processor, sample.prompt)
        try:
            places = boxes(lambda p: self._processed(asked, [p]), picture.size, panels.rasters(unit))
        except ValueError:
            return None
        return show.overlay(picture, unit, title, places)

    def _line(self, sample: Sample, recorder: Recorder) -> Line:
        inputs = self._inputs(sample)
        start = time.perf_counter()
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1)
        fresh = ids[0, inputs["input_ids"].shape[1] :]
        answer = self.processor.decode(fresh, skip_special_tokens=True).strip()  # waits for a GPU
        call = recorder.taken.pop()
        call.seconds["total"] = time.perf_counter() - start
        metric = METRICS.get(sample.metric)
        parts = None if metric is None else list(metric.parts(answer, sample))
        asked = {"id": sample.id, "question": sample.question, "answers": list(sample.answers)}
        return {**asked, "answer": answer, "parts": parts, **call.line()}

    def _inputs(self, sample: Sample) -> dict[str, Any]:
        film = sample.film
        asked = turn(self.processor, sample.prompt, len(sample.images), int(film is not None))
        made = self._processed(asked, sample.pictures, film)
        return dict(made.to(self.model.device, dtype=self.model.dtype))

    def _processed(self, text: str, pictures: Sequence[Any], film: Any = None) -> Any:
        media: Mapping[str, Any] = {"images": [list(pictures)]}
        if film is not None:
            media = {"videos": [[film.frames]], "video_metadata": [[film.metadata]], "do_sample_frames": False}
        return self.processor(text=[text], **media, return_tensors="pt", add_special_tokens=False)
