"""Fewer tokens inside a plain vision transformer: timm, open_clip, transformers.

Every block of one model instance gets a forward of its own, made of the block's own modules, that reduces tokens
between attention and MLP. Where nothing is to be done the class's forward runs, so r=0 and keep=1.0 change no bit.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .kernels import attention_received, attention_rows
from .model_adapters.vits import Attention, Given, Vit, cover, watch, weighted_pooling
from .reduction import Reducer, Reduction, Tokens, keep_rows
from .tower import places
from .types import Method, Stage, UnsupportedCall, UnsupportedModel, Visual, budget

MASKS = ("attn_mask", "attention_mask", "is_causal", "k_x", "v_x")
READABLE = {"cls": "attention", "received": "attention", "mean_keys": "mean_keys", "keys": "keys"}


@dataclass
class VitLast:
    """What the last forward pass did to the tokens of its batch.

    n: rows before anything was reduced, prefix included. lengths: rows behind every block. steps: (block, reduction).
    size: [B, M] float32, for how many tokens each output row stands; None: one each. notes: what stood in for what.
    """

    n: int
    prefix: int
    lengths: list[int] = field(default_factory=list)
    steps: list[tuple[int, Reduction]] = field(default_factory=list)
    size: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def slots(self) -> Tensor | None:
        """[B, n] int64: the output row that holds each token, -1 for a dropped one; None if all stayed."""
        slots, rows = None, self.n
        for _, step in self.steps:
            here = step.slots(rows)
            rows = step.index.shape[1]
            slots = here if slots is None else here.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -1)
        return slots

    @property
    def index(self) -> Tensor | None:
        """[B, M] int64: the original place of the token that each output row stands for; None if all stayed."""
        index = None
        for _, step in self.steps:
            index = step.index if index is None else index.gather(1, step.index)
        return index

    def unmerge(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """x [B, M, C], such as the model's rows -> [B, n, C]: every token gets the row that holds it.

        fill: the value of dropped tokens. Raises ValueError if x has another number of rows.
        """
        slots = self.slots
        rows = self.n if slots is None else self.steps[-1][1].index.shape[1]
        if x.shape[1] != rows:
            raise ValueError(f"x has {x.shape[1]} rows, but the last forward pass left {rows}")
        if slots is None:
            return x
        out = x.gather(1, slots.clamp(min=0)[..., None].expand(*slots.shape, x.shape[2]))
        return out.masked_fill((slots < 0)[..., None], fill)

    @property
    def stats(self) -> dict[int, dict[str, Tensor]]:
        """What methods noted, by block: zero_tprune the share of heads that passed its filter, "heads_passed" [B]."""
        return {k: dict(step.stats) for k, step in self.steps if step.stats}


@dataclass
class Run:
    """One forward pass. plan: (method, patches left) of every block. origin: [B, n] places of the patches left."""

    plan: list[tuple[Reducer | None, int]]
    last: VitLast
    size: Tensor | None = None
    origin: Tensor | None = None
    full: Tensor | None = None  # dense outputs: what was handed out, all rows
    short: Tensor | None = None  # and what goes on


class _Local(threading.local):
    """Per-thread state of one patched model; a copy starts empty."""

    run: Run | None = None
    last: VitLast | None = None
    seen: dict[str, Tensor] | None = None
    dense = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Local:
        return _Local()

    def __reduce__(self) -> Any:
        return _Local, ()


class VitSession:
    """Everything that is installed on one vision transformer. `remove()` takes it off."""

    def __init__(self, vit: Vit, stages: Sequence[Stage]) -> None:
        self.vit, self.stages = vit, list(stages)
        self.depth = len(vit.blocks)
        # The arguments of a block, hidden states first.
        self.names = tuple(inspect.signature(type(vit.blocks[0]).forward).parameters)[1:]
        self.reducers = [self._reducer(stage) for stage in self.stages]
        self.at = [places(stage, self.depth) for stage in self.stages]
        self.weighs = any(method.weighs for method in self.reducers)
        self.local = _Local()
        self.latest: VitLast | None = None
        self._plans: dict[int, list[tuple[Reducer | None, int]]] = {}
        self._undo: list[Callable[[], None]] = []
        self._check()
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _reducer(self, stage: Stage) -> Reducer:
        return stage.method if isinstance(stage.method, Reducer) else EachImage(stage.method)

    def _check(self) -> None:
        for stage, at in zip(self.stages, self.at):
            if at[-1] >= self.depth:
                raise ValueError(
                    f"{stage.method.name} at {stage.where!r}: this model has blocks 0..{self.depth - 1}, and tokens "
                    "leave in the middle of a block"
                )
            if stage.keep_total is not None:
                raise ValueError("keep_total is for the images of a prompt; a vision transformer takes keep")
        blocks = [k for at in self.at for k in at]
        if len(blocks) != len(set(blocks)):
            raise ValueError(f"stages at blocks {blocks}: one stage a block")
        if self.weighs and self.vit.flash:
            raise UnsupportedModel(
                "flash attention takes no bias for the size of merged tokens: load the model with "
                "attn_implementation='sdpa', or choose a method that does not weigh (tome with proportional=False)"
            )

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
        if callable(getattr(type(self.vit.root), "forward_intermediates", None)):
            self._undo.append(cover(self.vit.root, "forward_intermediates", self._intermediates))

    def remove(self) -> None:
        """Undo everything; safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def release(self) -> None:
        """Let go of the model, once removed for good."""
        del self.vit

    # -- one forward pass -------------------------------------------------------------------------------------------

    def plan(self, n: int) -> list[tuple[Reducer | None, int]]:
        """(method, patches left) of every block, of n patches."""
        if n not in self._plans:
            plan: list[tuple[Reducer | None, int]] = [(None, n)] * self.depth
            now = n
            for stage, method, at in sorted(zip(self.stages, self.reducers, self.at), key=lambda found: found[2][0]):
                goal = None if stage.keep is None else min(now, budget(stage.keep, n))
                for k, left in zip(at, method.counts(now, len(at), goal)):
                    plan[k] = method, left
                    now = left
            self._plans[n] = plan
        return self._plans[n]

    def _forward(self, k: int, *args: Any, **kwargs: Any) -> Any:
        """A block's forward: the class's own unless tokens go here or merged ones are about."""
        block, vit = self.vit.blocks[k], self.vit
        given = {**dict(zip(self.names, args)), **kwargs}
        x = given.pop(self.names[0])
        run = self._begin(x) if k == 0 else self.local.run
        if run is None:
            return type(block).forward(block, *args, **kwargs)
        if run.short is not None and x is run.full:
            x = run.short
        method, left = run.plan[k]
        reduces = method is not None and left < x.shape[1] - vit.prefix
        if not reduces and not run.last.steps:
            x = type(block).forward(block, *args, **kwargs)
        else:
            x = self._split(run, k, x, method if reduces else None, left, self._allowed(run, given))
        run.last.lengths.append(x.shape[1])
        if self.local.dense and run.last.steps:
            run.short = x
            x = run.full = self._dense(run, x)
        if k == self.depth - 1:
            run.last.size = run.size
            self.local.last = self.latest = run.last
        return x

    def _begin(self, x: Tensor) -> Run:
        if self.vit.checkpointing():
            raise UnsupportedCall(
                "gradient checkpointing runs blocks a second time, out of order: turn it off "
                "(set_grad_checkpointing(False) or gradient_checkpointing_disable())"
            )
        run = Run(self.plan(x.shape[1] - self.vit.prefix), VitLast(x.shape[1], self.vit.prefix))
        self.local.run = run
        return run

    def _allowed(self, run: Run, given: Given) -> Given:
        """The block's further arguments for the tokens that are left; masks are refused."""
        for name in MASKS:
            if given.get(name) is not None and given[name] is not False:
                raise UnsupportedCall(f"{name} hides tokens, which a reduction would have to follow: call without it")
        given = {name: value for name, value in given.items() if name not in MASKS}
        rope = given.get("rope")
        if rope is not None and run.origin is not None:
            if rope.dim() != 2:
                raise UnsupportedCall(f"rotary positions of shape {list(rope.shape)}: one table [N, d] is supported")
            given["rope"] = rope[run.origin][:, None]  # [B, 1, n, d]
        return given

    def _split(self, run: Run, k: int, x: Tensor, method: Reducer | None, left: int, given: Given) -> Tensor:
        """The block in its two halves, with a reduction in between where there is a method."""
        block, parts = self.vit.blocks[k], self.vit.parts
        bias = run.size.log().to(x.dtype) if run.size is not None and self.weighs else None
        self.local.seen = {} if method is not None and method.reads else None
        x = x + parts.attend(block, x, bias, given)
        if method is not None:
            with torch.no_grad():
                step = method.reduce(self._tokens(run, k, x, method, bias, given), left)
                run.size = step.resize(run.size)
                if "rope" in given:
                    patches = step.index[:, self.vit.prefix :] - self.vit.prefix
                    run.origin = patches if run.origin is None else run.origin.gather(1, patches)
            if self.local.dense and not run.last.steps:
                run.full = x
            run.last.steps.append((k, step))
            x = step.apply(x)
        self.local.seen = None
        return x + parts.feed(block, x)

    def _tokens(self, run: Run, k: int, x: Tensor, method: Reducer, bias: Tensor | None, given: Given) -> Tokens:
        seen = Attention(self.vit, k, self.local.seen or {}, given)
        signals: dict[str, Tensor] = {what: self._signal(run, seen, what, bias) for what in method.reads}
        return Tokens(
            x=x,
            prefix=self.vit.prefix,
            size=run.size,
            signals=signals,
            block=(k, self.depth),
            n0=run.last.n - self.vit.prefix,
            has_cls=self.vit.has_cls,
            scaling=seen.scaling,
        )

    def _signal(self, run: Run, seen: Attention, what: str, bias: Tensor | None) -> Tensor:
        if what != "attention":
            return getattr(seen, what)()
        mask = None if bias is None else bias[:, None, None, :]
        if self.vit.has_cls:
            return attention_rows(seen.queries()[:, :, :1], seen.keys(), mask, seen.scaling).mean(1)[:, 0]
        note = "the model has no CLS token, the attention every token receives is used instead"
        if note not in run.last.notes:
            run.last.notes.append(note)
        return attention_received(seen.queries(), seen.keys(), mask, seen.scaling)

    def _note(self, k: int, name: str, output: Tensor) -> None:
        if self.local.seen is not None:
            self.local.seen[name] = output.detach()

    def _sizes(self) -> Tensor | None:
        """Sizes of the rows that the last block put out."""
        run = self.local.run
        return None if run is None or self.local.dense else run.size

    # -- all rows -----------------------------------------------------------------------------------------------------

    def _intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """The class's forward_intermediates, whose maps need all rows: dropped tokens keep their last state."""
        root, self.local.dense = self.vit.root, True
        try:
            return type(root).forward_intermediates(root, *args, **kwargs)
        finally:
            self.local.dense, self.local.run = False, None

    def _dense(self, run: Run, x: Tensor) -> Tensor:
        slots = run.last.slots
        assert slots is not None
        assert run.full is not None
        out = x.gather(1, slots.clamp(min=0)[..., None].expand(*slots.shape, x.shape[2]))
        return torch.where((slots < 0)[..., None], run.full, out)


@dataclass(frozen=True)
class EachImage(Reducer):
    """A method for one image at a time, such as `random` or `divprune`, in every block of its stage."""

    method: Method

    def __post_init__(self) -> None:
        wrong = sorted({need.kind for need in self.method.needs} - set(READABLE))
        if wrong or self.method.seam == "in_llm":
            raise UnsupportedModel(
                f"{self.method.name} reads {', '.join(wrong) or 'the LLM'}, which a plain vision transformer does not "
                "show; see `vtprune methods` for those with seam in_vit"
            )

    @property
    def reads(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(READABLE[need.kind] for need in self.method.needs))

    def reduce(self, t: Tokens, left: int) -> Reduction:
        units = []
        for b in range(t.x.shape[0]):
            signals = {need: _of_image(t, READABLE[need.kind], b) for need in self.method.needs}
            units.append(Visual(t.x[b, t.prefix :], left, signals=signals, block=(t.block[0], t.block[0])))
        answers = self.method.batch(units)
        index = keep_rows(t, torch.stack([answer.idx for answer in answers]))
        if not any(answer.merges for answer in answers):
            return Reduction(index)
        eye = torch.eye(t.n, device=t.x.device)
        rows = torch.stack([answer.apply(eye) for answer in answers])
        matrix = rows.new_zeros(len(answers), index.shape[1], t.x.shape[1])
        matrix[:, : t.prefix, : t.prefix] = torch.eye(t.prefix, device=t.x.device)
        matrix[:, t.prefix :, t.prefix :] = rows
        return Reduction(index, matrix=matrix)


def _of_image(t: Tokens, what: Any, b: int) -> Tensor:
    x = t.read(what)[b]
    return x.transpose(0, 1).flatten(1)[t.prefix :] if what == "keys" else x[t.prefix :]
