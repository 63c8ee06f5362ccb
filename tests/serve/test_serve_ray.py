"""`vtprune serve --ray`: replicas answer as the plain server does, also once one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

pytest.importorskip("ray", reason="Ray is not installed: make test-lmms makes an environment with it")

import ray_processes
import serving
from serving import picture

pytestmark = pytest.mark.lmms
WORDS = "how many shapes are there ?"
Answer = tuple[str, dict[str, Any]]


def answer(running: serving.Running, seed: int, **options: Any) -> Answer:
    """Text and usage of a greedy answer about a picture."""
    made = running.ask(WORDS, [picture(seed, 64, 64)], **options)
    return made.choices[0].message.content, made.usage.vtprune


@pytest.fixture(scope="module")
def expected() -> dict[int, Answer]:
    """What the plain server answers."""
    with serving.command() as process:
        return {seed: answer(process.running, seed) for seed in range(6)}


@pytest.fixture(scope="module")
def process() -> Iterator[serving.Process]:
    with serving.command("--ray", "local", "--replicas", "2") as process:
        yield process


def replicas(process: serving.Process) -> list[int]:
    return ray_processes.named("ServeReplica:vtprune:replica", process.popen.pid)


def test_replicas_answer_as_the_plain_server(process: serving.Process, expected: dict[int, Answer]) -> None:
    assert len(replicas(process)) == 2
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(expected, pool.map(lambda seed: answer(process.running, seed), expected)))
    assert found == expected
    assert process.running.get("/health") == (200, '{"status":"ok"}')
    with pytest.raises(openai.BadRequestError, match="keep_ratio"):
        answer(process.running, 0, extra_body={"mm_processor_kwargs": {"keep_ratio": 2.0}})
    chunks = process.running.ask(WORDS, [picture(1, 64, 64)], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected[1][0]


def test_a_replica_that_is_killed_under_load_changes_no_other_answer(
    process: serving.Process, expected: dict[int, Answer]
) -> None:
    """What it was answering is lost and said to be; whatever comes later is answered."""
    victim = replicas(process)[0]
    seeds = [*expected] * 8
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(answer, process.running, seed) for seed in seeds]
        asked[0].result(120)
        os.kill(victim, signal.SIGKILL)
        lost = 0
        for seed, future in zip(seeds, asked):
            try:
                assert future.result(120) == expected[seed]
            except (openai.APIStatusError, openai.APIConnectionError):
                lost += 1
    assert lost <= 6, "no more than were in flight"
    assert {seed: answer(process.running, seed) for seed in expected} == expected
    assert victim not in replicas(process)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--replicas", "2"], "--replicas belongs to --ray"),
        (["--ray", "127.0.0.1:1"], "--ray 127.0.0.1:1: no cluster answers there"),
        (["--ray", "local", "--model", "/nowhere/model"], "the replicas did not start: ValueError: --model /nowhere"),
    ],
)
def test_what_cannot_start_is_one_sentence(options: list[str], told: str) -> None:
    line = [sys.executable, "-m", "vtprune.cli", "serve", "--port", "0", *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_ends_it_cleanly(process: serving.Process) -> None:
    status, said = process.end()
    assert status == 0
    assert "Traceback" not in said
