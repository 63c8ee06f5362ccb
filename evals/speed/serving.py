"""A server under load, dense and pruned (`vtprune bench --serve`): requests per second, TTFT and resident memory.

One server runs as a process of its own and answers both: a request names its budget, and 1.0 prunes nothing. Rounds of
dense and pruned requests take turns, so that both meet the same machine.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from statistics import fmean, median

import openai
from tqdm import tqdm

from vtprune.evals.report import Row, environment, share, show
from vtprune.evals.speed.servers import Server, started, version_of
from vtprune.evals.speed.tables import BenchReport
from vtprune.recipe import Recipe

QUESTION = "what is in the picture?"
LOOK = 0.05  # seconds between two looks at the memory of the server
NOTES = (
    "requests/s: median over rounds that take turns on one server; dense are requests with keep_ratio 1.0, which "
    "prunes nothing. faster: against dense of the same round, median. TTFT: from the sending of a request, which may "
    "wait in the server, to the first text of its answer, over all rounds; latency: to its end.",
    "Every request has a picture of noise of its own, so that no cache of prefixes or of pictures answers it. The "
    "clients run on the same machine.",
    "RSS: peak of the resident memory of the server's processes in the first round. A process seldom gives memory "
    "back, so budgets take their turns from the smallest on, counts of tokens before shares, and dense is last. "
    "Pages that processes share count in each of them, and the memory of a GPU in none.",
)


@dataclass(frozen=True)
class Load:
    """What the clients do. requests: of a round; concurrency: clients, each with one request under way.

    repeats: rounds of each budget. new_tokens: the most of an answer. side: of the square pictures, in pixels.

    Raises ValueError for a number below 1.
    """

    requests: int = 64
    concurrency: int = 8
    repeats: int = 7
    new_tokens: int = 16
    side: int = 336

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) < 1:
                raise ValueError(f"{one.name}={getattr(self, one.name)}: use an integer >= 1")


@dataclass(frozen=True)
class Answer:
    """One request. Times in seconds since it was sent; tokens as the server counts them, the prompt's once pruned."""

    first: float
    total: float
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Round:
    """Requests of one budget, one after another from each client. seconds: of all together; rss: peak, in bytes."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    rss: int = 0


def serving(
    engine: str,
    model: str | None,
    recipe: Recipe,
    keeps: Sequence[float | int | None],
    load: Load,
    *,
    device: str,
    dtype: str,
    arguments: Sequence[str] = (),
    progress: bool = True,
) -> BenchReport:
    """Start a server and measure it, dense and at every budget of `keeps`; None is the budget of the recipe.

    engine: "vtprune" or "vllm". model: a path or an id of the Hub; None is the embedded toy, for "vtprune" alone.
    recipe: of one stage, as a request names one budget. dtype: by name. arguments: more of the server's own.

    Raises ValueError for an engine or a model that cannot be served and for a request that is refused.
    """
    if len(recipe.stages) != 1:
        raise ValueError(
            f"the recipe has {len(recipe.stages)} stages, and a request names one budget: give one of a single stage"
        )
    with started(engine, model, recipe, load.concurrency, device, dtype, arguments) as server:
        rounds = asyncio.run(_rounds(server, keeps, load, progress))
    name = Path(model).name if model else "toy"
    known = {one.name: getattr(load, one.name) for one in fields(load)}
    env = environment(
        device, dtype, 1, engine=engine, model=name, **known, arguments=list(arguments), recipe=recipe.to_json()
    )
    env["versions"] |= {"vllm": version_of("vllm")} if engine == "vllm" else {}
    method = recipe.stages[0].method.name
    rows = [_row("dense", 1.0, rounds[-1], rounds[-1])]
    rows += [_row(method, keep, rounds[i], rounds[-1]) for i, keep in enumerate(_ordered(keeps))]
    return ServingReport(f"{name} served by {engine}, {load.concurrency} clients", rows, env, NOTES)


def _ordered(keeps: Sequence[float | int | None]) -> list[float | int | None]:
    """Counts of tokens first, then shares, each from the smallest on."""
    return sorted(keeps, key=lambda keep: (isinstance(keep, float), keep or 0))


async def _rounds(server: Server, keeps: Sequence[float | int | None], load: Load, progress: bool) -> list[list[Round]]:
    """The rounds of each budget, those of dense last."""
    budgets: list[Row] = [budget(keep) for keep in _ordered(keeps)] + [{"keep_ratio": 1.0}]
    done: list[list[Round]] = [[] for _ in budgets]
    seeds = count()
    direct = openai.DefaultAsyncHttpxClient(trust_env=False)  # past the proxies of this machine
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=direct
    ) as client:
        name = (await client.models.list()).data[0].id
        with tqdm(total=len(budgets) * load.repeats, unit="round", disable=not progress) as bar:
            for repeat in range(load.repeats):
                for given, into in zip(budgets, done):
                    if repeat == 0:  # a first time that nobody counts
                        await _round(server, client, name, given, load, load.concurrency, seeds)
                    into.append(await _round(server, client, name, given, load, load.requests, seeds))
                    bar.update()
    return done


def budget(keep: float | int | None) -> Row:
    """The options of a request: a share, a number of tokens, or nothing for what the recipe says."""
    if keep is None:
        return {}
    return {"keep_ratio" if isinstance(keep, float) else "keep_tokens": keep}


async def _round(
    server: Server, client: openai.AsyncOpenAI, name: str, given: Row, load: Load, requests: int, seeds: Iterator[int]
) -> Round:
    made = Round()
    options = {"model": name, "max_tokens": load.new_tokens, "extra_body": {"mm_processor_kwargs": given}}
    pending = iter([_messages(next(seeds), load.side) for _ in range(requests)])

    async def ask_in_turn() -> None:
        for messages in pending:
            made.answers.append(await _ask(client, {**options, "messages": messages}))

    async def look() -> None:
        while True:
            made.rss = max(made.rss, server.resident())
            await asyncio.sleep(LOOK)

    server.find_children()
    looking = asyncio.create_task(look())
    begin = time.perf_counter()
    try:
        await asyncio.gather(*(ask_in_turn() for _ in range(load.concurrency)))
    except openai.OpenAIError as error:
        raise ValueError(f"the server failed at a request: {error}{server.last_words()}") from error
    finally:
        looking.cancel()
    made.seconds = time.perf_counter() - begin
    made.rss = max(made.rss, server.resident())
    return made


def _messages(seed: int, side: int) -> list[Row]:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]


async def _ask(client: openai.AsyncOpenAI, request: Row) -> Answer:
    begin = time.perf_counter()
    first, usage = None, None
    stream = await client.chat.completions.create(
        **request, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        # An answer may end without any text, where its first token is the last.
        told = any(choice.delta.content or choice.finish_reason for choice in chunk.choices)
        if first is None and told:
            first = time.perf_counter() - begin
    if first is None or usage is None:
        raise ValueError("the server ended a stream without an answer or without its usage")
    return Answer(first, time.perf_counter() - begin, usage.prompt_tokens, usage.completion_tokens)


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of them do not exceed (nearest rank); part in (0, 1].

    Raises ValueError for no values or another part.
    """
    if not values or not 0 < part <= 1:
        raise ValueError(f"percentile {part} of {len(values)} values: use a part in (0, 1] of at least one value")
    return sorted(values)[math.ceil(part * len(values)) - 1]


def _row(method: str, keep: float | int | None, rounds: Sequence[Round], dense: Sequence[Round]) -> Row:
    answers = [one for made in rounds for one in made.answers]
    first, total = [one.first for one in answers], [one.total for one in answers]
    rates = [len(made.answers) / made.seconds for made in rounds]
    return {
        "method": method,
        "keep": keep,
        "prompt_tokens": fmean(one.prompt_tokens for one in answers),
        "completion_tokens": fmean(one.completion_tokens for one in answers),
        "requests_per_second": median(rates),
        "requests_per_second_by_round": rates,
        "speedup": median(rate * one.seconds / len(one.answers) for rate, one in zip(rates, dense)),
        "ttft_ms": 1e3 * median(first),
        "ttft_p95_ms": 1e3 * percentile(first, 0.95),
        "latency_ms": 1e3 * median(total),
        "latency_p95_ms": 1e3 * percentile(total, 0.95),
        "rss_bytes": rounds[0].rss,
    }


class ServingReport(BenchReport):
    """A line a budget; times in ms, median and 95th percentile."""

    kind = "bench-serve"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        header = ["method", "kept", "prompt tokens", "answer tokens", "requests/s", "faster", "TTFT ms", "p95"]
        return [*header, "latency ms", "p95", "RSS MiB"], [_line(row) for row in self.rows]

    def file_name(self) -> str:
        """serve_engine_model_device_dtype_clients_time.json"""
        env = self.environment
        stamp = "".join(c for c in env["time"][:19] if c.isalnum())
        parts = env["engine"], env["model"], env["device"], env["dtype"], f"c{env['concurrency']}", stamp
        return f"serve_{'_'.join(parts)}.json"


def _line(row: Row) -> list[str]:
    times = [show(row[name]) for name in ("ttft_ms", "ttft_p95_ms", "latency_ms", "latency_p95_ms")]
    tokens = [f"{row[name]:.1f}" for name in ("prompt_tokens", "completion_tokens")]
    rate = [show(row["requests_per_second"]), f"{row['speedup']:.2f}x"]
    return [row["method"], share(row["keep"]), *tokens, *rate, *times, f"{row['rss_bytes'] / 2**20:.0f}"]
