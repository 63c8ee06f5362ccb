"""Counters of a server: requests, tokens and latencies, as JSON and as Prometheus reads them."""

from __future__ import annotations

import json
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vtprune.integrations.serve.call import Call
from vtprune.recipe import Recipe

RECENT = 512  # requests whose latencies the JSON sums up
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = {
    "prompt": "Prompt tokens that the LLM prefilled, once pruned before it.",
    "prompt_unpruned": "Prompt tokens before pruning.",
    "visual": "Visual tokens before pruning.",
    "visual_kept": "Visual tokens left behind all stages.",
    "completion": "Tokens generated.",
}
LATENCIES = {
    "queued": "Seconds from the arrival of a request to the begin of its generation.",
    "ttft": "Seconds from the arrival of a request to its first token.",
    "total": "Seconds from the arrival of a request to its last token.",
}


class Status:
    """What a server has done since it began. Touched by the event loop alone."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe, self.began = name, recipe, time.time()
        self.registry = CollectorRegistry()
        self._requests = Counter("vtprune_requests", "Requests by outcome.", ["outcome"], registry=self.registry)
        self._in_flight = Gauge("vtprune_requests_in_flight", "Requests not answered yet.", registry=self.registry)
        self._tokens = {
            name: Counter(f"vtprune_{name}_tokens", text, registry=self.registry) for name, text in TOKENS.items()
        }
        self._latencies = {
            name: Histogram(f"vtprune_{name}_seconds", text, buckets=BUCKETS, registry=self.registry)
            for name, text in LATENCIES.items()
        }
        self.outcomes: Tally[str] = Tally()
        self.tokens: Tally[str] = Tally()
        self.in_flight = 0
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in LATENCIES}
        self.last: dict[str, Any] | None = None

    def arrived(self) -> None:
        """A request is in flight."""
        self.in_flight += 1
        self._in_flight.set(self.in_flight)

    def ended(self, call: Call, outcome: str) -> None:
        """It is no more. outcome: "ok", or a word for what went wrong."""
        self.in_flight -= 1
        self._in_flight.set(self.in_flight)
        self.count(outcome)
        if call.counts is None:
            return
        counts = call.counts
        values = (counts.prompt, counts.unpruned, counts.visual, counts.kept, call.generated)
        for name, value in zip(TOKENS, values):
            self.tokens[name] += value
            self._tokens[name].inc(value)
        if outcome == "ok":
            self.last = call.line()
            for name, seconds in self.last["seconds"].items():
                self.recent[name].append(seconds)
                self._latencies[name].observe(seconds)

    def count(self, outcome: str) -> None:
        """Count a request by its outcome alone, such as one that was refused at the door."""
        self.outcomes[outcome] += 1
        self._requests.labels(outcome).inc()

    def document(self) -> dict[str, Any]:
        """As JSON; latencies in seconds, of the last 512 requests that were answered."""
        total = sum(self.outcomes.values())
        errors = total - self.outcomes["ok"]
        return {
            "model": self.name,
            "uptime_seconds": round(time.time() - self.began, 1),
            "pruned_by": in_words(self.recipe),
            "recipe": json.loads(self.recipe.to_json()),
            "requests": {
                "total": total,
                "errors": errors,
                "in_flight": self.in_flight,
                "by_outcome": dict(self.outcomes),
            },
            "tokens": {name: self.tokens[name] for name in TOKENS},
            "latency_seconds": {name: _summary(sorted(values)) for name, values in self.recent.items()},
            "last": self.last,
        }

    def prometheus(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


def in_words(recipe: Recipe) -> str:
    """Its methods and budgets: "divprune at 25 %"."""
    found = []
    for stage in recipe.stages:
        budget = stage.keep if stage.keep_total is None else stage.keep_total
        share = f" at {100 * budget:g} %" if isinstance(budget, float) else f" at {budget} tokens"
        found.append(stage.method.name + ("" if budget is None else share))
    return ", ".join(found)


def _summary(values: Sequence[float]) -> dict[str, float | int]:
    if not values:
        return {"count": 0}
    at = {name: values[min(len(values) - 1, int(share * len(values)))] for name, share in (("p50", 0.5), ("p95", 0.95))}
    return {"count": len(values), "mean": round(sum(values) / len(values), 4), **at, "max": values[-1]}
