"""The application under Ray Serve: replicas on a cluster, each with a model of its own, behind one address.

    vtprune serve --model ID --recipe FILE --ray auto --replicas 4

Ray Serve shares out the requests, and starts a new replica where one is lost; nothing of that is code of our own.
`GET /vtprune` and `/metrics` are those of the replica that answers.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI

from vtprune.evals.models import device_of, quiet
from vtprune.evals.tasks.cluster import connected
from vtprune.integrations.serve.app import create_app
from vtprune.integrations.serve.model import ServedModel

NAME = "vtprune"
BESIDE = 8  # requests that a full replica still takes: it tells them so, or answers for its health


def run(
    model: Mapping[str, Any], asked: Mapping[str, Any], host: str, port: int, address: str,
    *, replicas: int, grace: float, ready: Callable[[], None],
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM on the cluster at `address`, as `vtprune.evals.tasks.cluster.run` takes it.

    model: what `ServedModel` is made of, in every replica, which takes one CPU, and one GPU where its device is one.
    asked: the options of `create_app`, `limits` among them; what waits, waits in a replica. host, port: where every
    machine with a replica listens; where Ray Serve runs already on that cluster, it keeps its own. grace: seconds that
    requests have to end once a replica is stopped. ready: called once clients can connect.

    Raises ValueError where no cluster answers, or the replicas do not start, with the reason.
    """
    with connected(address):
        from ray import serve

        def built() -> FastAPI:
            quiet()
            return create_app(ServedModel(**model), **asked)

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": host, "port": port})
        replica: Any = serve.deployment(serve.ingress(built)())
        replica = replica.options(
            name="replica",
            num_replicas=replicas,
            max_ongoing_requests=1 + asked["limits"].waiting + BESIDE,
            graceful_shutdown_timeout_s=grace,
            ray_actor_options={"num_cpus": 1, "num_gpus": 1 if device_of(model["device"]) == "cuda" else 0},
        )
        try:
            with _signals() as ended:
                serve.run(replica.bind(), name=NAME, route_prefix="/")
                ready()
                ended.wait()
        except RuntimeError as error:
            raise ValueError(f"--ray {address}: the replicas did not start: {_why(serve)}") from error
        finally:
            serve.delete(NAME)  # other applications of the cluster go on


def _why(serve: Any) -> str:
    """What the replicas raised: the last line of a traceback."""
    told = serve.status().applications[NAME].deployments["replica"].message
    return (told.strip() or "Ray's logs say why").splitlines()[-1]


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in place of what they do otherwise."""
    ended = threading.Event()
    before = {n: signal.signal(n, lambda *_: ended.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
