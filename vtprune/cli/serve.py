"""`vtprune serve`: one pruned model behind OpenAI's chat API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtprune.cli.common import needs, sentence
from vtprune.cli.options import Device, Dtype, Model, parse_keep

if TYPE_CHECKING:
    from socket import socket

    from vtprune.recipe import Recipe
    from vtprune.types import Method


@sentence
def serve(
    model: Model = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe.json, as vtprune tune writes.")] = None,
    method: Annotated[str | None, typer.Option(help="In its place a name, or name:option=value (divprune).")] = None,
    keep: Annotated[
        str | None, typer.Option(help="0.25 or 25% (share), 64 (tokens); requests may say another.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model; its path unless said.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Key of clients; others on this machine can see it.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds it.")] = None,
    allow_anyone: Annotated[bool, typer.Option("--allow-anyone", help="Other machines may ask without a key.")] = False,
    allow_remote_urls: Annotated[
        bool, typer.Option("--allow-remote-urls", help="Fetch pictures and films from any http(s) address.")
    ] = False,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 32 << 20,
    max_images: Annotated[int, typer.Option(min=0, help="Pictures of a request.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of its pictures and frames together.")] = 128_000_000,
    max_videos: Annotated[int, typer.Option(min=0, help="Films of a request.")] = 4,
    frames: Annotated[int, typer.Option(min=1, help="Frames taken of a film.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 2048,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may take.")] = 300.0,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that wait while one is answered.")] = 32,
    grace: Annotated[float, typer.Option(min=1, help="Seconds for running requests when a signal ends it.")] = 10.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    device: Device = None,
    dtype: Dtype = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster that runs the replicas; local starts one.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: models that answer side by side.")] = 1,
) -> None:
    """Serve a model, pruned: /v1/chat/completions with pictures and films, /vtprune, /metrics, and a page at /.

    A request may name a budget of its own: mm_processor_kwargs={"keep_ratio": 0.5} or {"keep_tokens": 64}.
    """
    needs("fastapi", "uvicorn", "openai", "prometheus_client")
    if log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"--log-level {log_level}: use debug, info, warning or error")
    if ray is None and replicas > 1:
        raise ValueError("--replicas belongs to --ray: name a cluster, or start one with --ray local")
    rule, budget = _stages(recipe, method, keep)
    from transformers.utils import logging

    from vtprune.evals import models
    from vtprune.integrations.serve import Limits, ServedModel, create_app
    from vtprune.integrations.serve.run import bound, key_of, own_names, run, url_of
    from vtprune.integrations.serve.status import in_words

    limits = Limits(
        body_bytes=max_body_bytes, images=max_images, pixels=max_pixels, videos=max_videos,
        video_frames=frames, new_tokens=max_new_tokens, seconds=timeout, waiting=max_waiting,
        remote_urls=allow_remote_urls,
    )  # fmt: skip
    key = key_of(api_key, api_key_file)
    loaded: dict[str, Any] = {
        "path": model, "method": rule, "keep": budget, "name": name, "device": device, "dtype": dtype
    }  # fmt: skip
    with bound(host, port, key is not None, allow_anyone) as opened:
        asked: dict[str, Any] = {"limits": limits, "api_key": key, "hosts": None if key else own_names(opened)}
        if ray is not None:
            _serve_on_ray(opened, loaded, asked, ray, replicas, grace)
            return
        models.quiet()
        logging.set_verbosity_error()
        served = ServedModel(**loaded)
        app = create_app(served, **asked)
        told = f"vtprune serves {served.name}, pruned by {in_words(served.recipe)}, at {url_of(opened)}"
        run(app, opened, lambda: typer.echo(told), grace, log_level)


def _serve_on_ray(
    opened: socket, loaded: dict[str, Any], asked: dict[str, Any], address: str, replicas: int, grace: float
) -> None:
    """The same application in replicas, which listen where `opened` has found a free place."""
    from vtprune.integrations.serve import on_ray
    from vtprune.integrations.serve.model import TOY
    from vtprune.integrations.serve.run import url_of

    name = loaded["name"] or loaded["path"] or TOY
    told = f"vtprune serves {name} from {replicas} replica{'s' * (replicas > 1)} at {url_of(opened)}"
    host, port = opened.getsockname()[:2]
    opened.close()
    on_ray.run(loaded, asked, host, port, address, replicas=replicas, grace=grace, ready=lambda: typer.echo(told))


def _stages(recipe: Path | None, method: str | None, keep: str | None) -> tuple[Recipe | Method, float | int | None]:
    """(method or stages, budget) that were asked for; divprune at 25 % where nothing was."""
    import vtprune
    from vtprune.parsing import parse_method

    if recipe is not None:
        if method is not None or keep is not None:
            raise ValueError("--recipe holds its own method and budget: leave out --method and --keep")
        return vtprune.Recipe.load(recipe), None
    name, options = parse_method(method or "divprune")
    rule = vtprune.create(name, **options)
    return rule, None if keep is None and rule.adaptive else parse_keep(keep or "25%")
