"""The life of requests: time limits, the queue, clients that leave, the end of the server; counters of all that."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoints
import openai
import pytest
import serving
import torch
from serving import ENDLESS, Running, message, picture

import vtprune
from vtprune import UnsupportedCall
from vtprune.integrations.serve import Limits, ServedModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return serving.with_long_context(checkpoints.save("llava", tmp_path_factory.mktemp("model") / "llava"))


def served(folder: Path) -> ServedModel:
    return ServedModel(str(folder), "divprune", keep=0.5, name="tiny", device="cpu", dtype="float32")


LONG: Any = {"max_tokens": 900_000, **ENDLESS}  # for minutes


@pytest.fixture
def running(folder: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """A server with the limits that a test names."""
    with serving.serving(served(folder), Limits(**{"new_tokens": 1_000_000, **getattr(request, "param", {})})) as one:
        yield one


def limits(**given: Any) -> Any:
    return pytest.mark.parametrize("running", [given], indirect=True)


@limits(seconds=2)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_with_its_time(running: Running, stream: bool) -> None:
    """And so does its generation, before the one behind it has waited as long."""
    short = running.ask("what?", [picture(0)])
    with running.client() as client:
        asked: Any = {"model": "tiny", "messages": [message("what?", [picture(0)])], "temperature": 0, **LONG}
        if stream:
            chunks: list[Any] = []
            events = client.chat.completions.create(stream=True, **asked)
            with pytest.raises(openai.APIError, match=r"took longer than 2 s") as error:
                chunks.extend(events)
            assert chunks, "the time was over in the middle of the stream"
        else:
            with pytest.raises(openai.APIStatusError, match=r"took longer than 2 s") as error:
                client.chat.completions.create(**asked)
            assert error.value.status_code == 504  # type: ignore[attr-defined]
        assert error.value.code == "timeout"
    status = running.until("timeout")
    assert status["tokens"]["completion"] < 900_000
    assert running.ask("what?", [picture(0)]).vtprune == short.vtprune


@limits(waiting=1)
def test_a_full_queue_refuses_at_once(running: Running) -> None:
    with running.client() as client:
        asked: Any = {"model": "tiny", "messages": [message("what?", [picture(0)])], **LONG}
        first = client.chat.completions.create(stream=True, **asked)
        next(iter(first))  # under way
        second = threading.Thread(target=running.ask, args=("which?", [picture(1)]))
        second.start()
        for _ in range(2000):
            if running.status()["requests"]["in_flight"] == 2:
                break
        with pytest.raises(openai.InternalServerError, match="2 requests are waiting or running") as error:
            client.chat.completions.create(**asked)
        assert error.value.status_code == 503
        assert error.value.response.headers["retry-after"] == "1"
        first.close()
        second.join()
    assert running.until("cancelled")["requests"]["by_outcome"] == {"busy": 1, "cancelled": 1, "ok": 1}
    assert running.ask("what?", [picture(0)])


def test_a_stream_whose_client_leaves_frees_the_model(running: Running) -> None:
    before = [running.ask("which?", [picture(i)]) for i in range(3)]
    others: list[Any] = [None] * 3

    def other(i: int) -> None:
        others[i] = running.ask("which?", [picture(i)])

    with running.client() as client:
        asked: Any = {"model": "tiny", "messages": [message("what?", [picture(0)])], **LONG}
        stream = client.chat.completions.create(stream=True, **asked)
        next(iter(stream))
        threads = [threading.Thread(target=other, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        stream.close()
        for thread in threads:
            thread.join()
    status = running.until("cancelled")
    assert status["requests"]["by_outcome"] == {"ok": 6, "cancelled": 1}
    assert status["tokens"]["completion"] < 900_000
    assert [other.vtprune for other in others] == [one.vtprune for one in before]


@pytest.mark.parametrize("moment", ["headers", "body", "answer"])
def test_a_client_that_hangs_up(running: Running, moment: str) -> None:
    """In the middle of what it sends, or while it waits for a whole answer."""
    before = running.ask("which?", [picture(1)])
    data = json.dumps({"messages": [message("what?", [picture(0)])], **LONG}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}"])
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        if moment == "headers":
            line.sendall(head.encode())
        else:
            line.sendall(f"{head}\r\n\r\n".encode() + (data[:-10] if moment == "body" else data))
            for _ in range(2000):
                if running.status()["requests"]["in_flight"]:
                    break
            else:
                raise AssertionError("it never arrived")
    status = running.until("ok") if moment == "headers" else running.until("cancelled")
    assert status["tokens"]["completion"] < 900_000
    assert running.ask("which?", [picture(1)]).vtprune == before.vtprune


@limits(seconds=0.3)
def test_a_body_that_never_ends(running: Running) -> None:
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (504, "timeout")


def test_a_budget_that_a_method_cannot_reach_is_the_requests_fault(folder: Path) -> None:
    pool = vtprune.create("average_pool", stride=2)
    with serving.serving(ServedModel(str(folder), pool, name="tiny", device="cpu", dtype="float32")) as running:
        before = running.ask("what?", [picture(0)])
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="stride=2 gives 4 tokens, not 3"):
                running.ask(
                    "what?", [picture(0)], extra_body={"mm_processor_kwargs": {"keep_tokens": 3}}, stream=stream
                )
        assert running.ask("what?", [picture(0)]).vtprune == before.vtprune
        assert running.status()["requests"]["by_outcome"] == {"ok": 2, "bad_request": 2}


@contextmanager
def failing(running: Running, error: Exception) -> Iterator[None]:
    """The text model raises."""
    assert running.served is not None

    def fail(*_: Any) -> None:
        raise error

    hook = running.served.model.get_decoder().register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_hooks_refuse_is_told_in_their_own_words(running: Running, stream: bool) -> None:
    before = running.ask("which?", [picture(1)])
    refusal = UnsupportedCall("this call cannot be pruned")
    with failing(running, refusal), pytest.raises(openai.BadRequestError, match=str(refusal)):
        running.ask("what?", [picture(0)], stream=stream)
    assert running.until("bad_request")
    assert running.ask("which?", [picture(1)]).vtprune == before.vtprune


def test_a_fault_of_the_server_tells_nothing_of_it_and_the_next_is_answered(running: Running) -> None:
    before = running.ask("which?", [picture(1)])
    with failing(running, RuntimeError("secret")):
        status, answer = running.post({"messages": [message("what?")]})
        _, streamed = running.post({"messages": [message("what?")], "stream": True})
    assert status == 500
    assert answer["error"]["code"] == streamed["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(answer)
    assert running.until("internal_error", 2)["requests"]["errors"] == 2
    assert running.ask("which?", [picture(1)]).vtprune == before.vtprune


def test_two_applications_stand_in_one_process(folder: Path) -> None:
    with serving.serving(served(folder)) as one, serving.serving(served(folder)) as other:
        budget: Any = {"extra_body": {"mm_processor_kwargs": {"keep_tokens": 2}}}
        assert one.ask("what?", [picture(0)], **budget).usage.vtprune["visual_tokens_kept"] == 2
        assert other.ask("what?", [picture(0)]).usage.vtprune["visual_tokens_kept"] == 12
        assert one.status()["requests"]["total"] == other.status()["requests"]["total"] == 1
        assert other.status()["tokens"]["visual_kept"] == 12


def test_the_end_waits_for_what_runs_and_takes_the_patch_off(folder: Path) -> None:
    model = served(folder)
    with serving.serving(model) as running:
        assert model.handle.active
        client = running.client()
        asked: Any = {"model": "tiny", "messages": [message("what?", [picture(0)])], "max_tokens": 100, **ENDLESS}
        stream = iter(client.chat.completions.create(stream=True, **asked))
        next(stream)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    client.close()
    assert not model.handle.active
    assert not any("_vtprune" in module.__dict__ for module in model.model.modules())


def test_counters_as_json_and_for_prometheus(running: Running) -> None:
    for seed in range(3):
        answer = running.ask("what?", [picture(seed)], extra_body={"mm_processor_kwargs": {"keep_tokens": 4}})
    running.post({"messages": []})
    status = running.status()
    assert status["model"] == "tiny"
    assert status["recipe"]["stages"][0]["method"] == "divprune"
    assert status["requests"] == {"total": 4, "errors": 1, "in_flight": 0, "by_outcome": {"ok": 3, "bad_request": 1}}
    usage = answer.usage
    assert status["tokens"]["visual"] == 75
    assert status["tokens"]["visual_kept"] == 12
    assert status["tokens"]["prompt"] == 3 * usage.prompt_tokens
    assert status["tokens"]["completion"] == 3 * usage.completion_tokens
    assert status["last"]["visual_tokens_kept"] == 4
    seconds = status["last"]["seconds"]
    assert 0 < seconds["queued"] < seconds["ttft"] < seconds["total"]
    assert status["latency_seconds"]["ttft"]["count"] == 3
    texts = [
        running.get("/metrics"),
        running.get("/vtprune?format=prometheus"),
        running.get("/vtprune", Accept="text/plain"),
    ]
    assert len({text for _, text in texts}) == 1
    lines = dict(line.rsplit(" ", 1) for line in texts[0][1].splitlines() if not line.startswith("#"))
    assert float(lines['vtprune_requests_total{outcome="ok"}']) == 3
    assert float(lines["vtprune_visual_kept_tokens_total"]) == 12
    assert float(lines["vtprune_ttft_seconds_count"]) == 3
    assert float(lines['vtprune_total_seconds_bucket{le="+Inf"}']) == 3
    assert running.get("/vtprune?format=xml")[0] == 400
