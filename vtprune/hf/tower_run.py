"""One features call in whose tower stages act: its images, and which of their patches are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.compaction import Compaction
from ..core.errors import VtpruneError
from ..core.result import UnitResult
from ..core.visual import Assignment
from ..kernels import DeferredChecks, HostCopy, to_device
from ..model_adapters.tower_layout import Call
from ..model_adapters.tower_tokens import TowerTokens, tokens_of
from .tower_plan import TowerPlan


@dataclass
class TowerImage:
    """A unit of a tower stage: a row of the tower's batch (a crop, a tile, a frame) or one of the images packed in it.

    groups: [n, g] positions of its tokens' patches. left: [m] which of its n tokens are left.
    patches_per_token: patches of a visual token where the n tokens are single patches (`Method.by_patch`), else 1.
    output_slots: [q, patches_per_token] positions that the patches left take before the projector, which makes a visual
    token of each row.
    """

    number: int
    row: int
    groups: Tensor
    grid: tuple[int, int, int] | None
    left: Tensor
    patches_per_token: int = 1
    output_slots: Tensor | None = None
    states: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many tokens it had when the tower began."""
        return self.groups.shape[0]

    @property
    def whole(self) -> bool:
        """True while all its tokens are there."""
        return self.left.shape[0] == self.n

    @property
    def patches(self) -> Tensor:
        """[m, g] positions of the patches that are left."""
        return self.groups if self.whole else self.groups.index_select(0, self.left)


@dataclass
class TowerRun:
    """What the stages did in one features call.

    kept: per entry of its output [n] int8 on the host, 1 kept, 0 dropped, -1 a newline; None if nothing was dropped.
    lengths: rows each block ran on (its longest crop; all images where the tower packs them).
    cut: from all N rows to those that are left; cut_at: by block, the cut on which it ran.
    queries: by block, the patches of each image on which it ran. signals: what was read of attention, by (block, name).
    marks: `marks_of_kept`, on their way to the host as soon as nothing more will be dropped.
    """

    call: Call
    tokens: TowerTokens | None = None
    kept: list[Tensor] | None = None
    images: list[TowerImage] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    cut: Compaction | None = None
    cut_at: dict[int, Compaction | None] = field(default_factory=dict)
    queries: dict[int, list[int]] = field(default_factory=dict)
    signals: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    results: list[UnitResult] = field(default_factory=list)
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

    def left(self) -> int:
        """How many tokens are left in all images together."""
        return sum(image.left.shape[0] for image in self.images)

    def restored(self, block: int, x: Tensor) -> Tensor:
        """Rows [T, n, C] that a block saw, for all N positions."""
        cut = self.cut_at[block]
        return x if cut is None else cut.restore(x)

    def report(self) -> TowerRun:
        """What the LLM and `Last` ask for: no pixels and no states."""
        return TowerRun({}, kept=self.kept, results=self.results, notes=self.notes, lengths=self.lengths)

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
    for row in range(x.shape[0]):
        for (grid, n), part in zip(units, groups.split([n for _, n in units])):
            per_token = part.shape[1] if plan.by_patch else 1
            if per_token > 1:
                part, grid, n = part.reshape(-1, 1), None, part.numel()
            left = torch.arange(n, device=x.device)
            run.images.append(TowerImage(len(run.images), row, part, grid, left, per_token))


def compact(run: TowerRun) -> Compaction:
    """The cut from N rows to the prefix and the patches that are left; shorter rows are padded on the right."""
    assert run.tokens is not None
    keep = torch.zeros(run.shape[:2], dtype=torch.bool, device=run.images[0].left.device)
    keep[:, : run.tokens.prefix] = True
    counts = [run.tokens.prefix] * run.shape[0]
    for image in run.images:
        keep[image.row].index_fill_(0, image.patches.flatten(), True)
        counts[image.row] += image.patches.numel()
    return right_padded(keep, counts)


def right_padded(keep: Tensor, counts: Sequence[int]) -> Compaction:
    """From a mask [T, N] (True = stays) and its row sums: towers look for the CLS token at the left end."""
    n = max(counts)
    index = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :n]
    valid = None
    if min(counts) != n:
        valid = torch.arange(n, device=keep.device)[None] < to_device(torch.tensor(counts), keep.device)[:, None]
    return Compaction(index, valid, (keep.cumsum(1) - 1).clamp(min=0))


def rows_of_tokens(x: Tensor, image: TowerImage) -> Tensor:
    """[T, N, C] -> [m, C]: the image's tokens that are left, each the mean of its patches."""
    patches = image.patches.to(x.device)
    rows = x[image.row].index_select(0, patches.flatten())
    if patches.shape[1] == 1:
        return rows
    return rows.view(*patches.shape, -1).float().mean(1).to(x.dtype)


def with_merged(x: Tensor, image: TowerImage, answer: Assignment) -> Tensor:
    """x [T, N, C] with what flows into the kept tokens; patch by patch where a token has several."""
    patches = image.patches.to(x.device)
    new = answer.apply(x[image.row].index_select(0, patches.flatten()).view(*patches.shape, -1))
    at = patches.index_select(0, answer.idx).flatten()
    return x.index_put((torch.full_like(at, image.row), at), new.flatten(0, 1))


def with_patches_joined(run: TowerRun, x: Tensor) -> Tensor:
    """x [T, N, C] with the patches left side by side: each row of them where the token of its first patch stands."""
    for image in run.images:
        per_token = image.patches_per_token
        if per_token == 1 or image.whole:
            continue
        if image.left.shape[0] % per_token:
            raise VtpruneError(
                f"{image.left.shape[0]} patches left in the tower do not make tokens of {per_token} each"
            )
        left = image.left.view(-1, per_token)
        image.output_slots = image.groups.view(-1, per_token).index_select(0, left[:, 0] // per_token)
        to, from_ = image.output_slots.flatten(), image.patches.flatten()
        x = x.index_put((torch.full_like(to, image.row), to), x[image.row].index_select(0, from_))
    return x


def marks_of_kept(run: TowerRun) -> Tensor:
    """[T, N]: 2 where the tower's output stands for a kept token, 1 where a dropped one stood."""
    assert run.tokens is not None
    assert run.cut is not None
    marks = torch.ones(run.shape[:2], device=run.cut.index.device)
    marks[:, : run.tokens.prefix] = 2
    for image in run.images:
        shown = image.patches if image.output_slots is None else image.output_slots
        marks[image.row].index_fill_(0, shown.flatten(), 2)
    return marks
