"""`vtprune serve` as a process: it is stopped by signals, says where it is, and stands much traffic."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import checkpoints
import openai
import pytest
import serving
import torch
from serving import ENDLESS, message, picture
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app, serve
from vtprune.integrations.serve import Limits
from vtprune.integrations.serve.run import bound, own_names, url_of

TINY = ("--device", "cpu", "--dtype", "float32", "--name", "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return checkpoints.save("llava", tmp_path_factory.mktemp("model") / "llava")


def test_the_example_of_a_client() -> None:
    client = Path(__file__).parents[2] / "examples" / "serving" / "client.py"
    with serving.command() as process:
        line = [sys.executable, str(client), process.running.url]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [f"kept {n} of 256" in line for n, line in zip((64, 128, 8), done.stdout.splitlines())] == [True] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number: signal.Signals) -> None:
    with serving.command() as process:
        assert process.running.ask("how many shapes are there ?", [picture(0, 64, 64)]).choices[0].message.content
        assert process.running.get("/health", Host="elsewhere.example")[0] == 400, "a page of another site"
        assert process.running.get("/health", Host="localhost:1")[0] == 200
        status, said = process.end(number)
    assert status == 0
    assert "Traceback" not in said


def test_a_signal_ends_a_generation_that_takes_longer_than_the_grace(tmp_path: Path) -> None:
    """Of a context so long that the answer would take minutes."""
    torch.manual_seed(0)
    folder = serving.with_long_context(checkpoints.save("qwen2_5_vl", tmp_path / "model"))
    options = ("--model", str(folder), *TINY, "--grace", "1", "--max-new-tokens", "1000000")
    with serving.command(*options, model="tiny") as process:
        running = process.running
        asked: Any = {"model": "tiny", "messages": [message("what?", [picture(0)])], "max_tokens": 900_000, **ENDLESS}
        with running.client() as client, ThreadPoolExecutor(1) as pool:
            stream = iter(client.chat.completions.create(stream=True, **asked))
            next(stream)
            waiting = pool.submit(client.chat.completions.create, **asked)
            while running.status()["requests"]["in_flight"] < 2:
                pass
            began = time.perf_counter()
            status, said = process.end()
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                waiting.result(60)
    assert status == 0, said
    assert time.perf_counter() - began < 30
    assert "Traceback" not in said, said


def test_a_recipe_and_a_key_from_files(folder: Path, tmp_path: Path) -> None:
    stage = vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=5)
    vtprune.Recipe.of(stage).save(tmp_path / "recipe.json")
    (tmp_path / "key").write_text("secret\n")
    options = ("--model", str(folder), *TINY, "--recipe", str(tmp_path / "recipe.json"))
    with serving.command(*options, "--api-key-file", str(tmp_path / "key"), model="tiny") as process:
        running = process.running
        messages: Any = [message("what?", [picture(0)])]
        with running.client(api_key="secret") as client:
            answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
            assert answer.usage.vtprune["visual_tokens_kept"] == 5
        assert running.get("/health", Host="elsewhere.example")[0] == 200, "the key guards it"
        with running.client() as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="tiny", messages=messages)
        _, said = process.end()
    assert "secret" not in said
    assert "what?" not in said, "prompts are not logged"
    assert "'visual_tokens_kept': 5" in said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "no API key is set"),
        (["--host", "not.a.host.invalid"], "no such address"),
        (["--api-key", " "], "the key is empty"),
        (["--api-key", "a", "--api-key-file", "b"], "give one of them"),
        (["--api-key-file", "/nowhere/key"], "No such file"),
        (["--model", "/nowhere/model"], "no model there"),
        (["--keep", "2.0"], "use a share"),
        (["--method", "nothing"], "nothing"),
        (["--recipe", "/nowhere.json"], "No such file"),
        (["--recipe", "a.json", "--keep", "4"], "leave out --method and --keep"),
        (["--log-level", "loud"], "use debug, info, warning or error"),
    ],
)
def test_it_does_not_start_with(options: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())


def test_it_does_not_start_where_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = CliRunner().invoke(app, ["serve", "--port", str(taken.getsockname()[1])])
    assert done.exit_code == 2
    assert "choose another one" in done.output


def test_a_processor_without_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--model", str(bare)])
    assert done.exit_code == 2
    assert "has no chat template" in " ".join(done.output.split())


def test_the_defaults_of_the_options_are_those_of_the_limits() -> None:
    options = inspect.signature(serve.serve).parameters
    names = {
        "max_body_bytes": "body_bytes", "max_images": "images", "max_pixels": "pixels",
        "max_videos": "videos", "frames": "video_frames", "max_new_tokens": "new_tokens", "timeout": "seconds",
        "max_waiting": "waiting", "allow_remote_urls": "remote_urls",
    }  # fmt: skip
    assert {names[name]: options[name].default for name in names} == dataclasses.asdict(Limits())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_addresses_of_this_machine_need_no_key(host: str) -> None:
    try:
        opened = bound(host, 0, False, False)
    except ValueError:
        assert host == "::1"
        pytest.skip("no IPv6 here")
    with opened:
        names = own_names(opened)
        assert names is not None
        assert urlsplit(url_of(opened)).hostname in names
    for has_key, anyone in ((True, False), (False, True)):
        with bound("0.0.0.0", 0, has_key, anyone) as opened:
            assert own_names(opened) is None


def memory(pid: int) -> int:
    """Bytes of a process that are in memory."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("no /proc here")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_two_hundred_requests_lose_none_and_hold_no_memory(folder: Path) -> None:
    """Eight in flight, of five budgets and seven pictures; each answered as when it comes alone."""
    with serving.command("--model", str(folder), *TINY, model="tiny") as process:
        running = process.running

        def fields(i: int) -> dict[str, Any]:
            budget = {"keep_tokens": 1 + i % 5} if i % 6 else {}
            return {
                "model": "tiny", "messages": [message("which?", [picture(i % 7, 200, 160)])], "max_tokens": 8,
                "temperature": 0, "extra_body": {"mm_processor_kwargs": budget, "vtprune": {"show": True}},
            }  # fmt: skip

        kinds = list({(i % 5, i % 6 == 0, i % 7): i for i in range(200)}.values())
        with running.client() as client:
            alone = {i: client.chat.completions.create(**fields(i)) for i in kinds}  # type: ignore[call-overload]
        expected = {(i % 5, i % 6 == 0, i % 7): answer for i, answer in alone.items()}

        async def all_of_them(numbers: range) -> list[Any]:
            gate = asyncio.Semaphore(8)

            async def one(client: Any, i: int) -> Any:
                async with gate:
                    return await client.chat.completions.create(**fields(i))

            async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
                return await asyncio.gather(*(one(client, i) for i in numbers))

        answers = asyncio.run(all_of_them(range(50)))
        before = memory(process.popen.pid)
        began = time.perf_counter()
        answers += asyncio.run(all_of_them(range(50, 200)))
        seconds = time.perf_counter() - began
        after = memory(process.popen.pid)
        print(f"{150 / seconds:.1f} requests/s, {before / 2**20:.1f} -> {after / 2**20:.1f} MiB")
        assert len(answers) == 200
        for i, answer in enumerate(answers):
            same = expected[i % 5, i % 6 == 0, i % 7]
            assert (answer.vtprune, answer.usage) == (same.vtprune, same.usage)
        assert len({tuple(a.vtprune["completion_token_ids"]) for a in answers}) > 10
        assert after - before < 16 * 2**20
        assert running.status()["requests"]["by_outcome"] == {"ok": 200 + len(alone)}
