"""`vtprune bench --serve`: a server under load, dense and pruned."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.cli.common import needs
from vtprune.cli.options import parse_keeps
from vtprune.evals.models import device_of, dtype_of

if TYPE_CHECKING:
    from vtprune.evals.speed import BenchReport
    from vtprune.recipe import Recipe


def served(
    engine: str,
    model: str | None,
    methods: list[str] | None,
    keep: list[str] | None,
    recipes: list[Path] | None,
    device: str | None,
    dtype: str | None,
    arguments: str,
    progress: bool,
    **load: int,
) -> BenchReport:
    """Measure one server with one method at every keep, or with one recipe. load: the fields of `serving.Load`."""
    needs("openai", "psutil")
    from vtprune.evals.speed.servers import check
    from vtprune.evals.speed.serving import Load, serving

    check(engine, model)
    recipe, keeps = _recipe(model, methods or [], keep, recipes or [])
    where = device_of(device or (None if model else "cpu"))
    if engine == "vllm" and where != device_of(None):
        raise ValueError(f"--device {device}: vLLM runs where it was built for, here {device_of(None)}: leave it out")
    kind = str(dtype_of(dtype, where)).removeprefix("torch.")
    return serving(
        engine, model, recipe, keeps, Load(**load), device=where, dtype=kind, arguments=shlex.split(arguments),
        progress=progress,
    )  # fmt: skip


def _recipe(
    model: str | None, methods: list[str], keep: list[str] | None, recipes: list[Path]
) -> tuple[Recipe, list[float | int | None]]:
    """What the server is started with, and the budgets of requests; None is the recipe's own."""
    import vtprune
    from vtprune.parsing import parse_method

    if len(methods) + len(recipes) > 1:
        raise ValueError("--serve measures one server: give one --method with its budgets, or one --recipe")
    if recipes:
        if keep:
            raise ValueError("--recipe holds its own budget: leave out --keep")
        return vtprune.Recipe.load(recipes[0]), [None]
    name, options = parse_method(methods[0] if methods else "divprune")
    rule = vtprune.create(name, **options)
    keeps: list[float | int | None] = [*parse_keeps(keep, () if rule.adaptive else (0.25,))] or [None]
    return vtprune.Recipe.of(rule.stages(keeps[0], _depth(model))), keeps


def _depth(model: str | None) -> int:
    """Decoder layers of a model, which the schedules of some methods depend on."""
    from transformers import AutoConfig

    from vtprune.evals.toys.image import CHECKPOINT

    config = AutoConfig.from_pretrained(model or CHECKPOINT, trust_remote_code=False)
    return config.get_text_config().num_hidden_layers
