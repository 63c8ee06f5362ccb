"""The model that is served: loaded and patched before the first request, unpatched when the server ends."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import vtprune
from vtprune.evals import models
from vtprune.handle import Handle
from vtprune.integrations.serve.parts import InferenceThread, ModelManager, get_response_template
from vtprune.recipe import Recipe
from vtprune.types import Method

TOY = "vtprune-toy"


class ServedModel(ModelManager):
    """One model on one machine, which generates for one request at a time.

    path: a folder or an id of the Hub; None is the embedded toy. method, keep: as for `vtprune.patch`. name: what
    requests call it, the path by default. device, dtype: as the other commands take them.

    Raises ValueError for a model that cannot be loaded or that has no chat template, UnsupportedModel for one that
    cannot be pruned so.
    """

    def __init__(
        self,
        path: str | None,
        method: str | Method | Recipe,
        *,
        keep: float | int | None = None,
        name: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.name = name or path or TOY
        self.model, self.processor = models.load(path, device, dtype)
        self._check_chat(path)
        self.modality = self.get_model_modality(self.model, processor=self.processor)
        self.answerer = self._answerer()
        self.handle: Handle = vtprune.patch(self.model, method, keep=keep)
        self.recipe = self.handle.recipe
        self._in_force = self.recipe.to_json()
        self._lock = threading.Lock()
        self.thread = InferenceThread()
        # Tokenizers lend themselves to one thread at a time: this copy makes prompts while the other decodes answers.
        self.reader = copy.deepcopy(self.processor)
        if self.model.generation_config.pad_token_id is None:  # else `generate` warns of it at every request
            self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id
        super().__init__(force_model=self.name)

    def _load_model(self, *_: Any, **__: Any) -> Any:
        return self.model

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        return self.processor

    def _check_chat(self, path: str | None) -> None:
        if path is None:
            from vtprune.evals.toys.image import CHAT_TEMPLATE

            self.processor.chat_template = CHAT_TEMPLATE
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(
                f"--model {path}: its processor has no chat template, so messages cannot be made a prompt: save "
                "one with processor.chat_template = ...; processor.save_pretrained(folder)"
            )

    def _answerer(self) -> Any:
        """The model, whose type tells transformers how to part answers into text, reasoning and calls of tools.

        It looks for a mark in the prompt, and where the chat template writes another one it takes the prompt for a part
        of the answer: then something of no type stands for the model, and answers are text.
        """
        marks = (get_response_template(self.processor, self.model) or {}).get("start_anchor", [])
        turns = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if not marks or any(mark in prompt for mark in ([marks] if isinstance(marks, str) else marks)):
            return self.model
        return SimpleNamespace(config=SimpleNamespace(model_type=None))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that answers are decoded with, and in whose vocabulary stop texts are looked up."""
        return self.processor.tokenizer

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together, where the config says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def takes_films(self) -> bool:
        """True if its processor reads videos."""
        return getattr(self.processor, "video_processor", None) is not None

    @contextmanager
    def pruned_by(self, recipe: Recipe) -> Iterator[Handle]:
        """The model with the stages of one request in force; for the thread that generates.

        Stages stay until a request brings others: to patch anew takes milliseconds.
        """
        with self._lock:
            wanted = recipe.to_json()  # as text, where 1 (one token) and 1.0 (all of them) are not equal
            if wanted != self._in_force:
                self._repatch(recipe)
            yield self.handle

    def _repatch(self, recipe: Recipe) -> None:
        self.handle.remove()
        try:
            self.handle = vtprune.patch(self.model, recipe)
        except BaseException:
            recipe = self.recipe
            self.handle = vtprune.patch(self.model, recipe)
            raise
        finally:
            self._in_force = recipe.to_json()

    def shutdown(self) -> None:
        """Wait for the generation under way, take the patch off and let go of the model; safe to call twice."""
        with self._lock:
            self.handle.remove()
        super().shutdown()
