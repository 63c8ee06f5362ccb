"""vLLM's OpenAI server with the plug-in: budgets of requests, what is refused, and that the others' answers stay."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
from engines import NEW, QUESTION, Reference, noise

import vtprune

pytest.importorskip("vllm", reason="vLLM is in the environment of `make test-vllm`")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
httpx = pytest.importorskip("httpx")

RECIPE = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.25))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    engines.save("qwen2_5_vl", folder / "model")
    RECIPE.save(folder / "recipe.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = json.dumps({"vtprune": str(folder / "recipe.json")})
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--block-size", "32", "--mm-processor-kwargs", told]
    command += ["--trust-request-mm-kwargs", "--served-model-name", "tiny"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 180
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until, "the server did not answer in three minutes"
            try:
                if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield address, folder / "model"
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def body(seed: int, url: str | None = None, **more: Any) -> dict[str, Any]:
    data = io.BytesIO()
    noise(seed).save(data, "PNG")
    url = url or "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    settings = {"temperature": 0, "max_tokens": NEW, "min_tokens": NEW, "return_token_ids": True}
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **settings, **more}


def budget(**given: Any) -> dict[str, Any]:
    return {"mm_processor_kwargs": given}


async def post(address: str, bodies: list[dict[str, Any]]) -> list[Any]:
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        return await asyncio.gather(*(client.post("/v1/chat/completions", json=one) for one in bodies))


def test_twenty_at_once_with_bad_ones_among_them(server: tuple[str, Path]) -> None:
    """Every answer is that of the patched transformers model; what is wrong is an error of that request alone."""
    address, folder = server
    reference = Reference(folder)
    wrong = [
        {"keep_ratio": 0},
        {"keep_tokens": 0},
        {"keep_ratio": "half"},
        {"keep_ratio": 2},
        {"keep": 0.5},
        {"vtprune": "x"},
    ]
    good = [{}, *({"keep_tokens": k} for k in range(1, 10)), *({"keep_ratio": k / 10} for k in range(1, 11))]
    mixed = [body(i % 3, **budget(**given)) for i, given in enumerate(good)] + [
        body(1, **budget(**given)) for given in wrong
    ]
    mixed += [body(1, url="data:image/png;base64,bm90IGEgcGljdHVyZQ==")]
    answers = asyncio.run(post(address, mixed))
    for i, (given, found) in enumerate(zip(good, answers)):
        assert found.status_code == 200, found.text
        keep = next(iter(given.values()), 0.25)
        recipe = None if keep == 1.0 and isinstance(keep, float) else vtprune.Recipe.of(
            vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=keep)
        )  # fmt: skip
        text = reference.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        )
        tokens, length = reference.answer(recipe, text, [noise(i % 3)])
        assert found.json()["choices"][0]["token_ids"] == tokens
        assert found.json()["usage"]["prompt_tokens"] == length
    for found in answers[len(good) :]:
        assert found.status_code in (400, 422), found.text


def test_a_request_that_is_given_up_leaves_the_others_alone(server: tuple[str, Path]) -> None:
    address, _ = server
    before = asyncio.run(post(address, [body(1)]))[0].json()["choices"][0]["token_ids"]

    async def some_give_up() -> Any:
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            long = body(2, max_tokens=300, min_tokens=300)
            tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=long)) for _ in range(3)]
            stays = asyncio.create_task(client.post("/v1/chat/completions", json=body(1)))
            for task in tasks:
                task.cancel()
            return await stays

    assert asyncio.run(some_give_up()).json()["choices"][0]["token_ids"] == before
    assert httpx.get(f"{address}/health").status_code == 200
