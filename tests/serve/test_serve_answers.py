"""A served model answers as the patched model does by itself, with usage of what was really prefilled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import serving
import torch
from serving import Alone, Running, message, picture

import vtprune
from vtprune.integrations.serve import Limits, ServedModel

FAMILIES = ["llava", "qwen2_5_vl"]
KEEP = 0.5


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Alone]]:
    torch.manual_seed(0)
    folder = checkpoints.save(request.param, tmp_path_factory.mktemp("model") / request.param)
    served = ServedModel(str(folder), "divprune", keep=KEEP, name="tiny", device="cpu", dtype="float32")
    with serving.serving(served, Limits(waiting=64)) as running:
        yield running, Alone(folder)


def ids_of(answer: Any) -> list[int]:
    return answer.vtprune["completion_token_ids"]


def test_a_text_is_answered_and_nothing_is_counted_as_visual(pair: tuple[Running, Alone]) -> None:
    running, alone = pair
    running.ask("before it, a picture", [picture(1)])  # whose counts must not be told again
    answer = running.ask("hello")
    assert ids_of(answer) == alone.ids("hello", keep=KEEP)
    assert answer.usage.prompt_tokens == answer.usage.vtprune["prompt_tokens_unpruned"] == 5
    assert answer.usage.vtprune["visual_tokens"] == 0


@pytest.mark.parametrize("images", [1, 2])
def test_pictures_are_answered_as_by_generate(pair: tuple[Running, Alone], images: int) -> None:
    running, alone = pair
    for seed in range(3):
        seen = [picture(seed + i) for i in range(images)]
        answer = running.ask("what is it?", seen)
        assert ids_of(answer) == alone.ids("what is it?", seen, keep=KEEP)
        assert answer.choices[0].message.content == running.served.tokenizer.decode(
            ids_of(answer), skip_special_tokens=True
        ), "without the prompt, and without special tokens"
        counts = answer.usage.vtprune
        assert counts["visual_tokens"] == images * (25 if "llava" in str(alone.folder) else 16)
        assert counts["visual_tokens_kept"] + counts["visual_tokens_dropped"] == counts["visual_tokens"]
        assert answer.usage.prompt_tokens == counts["prompt_tokens_unpruned"] - counts["visual_tokens_dropped"]
        assert answer.usage.completion_tokens == len(ids_of(answer))
        assert len(answer.vtprune["images"]) == images


def test_budgets_of_requests_hold_for_them_alone(pair: tuple[Running, Alone]) -> None:
    running, alone = pair
    for budget, keep in (
        ({"keep_tokens": 3}, 3),
        ({}, KEEP),
        ({"keep_ratio": 1}, 1.0),
        ({"keep_ratio": 1.0}, 1.0),
        ({"keep_tokens": 1}, 1),
        ({"keep_tokens": 10**9}, 1.0),
        ({"keep_ratio": 0.25}, 0.25),
        ({"keep_ratio": None}, KEEP),
    ):
        answer = running.ask("what is it?", [picture(7)], extra_body={"mm_processor_kwargs": budget})
        assert ids_of(answer) == alone.ids("what is it?", [picture(7)], keep=keep), budget
        counts = answer.usage.vtprune
        wanted = round(keep * counts["visual_tokens"]) if isinstance(keep, float) else keep
        assert counts["visual_tokens_kept"] == wanted
        assert len(answer.vtprune["images"][0]["kept"]) == wanted


def test_twenty_requests_at_once_keep_their_budgets(pair: tuple[Running, Alone]) -> None:
    running, alone = pair

    async def ask() -> list[Any]:
        async with running_client(running) as client:
            return await asyncio.gather(*(one(client, i) for i in range(20)))

    async def one(client: Any, i: int) -> Any:
        return await client.chat.completions.create(
            model="tiny", messages=[message("which?", [picture(i % 3)])], max_tokens=8, temperature=0,
            extra_body={"mm_processor_kwargs": {"keep_tokens": 1 + i % 5}, "vtprune": {"show": True}},
        )  # fmt: skip

    answers = asyncio.run(ask())
    expected = {(s, k): alone.ids("which?", [picture(s)], keep=k) for s in range(3) for k in range(1, 6)}
    assert len({tuple(ids) for ids in expected.values()}) > 5, "answers that do not differ tell nothing"
    for i, answer in enumerate(answers):
        assert ids_of(answer) == expected[i % 3, 1 + i % 5]
        assert answer.usage.vtprune["visual_tokens_kept"] == 1 + i % 5


def running_client(running: Running) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_a_stream_says_what_a_whole_answer_says(pair: tuple[Running, Alone]) -> None:
    running, _ = pair
    options: Any = {"extra_body": {"mm_processor_kwargs": {"keep_tokens": 4}}}
    whole = running.ask("what is it?", [picture(3)], **options)
    chunks = running.ask("what is it?", [picture(3)], stream=True, stream_options={"include_usage": True}, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    (last,) = [chunk for chunk in chunks if chunk.usage is not None]
    assert last is chunks[-1]
    assert last.choices == []
    assert last.usage == whole.usage
    assert last.vtprune == whole.vtprune
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_include_usage_has_no_usage(pair: tuple[Running, Alone]) -> None:
    running, _ = pair
    with running.client() as client:
        messages: Any = [message("what?", [picture(3)])]
        chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True, max_tokens=4))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_samples_of_one_seed_are_the_same_also_among_others(pair: tuple[Running, Alone]) -> None:
    running, _ = pair

    def sampled(seed: int) -> list[int]:
        return ids_of(running.ask("what?", [picture(5)], temperature=1.0, seed=seed))

    first = sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(2, 8)}) > 1
    assert sampled(1) == first


def test_an_answer_stops_at_a_text(pair: tuple[Running, Alone]) -> None:
    running, _ = pair
    whole = running.ask("what is it?", [picture(0)])
    last = running.served.processor.decode(ids_of(whole)[2:3])
    short = running.ask("what is it?", [picture(0)], stop=[last, "never said"])
    assert ids_of(short) == ids_of(whole)[: short.usage.completion_tokens]
    assert short.usage.completion_tokens <= 3
    assert short.choices[0].finish_reason == "stop"


def test_reasoning_and_calls_of_tools_are_parted_as_transformers_does(tmp_path: Path) -> None:
    """By a template that takes three digits, which are all that the model may say, for marks and arguments."""
    folder = checkpoints.save("llava", tmp_path / "llava")
    served = ServedModel(str(folder), "divprune", keep=KEEP, name="tiny", device="cpu", dtype="float32")
    ids = [served.tokenizer.convert_tokens_to_ids(digit) for digit in "123456789"]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    options: Any = {"logit_bias": dict.fromkeys(map(str, ids), 100), "tools": [tool]}
    with serving.serving(served) as running:
        texts = [
            (seed, running.ask("what?", [picture(seed)], **options).choices[0].message.content) for seed in range(9)
        ]
        seed, (begin, inner, end, *_) = next((seed, text) for seed, text in texts if len(set(text[:3])) == 3)
        call = {"type": "function", "function": {"name": "look", "arguments": "{content}"}}
        for field, more in (("thinking", {}), ("tool_calls", {"repeats": True, "transform": call})):
            served.tokenizer.response_template = {
                "start_anchor": "what?",
                "fields": {
                    field: {"open": begin, "close": end, "content": "json" if more else "text", **more},
                    "content": {"content": "text"},
                },
            }
            whole = running.ask("what?", [picture(seed)], max_tokens=3, **options).choices[0]
            chunks = running.ask("what?", [picture(seed)], max_tokens=3, stream=True, **options)
            deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
            if more:
                assert [(c.function.name, c.function.arguments) for c in whole.message.tool_calls] == [("look", inner)]
                (called,) = [c for delta in deltas for c in delta.tool_calls or []]
                assert (called.function.name, called.function.arguments) == ("look", inner)
                assert whole.finish_reason == chunks[-2].choices[0].finish_reason == "tool_calls"
            else:
                assert whole.message.reasoning_content == inner
                assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == inner


def test_the_models_are_told(pair: tuple[Running, Alone]) -> None:
    running, _ = pair
    with running.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
    assert running.get("/v1/models/other")[0] == 404
    assert running.get("/health") == (200, '{"status":"ok"}')


@pytest.mark.parametrize("family", sorted(checkpoints.PROCESSORS.keys() - set(FAMILIES)))
def test_other_families_are_answered_as_by_generate(family: str, tmp_path: Path) -> None:
    """Those whose pictures are cut into crops, too; all of their panels hold all of their tokens."""
    folder, seen = checkpoints.save(family, tmp_path / family), picture(2, 60, 40)
    served = ServedModel(str(folder), "divprune", keep=KEEP, device="cpu", dtype="float32")
    with serving.serving(served) as running:
        answer = running.ask("what?", [seen])
    assert ids_of(answer) == Alone(folder).ids("what?", [seen], keep=KEEP)
    (shown,) = answer.vtprune["images"]
    assert shown["tokens"] == answer.usage.vtprune["visual_tokens"]
    cells = sum(len(panel["kept"]) for panel in shown["panels"])
    assert 0 < cells <= shown["tokens"], "separators are no cells"
    assert 0 < sum(sum(panel["kept"]) for panel in shown["panels"]) <= len(shown["kept"])


@pytest.mark.parametrize("method", ["fastv", "lazyllm", "visionzip", "tome"])
def test_methods_at_other_places(method: str, tmp_path: Path) -> None:
    """Usage counts what the first decoder layer ran on, and what is left behind all stages."""
    folder = checkpoints.save("llava", tmp_path / "llava")
    stages: Any = method
    if method == "tome":  # which is for plain vision transformers where it is named alone
        stages = vtprune.Stage(("vit", 1), vtprune.create("tome"), keep=KEEP)
    served = ServedModel(
        str(folder), stages, keep=None if method == "tome" else KEEP, name="tiny", device="cpu", dtype="float32"
    )
    with serving.serving(served) as running:
        answer = running.ask("what?", [picture(2)])
        alone = Alone(folder, stages)
        assert ids_of(answer) == alone.ids("what?", [picture(2)], keep=None if method == "tome" else KEEP)
        counts = answer.usage.vtprune
        inside = method in ("fastv", "lazyllm")
        assert answer.usage.prompt_tokens == counts["prompt_tokens_unpruned"] - (
            0 if inside else counts["visual_tokens_dropped"]
        )
        assert 0 < counts["visual_tokens_kept"] < counts["visual_tokens"]
        several = len(served.recipe.stages) > 1
        status, told = running.post(
            {"messages": [message("what?", [picture(2)])], "mm_processor_kwargs": {"keep_tokens": 4}, "max_tokens": 2}
        )
        assert status == (400 if several else 200)
        assert not several or "stages, each with a budget of its own" in told["error"]["message"]
