"""One features call in whose tower stages act: its images, and which of their patches are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..core.compaction import Compaction
from ..core.errors import VtpruneError
from ..core.result import TowerStep
from ..core.visual import Span
from ..kernels import DeferredChecks, HostCopy, each, to_device
from ..model_adapters.tower_layout import Call
from ..model_adapters.tower_tokens import TowerTokens, tokens_of
from .tower_plan import TowerPlan


@dataclass
class TowerImage:
    """A unit of a tower stage: a row of the tower's batch (a crop, a tile, a frame) or one of the images packed in it.

    start: its first token among those of all images. n: how many it had when the tower began; left: how many now.
    """

    number: int
    row: int
    start: int
    n: int
    left: int
    grid: tuple[int, int, int] | None
    states: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def raster(self) -> tuple[int, int, int] | None:
        """Its grid while all tokens are there."""
        return self.grid if self.left == self.n else None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The same as rasters."""
        return (Span(0, self.raster),) if self.raster else ()


@dataclass
class TowerRun:
    """What the stages did in one features call.

    Tokens of all images stand side by side in one tensor, so that no operation is repeated image by image.

    kept: per entry of its output [n] int8 on the host, 1 kept, 0 dropped, -1 a newline; None if nothing was dropped.
    at: [S, g] where the patches of all S tokens stand among the rows of the flattened batch. left: [M] which tokens are
    left, ascending. size: [S] float32, for how many tokens each stands; None: one each.
    patches_per_token: patches of a visual token where tokens are single patches (`Method.by_patch`), else 1.
    joined: [Q, patches_per_token] rows that the patches left take before the projector, which makes a visual token of
    each of the Q.
    lengths: rows each block ran on (its longest crop; all images where the tower packs them).
    cut: from all N rows to those that are left; cut_at: by block, the cut on which it ran.
    queries: by block, the patches of each image on which it ran. signals: what was read of attention, by (block, name).
    marks: `marks_of_kept`, on their way to the host as soon as nothing more will be dropped.
    """

    call: Call
    tokens: TowerTokens | None = None
    kept: list[Tensor] | None = None
    images: list[TowerImage] = field(default_factory=list)
    at: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.int64))
    left: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    patches: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.int64))
    size: Tensor | None = None
    patches_per_token: int = 1
    joined: Tensor | None = None
    shape: tuple[int, ...] = ()
    cut: Compaction | None = None
    cut_at: dict[int, Compaction | None] = field(default_factory=dict)
    queries: dict[int, list[int]] = field(default_factory=dict)
    signals: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    steps: list[TowerStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    checks: list[DeferredChecks] = field(default_factory=list)
    marks: HostCopy | None = None
    bias: Tensor | None = None
    memo: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def once(self, value: Any, cut: Callable[[], Any]) -> Any:
        """Blocks share their arguments: cut each object once per cut (and keep it alive while its id is a key)."""
        if id(value) not in self.memo:
            self.memo[id(value)] = value, cut()
        return self.memo[id(value)][1]

    def note(self, text: str | None) -> None:
        """Remember a sentence for the user, once."""
        if text and text not in self.notes:
            self.notes.append(text)

    def counts(self) -> list[int]:
        """How many tokens are left in each image."""
        return [image.left for image in self.images]

    def to(self, device: torch.device) -> None:
        """Move what is left to the device of a block, where a tower is spread over several."""
        self.at, self.left, self.patches = (t.to(device) for t in (self.at, self.left, self.patches))
        self.size = None if self.size is None else self.size.to(device)

    def keep(self, left: Tensor) -> None:
        """Go on with the tokens left [M], ascending."""
        if len(left) < len(self.left):
            self.left, self.patches = left, self.at.index_select(0, left)

    def restored(self, block: int, x: Tensor) -> Tensor:
        """Rows [T, n, C] that a block saw, for all N positions."""
        cut = self.cut_at[block]
        return x if cut is None else cut.restore(x)

    def report(self) -> TowerRun:
        """What the LLM and `Last` ask for: no pixels and no states."""
        return TowerRun({}, kept=self.kept, steps=self.steps, notes=self.notes, lengths=self.lengths)

    def raise_if_failed(self) -> None:
        """Raise what the checks of the stages found."""
        while self.checks:
            self.checks.pop(0).raise_if_failed()


def begin(plan: TowerPlan, run: TowerRun, x: Tensor) -> None:
    """Find the images of a call by the states x [T, N, C] of its first block with a hook."""
    run.tokens = tokens_of(plan.call(run.call), plan.layout, plan.modality, x.shape[1])
    run.shape, run.lengths = tuple(x.shape), [x.shape[1]] * len(plan.blocks)
    groups = to_device(run.tokens.groups, x.device)
    units: Any = run.tokens.grids
    if plan.by_frame and plan.packed:
        units = tuple(((1, h, w), h * w) for (t, h, w), _ in units for _ in range(t))
    first = torch.arange(x.shape[0], device=x.device)[:, None, None] * x.shape[1]
    run.at = (first + groups).flatten(0, 1)
    if plan.by_patch:
        run.patches_per_token = groups.shape[1]
        run.at = run.at.reshape(-1, 1)
        units = tuple((None, n * run.patches_per_token) for _, n in units) if run.patches_per_token > 1 else units
    run.left, run.patches = torch.arange(len(run.at), device=x.device), run.at
    start = 0
    for row in range(x.shape[0]):
        for grid, n in units:
            run.images.append(TowerImage(len(run.images), row, start, n, n, grid))
            start += n


def compact(run: TowerRun) -> Compaction:
    """The cut from N rows to the prefix and the patches that are left; shorter rows are padded on the right."""
    assert run.tokens is not None
    keep = torch.zeros(run.shape[:2], dtype=torch.bool, device=run.patches.device)
    keep[:, : run.tokens.prefix] = True
    keep.view(-1).index_fill_(0, run.patches.flatten(), True)
    counts = [run.tokens.prefix] * run.shape[0]
    for image in run.images:
        counts[image.row] += image.left * run.patches.shape[1]
    return right_padded(keep, counts)


def right_padded(keep: Tensor, counts: Sequence[int]) -> Compaction:
    """From a mask [T, N] (True = stays) and its row sums: towers look for the CLS token at the left end."""
    n = max(counts)
    index = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :n]
    valid = None
    if min(counts) != n:
        valid = torch.arange(n, device=keep.device)[None] < to_device(torch.tensor(counts), keep.device)[:, None]
    return Compaction(index, valid, (keep.cumsum(1) - 1).clamp(min=0))


def of_images(run: TowerRun, images: Sequence[TowerImage], rows: Tensor) -> Tensor:
    """Of rows [M, ...] of all tokens that are left those of some images, side by side."""
    if len(images) == len(run.images):
        return rows
    starts, counts = list(accumulate(run.counts(), initial=0)), [image.left for image in images]
    ahead = list(accumulate(counts, initial=0))
    shift = each([starts[image.number] - before for image, before in zip(images, ahead)], counts, rows.device)
    return rows.index_select(0, torch.arange(ahead[-1], device=rows.device) + shift)


def rows_of_tokens(run: TowerRun, x: Tensor) -> Tensor:
    """[T, N, C] -> [M, C]: the tokens that are left, each the mean of its patches."""
    patches = run.patches.to(x.device)
    rows = x.reshape(-1, x.shape[-1]).index_select(0, patches.flatten())
    if patches.shape[1] == 1:
        return rows
    return rows.view(*patches.shape, -1).float().mean(1).to(x.dtype)


def with_patches_joined(run: TowerRun, x: Tensor) -> Tensor:
    """x [T, N, C] with the patches left side by side: each row of them where the token of its first patch stands."""
    per_token = run.patches_per_token
    if per_token == 1 or run.cut is None:
        return x
    for count in run.counts():
        if count % per_token:
            raise VtpruneError(f"{count} patches left in the tower do not make tokens of {per_token} each")
    first = run.left.view(-1, per_token)[:, 0]
    run.joined = run.at.view(-1, per_token).index_select(0, first // per_token)
    rows = x.reshape(-1, x.shape[-1])
    from_ = rows.index_select(0, run.patches.flatten().to(x.device))
    return rows.index_copy(0, run.joined.flatten().to(x.device), from_).view_as(x)


def marks_of_kept(run: TowerRun) -> Tensor:
    """[T, N]: 2 where the tower's output stands for a kept token, 1 where a dropped one stood."""
    assert run.tokens is not None
    assert run.cut is not None
    marks = torch.ones(run.shape[:2], device=run.cut.index.device)
    marks[:, : run.tokens.prefix] = 2
    shown = run.patches if run.joined is None else run.joined
    marks.view(-1).index_fill_(0, shown.flatten(), 2)
    return marks
