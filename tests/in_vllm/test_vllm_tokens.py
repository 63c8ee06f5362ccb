"""vLLM with the plug-in generates the tokens of the patched transformers model, for images and videos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
from engines import BEGIN, QUESTION, STOP, Reference, as_on_the_hub, ask, engine, film, noise, prompt

import vtprune

pytest.importorskip("vllm", reason="vLLM is in the environment of `make test-vllm`")
pytestmark = pytest.mark.vllm

PICTURE = {name: f"{BEGIN}<|image_pad|>{STOP}" if "qwen" in name else "<image>" for name in engines.PROCESSORS}
FILM = f"{BEGIN}<|video_pad|>{STOP}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (folder for vLLM, reference), made once."""
    known: dict[str, tuple[Path, Reference]] = {}

    def get(name: str) -> tuple[Path, Reference]:
        if name not in known:
            folder = engines.save(name, tmp_path_factory.mktemp("models") / name)
            served = as_on_the_hub(folder) if name.startswith("llava") else folder
            known[name] = served, Reference(folder)
        return known[name]

    return get


def recipe_of(method: str, keep: float | int, **options: Any) -> vtprune.Recipe:
    where = {k: options.pop(k) for k in ("per", "newlines", "positions") if k in options}
    return vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create(method, **options), keep=keep, **where))


def assert_same(llm: Any, reference: Reference, recipe: Any, requests: list[tuple[str, list[Any], list[Any]]]) -> None:
    """The tokens and the length of the prefill of every request, asked together and again, from the cache."""
    wanted = [reference.answer(recipe, *request) for request in requests]
    for _ in range(2):
        for found, (tokens, length), request in zip(ask(llm, [prompt(*r) for r in requests]), wanted, requests):
            assert list(found.outputs[0].token_ids) == tokens, request[0]
            assert len(found.prompt_token_ids) == length, request[0]


IMAGE_CASES = [
    ("llava", "divprune", {}),
    ("llava", "uniform", {}),
    ("llava", "random", {"seed": 3}),
    ("llava", "hiprune", {}),
    ("llava", "visionzip", {}),
    ("llava", "divprune", {"positions": "compact"}),
    ("llava_next", "divprune", {}),
    ("llava_next", "visionzip", {}),
    ("llava_onevision", "divprune", {"newlines": "drop"}),
    ("qwen2_vl", "divprune", {}),
    ("qwen2_5_vl", "uniform", {}),
    ("qwen2_5_vl", "random", {"seed": 3}),
    ("qwen2_5_vl", "hiprune", {}),
    ("qwen2_5_vl", "visionzip", {}),
    ("qwen3_vl", "divprune", {}),
]


@pytest.mark.parametrize(("family", "method", "options"), IMAGE_CASES)
def test_images(made: Any, family: str, method: str, options: dict[str, Any]) -> None:
    folder, reference = made(family)
    recipe, picture = recipe_of(method, 0.4, **options), PICTURE[family]
    # transformers does not tile the images of a prompt that holds several; vLLM encodes each as if alone
    several = [] if family == "llava_onevision" else [(picture + "and" + picture + QUESTION, [noise(1), noise(2)], [])]
    with engine(folder, recipe) as llm:
        assert_same(llm, reference, recipe, [(picture + QUESTION, [noise(i)], []) for i in range(3)] + several)


@pytest.mark.parametrize(
    ("family", "method"),
    [("qwen2_5_vl", "evs"), ("qwen2_5_vl", "divprune"), ("qwen3_vl", "evs"), ("qwen3_vl", "divprune")],
)
@pytest.mark.parametrize("step", [512, 32])  # in one step, and in chunks that cut through films
def test_videos_and_images(made: Any, family: str, method: str, step: int) -> None:
    folder, reference = made(family)
    recipe, picture = recipe_of(method, 0.4), PICTURE[family]
    requests = [
        (FILM + QUESTION, [], [film(1)]),
        (FILM + FILM + QUESTION, [], [film(1), film(2, frames=4)]),
        (picture + FILM + QUESTION, [noise(1)], [film(1)]),
        (FILM + "then" + picture + QUESTION, [noise(1)], [film(2)]),
    ]
    with engine(folder, recipe, max_num_batched_tokens=step) as llm:
        assert_same(llm, reference, recipe, requests)


@pytest.mark.parametrize("method", ["evs", "divprune"])
def test_videos_of_llava_onevision(made: Any, method: str) -> None:
    """One position a token, and a newline behind the last frame."""
    folder, reference = made("llava_onevision")
    recipe = recipe_of(method, 0.4)
    with engine(folder, recipe) as llm:
        assert_same(llm, reference, recipe, [("<video>" + QUESTION, [], [film(1)])])


@pytest.fixture(scope="module")
def served(made: Any) -> Iterator[tuple[Any, Reference, str]]:
    folder, reference = made("qwen2_5_vl")
    with engine(folder, recipe_of("divprune", 0.25)) as llm:
        yield llm, reference, PICTURE["qwen2_5_vl"] + QUESTION


def test_budgets_of_requests(served: Any) -> None:
    """Twenty requests at once, each with a budget of its own, get what they get alone."""
    llm, reference, text = served
    budgets = [{"keep_ratio": k / 8} for k in range(1, 9)] + [{"keep_tokens": k} for k in range(1, 13)]
    together = ask(llm, [prompt(text, [noise(i % 3)], **budget) for i, budget in enumerate(budgets)])
    for i, (found, budget) in enumerate(zip(together, budgets)):
        (keep,) = budget.values()
        tokens, length = reference.answer(recipe_of("divprune", keep), text, [noise(i % 3)])
        assert (list(found.outputs[0].token_ids), len(found.prompt_token_ids)) == (tokens, length)


def test_all_kept_is_the_unpruned_model(served: Any) -> None:
    llm, reference, text = served
    (found,) = ask(llm, [prompt(text, [noise(1)], keep_ratio=1.0)])
    assert (list(found.outputs[0].token_ids), len(found.prompt_token_ids)) == reference.answer(None, text, [noise(1)])
    (more,) = ask(llm, [prompt(text, [noise(1)], keep_tokens=10**6)])
    assert more.outputs[0].token_ids == found.outputs[0].token_ids


@pytest.mark.parametrize(
    "given",
    [
        {"keep_ratio": 0},
        {"keep_ratio": float("nan")},
        {"keep_ratio": "half"},
        {"keep_ratio": 1.5},
        {"keep_tokens": 0},
        {"keep_tokens": 2.5},
        {"keep_ratio": 0.5, "keep_tokens": 3},
        {"keep": 0.5},
        {"vtprune": "other.json"},
    ],
)
def test_a_wrong_budget_is_the_request_s_own_error(served: Any, given: dict[str, Any]) -> None:
    llm, reference, text = served
    with pytest.raises((ValueError, TypeError), match=r"keep_ratio|keep_tokens"):
        ask(llm, [prompt(text, [noise(1)], **given)])
    (found,) = ask(llm, [prompt(text, [noise(1)])])  # the engine lives on
    assert list(found.outputs[0].token_ids) == reference.answer(recipe_of("divprune", 0.25), text, [noise(1)])[0]


def test_an_image_without_words_around_it_is_refused(served: Any) -> None:
    llm, _, _ = served
    with pytest.raises(ValueError, match="no word before or behind"):
        ask(llm, [prompt("<|image_pad|><|image_pad|>?", [noise(1), noise(2)])])


def test_images_side_by_side_where_a_token_has_one_position(made: Any) -> None:
    """Chunks of 32 tokens end inside images that no word divides."""
    folder, reference = made("llava")
    recipe = recipe_of("divprune", 0.8)
    text = "<image><image><image>" + QUESTION
    with engine(folder, recipe, max_num_batched_tokens=32) as llm:
        assert_same(llm, reference, recipe, [(text, [noise(1), noise(2), noise(3)], [])])


def test_an_idle_plug_in_changes_nothing(made: Any) -> None:
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    folder, reference = made("llava")
    with engine(folder) as llm:
        assert_same(llm, reference, None, [("<image>" + QUESTION, [noise(i)], []) for i in range(2)])
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert type(runner.model) is LlavaForConditionalGeneration
