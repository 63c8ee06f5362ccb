"""MMTok: tokens that cover both the words of the question and the other tokens of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.kernels import check_finite, facility_greedy, full_precision

from ...core.method import Method, Newlines, Per, Positions, Rounding
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of, check_choices, select
from ..shared.hidden import FeaturesFallback, hidden_need, hidden_states
from ..shared.raster import square_border
from ..shared.text import STOP_WORDS, keywords, note, questions_of


@register("mmtok", paper="https://arxiv.org/abs/2508.18264", seam="pre_llm")
@dataclass(frozen=True)
class MMTok(Method):
    """Greedy maximum coverage: each pick j adds most to the sum over rows i of max over picked j of M_ij.

    x [N, D]: projected tokens, w [m, D]: input embeddings of the words, z [N, C]: states of the tower. Cosines all:
    P = softmax over j of (w_i . x_j / text_temperature) / m, [m, N]: how well token j stands for word i.
    Q = softmax over j of (z_i . z_j / image_temperature) / N, [N, N]: how well token j stands for token i.
    M = [P; alpha * Q], [m + N, N].

    The words are all text of the prompt that the image stands in, template included, unless `question` says which.
    An image of several in one prompt sees the text of the whole prompt. A prompt without text is covered without
    words, noted in `Visual.state["note"]`. As officially each crop has its own budget, and separators are dropped. The
    official code renumbers position ids, positions="compact". (That is for LLaVA, the one for Qwen keeps them.)

    alpha: weight of the image beside the words, > 0. image_temperature, text_temperature: > 0; the official code has a
        text_temperature of 0.02 for LLaVA and of 0.01 for Qwen.
    use_text: False looks at the image alone, so that the choice may be stored with the image.
    question: the question in words, or a tuple of one for each prompt of the batch, in order. It is given anew for
        each call of the model: an old one would go on to choose among the tokens of the next image. Needs `embed`.
    embed: words -> [M, D], the LLM's input embeddings of their tokens, such as
        lambda words: table(torch.tensor(tokenizer(list(words), is_split_into_words=True,
        add_special_tokens=False).input_ids)) with table = model.get_input_embeddings().
    stop_words: left out of `question`, in small letters; a question of stop words alone counts whole. () keeps all, as
        the official code for Qwen does. They do not apply to the text of a prompt, of which only embeddings are there.
    padding: (height, width) of the picture that was padded to a square: tokens wholly in the border are picked only
        when no others are left (official code for LLaVA-1.5, which then repeats a token). Or unit -> [N] bool.
    features_fallback: as for `scope`. memory: as for `vtprune.kernels.facility_greedy`.
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "drop"
    rounding: ClassVar[Rounding] = "down"
    official_positions: ClassVar[Positions] = "compact"

    alpha: float = 0.5
    image_temperature: float = 0.2
    text_temperature: float = 0.02
    use_text: bool = True
    question: str | tuple[str, ...] | None = None
    embed: Callable[[Sequence[str]], Tensor] | None = None
    stop_words: tuple[str, ...] = STOP_WORDS
    padding: tuple[int, int] | Callable[[Visual], Tensor] | None = None
    features_fallback: FeaturesFallback = "features"
    memory: Literal["auto", "fast", "low"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self, features_fallback=FeaturesFallback, memory=Literal["auto", "fast", "low"])
        for name in ("alpha", "image_temperature", "text_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: use a finite number > 0")
        if self.question is None:
            return
        if self.embed is None or not self.use_text:
            raise ValueError(
                f"question={self.question!r:.80} with embed={self.embed}, use_text={self.use_text}: words become "
                "embeddings by embed=..., and count with use_text=True; or leave question=None, which reads the prompt"
            )
        for question in (self.question,) if isinstance(self.question, str) else self.question:
            keywords(question, self.stop_words)  # refuses one without words

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        """False where the image alone decides."""
        return self.use_text

    @property
    def needs(self) -> tuple[Signal, ...]:
        return hidden_need(self.features_fallback)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        check_finite([v.x for v in units])
        orders = facility_greedy(
            [hidden_states(v, self.features_fallback, self.name) for v in units],
            budgets,
            rows=[None if w is None else self._covered(v, w) for v, w in zip(units, self._words(units))],
            temperature=self.image_temperature,
            scale=self.alpha,
            excluded=None if self.padding is None else [self._border(v) for v in units],
            memory=self.memory,
        )
        return [select(order) for order in orders]

    def _words(self, units: Sequence[Visual]) -> list[Tensor | None]:
        """[m, D] embeddings of the words of each unit, or None."""
        if not self.use_text:
            return [None] * len(units)
        found = [v.text for v in units]
        if self.question is not None and self.embed is not None:
            made: dict[str, Tensor] = {}
            asked = questions_of(units, self.question, self.name)
            for question in asked:
                if question not in made:
                    made[question] = self.embed(keywords(question, self.stop_words))
            found = [made[question].to(v.x.device) for question, v in zip(asked, units)]
        for v, w in zip(units, found):
            if w is None or not len(w):
                note(v, f"{self.name}: the prompt has no text, so the image alone decides")
            elif w.dim() != 2 or w.shape[1] != v.x.shape[1]:
                raise ValueError(f"{self.name}: words are {list(w.shape)}, expected [M, {v.x.shape[1]}] embeddings")
        words = [w if w is not None and len(w) else None for w in found]
        check_finite([w for w in words if w is not None], "text embeddings")
        return words

    def _covered(self, v: Visual, words: Tensor) -> Tensor:
        """P [m, N] float32."""
        x, w = (normalize(t.float(), dim=1, eps=1e-8) for t in (v.x, words))
        with full_precision(x.device):
            return (w @ x.T).div_(self.text_temperature).softmax(1).div_(len(w))

    def _border(self, v: Visual) -> Tensor:
        """[N] bool: tokens that are picked last."""
        if isinstance(self.padding, tuple):
            return square_border(v, self.padding, self.name)
        assert self.padding is not None
        found = self.padding(v)
        if found.shape != (v.n,) or found.dtype != torch.bool:
            raise ValueError(
                f"padding answered {found.dtype} {list(found.shape)}: it owes one bool to each of {v.n} tokens"
            )
        return found.to(v.x.device)
