"""A chat request answered by the parts of `transformers serve`, with usage of the tokens that were really prefilled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

from vtprune.core.errors import VtpruneError
from vtprune.integrations.serve.body import Asked
from vtprune.integrations.serve.call import Call
from vtprune.integrations.serve.errors import RequestError, gone
from vtprune.integrations.serve.generation import Generation
from vtprune.integrations.serve.limits import Limits
from vtprune.integrations.serve.model import ServedModel
from vtprune.integrations.serve.parts import (
    ChatCompletionHandler,
    GenerationState,
    ReasoningText,
    ToolCall,
    accepted,
    build_response_parser,
)
from vtprune.integrations.serve.prompt import Prompt, Size, drawn

T = TypeVar("T")
# Runs a function on the thread that makes prompts, while another request is generated.
Prepare = Callable[[Callable[[], T]], "asyncio.Future[T]"]


class ChatHandler(ChatCompletionHandler):
    """Answers one call."""

    def __init__(self, served: ServedModel, limits: Limits, prepare: Prepare[Any], call: Call, asked: Asked) -> None:
        super().__init__(model_manager=served, generation_state=GenerationState())
        self.served, self.limits, self.call, self.asked, self._prepare = served, limits, call, asked, prepare
        self.generation = Generation(served, call, asked)
        self._sizes: list[Size] = []

    async def answer(self) -> JSONResponse | StreamingResponse:
        """JSON, or a stream whose first piece is there. Raises RequestError."""
        return await self.handle_request(self.asked.fields, self.call.id)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> JSONResponse | StreamingResponse:
        """Make the prompt on a thread of its own, then generate."""
        self._sizes, inputs = await self._prepare(lambda: self._prompt(body))
        config = self._config(body, inputs["input_ids"].shape[1])
        begin = self._begin_stream if self.asked.stream else self._whole
        try:
            return await begin(inputs, config, body.get("tools"))
        except VtpruneError as error:  # this call cannot be pruned exactly, and says what can
            raise RequestError(str(error)) from error

    def _prompt(self, body: dict[str, Any]) -> tuple[list[Size], Any]:
        """(sizes of the pictures, tensors of the prompt): all that is held of the messages while it waits."""
        self.call.check()
        prompt = Prompt.of(self.served, body.pop("messages"), self.limits)
        self.call.check()
        return prompt.sizes, prompt.inputs(self.served, body)

    def _config(self, body: dict[str, Any], length: int) -> Any:
        """The generation config of the request, whose answer fits the limits and the context of the model."""
        config = self._build_generation_config(body, self.served.model.generation_config)
        if config.sequence_bias is not None:  # where transformers takes no integers
            config.sequence_bias = {ids: float(bias) for ids, bias in config.sequence_bias.items()}
            self._check_ids(config.sequence_bias)
        room = self.limits.new_tokens if self.served.context is None else self.served.context - length
        if room < (self.asked.new_tokens or 1):
            raise RequestError(
                f"the prompt has {length} tokens and the answer may have {self.asked.new_tokens or 1}, more than the "
                f"{self.served.context} that this model takes together: send less",
                param="messages",
                code="context_length_exceeded",
            )
        config.max_new_tokens = self.asked.new_tokens or min(config.max_new_tokens, self.limits.new_tokens, room)
        config.max_length = None
        if body.get("temperature"):
            config.do_sample = True
        elif body.get("temperature") is not None:  # 0 is greedy, and no temperature to divide by
            config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        return config

    def _check_ids(self, biases: dict[tuple[int, ...], float]) -> None:
        size = self.served.model.get_output_embeddings().weight.shape[0]
        outside = [ids[0] for ids in biases if ids[0] >= size]
        if outside:
            raise RequestError(f"logit_bias: {outside[0]} is no token: use 0..{size - 1}", param="logit_bias")

    # -- whole answers ------------------------------------------------------------------------------------------------

    async def _whole(self, inputs: Any, config: Any, tools: Any) -> JSONResponse:
        more = accepted(self._non_streaming, tools=tools)
        answer = await self._non_streaming(
            self.call.id, self.served.answerer, self.served.tokenizer, self.served.name, inputs, config,
            self.generation, **more,
        )  # fmt: skip
        if not self.asked.show:
            return answer
        return JSONResponse(json.loads(bytes(answer.body)) | {"vtprune": await self._shown()})

    def _build_completion(self, *args: Any, **options: Any) -> dict[str, Any]:
        """With the details of pruning in `usage`."""
        return super()._build_completion(*args, **options) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt that were prefilled and of the answer, and what pruning left out."""
        counts = self.call.counts
        assert counts is not None, "usage is asked for behind the first token"
        return {
            "prompt_tokens": counts.prompt,
            "completion_tokens": self.call.generated,
            "total_tokens": counts.prompt + self.call.generated,
            "vtprune": counts.details(),
        }

    async def _shown(self) -> dict[str, Any]:
        """Which tokens stayed and where they stand, and the ids of the answer."""
        images = await self._prepare(lambda: drawn(self.served, self._sizes, self.call.units))
        return {"images": images, "completion_token_ids": self.call.ids.tolist()}

    # -- streams ------------------------------------------------------------------------------------------------------

    async def _begin_stream(self, inputs: Any, config: Any, tools: Any) -> StreamingResponse:
        """Wait for the first piece, so that what goes wrong before it has a status of its own."""
        model, tokenizer = self.served.answerer, self.served.tokenizer
        more = accepted(build_response_parser, tools=tools)
        parser = build_response_parser(tokenizer, model, inputs["input_ids"], **more)
        queue, _ = self.generation.generate_streaming(model, tokenizer, inputs, config, self.call.id, parser)
        assert self.generation.done is not None
        first = asyncio.ensure_future(queue.get())
        await asyncio.wait({first, self.generation.done}, return_when=asyncio.FIRST_COMPLETED)
        if self.generation.done.done() and self.generation.done.exception() is not None:
            first.cancel()
            self.generation.done.result()
        events = self._events(await first, queue, config.max_new_tokens)
        return Stream(events, self.call)

    async def _events(self, first: Any, queue: asyncio.Queue[Any], most: int) -> AsyncIterator[str]:
        """Server-sent events: the role, the pieces, the reason of the end, usage, [DONE]; or an error as the last."""
        tools, item = 0, first
        yield self._chunk(role="assistant")
        while item is not None:
            if isinstance(item, ToolCall):
                yield self._chunk(tool_calls=[_tool_call(item, self.call.id, tools)])
                tools += 1
            elif isinstance(item, ReasoningText):
                yield self._chunk(reasoning_content=item)
            else:
                yield self._chunk(content=item)
            item = await self._next(queue)
        assert self.generation.done is not None
        try:
            await asyncio.shield(self.generation.done)
        except RequestError as error:
            yield self.chunk_to_sse(json.dumps(error.document()))
            return
        except Exception:  # which is logged where the call ends
            yield self.chunk_to_sse(json.dumps(internal(self.call).document()))
            return
        reason = "tool_calls" if tools else "length" if self.call.generated >= most else "stop"
        yield self._chunk(finish_reason=reason)
        if self.asked.include_usage or self.asked.show:
            yield await self._last_chunk()
        yield self.chunk_to_sse("[DONE]")

    async def _next(self, queue: asyncio.Queue[Any]) -> Any:
        """The next piece; None at the end, also where an error left the queue without one."""
        assert self.generation.done is not None
        wanted = asyncio.ensure_future(queue.get())
        await asyncio.wait({wanted, self.generation.done}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done() and queue.empty():
            wanted.cancel()
            return None
        return await wanted

    def _chunk(self, **fields: Any) -> str:
        return self._build_chunk_sse(self.call.id, model=self.served.name, **fields)

    async def _last_chunk(self) -> str:
        """Without choices, as OpenAI's last chunk has none: usage, and where the kept tokens stand."""
        chunk = json.loads(self._chunk().removeprefix("data: ")) | {"choices": [], "usage": self.usage()}
        if self.asked.show:
            chunk["vtprune"] = await self._shown()
        return self.chunk_to_sse(json.dumps(chunk))


class Stream(StreamingResponse):
    """Events of a call, which is stopped when its client goes, whether or not anything was sent by then."""

    def __init__(self, events: AsyncIterator[str], call: Call) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.call = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.stop(gone())  # nothing to stop where it has ended


def _tool_call(item: ToolCall, request_id: str, index: int) -> ChoiceDeltaToolCall:
    function: Any = {"name": item.name, "arguments": item.arguments}
    name = f"{request_id}_tool_call_{index}"
    return ChoiceDeltaToolCall(index=index, type="function", id=name, function=function)


def internal(call: Call) -> RequestError:
    """A fault of the server, whose details are in its log."""
    return RequestError(f"the server failed at the request {call.id}: its log says why", 500, code="internal_error")
