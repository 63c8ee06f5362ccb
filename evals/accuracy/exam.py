"""Questions made ready for one model, and what it answers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from vtprune.evals.accuracy.marking import mark
from vtprune.evals.video import Video

if TYPE_CHECKING:
    from PIL import Image

    from vtprune.evals.accuracy.probe import CostProbe
    from vtprune.evals.toys.questions import Visible as Question

Marks = NDArray[np.float64]


class Exam:
    """Questions made ready for one model: prompts rendered, images processed, image features kept where they fit.

    The features do not depend on what is pruned behind them. They are computed once and handed to `generate` as
    `mm_encoder_outputs`, with the grids beside them, unless a stage acts inside the tower or reads a signal from it (or
    the model cannot take them).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        questions: Sequence[Question],
        batch: int = 16,
        memory: int = 2 << 30,
        prompts: int = 16,
    ) -> None:
        """memory: bytes of prepared inputs to hold; a larger exam prepares its batches anew in every pass.

        prompts: of how many questions the cost of a pass is the mean.
        """
        if not questions:
            raise ValueError("no questions: raise --limit or name a capability that exists")
        self.model, self.processor, self.batch, self.prompts = model, processor, batch, prompts
        # Prompts of one length need no padding; a stable sort keeps runs comparable.
        self.questions = sorted(questions, key=lambda q: len(q.prompt.split()))
        size = sum(self._tensor_bytes(self._prepare(self.questions[:1])).values())
        self._held: list[dict[str, Any]] | None = [] if size * len(questions) <= memory else None
        self._features: list[Any] = []

    def __len__(self) -> int:
        return len(self.questions)

    @cached_property
    def probe(self) -> CostProbe:
        """What tells the cost of a pass on these questions."""
        from vtprune.evals.accuracy.probe import CostProbe

        return CostProbe(self.model, self.processor, self.questions, self.prompts)

    def answers(self, needs_tower: bool = False, new_tokens: int = 4) -> list[tuple[str, bool]]:
        """Greedy `generate` on every question: (text, whether the end token came), in `self.questions` order."""
        said: list[tuple[str, bool]] = []
        ends = _end_tokens(self.model)
        for i, inputs in enumerate(self._batches()):
            if not needs_tower:
                inputs = self._with_features(i, inputs)
            with torch.inference_mode():
                ids = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
            fresh = ids[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(fresh, skip_special_tokens=True)
            said += [(text, bool(ends.intersection(row))) for text, row in zip(texts, fresh.tolist())]
        return said

    def run(self, needs_tower: bool = False, new_tokens: int = 4) -> tuple[Marks, Marks]:
        """(answer right, stopped right) of every question, 0. or 1. each."""
        said = self.answers(needs_tower, new_tokens)
        marks = [mark(text, ended, q.answer) for (text, ended), q in zip(said, self.questions)]
        right, stopped = np.array(marks, dtype=np.float64).T
        return right, stopped

    def _batches(self) -> Iterator[dict[str, Any]]:
        if self._held:
            yield from self._held
            return
        for start in range(0, len(self.questions), self.batch):
            inputs = self._prepare(self.questions[start : start + self.batch])
            if self._held is not None:
                self._held.append(inputs)
            yield inputs

    def _prepare(self, questions: Sequence[Question]) -> dict[str, Any]:
        return prepare(self.model, self.processor, [q.prompt for q in questions], [q.seen for q in questions])

    def _with_features(self, i: int, inputs: dict[str, Any]) -> dict[str, Any]:
        modality = "video" if isinstance(self.questions[0].seen, Video) else "image"
        encode = getattr(self.model.base_model, f"get_{modality}_features")
        takes = inspect.signature(encode).parameters
        if self._held is None or "mm_encoder_outputs" not in inspect.signature(self.model.forward).parameters:
            return inputs
        if i == len(self._features):
            with torch.inference_mode():
                out = encode(**{k: v for k, v in inputs.items() if k in takes}, return_dict=True)
            slim = {k: v for k, v in out.items() if k in ("pooler_output", "deepstack_features")}
            self._features.append(type(out)(**slim))
        # Sizes and grids stay: M-RoPE counts positions from them, and rules about rows and frames read them.
        rest = {k: v for k, v in inputs.items() if not (k in takes and k.startswith("pixel_values"))}
        return {**rest, "mm_encoder_outputs": {modality: self._features[i]}}

    @staticmethod
    def _tensor_bytes(inputs: dict[str, Any]) -> dict[str, int]:
        return {k: v.nbytes for k, v in inputs.items() if isinstance(v, torch.Tensor)}


def prepare(model: Any, processor: Any, prompts: Sequence[str], seen: Sequence[Image.Image | Video]) -> dict[str, Any]:
    """What `generate` takes for a batch of prompts, each about one picture or one video (all of a kind).

    Padded on the left, on the model's device and in its dtype.
    """
    return dict(process(processor, prompts, seen).to(model.device, dtype=model.dtype))


def process(processor: Any, prompts: Sequence[str], seen: Sequence[Image.Image | Video]) -> Any:
    """What the processor makes of such a batch, on the host, pixels in float32."""
    processor.tokenizer.padding_side = "left"
    video = isinstance(seen[0], Video)
    media: dict[str, Any] = {"images": [[image] for image in seen]}
    if video:
        clips = cast(Sequence[Video], seen)
        media = {"videos": [[v.frames] for v in clips], "video_metadata": [[v.metadata] for v in clips]}
        media["do_sample_frames"] = False  # they have been chosen
    texts = [render(processor, prompt, video) for prompt in prompts]
    return processor(text=texts, **media, padding=True, return_tensors="pt", add_special_tokens=False)


def render(processor: Any, prompt: str, video: bool = False) -> str:
    """The text of one turn about one picture or film, which asks for a short answer where the model can read that."""
    question = words_of(prompt)
    if getattr(processor, "chat_template", None):
        question = f"{question}\nAnswer with one or two words."
    return turn(processor, question, 0 if video else 1, int(video))


def turn(processor: Any, question: str, images: int = 1, videos: int = 0) -> str:
    """The text of one turn: through the chat template if the processor has one, else as the embedded models read it."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    places = [processor.image_token] * images
    if videos:
        places += [f"<|vision_start|> {processor.video_token} <|vision_end|>"] * videos
    return " ".join([processor.tokenizer.bos_token or "", *places, question, "answer:"]).strip()


def words_of(prompt: str) -> str:
    """The question alone, without the embedded models' frame, as `<s> <image> ... answer:`."""
    return re.split(r"<image>|<\|vision_end\|>", prompt)[-1].removesuffix("answer:").strip()


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])
