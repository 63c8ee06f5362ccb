"""Ask the methods of the stages at one block of a tower, and write down what they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from ..core.ask import ask
from ..core.errors import UnsupportedModel
from ..core.method import Stage
from ..core.reading import no_cls_note
from ..core.reduction import Reducer, Reduction, reduced
from ..core.result import TowerStep, UnitResult
from ..core.signal import Signal
from ..core.visual import Assignment, Visual
from ..kernels import DeferredChecks, check_rows_finite, deferring, each, full_precision
from ..kernels.clock import timed
from ..signals import kind_of
from .tower_plan import TowerPlan
from .tower_run import TowerImage, TowerRun, compact, of_images, rows_of_tokens

Todo = list[tuple[TowerImage, int | None]]
Alike = dict[tuple[int, int], list[TowerImage]]


@dataclass(frozen=True)
class Answers:
    """What a method says of some images: the tokens that they keep side by side, [K] of all tokens of the run.

    counts: how many of these each image keeps. assignments: one for each image, for those who ask for results.
    """

    images: list[TowerImage]
    kept: Tensor
    counts: list[int]
    assignments: Callable[[], Sequence[Assignment]]


def run_stages(plan: TowerPlan, needs: dict[tuple[int, str], int], run: TowerRun, k: int, x: Tensor) -> Tensor:
    """Run the stages that act at block k on x [T, N, C]; the returned states hold what was merged.

    needs: (block, name) of every signal that is read, and the last block at which it is.
    """
    before = sum(run.counts())
    for stage, acts_at in zip(plan.stages, plan.acts_at):
        if k in acts_at:
            x = _run_stage(plan, run, stage, (k, acts_at[-1]), x)
    if sum(run.counts()) < before:
        run.cut = compact(run)
        run.bias = _size_bias(plan, run)
        run.memo.clear()
    for key in [key for key in run.signals if needs[key] <= k]:
        del run.signals[key]
    return x


def _run_stage(plan: TowerPlan, run: TowerRun, stage: Stage, block: tuple[int, int], x: Tensor) -> Tensor:
    """Ask the method about every image that has more tokens than its budget. block: (this one, the stage's last)."""
    method, todo = stage.method, Todo()
    for image in run.images:
        (budget,) = stage.budgets([image.n // run.patches_per_token])
        budget = None if budget is None else budget * run.patches_per_token
        if budget is None or budget < image.left:
            todo.append((image, budget))
    alike = _alike(method, todo, block) if isinstance(method, Reducer) else {}
    if not todo or (isinstance(method, Reducer) and not alike):
        return x
    run.to(x.device)
    rows = rows_of_tokens(run, x)
    signals = {need: _signal(plan, run, block[0] + need.offset, need.kind) for need in method.needs if plan.reads(need)}
    with deferring() as checks, timed(x.device), full_precision(x.device):
        if isinstance(method, Reducer):
            x, answers = _reduce(run, method, alike, block, x, rows, signals)
        else:
            x, answers = _ask(run, stage, todo, block, x, rows, signals)
    run.checks.append(DeferredChecks(checks))
    if not x.is_cuda or not method.trusted:
        run.raise_if_failed()
    seen = [(found, [replace(image) for image in found.images]) for found in answers]
    run.steps.append(TowerStep(("vit", block[0]), partial(_results, plan.modality, method.name, block[0], seen)))
    _keep(run, answers)
    return x


def _keep(run: TowerRun, answers: list[Answers]) -> None:
    """Go on with what the answers leave, and with all that is left of the other images."""
    asked = {image.number for found in answers for image in found.images}
    others = [image for image in run.images if image.number not in asked]
    parts = [found.kept for found in answers] + ([of_images(run, others, run.left)] if others else [])
    run.keep(parts[0] if len(parts) == 1 else torch.cat(parts).sort().values)
    for found in answers:
        for image, count in zip(found.images, found.counts):
            image.left = count


def _results(modality: str, method: str, k: int, seen: list[tuple[Answers, list[TowerImage]]]) -> list[UnitResult]:
    """One for each image. seen: the answers, and their images as the method found them."""
    results = []
    for found, images in seen:
        for image, kept, answer in zip(images, found.kept.split(found.counts), found.assignments()):
            results.append(
                UnitResult(
                    row=image.row,
                    image=image.number,
                    part=None,
                    modality=modality,
                    method=method,
                    where=("vit", k),
                    n=image.left,
                    positions=kept - image.start,
                    idx=answer.idx,
                    order=answer.order,
                    scores=answer.scores,
                    spans=image.spans,
                    grid=image.raster,
                    assignment=answer,
                )
            )
    return sorted(results, key=lambda result: result.image)


def _signal(plan: TowerPlan, run: TowerRun, block: int, name: str) -> Tensor:
    """[M] or [M, C] float32: mean over the patches of each token that is left."""
    found = run.signals.get((block, name))
    if not found:
        raise UnsupportedModel(
            f"block {block} of {type(plan.tower).__name__} did not pass the attention interface, so its {name!r} "
            "cannot be read; choose a method without signals"
        )
    if len(found) > 1:
        found[:] = [torch.cat([part.flatten(0, 1) for part in found])[None]]
    of_tokens = rows_of_tokens(run, run.restored(block, found[0]))
    if kind_of(name).over_queries and plan.packed:
        of_tokens = of_tokens / each(run.queries[block], run.counts(), of_tokens.device)[:, None]
    return of_tokens if kind_of(name).vector else of_tokens[:, 0]


# -- methods for images of equal length together ----------------------------------------------------------------------


def _alike(method: Reducer, todo: Todo, block: tuple[int, int]) -> Alike:
    """The images from which tokens go now, by how many they have and how many stay."""
    budgets: dict[tuple[int, int | None], list[TowerImage]] = {}
    for image, budget in todo:
        budgets.setdefault((image.left, budget), []).append(image)
    alike: Alike = {}
    for (n, budget), images in budgets.items():
        left = method.due(Visual(torch.empty(n, 0), budget, block=block))
        if left < n:
            alike.setdefault((n, left), []).extend(images)
    return alike


def _reduce(
    run: TowerRun,
    method: Reducer,
    alike: Alike,
    block: tuple[int, int],
    x: Tensor,
    rows: Tensor,
    signals: dict[Signal, Tensor],
) -> tuple[Tensor, list[Answers]]:
    """The states x [T, N, C] with what was merged, and what stays of the images."""
    if any(signal.without_cls for signal in signals):
        run.note(no_cls_note(method.name))
    answers = []
    for (n, left), images in alike.items():
        batch = partial(_batch, run, images, n)
        x_of, signals_of = batch(rows), {signal: batch(t) for signal, t in signals.items()}
        for t in signals_of.values():
            check_rows_finite(t, "signals")
        check_rows_finite(x_of)
        size = None if run.size is None else batch(run.size.index_select(0, run.left))
        step = reduced(method, method.seen(x_of, signals_of, size, block), left)
        if step.src is not None or step.matrix is not None:
            x = _merged(x, batch(run.patches), step)
        idx, order = step.index.sort(1)
        kept = batch(run.left).gather(1, idx).flatten()
        sizes = step.resize(size)
        if sizes is not None:
            run.size = run.at.new_ones(len(run.at), dtype=torch.float32) if run.size is None else run.size
            run.size = run.size.index_copy(0, kept, sizes.gather(1, order).flatten())
        answers.append(Answers(images, kept, [left] * len(images), partial(_assignments, _slim(step))))
    return x, answers


def _batch(run: TowerRun, images: list[TowerImage], n: int, rows: Tensor) -> Tensor:
    """Rows [M, ...] of all tokens left -> [B, n, ...] of these images, which have n each."""
    return of_images(run, images, rows).view(len(images), n, *rows.shape[1:])


def _merged(x: Tensor, patches: Tensor, step: Reduction) -> Tensor:
    """x [T, N, C] with what flows into the rows that stay, patch by patch. patches: [B, n, g], flat in x."""
    rows = x.reshape(-1, x.shape[-1])
    new = step.apply(rows.index_select(0, patches.flatten()).view(*patches.shape[:2], -1))
    to = patches.gather(1, step.index[..., None].expand(-1, -1, patches.shape[2]))
    return rows.index_copy(0, to.flatten(), new.view(-1, x.shape[-1])).view_as(x)


def _slim(step: Reduction) -> Reduction:
    """The step as it is kept for those who ask: of a matrix what is not zero."""
    return step if step.matrix is None else replace(step, matrix=step.matrix.to_sparse())


def _assignments(step: Reduction) -> list[Assignment]:
    step = step if step.matrix is None else replace(step, matrix=step.matrix.to_dense())
    return [step.assignment(image) for image in range(len(step.index))]


def _size_bias(plan: TowerPlan, run: TowerRun) -> Tensor | None:
    """[T, n] float32: log of how many tokens each row stands for, where merged ones weigh; None if none do.

    Towers that pack images take none: their masks are segment lengths.
    """
    if run.size is None or run.cut is None:
        return None
    if not any(isinstance(stage.method, Reducer) and stage.method.weighs for stage in plan.stages):
        return None
    if plan.packed:
        run.note("sizes of merged tokens do not enter attention in a tower that packs images into one row")
        return None
    whole = run.size.new_zeros(run.shape[0] * run.shape[1])
    size = run.size.index_select(0, run.left).clamp(min=1e-3).log()
    whole.index_copy_(0, run.patches.flatten(), size.repeat_interleave(run.patches.shape[1]))
    return run.cut.cut(whole.view(*run.shape[:2]), 1)


# -- methods for one image at a time ----------------------------------------------------------------------------------


def _ask(
    run: TowerRun,
    stage: Stage,
    todo: Todo,
    block: tuple[int, int],
    x: Tensor,
    rows: Tensor,
    signals: dict[Signal, Tensor],
) -> tuple[Tensor, list[Answers]]:
    """The states x [T, N, C] with what was merged, and what stays of the images."""
    counts, name = run.counts(), id(stage.method)
    rows_of = rows.split(counts)
    signals_of = {need: values.split(counts) for need, values in signals.items()}
    views = [
        Visual(
            x=rows_of[image.number],
            budget=budget,
            grid=image.raster,
            spans=image.spans,
            signals={need: values[image.number] for need, values in signals_of.items()},
            state=image.states.setdefault(name, {}),
            block=block,
        )
        for image, budget in todo
    ]
    if stage.trusted:  # tested for its answers, which no block has to check again
        answers = stage.method.batch(views)
    else:  # before its last block a schedule may keep more, not less
        answers = ask(stage, views, least=block[0] != block[1])
    images = [image for image, _ in todo]
    for image, view, answer in zip(images, views, answers):
        if answer.merges:
            x = _with_merged(x, run.patches.split(counts)[image.number], answer)
        run.note(view.state.get("note"))
    kept = [len(answer.idx) for answer in answers]
    if kept == [view.n for view in views]:
        left = of_images(run, images, run.left)
    else:
        starts = list(accumulate(counts, initial=0))
        picked = torch.cat([answer.idx for answer in answers])
        if len(run.images) > 1:
            picked = picked + each([starts[image.number] for image in images], kept, picked.device)
        left = run.left.index_select(0, picked)
    return x, [Answers(images, left, kept, partial(list, answers))]


def _with_merged(x: Tensor, patches: Tensor, answer: Assignment) -> Tensor:
    """x [T, N, C] with what flows into the kept tokens of an image, patch by patch. patches: [m, g]."""
    rows = x.reshape(-1, x.shape[-1])
    new = answer.apply(rows.index_select(0, patches.flatten()).view(*patches.shape, -1))
    at = patches.index_select(0, answer.idx).flatten()
    return rows.index_copy(0, at, new.flatten(0, 1)).view_as(x)
