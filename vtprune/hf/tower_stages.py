"""Ask the methods of the stages at one block of a tower, and write down what they answer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.ask import ask
from ..core.errors import UnsupportedModel
from ..core.method import Stage
from ..core.result import UnitResult
from ..core.visual import Assignment, Span, Visual
from ..kernels import DeferredChecks, deferring, full_precision
from ..kernels.clock import timed
from ..signals import kind_of
from .tower_plan import TowerPlan
from .tower_run import TowerImage, TowerRun, compact, rows_of_tokens, with_merged


def run_stages(plan: TowerPlan, needs: dict[tuple[int, str], int], run: TowerRun, k: int, x: Tensor) -> Tensor:
    """Run the stages that act at block k on x [T, N, C]; the returned states hold what was merged.

    needs: (block, name) of every signal that is read, and the last block at which it is.
    """
    before = run.left()
    for stage, acts_at in zip(plan.stages, plan.acts_at):
        if k in acts_at:
            x = _run_stage(plan, run, stage, (k, acts_at[-1]), x)
    if run.left() < before:
        run.cut = compact(run)
        run.bias = _size_bias(plan, run)
        run.memo.clear()
    for key in [key for key in run.signals if needs[key] <= k]:
        del run.signals[key]
    return x


def _run_stage(plan: TowerPlan, run: TowerRun, stage: Stage, block: tuple[int, int], x: Tensor) -> Tensor:
    """Ask the method about every image that has more tokens than its budget. block: (this one, the stage's last)."""
    todo, views = [], []
    for image in run.images:
        (budget,) = stage.budgets([image.n // image.patches_per_token])
        budget = None if budget is None else budget * image.patches_per_token
        if budget is None or budget < image.left.shape[0]:
            todo.append(image)
            views.append(_visual(plan, run, stage, image, block, budget, x))
    if not todo:
        return x
    k, last = block
    with deferring() as checks, timed(x.device), full_precision(x.device):
        answers = ask(stage, views, least=k != last)  # before its last block a schedule may keep more, not less
    run.checks.append(DeferredChecks(checks))
    if not x.is_cuda or not stage.method.trusted:
        run.raise_if_failed()
    for image, view, answer in zip(todo, views, answers):
        if answer.merges:
            x = with_merged(x, image, answer)
        image.left = image.left.index_select(0, answer.idx.to(image.left.device))
        run.note(view.state.get("note"))
        run.results.append(_result(plan, stage, image, k, view, answer))
    return x


def _visual(
    plan: TowerPlan,
    run: TowerRun,
    stage: Stage,
    image: TowerImage,
    block: tuple[int, int],
    budget: int | None,
    x: Tensor,
) -> Visual:
    """What the method sees of an image; its raster only while all tokens are there."""
    grid = image.grid if image.whole else None
    signals = {
        need: _signal(plan, run, image, block[0] + need.offset, need.kind)
        for need in stage.method.needs
        if plan.reads(need)
    }
    return Visual(
        x=rows_of_tokens(x, image),
        budget=budget,
        grid=grid,
        spans=(Span(0, grid),) if grid else (),
        signals=signals,
        state=image.states.setdefault(id(stage.method), {}),
        block=block,
    )


def _signal(plan: TowerPlan, run: TowerRun, image: TowerImage, block: int, name: str) -> Tensor:
    """[m] or [m, C] float32: mean over the patches of each token."""
    found = run.signals.get((block, name))
    if not found:
        raise UnsupportedModel(
            f"block {block} of {type(plan.tower).__name__} did not pass the attention interface, so its {name!r} "
            "cannot be read; choose a method without signals"
        )
    if len(found) > 1:
        found[:] = [torch.cat([part.flatten(0, 1) for part in found])[None]]
    of_tokens = rows_of_tokens(run.restored(block, found[0]), image)
    if kind_of(name).over_queries and plan.packed:
        of_tokens = of_tokens / run.queries[block][image.number]
    return of_tokens if kind_of(name).vector else of_tokens[:, 0]


def _size_bias(plan: TowerPlan, run: TowerRun) -> Tensor | None:
    """[T, n] float32: log of how many tokens each row stands for, where merged ones weigh; None if none do.

    Towers that pack images take none: their masks are segment lengths.
    """
    sizes = [
        (image, state["size"])
        for image in run.images
        for stage in plan.stages
        if getattr(stage.method, "weighs", False)
        and (state := image.states.get(id(stage.method), {})).get("size") is not None
    ]
    if not sizes or run.cut is None:
        return None
    if plan.packed:
        run.note("sizes of merged tokens do not enter attention in a tower that packs images into one row")
        return None
    whole = sizes[0][1].new_zeros(run.shape[:2])
    for image, size in sizes:
        patches = image.patches
        whole[image.row, patches.flatten()] = size.clamp(min=1e-3).log().repeat_interleave(patches.shape[1])
    return run.cut.cut(whole, 1)


def _result(plan: TowerPlan, stage: Stage, image: TowerImage, k: int, view: Visual, answer: Assignment) -> UnitResult:
    return UnitResult(
        row=image.row,
        image=image.number,
        part=None,
        modality=plan.modality,
        method=stage.method.name,
        where=("vit", k),
        n=view.n,
        positions=image.left,
        idx=answer.idx,
        order=answer.order,
        scores=answer.scores,
        spans=view.spans,
        grid=view.grid,
        assignment=answer,
    )
