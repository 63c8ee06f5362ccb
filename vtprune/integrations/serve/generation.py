"""One request's `generate` on the thread that all requests share, with its own stages in force."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from transformers import StoppingCriteria

from vtprune.handle import Handle
from vtprune.integrations.serve.body import Asked
from vtprune.integrations.serve.call import Call
from vtprune.integrations.serve.errors import RequestError
from vtprune.integrations.serve.model import ServedModel
from vtprune.integrations.serve.parts import BaseGenerateManager, DirectStreamer


class Watch(StoppingCriteria):
    """Looks after a generation at every token: notes what the prefill kept, and ends it when the call is to end."""

    def __init__(self, call: Call, handle: Handle, length: int) -> None:
        self.call, self.handle, self.length = call, handle, length
        self.before = handle.last  # of an earlier request: a prompt without pictures leaves it there

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
        """[B] bool: whether each row is to end."""
        if self.call.first is None:
            last = self.handle.last
            self.call.prefilled(self.length, None if last is self.before else last)
        self.call.ids = input_ids[0, self.length :]
        stop = self.call.stopped is not None
        return torch.full((len(input_ids),), stop, device=input_ids.device, dtype=torch.bool)


class Generation(BaseGenerateManager):
    """Generates for one call. done: the future of its run, None until it was handed to the thread."""

    def __init__(self, served: ServedModel, call: Call, asked: Asked) -> None:
        self.served, self.call, self.asked = served, call, asked
        self.done: asyncio.Future[Any] | None = None

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """Begin; the queue gets pieces of the answer and None at its end, `done` the errors."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        fast = self.served.tokenizer._tokenizer
        streamer = DirectStreamer(fast, asyncio.get_running_loop(), queue, response_parser=response_parser)
        self._submit(inputs, gen_config, streamer=streamer)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """(text, tokens of the prompt that were prefilled, ids [T] of the answer)."""
        sequences = await self._submit(inputs, gen_config)
        ids = sequences[0, inputs["input_ids"].shape[1] :]
        assert self.call.counts is not None, "`Watch` saw the first token"
        return self.served.tokenizer.decode(ids, skip_special_tokens=True), self.call.counts.prompt, ids

    def stop(self) -> None:
        """Nothing to free: the thread goes on with other requests."""

    def _submit(self, inputs: Any, gen_config: Any, **more: Any) -> asyncio.Future[Any]:
        options = {**inputs, **more, "generation_config": gen_config, "tokenizer": self.served.tokenizer}
        self.done = self.served.thread.async_submit(self._run, options)
        return self.done

    def _run(self, options: dict[str, Any]) -> Any:
        """On the thread of the model: nothing of another request runs meanwhile."""
        self.call.begin()
        try:
            made = self._generate(options)
        except ValueError as error:
            if self.asked.recipe is self.served.recipe:
                raise
            # A method may refuse a budget that it cannot reach, as pooling does.
            raise RequestError(f"mm_processor_kwargs: {error}", param="mm_processor_kwargs") from error
        self.call.check()
        return made

    def _generate(self, options: dict[str, Any]) -> Any:
        """Ids [1, L + T] of prompt and answer."""
        model = self.served.model
        with self.served.pruned_by(self.asked.recipe) as handle:
            if self.asked.seed is not None:
                torch.manual_seed(self.asked.seed)
            placed = {name: _placed(value, model) for name, value in options.items()}
            watch = Watch(self.call, handle, placed["input_ids"].shape[1])
            return model.generate(**placed, stopping_criteria=[watch])


def _placed(value: Any, model: Any) -> Any:
    """A tensor on the model's device, pixels in its dtype; anything else as it is."""
    if not torch.is_tensor(value):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
