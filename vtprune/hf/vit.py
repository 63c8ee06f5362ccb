"""Fewer tokens inside a plain vision transformer: timm, open_clip, torchvision, transformers.

Every block of one model instance gets a forward of its own, made of the block's own modules, that reduces tokens
between attention and MLP. Where nothing is to be done the class's forward runs, so r=0 and keep=1.0 change no bit.

    vit_run         one forward pass: how many patches each image has and keeps
    vit_tokens      what a method sees at one block
    vit_arguments   the block's arguments, for the patches that are left
    vit_each_image  methods that choose for one image at a time
    vit_last        what is reported of the last pass
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.covering import cover, standing
from ..core.errors import UnsupportedModel
from ..core.method import Stage, budget
from ..core.reduction import Reducer, Reduction, Tokens, reduced, stacked
from ..kernels import full_precision, recorded
from ..model_adapters.vit_blocks import ROPE, Given, Vit
from ..model_adapters.vit_pooling import cut_masks, masked_mean, weighted_pooling
from ..model_adapters.vit_signals import WHOLE_BATCH, Part, watch
from .tower_plan import blocks_of_stage
from .vit_arguments import cut_arguments, key_bias
from .vit_each_image import EachImage
from .vit_last import VitLast
from .vit_run import Plan, VitLocal, VitRun, all_rows, check_rows, patches_of_images
from .vit_tokens import tokens_at


class VitPatch:
    """Everything that is installed on one vision transformer. `remove()` takes it off."""

    def __init__(self, vit: Vit, stages: Sequence[Stage]) -> None:
        self.vit, self.stages = vit, list(stages)
        self.depth = len(vit.blocks)
        # The arguments of a block, hidden states first.
        self.names = tuple(inspect.signature(type(vit.blocks[0]).forward).parameters)[1:]
        self.arguments = tuple(inspect.signature(type(vit.root).forward).parameters)[1:]
        methods = [stage.method for stage in self.stages]
        self.reducers = [method if isinstance(method, Reducer) else EachImage(method) for method in methods]
        self.acts_at = [blocks_of_stage(stage, self.depth) for stage in self.stages]
        self.weighs = any(method.weighs for method in self.reducers)
        self.local = VitLocal()
        self.latest: VitLast | None = None
        self._plans: dict[int, Plan] = {}
        self._undo: list[Callable[[], None]] = []
        check_stages(self)
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def root(self) -> nn.Module:
        """The module that is patched, whatever it was found in."""
        return self.vit.root

    def _install(self) -> None:
        for k, block in enumerate(self.vit.blocks):
            if "forward" in block.__dict__:
                raise UnsupportedModel(
                    f"block {k} ({type(block).__name__}) has a forward of its own on the instance, put there by "
                    "another library: undo that first"
                )
            self._undo.append(cover(block, "forward", partial(self._forward, k)))
        if any(method.reads for method in self.reducers):
            for k in range(self.depth):
                self._undo += watch(self.vit, k, self._note)
        if any(method.pools for method in self.reducers):
            self._undo += weighted_pooling(self.vit, self._sizes)
            self._undo += masked_mean(self.vit, self._sizes, self._valid)
        else:
            self._undo += masked_mean(self.vit, lambda: None, self._valid)
        self._undo += cut_masks(self.vit, self._valid)
        self._undo.append(self.vit.root.register_forward_pre_hook(self._called, with_kwargs=True).remove)
        if callable(getattr(type(self.vit.root), "forward_intermediates", None)):
            plain = standing(self.vit.root, "forward_intermediates")
            self._undo.append(cover(self.vit.root, "forward_intermediates", partial(self._intermediates, plain)))

    def remove(self) -> None:
        """Undo everything; safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def release(self) -> None:
        """Let go of the model, once removed for good."""
        del self.vit

    # -- one forward pass -------------------------------------------------------------------------------------------

    def plan(self, n: int) -> Plan:
        """(method, patches left) of every block, of n patches."""
        if n not in self._plans:
            plan: Plan = [(None, n)] * self.depth
            now = n
            in_order = sorted(zip(self.stages, self.reducers, self.acts_at), key=lambda found: found[2][0])
            for stage, method, acts_at in in_order:
                goal = None if stage.keep is None else min(now, budget(stage.keep, n, method.rounding))
                for k, left in zip(acts_at, method.counts(now, len(acts_at), goal)):
                    plan[k] = method, left
                    now = left
            self._plans[n] = plan
        return self._plans[n]

    @property
    def by_place(self) -> bool:
        """True if blocks put out all rows in this call."""
        return self.vit.by_place or self.local.dense

    def _called(self, module: Any, args: Any, kwargs: Given) -> None:
        """Note whether the caller gave a mask; while it is recorded, transformers makes one that hides nothing."""
        call = {**dict(zip(self.arguments, args)), **kwargs}
        self.local.masked = call.get("attention_mask") is not None

    def _begin(self, x: Tensor, given: Given) -> VitRun:
        real, each = patches_of_images(self.vit, int(x.shape[1]), given)
        last = VitLast(int(x.shape[1]), self.vit.prefix)
        run = self.local.run = VitRun([self.plan(n) for n in real], last, real, real if each else None)
        return run

    def _forward(self, k: int, *args: Any, **kwargs: Any) -> Any:
        """A block's forward: the class's own unless tokens go here or merged ones are about."""
        block, vit = self.vit.blocks[k], self.vit
        given = {**dict(zip(self.names, args)), **kwargs}
        x = given.pop(self.names[0])
        run = self._begin(x, given) if k == 0 else self.local.run
        if run is None:
            return type(block).forward(block, *args, **kwargs)
        if run.short is not None and x is run.full:
            x = run.short
        check_rows(run, k, x)
        method, left = run.plans[0][k][0], [plan[k][1] for plan in run.plans]
        now = [x.shape[1] - vit.prefix] if run.now is None else run.now
        reduces = method is not None and any(goal < n for goal, n in zip(left, now))
        if not reduces and not run.last.steps:
            x = type(block).forward(block, *args, **kwargs)
        else:
            drop_mask = run.now is not None or (recorded() and not self.local.masked)
            given = cut_arguments(run, given, drop_mask)
            x = self._split(run, k, x, method if reduces else None, left, given)
        run.last.lengths.append(x.shape[1])
        if self.by_place and run.last.steps:
            run.short = x
            x = run.full = all_rows(run, x)
        if k == self.depth - 1:
            self._finish(run)
        return x

    def _finish(self, run: VitRun) -> None:
        run.last.size, run.last.valid = run.size, run.valid()
        if not recorded():
            self.local.last = self.latest = run.last

    def _split(self, run: VitRun, k: int, x: Tensor, method: Reducer | None, left: list[int], given: Given) -> Tensor:
        """The block in its two halves, with a reduction in between where there is a method."""
        block, parts = self.vit.blocks[k], self.vit.parts
        self.local.seen = {} if method is not None and method.reads else None
        x = x + parts.attend(block, x, key_bias(run, x, self.weighs), given)
        if method is not None:
            with torch.no_grad(), full_precision(x.device):
                step = self._step(run, k, x, method, left, given)
                run.size = step.resize(run.size)
                if any(given.get(name) is not None for name in ROPE):
                    patches = step.index[:, self.vit.prefix :] - self.vit.prefix
                    run.origin = patches if run.origin is None else run.origin.gather(1, patches)
            if self.by_place and not run.last.steps:
                run.full = x
            run.last.steps.append((k, step))
            x = step.apply(x)
        self.local.seen = None
        return x + parts.feed(block, x)

    def _step(self, run: VitRun, k: int, x: Tensor, method: Reducer, left: list[int], given: Given) -> Reduction:
        """The method's reduction of the batch; images with padding behind them in groups of equal counts."""
        if run.now is None:
            return reduced(method, self._tokens(run, k, x, method, WHOLE_BATCH, run.real[0], given), left[0])
        groups: dict[tuple[int, int, int], list[int]] = {}
        for image, counts in enumerate(zip(run.now, left, run.real)):
            groups.setdefault(counts, []).append(image)
        steps: list[tuple[Tensor, int, Reduction | None]] = []
        for (now, goal, n0), images in groups.items():
            rows, n = torch.tensor(images, device=x.device), now + self.vit.prefix
            step = None
            if goal < now:
                step = reduced(method, self._tokens(run, k, x, method, Part(rows, n), n0, given), goal)
            steps.append((rows, n, step))
        run.now = [min(now, goal) for now, goal in zip(run.now, left)]
        return stacked(steps, x.shape[0], x.shape[1], run.size)

    def _tokens(self, run: VitRun, k: int, x: Tensor, method: Reducer, part: Part, n0: int, given: Given) -> Tokens:
        return tokens_at(self.vit, run, k, x, method, part, n0, given, self.local.seen or {}, self.weighs)

    # -- what others ask of the pass that runs ----------------------------------------------------------------------

    def _note(self, k: int, name: str, output: Tensor) -> None:
        if self.local.seen is not None:
            self.local.seen[name] = output.detach()

    def _sizes(self) -> Tensor | None:
        """Sizes of the rows that the last block put out."""
        run = self.local.run
        return None if run is None or self.by_place else run.size

    def _valid(self) -> Tensor | None:
        """[B, M] bool: which rows the last block put out are real, once some are gone; None while all are there."""
        run = self.local.run
        if run is None or self.by_place or not run.last.steps:
            return None
        valid = run.valid()
        return torch.ones_like(run.last.steps[-1][1].index, dtype=torch.bool) if valid is None else valid

    def _intermediates(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The plain forward_intermediates, whose maps need all rows: dropped tokens keep their last state."""
        self.local.dense = True
        try:
            return plain(*args, **kwargs)
        finally:
            run, self.local.dense, self.local.run = self.local.run, False, None
            if run is not None and len(run.last.lengths) < self.depth:  # it stops at the last block that was asked for
                self._finish(run)


def check_stages(patch: VitPatch) -> None:
    """Refuse stages that the blocks of a plain vision transformer cannot run, or not together."""
    for stage, acts_at in zip(patch.stages, patch.acts_at):
        if acts_at[-1] >= patch.depth:
            raise ValueError(
                f"{stage.method.name} at {stage.where!r}: this model has blocks 0..{patch.depth - 1}, and tokens "
                "leave in the middle of a block"
            )
        if stage.keep_total is not None:
            raise ValueError("keep_total is for the images of a prompt; a vision transformer takes keep")
    blocks = [k for acts_at in patch.acts_at for k in acts_at]
    if len(blocks) != len(set(blocks)):
        raise ValueError(f"stages at blocks {blocks}: one stage a block")
    if patch.weighs and patch.vit.flash:
        raise UnsupportedModel(
            "flash attention takes no bias for the size of merged tokens: load the model with "
            "attn_implementation='sdpa', or choose a method that does not weigh (tome with proportional=False)"
        )
