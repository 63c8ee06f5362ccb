"""Fewer tokens inside a plain vision transformer: timm, open_clip, torchvision, transformers.

Every block of one model instance gets a forward of its own, made of the block's own modules, that reduces tokens
between attention and MLP. Where nothing is to be done the class's forward runs, so r=0 and keep=1.0 change no bit.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from . import registry
from .covering import cover, standing
from .kernels import attention_received, attention_rows, full_precision, recorded
from .model_adapters.vits import (
    ROPE,
    WHOLE_BATCH,
    Attention,
    Given,
    Part,
    Vit,
    cut_masks,
    masked_mean,
    real_tokens,
    watch,
    weighted_pooling,
)
from .reduction import Reads, Reducer, Reduction, Tokens, keep_rows, stacked
from .signals import LayerAttention, SignalKind, kind_of
from .tower import places
from .types import Method, Signal, Stage, UnsupportedCall, UnsupportedModel, Visual, VtpruneError, ask, budget

MASKS = ("attn_mask", "attention_mask", "is_causal", "k_x", "v_x")


@dataclass
class VitLast:
    """What the last forward pass did to the tokens of its batch.

    n: rows before anything was reduced, prefix included. lengths: rows behind every block. steps: (block, reduction).
    size: [B, M] float32, for how many tokens each output row stands; None: one each. notes: what stood in for what.
    valid: [B, M] bool, which output rows are real where images are padded to one length; None: all.

    The model's outputs have the rows that are left, unless it lays them out on a grid (backbones, masked image
    modelling, depth, `forward_intermediates`): then every token gets the row that holds it, and a dropped one keeps its
    last state.
    """

    n: int
    prefix: int
    lengths: list[int] = field(default_factory=list)
    steps: list[tuple[int, Reduction]] = field(default_factory=list)
    size: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    valid: Tensor | None = None

    @property
    def slots(self) -> Tensor | None:
        """[B, n] int64: the output row that holds each token, -1 for a dropped one; None if all stayed."""
        return self.slots_behind(None)

    def slots_behind(self, block: int | None) -> Tensor | None:
        """The same of the rows that a block put out; None: of the last one."""
        slots, rows = None, self.n
        for k, step in self.steps:
            if block is not None and k > block:
                break
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

    def unmerge(self, x: Tensor, fill: float = 0.0, block: int | None = None) -> Tensor:
        """x [B, M, C], such as the model's rows -> [B, n, C]: every token gets the row that holds it.

        fill: the value of dropped tokens. block: the one that put out x, such as k for hidden_states[k + 1] (which is
        not the last of transformers' models); None: the last. Raises ValueError if x has another number of rows.
        """
        slots = self.slots_behind(block)
        rows = self.n
        for k, step in self.steps:
            rows = rows if block is not None and k > block else step.index.shape[1]
        if x.shape[1] != rows:
            raise ValueError(
                f"x has {x.shape[1]} rows, but the last forward pass left {rows} behind "
                f"{'its last block' if block is None else f'block {block}'} (of {self.n})"
            )
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
    """One forward pass. origin: [B, n] places of the patches left.

    plans: (method, patches left) of every block; one for all images, or one each where padding makes them differ. real,
    now: patches each image had, and has, where there is one plan each.
    """

    plans: list[list[tuple[Reducer | None, int]]]
    last: VitLast
    real: list[int]
    now: list[int] | None = None
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
    masked = False

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
        self.arguments = tuple(inspect.signature(type(vit.root).forward).parameters)[1:]
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

    @property
    def root(self) -> nn.Module:
        """The module that is patched, whatever it was found in."""
        return self.vit.root

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

    def plan(self, n: int) -> list[tuple[Reducer | None, int]]:
        """(method, patches left) of every block, of n patches."""
        if n not in self._plans:
            plan: list[tuple[Reducer | None, int]] = [(None, n)] * self.depth
            now = n
            for stage, method, at in sorted(zip(self.stages, self.reducers, self.at), key=lambda found: found[2][0]):
                goal = None if stage.keep is None else min(now, budget(stage.keep, n, method.rounding))
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
        run = self._begin(x, given) if k == 0 else self.local.run
        if run is None:
            return type(block).forward(block, *args, **kwargs)
        if run.short is not None and x is run.full:
            x = run.short
        self._check_rows(run, k, x)
        method, left = run.plans[0][k][0], [plan[k][1] for plan in run.plans]
        now = [x.shape[1] - vit.prefix] if run.now is None else run.now
        reduces = method is not None and any(goal < n for goal, n in zip(left, now))
        if not reduces and not run.last.steps:
            x = type(block).forward(block, *args, **kwargs)
        else:
            x = self._split(run, k, x, method if reduces else None, left, self._allowed(run, given))
        run.last.lengths.append(x.shape[1])
        if self.by_place and run.last.steps:
            run.short = x
            x = run.full = self._dense(run, x)
        if k == self.depth - 1:
            self._finish(run)
        return x

    @property
    def by_place(self) -> bool:
        """True if blocks put out all rows in this call."""
        return self.vit.by_place or self.local.dense

    def _check_rows(self, run: Run, k: int, x: Tensor) -> None:
        """Refuse rows that somebody else made of those the block before put out."""
        before = run.last.lengths[-1] if run.last.lengths else run.last.n
        if x.shape[1] != before and run.last.steps:
            raise UnsupportedCall(
                f"block {k} is given {x.shape[1]} rows, but {before} are left behind block {k - 1}: a hook or a module "
                "between the blocks made others of them, which a reduction cannot follow; take it off, or unpatch"
            )

    def _finish(self, run: Run) -> None:
        run.last.size, run.last.valid = run.size, self._valid_rows(run)
        if not recorded():
            self.local.last = self.latest = run.last

    def _called(self, module: Any, args: Any, kwargs: Given) -> None:
        """Note whether the caller gave a mask; while it is recorded, transformers makes one that hides nothing."""
        call = {**dict(zip(self.arguments, args)), **kwargs}
        self.local.masked = call.get("attention_mask") is not None

    def _begin(self, x: Tensor, given: Given) -> Run:
        if self.vit.checkpointing():
            raise UnsupportedCall(
                "gradient checkpointing runs blocks a second time, out of order: turn it off "
                "(set_grad_checkpointing(False) or gradient_checkpointing_disable())"
            )
        n, mask = int(x.shape[1]), given.get("attention_mask") if self.vit.parts.pads else None
        if mask is not None and recorded():
            raise UnsupportedCall(
                f"{type(self.vit.root).__name__} is told by a mask how many patches an image has, and torch.export, "
                "torch.onnx and torch.jit would record the counts of this one: export it unpatched"
            )
        real = [n] if mask is None else real_tokens(mask, n)
        if min(real) <= self.vit.prefix:
            raise UnsupportedCall("attention_mask hides all patches of an image: leave that image out")
        real = [n - self.vit.prefix for n in real]
        run = Run([self.plan(n) for n in real], VitLast(n, self.vit.prefix), real, None if mask is None else real)
        self.local.run = run
        return run

    def _allowed(self, run: Run, given: Given) -> Given:
        """The block's further arguments for the tokens that are left; masks are refused."""
        if run.now is not None or (recorded() and not self.local.masked):
            given = {name: value for name, value in given.items() if name != "attention_mask"}
        for name in MASKS:
            if given.get(name) is not None and given[name] is not False:
                raise UnsupportedCall(f"{name} hides tokens, which a reduction would have to follow: call without it")
        given = {name: value for name, value in given.items() if name not in MASKS}
        for name in ROPE:
            rope = given.get(name)
            if rope is not None and run.origin is not None:
                tables = tuple(_of_patches(t, run.origin) for t in (rope if isinstance(rope, tuple) else (rope,)))
                given[name] = tables if isinstance(rope, tuple) else tables[0]
        return given

    def _split(self, run: Run, k: int, x: Tensor, method: Reducer | None, left: list[int], given: Given) -> Tensor:
        """The block in its two halves, with a reduction in between where there is a method."""
        block, parts = self.vit.blocks[k], self.vit.parts
        self.local.seen = {} if method is not None and method.reads else None
        x = x + parts.attend(block, x, self._bias(run, x), given)
        if method is not None:
            with torch.no_grad(), full_precision(x.device):
                step = self._step(run, k, x, method, left, given)
                _check(method, step, x.shape[1])
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

    def _bias(self, run: Run, x: Tensor) -> Tensor | None:
        """[B, N] to add to the logits of every key: log sizes, and the lowest number for padding."""
        bias = run.size.log().to(x.dtype) if run.size is not None and self.weighs else None
        if run.now is None or min(run.now) + self.vit.prefix == x.shape[1]:
            return bias
        pads = ~_first(run.now, self.vit.prefix, x)
        return (x.new_zeros(pads.shape) if bias is None else bias).masked_fill(pads, torch.finfo(x.dtype).min)

    def _step(self, run: Run, k: int, x: Tensor, method: Reducer, left: list[int], given: Given) -> Reduction:
        """The method's reduction of the batch; images with padding behind them in groups of equal counts."""
        if run.now is None:
            return method.reduce(self._tokens(run, k, x, method, WHOLE_BATCH, run.real[0], given), left[0])
        groups: dict[tuple[int, int, int], list[int]] = {}
        for image, counts in enumerate(zip(run.now, left, run.real)):
            groups.setdefault(counts, []).append(image)
        steps: list[tuple[Tensor, int, Reduction | None]] = []
        for (now, goal, n0), images in groups.items():
            rows, n = torch.tensor(images, device=x.device), now + self.vit.prefix
            step = None
            if goal < now:
                step = method.reduce(self._tokens(run, k, x, method, Part(rows, n), n0, given), goal)
            steps.append((rows, n, step))
        run.now = [min(now, goal) for now, goal in zip(run.now, left)]
        return stacked(steps, x.shape[0], x.shape[1], run.size)

    def _tokens(self, run: Run, k: int, x: Tensor, method: Reducer, part: Part, n0: int, given: Given) -> Tokens:
        seen = Attention(self.vit, k, self.local.seen or {}, given, part)
        size = None if run.size is None else part.of(run.size)
        bias = size.log().to(x.dtype) if size is not None and self.weighs else None
        signals: dict[str, Tensor] = {what: self._signal(run, seen, what, bias) for what in method.reads}
        return Tokens(
            x=part.of(x),
            prefix=self.vit.prefix,
            size=size,
            signals=signals,
            block=(k, self.depth),
            n0=n0,
            has_cls=self.vit.has_cls,
            scaling=seen.scaling,
        )

    def _signal(self, run: Run, seen: Attention, what: str, bias: Tensor | None) -> Tensor:
        mask = None if bias is None else bias[:, None, None, :]
        if what not in get_args(Reads):
            return self._read(kind_of(what), LayerAttention(seen.queries(), seen.keys(), None, mask, seen.scaling))
        if what != "attention":
            return getattr(seen, what)()
        if self.vit.has_cls:
            return attention_rows(seen.queries()[:, :, :1], seen.keys(), mask, seen.scaling).mean(1)[:, 0]
        note = "the model has no CLS token, the attention every token receives is used instead"
        if note not in run.last.notes:
            run.last.notes.append(note)
        return attention_received(seen.queries(), seen.keys(), mask, seen.scaling)

    def _read(self, kind: SignalKind, attention: LayerAttention) -> Tensor:
        """A signal that is none of the quantities a `Reducer` reads, [B, N, ...]; 0 at a CLS token it leaves out."""
        if kind.of_cls and not self.vit.has_cls:
            raise UnsupportedModel(f"signal {kind.name!r} is that of a CLS token, and this model has none")
        x: Tensor = kind(attention)
        return torch.cat([torch.zeros_like(x[:, :1]), x], 1) if kind.of_cls else x

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
        valid = self._valid_rows(run)
        index = run.last.steps[-1][1].index
        return torch.ones_like(index, dtype=torch.bool) if valid is None else valid

    def _valid_rows(self, run: Run) -> Tensor | None:
        if run.now is None or not run.last.steps:
            return None
        return _first(run.now, self.vit.prefix, run.last.steps[-1][1].index)

    # -- all rows -----------------------------------------------------------------------------------------------------

    def _intermediates(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The plain forward_intermediates, whose maps need all rows: dropped tokens keep their last state."""
        self.local.dense = True
        try:
            return plain(*args, **kwargs)
        finally:
            run, self.local.dense, self.local.run = self.local.run, False, None
            if run is not None and len(run.last.lengths) < self.depth:  # it stops at the last block that was asked for
                self._finish(run)

    def _dense(self, run: Run, x: Tensor) -> Tensor:
        slots = run.last.slots
        assert slots is not None
        assert run.full is not None
        out = x.gather(1, slots.clamp(min=0)[..., None].expand(*slots.shape, x.shape[2]))
        return torch.where((slots < 0)[..., None], run.full, out)


def _check(method: Reducer, step: Reduction, n: int) -> None:
    """Raise unless a method that is not of this package answers a reduction of n rows; its own are tested for that."""
    if isinstance(method, EachImage) or method.trusted:
        return
    weights = step.w if step.matrix is None else step.matrix
    inside = bool((step.index >= 0).all()) and bool((step.index < n).all())
    if not inside or (weights is not None and not bool(weights.isfinite().all())):
        raise VtpruneError(
            f"{method.name or type(method).__name__} answered a Reduction with "
            f"{'weights that are not finite' if inside else f'rows outside 0..{n - 1}'}"
        )


def _first(counts: list[int], prefix: int, x: Tensor) -> Tensor:
    """[B, N] bool of x [B, N, ...]: the prefix and the first counts[b] patches of every image."""
    return torch.arange(x.shape[1], device=x.device) < torch.tensor(counts, device=x.device)[:, None] + prefix


def _of_patches(rope: Tensor, origin: Tensor) -> Tensor:
    """A table [N, d] of rotary positions -> [B, 1, n, d] for the patches that are left, origin [B, n]."""
    if rope.dim() != 2:
        raise UnsupportedCall(f"rotary positions of shape {list(rope.shape)}: one table [N, d] is supported")
    return rope[origin][:, None]


@dataclass(frozen=True)
class EachImage(Reducer):
    """A method for one image at a time, such as `random` or `divprune`, in every block of its stage."""

    method: Method

    def __post_init__(self) -> None:
        wrong = sorted({need.kind for need in self.method.needs if "vit" not in kind_of(need).where})
        if wrong or self.method.seam == "in_llm":
            raise UnsupportedModel(
                f"{self.method.name} reads {', '.join(wrong) or 'the LLM'}, which a plain vision transformer does not "
                "show; see `vtprune methods` for those with seam in_vit"
            )

    @property
    def reads(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(_quantity(need) for need in self.method.needs))

    def reduce(self, t: Tokens, left: int) -> Reduction:
        if recorded():
            raise UnsupportedCall(
                f"{self.method.name} chooses image by image, on the host, which torch.export, torch.onnx and torch.jit "
                f"cannot record: export with a method for whole batches ({', '.join(_recordable())}), or unpatch first"
            )
        units = []
        for b in range(t.x.shape[0]):
            signals = {need: _of_image(t, _quantity(need), b) for need in self.method.needs}
            units.append(Visual(t.x[b, t.prefix :], left, signals=signals, block=(t.block[0], t.block[0])))
        stage = Stage(("vit", t.block[0]), self.method)
        answers = ask(stage, units)
        counts = {answer.idx.shape[0] for answer in answers}
        if len(counts) > 1:
            raise UnsupportedModel(
                f"{stage.method.name} kept {min(counts)} to {max(counts)} of {t.n} tokens in the images of one batch: "
                "a plain vision transformer needs the same count in all of them; pass one image at a time"
            )
        index = keep_rows(t, torch.stack([answer.idx for answer in answers]))
        if not any(answer.merges for answer in answers):
            return Reduction(index)
        eye = torch.eye(t.n, device=t.x.device)
        rows = torch.stack([answer.apply(eye) for answer in answers])
        matrix = rows.new_zeros(len(answers), index.shape[1], t.x.shape[1])
        matrix[:, : t.prefix, : t.prefix] = torch.eye(t.prefix, device=t.x.device)
        matrix[:, t.prefix :, t.prefix :] = rows
        return Reduction(index, matrix=matrix)


def _recordable() -> list[str]:
    return [method.name for method in registry.methods() if issubclass(method, Reducer)]


def _quantity(need: Signal) -> str:
    """What stands for a signal in `Tokens.signals`."""
    kind = kind_of(need)
    return kind.vit or kind.name


def _of_image(t: Tokens, what: Any, b: int) -> Tensor:
    x = t.read(what)[b]
    return x.transpose(0, 1).flatten(1)[t.prefix :] if what == "keys" else x[t.prefix :]
