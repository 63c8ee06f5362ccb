"""The fields of a chat request, checked before any work is done for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtprune.integrations.budget import NAMES, with_budget
from vtprune.integrations.serve.errors import RequestError
from vtprune.integrations.serve.limits import Limits
from vtprune.recipe import Recipe

# Accepted, and without any effect on what one prompt is answered.
IGNORED = {
    "metadata", "parallel_tool_calls", "reasoning_effort", "safety_identifier", "service_tier", "store", "user",
    "prompt_cache_key", "verbosity",
}  # fmt: skip
# Fields that would change the answer and that are not served: the only values that say the same as leaving them out.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (), "function_call": (), "functions": (), "generation_config": (), "prediction": (),
    "web_search_options": (), "logprobs": (False,), "modalities": (["text"],), "n": (1,), "presence_penalty": (0,),
    "response_format": ({"type": "text"},), "tool_choice": ("auto",), "top_logprobs": (0,),
}  # fmt: skip
# Numbers: kinds, least, most.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 100),
    "top_p": (float, 1e-6, 1),
    "frequency_penalty": (float, -0.99, 2),
    "seed": (int, -(2**63), 2**63 - 1),
    "max_tokens": (int, 1, 2**31),
    "max_completion_tokens": (int, 1, 2**31),
}
OTHERS = {
    "chat_template_kwargs", "logit_bias", "messages", "mm_processor_kwargs", "model", "stop", "stream",
    "stream_options", "tools", "vtprune",
}  # fmt: skip
ROLES = ("assistant", "developer", "system", "tool", "user")
PARTS = {"text": "text", "image_url": "image_url", "video_url": "video_url"}


@dataclass(frozen=True)
class Asked:
    """A request that is well formed. fields: those that the parts of transformers read.

    recipe: the stages for this request. new_tokens: the most it wants, None for what the server allows.
    include_usage: a stream ends with a chunk of usage. show: the answer tells which tokens stayed.
    """

    fields: dict[str, Any]
    recipe: Recipe
    new_tokens: int | None
    seed: int | None
    stream: bool
    include_usage: bool
    show: bool


def read(body: dict[str, Any], name: str, recipe: Recipe, limits: Limits) -> Asked:
    """Check a request to the model `name`. Raises RequestError that names the field and the valid values."""
    given = {field: value for field, value in body.items() if value is not None and field not in IGNORED}
    unknown = sorted(given.keys() - OTHERS - UNSERVED.keys() - NUMBERS.keys())
    if unknown:
        raise RequestError(f"{', '.join(map(repr, unknown))[:200]}: no such field of a chat request", param=unknown[0])
    for field, same in UNSERVED.items():
        if field in given and given[field] not in same:
            allowed = f" but {' or '.join(map(repr, same))}" if same else ""
            raise RequestError(
                f"{field}={given[field]!r:.80}: nothing{allowed} is served: leave it out",
                param=field,
                code="unsupported",
            )
    if "model" in given and given["model"] != name:
        raise RequestError(
            f"the model {given['model']!r:.200} is not served here: ask for {name!r}", 404, "model", "model_not_found"
        )
    for field, (kind, least, most) in NUMBERS.items():
        if field in given:
            _check_number(field, given[field], kind, least, most)
    _check_messages(given.get("messages"), limits)
    _check_options(given)
    wanted = given.get("max_completion_tokens", given.get("max_tokens"))
    if wanted is not None and wanted > limits.new_tokens:
        field = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
        message = f"{field}={wanted}: at most {limits.new_tokens} tokens are generated; raise --max-new-tokens for more"
        raise RequestError(message, param=field)
    served = {field: value for field, value in given.items() if field not in UNSERVED and field != "seed"}
    options = given.get("stream_options", {})
    return Asked(
        served,
        _recipe_of(given, recipe),
        wanted,
        given.get("seed"),
        given.get("stream", False),
        options.get("include_usage") is True,
        given.get("vtprune", {}).get("show", False),
    )


def _check_number(field: str, value: Any, kind: type, least: float, most: float) -> None:
    kinds = (int, float) if kind is float else (int,)
    if type(value) not in kinds or not math.isfinite(value) or not least <= value <= most:
        noun = "a number" if kind is float else "an integer"
        raise RequestError(f"{field}={value!r:.80}: use {noun} from {least:g} to {most:g}", param=field)


def _check_options(given: Mapping[str, Any]) -> None:
    """Fields that are objects, lists or flags."""
    kinds: dict[str, Any] = {"stream": bool, "tools": list, "stop": (str, list)}
    kinds |= dict.fromkeys(("chat_template_kwargs", "logit_bias", "mm_processor_kwargs"), dict)
    kinds |= dict.fromkeys(("stream_options", "vtprune"), dict)
    for field, kind in kinds.items():
        if field in given and not isinstance(given[field], kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise RequestError(f"{field}={given[field]!r:.80} is no {names}", param=field)
    stop = given.get("stop", [])
    if not all(isinstance(text, str) and text for text in ([stop] if isinstance(stop, str) else stop)):
        raise RequestError(f"stop={stop!r:.80}: use a text, or a list of texts, none empty", param="stop")
    for field, value in given.get("vtprune", {}).items():
        if field != "show" or type(value) is not bool:
            raise RequestError(f"vtprune={{{field!r}: {value!r:.80}}}: use {{'show': true}}", param="vtprune")
    for key, value in given.get("logit_bias", {}).items():
        if not key.isdigit() or type(value) not in (int, float) or not -100 <= value <= 100:
            raise RequestError(
                f"logit_bias={{{key!r}: {value!r:.40}}}: use ids of tokens and numbers in -100..100", param="logit_bias"
            )
    for key, value in given.get("chat_template_kwargs", {}).items():
        if not isinstance(value, (bool, int, float, str)):
            message = f"chat_template_kwargs: {key!r} is a {type(value).__name__}: use flags, numbers and texts"
            raise RequestError(message, param="chat_template_kwargs")


def _recipe_of(given: Mapping[str, Any], recipe: Recipe) -> Recipe:
    options = given.get("mm_processor_kwargs", {})
    unknown = sorted(options.keys() - set(NAMES))
    if unknown:
        names = ", ".join(map(repr, unknown))[:200]
        raise RequestError(f"mm_processor_kwargs: {names}: use {' or '.join(NAMES)}", param="mm_processor_kwargs")
    try:
        return with_budget(recipe, options)
    except (TypeError, ValueError) as error:
        raise RequestError(f"mm_processor_kwargs: {error}", param="mm_processor_kwargs") from error


def _check_messages(messages: Any, limits: Limits) -> None:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: send a list of at least one message", param="messages")
    media = {"image_url": 0, "video_url": 0}
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(f"{where}: send an object with a role of {', '.join(ROLES)}", param=where)
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise RequestError(f"{where}.content is a {type(content).__name__}: send a text or a list", param=where)
        for j, part in enumerate(content):
            kind = _check_part(part, f"{where}.content[{j}]")
            if kind in media:
                media[kind] += 1
    for kind, most, noun in (("image_url", limits.images, "images"), ("video_url", limits.videos, "videos")):
        if media[kind] > most:
            raise RequestError(f"{media[kind]} {noun}: a request may hold {most} of them", param="messages")


def _check_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PARTS:
        raise RequestError(f"{where}: its type is {kind!r:.40}: use one of {', '.join(PARTS)}", param=where)
    value = part.get(PARTS[kind])
    if kind == "text" and not isinstance(value, str):
        raise RequestError(f"{where}.text is a {type(value).__name__}: send a text", param=where)
    if kind != "text" and not (isinstance(value, dict) and isinstance(value.get("url"), str)):
        raise RequestError(f"{where}: send {{'type': {kind!r}, {kind!r}: {{'url': 'data:...'}}}}", param=where)
    return kind
