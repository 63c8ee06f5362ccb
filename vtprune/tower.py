"""Stages inside the vision tower.

Inside a block only the kept tokens are there; between blocks, and after the last one, every dropped position is
answered by a kept token. So the hidden states that anybody sees have all N rows, and projector, placeholder count and
`generate` work unchanged; before the LLM the dropped positions leave the prompt (`KEPT` says which).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clock import timed
from .compact import Compaction
from .compilers import announce, outside_while_busy
from .frame import UnitResult
from .kernels import Verdict, deferring, full_precision, to_device
from .model_adapters.tower_tokens import TowerTokens, blocks_of, tokens_of
from .model_adapters.towers import (
    Call,
    Modality,
    TowerCall,
    attention_modules,
    has_cls,
    layer_index,
    layout_of,
    per_entry,
    sizes_of,
    tower_of,
)
from .signals import kind_of
from .tap import attach, read
from .types import (
    Assignment,
    Signal,
    Span,
    Stage,
    UnsupportedCall,
    UnsupportedModel,
    Visual,
    VtpruneError,
    ask,
)

SEQUENCE_LENGTHS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass
class Crop:
    """A unit of a tower stage: a row of the tower's batch (a crop, a tile, a frame) or one of the images packed in it.

    groups: [n, g] positions of its tokens' patches. alive: [m] which of its n tokens are left.
    each: patches of a visual token where the n tokens are single patches (`Method.by_patch`), else 1. seats: [q, each]
    positions that the patches left take before the projector, which makes a visual token of each row.
    """

    number: int
    row: int
    groups: Tensor
    grid: tuple[int, int, int] | None
    alive: Tensor
    each: int = 1
    seats: Tensor | None = None
    states: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.groups.shape[0]

    @property
    def patches(self) -> Tensor:
        """[m, g] positions of the patches that are left."""
        return self.groups if self.alive.shape[0] == self.n else self.groups.index_select(0, self.alive)


@dataclass
class TowerRun:
    """What the stages did in one features call.

    kept: per entry of its output [n] int8 on the host, 1 kept, 0 dropped, -1 a newline; None if nothing was dropped.
    lengths: rows each block ran on (its longest crop; all images where the tower packs them).
    """

    call: Call
    tokens: TowerTokens | None = None
    kept: list[Tensor] | None = None
    crops: list[Crop] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    cut: Compaction | None = None
    cuts: dict[int, Compaction | None] = field(default_factory=dict)
    queries: dict[int, list[int]] = field(default_factory=dict)
    rows: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    results: list[UnitResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    bias: Tensor | None = None
    memo: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def once(self, value: Any, cut: Callable[[], Any]) -> Any:
        """Blocks share their arguments: cut each object once per cut (and keep it alive while its id is a key)."""
        if id(value) not in self.memo:
            self.memo[id(value)] = value, cut()
        return self.memo[id(value)][1]

    def report(self) -> TowerRun:
        """What the LLM and `Last` ask for: no pixels and no states."""
        return TowerRun({}, kept=self.kept, results=self.results, notes=self.notes, lengths=self.lengths)

    def settle(self) -> None:
        """Raise what the checks of the stages found."""
        while self.verdicts:
            self.verdicts.pop(0).settle()


class _Local(threading.local):
    """The features call of this thread; a copy starts without one."""

    run: TowerRun | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Local:
        return _Local()

    def __reduce__(self) -> Any:
        return _Local, ()


class TowerStages:
    """The stages inside one vision tower, as hooks on its blocks and their attention modules.

    base: the VLM's base model. modality: the features calls in which they act. stages: their `where` is ("vit", k).
    Raises UnsupportedModel or ValueError for stages this tower cannot hold.

        stages = TowerStages(model.base_model, "image", [stage])
        undo = stages.install()
        stages.start(call)                      # bound arguments of the features call
        output = model.base_model.get_image_features(**call)
        run = stages.finish(output)             # run.kept: [n] per entry
    """

    def __init__(self, base: Any, modality: Modality, stages: Sequence[Stage]) -> None:
        self.base, self.modality = base, modality
        self.layout, self.tower = layout_of(base, modality), tower_of(base, modality)
        self.blocks, self.attention = blocks_of(self.tower), attention_modules(self.tower)
        self.depth = layer_index(base, self.tower, len(self.blocks), None) + 1
        self.stages, self.places = list(stages), [places(stage, self.depth) for stage in stages]
        self.by_frame = any(stage.per == "frame" for stage in stages)
        self.by_patch = any(stage.method.by_patch for stage in stages)
        self.cls = has_cls(self.tower)
        self._check()
        self.needs = self._needs()  # and the last block where each is read
        self._local = _Local()

    def _check(self) -> None:
        """Refuse stages that cannot stand in a tower, or not together."""
        for stage in self.stages:
            if stage.per == "sample" or stage.keep_total is not None:
                raise ValueError(
                    f"{stage.method.name} at {stage.where!r}: in the tower every crop or image has its own budget; "
                    "use keep=..., and per='image', 'crop' or 'frame'"
                )
        for i, (stage, at) in enumerate(zip(self.stages, self.places)):
            between = [k for j, other in enumerate(self.places) if j != i for k in other if at[0] <= k <= at[-1]]
            if len(at) > 1 and between:
                raise ValueError(
                    f"{stage.method.name} acts at tower blocks {at[0]}..{at[-1]}, so no other stage may stand at "
                    f"{between[0]}: its scores would go out of step"
                )
        if self.by_frame and any(stage.per != "frame" for stage in self.stages):
            raise ValueError("stages in the tower must agree on per='frame': set it on all of them, or on none")
        if self.by_patch and not all(stage.method.by_patch for stage in self.stages):
            raise ValueError(
                "stages in the tower must agree on what they choose among: single patches, or whole tokens"
            )
        weighing = [stage.method.name for stage in self.stages if getattr(stage.method, "weighs", False)]
        if weighing and "flash" in (self.tower.config._attn_implementation or ""):
            raise UnsupportedModel(
                f"{weighing[0]} biases attention by the size of merged tokens, which flash attention does not take: "
                "load the model with attn_implementation='sdpa'"
            )
        if self.by_patch and getattr(self.tower, "deepstack_visual_indexes", None):
            raise UnsupportedModel(
                f"{type(self.tower).__name__} takes features from several blocks, whose patches must stay together: "
                "choose among whole tokens (unit='block')"
            )

    def _needs(self) -> dict[tuple[int, str], int]:
        """(block, kind) of every signal the stages read, and the last block that reads it."""
        found: dict[tuple[int, str], int] = {}
        for stage, at in zip(self.stages, self.places):
            for need in stage.method.needs:
                kind = kind_of(need)
                if "tower" not in kind.where or kind.source != "attention":
                    raise UnsupportedModel(f"signal {need.kind!r} cannot be read inside a vision tower")
                for k in at:
                    if not 0 <= k + need.offset < k:
                        raise ValueError(
                            f"{stage.method.name} at tower block {k} reads block {k + need.offset}: use block "
                            f"{-need.offset} or later, and offsets below 0"
                        )
                    if self._readable(need):
                        key = k + need.offset, need.kind
                        found[key] = max(k, found.get(key, 0))
        return found

    def _readable(self, need: Signal) -> bool:
        return not (need.without_cls if self.cls else kind_of(need).of_cls)

    # -- installing -------------------------------------------------------------------------------------------------

    def install(self) -> list[Callable[[], None]]:
        """Register the hooks; the returned functions take them off."""
        undo: list[Callable[[], None]] = []
        first = min([self.depth - 1, *(k for at in self.places for k in at), *(k for k, _ in self.needs)])
        for k in range(first, len(self.blocks)):
            pre, post = partial(self._block_pre, k), partial(self._block_post, k)
            undo.append(self.blocks[k].register_forward_pre_hook(pre, with_kwargs=True).remove)
            # First among its hooks: transformers records hidden states with one, and they shall have all rows.
            undo.append(self.blocks[k].register_forward_hook(post, prepend=True).remove)
            attention = partial(self._attention_pre, k)
            undo.append(self.attention[k].register_forward_pre_hook(attention, with_kwargs=True).remove)
            undo += [announce(module, self.busy) for module in (self.blocks[k], self.attention[k])]
        for layer, kind in sorted(self.needs):
            undo.append(attach(self.attention[layer], partial(self._sink, layer, kind)))
        return undo

    def busy(self) -> bool:
        """True during a features call of this thread."""
        return self._local.run is not None

    def start(self, call: Call) -> None:
        """Begin a features call, in this thread. Raises UnsupportedCall under gradient checkpointing."""
        again = torch.is_grad_enabled() and not all(isinstance(s.keep, float) and s.keep == 1.0 for s in self.stages)
        if again and any(b.training and getattr(b, "gradient_checkpointing", False) for b in self.blocks):
            raise UnsupportedCall(
                "gradient checkpointing re-runs the tower's blocks, which a stage inside it cannot follow: use stages "
                "before the LLM, or model.gradient_checkpointing_disable()"
            )
        self._local.run = TowerRun(call)

    def stop(self) -> TowerRun | None:
        """End the features call of this thread, whatever became of it."""
        run, self._local.run = self._local.run, None
        return run

    def finish(self, output: Any) -> TowerRun:
        """End the call and say what is left of every entry of `output.pooler_output`.

        Raises UnsupportedCall if dropped and kept tokens were mixed after the tower.
        """
        run = self.stop()
        assert run is not None
        run.settle()
        if run.cut is None or run.tokens is None:
            return run
        marks = torch.ones(run.shape[:2], device=run.cut.index.device)
        marks[:, : run.tokens.prefix] = 2
        for crop in run.crops:
            shown = crop.patches if crop.seats is None else crop.seats
            marks[crop.row].index_fill_(0, shown.flatten(), 2)
        marks = marks.cpu()
        f = TowerCall(self.base, self.tower, run.call, f"{self.modality}_grid_thw", sizes_of(output))
        entries = per_entry(f, self.layout, self.modality, marks[..., None])
        for entry in entries:
            if not bool(torch.isin(entry, torch.arange(3.0)).all()):
                raise UnsupportedCall(
                    f"{f.base.config.model_type} resizes this image's features after the tower, which mixes kept and "
                    "dropped tokens: use a stage before the LLM ('llm'), or images of fewer tiles"
                )
        run.kept = [entry[:, 0].to(torch.int8) - 1 for entry in entries]
        return run

    # -- hooks ------------------------------------------------------------------------------------------------------

    @outside_while_busy
    def _block_pre(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._local.run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        full = hidden[None] if hidden.dim() == 2 else hidden
        if not run.crops:
            self._begin(run, full)
        x = self._run_stages(run, k, full)
        run.cuts[k] = run.cut
        run.queries[k] = [crop.patches.numel() for crop in run.crops]
        if run.cut is not None:
            x, run.lengths[k] = run.cut.cut(x, 1), run.cut.n
        elif x is full:
            return None
        # Positional, because transformers looks for the first hidden state there.
        rest = {name: v for name, v in kwargs.items() if name != "hidden_states"}
        return (x[0] if hidden.dim() == 2 else x, *args[1:]), rest

    @outside_while_busy
    def _block_post(self, k: int, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._local.run
        if run is None:
            return None
        out = output[0] if isinstance(output, tuple) else output
        short = out[None] if out.dim() == 2 else out
        x = short if run.cut is None else run.cut.restore(short)
        if k == self.depth - 1:
            x = self._run_stages(run, self.depth, x)
            x = _seated(run, x) if self.by_patch else x
        if x is short:
            return None
        x = x[0] if out.dim() == 2 else x
        return (x, *output[1:]) if isinstance(output, tuple) else x

    @outside_while_busy
    def _attention_pre(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything else that has the length of the tower's sequence is an argument of the attention module."""
        run = self._local.run
        if run is None or run.cut is None:
            return None
        cut, call = run.cut, _bind(module, args, kwargs)
        if "position_embeddings" in call:
            rotary = call["position_embeddings"]
            call["position_embeddings"] = run.once(rotary, lambda: tuple(cut.cut(t, -2) for t in rotary))
        for name in SEQUENCE_LENGTHS:
            if call.get(name) is not None:
                call[name] = run.once(call[name], partial(_shorter, call[name], run))
        mask = call.get("attention_mask")
        if mask is not None:
            call["attention_mask"] = run.once(mask, lambda: cut.cut_mask(mask, 0))
        elif cut.valid is not None:
            call["attention_mask"] = _padding(cut.valid, self.tower.config._attn_implementation, call["hidden_states"])
        if run.bias is not None:
            call["attention_mask"] = _with_bias(call.get("attention_mask"), run.bias, call["hidden_states"])
        hidden = call.pop("hidden_states")
        return (hidden,), call

    @outside_while_busy
    def _sink(
        self,
        layer: int,
        kind: str,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        run = self._local.run
        if run is None:
            return
        parts = [(q, k, v, mask)]
        if self.layout.packed and mask is not None:  # one product for all images, each attending to itself
            sizes = run.queries[layer]
            parts = [(*part, None) for part in zip(*(t.split(sizes, dim=2) for t in (q, k, v)))]
        for part in parts:
            with timed(q.device):
                x = read(kind, *part, scaling).float()
            if kind_of(kind).of_cls:
                x = F.pad(x, (1, 0))  # the CLS token has no score of its own
            if kind_of(kind).over_queries and self.layout.packed:
                x = x * part[0].shape[2]
            run.rows.setdefault((layer, kind), []).append(x if x.dim() == 3 else x.unsqueeze(-1))

    # -- what the hooks do ------------------------------------------------------------------------------------------

    def _begin(self, run: TowerRun, x: Tensor) -> None:
        """Find the units of this call, x [T, N, C]."""
        f = TowerCall(self.base, self.tower, run.call, f"{self.modality}_grid_thw", ())
        run.tokens, run.shape = tokens_of(f, self.layout, self.modality, x.shape[1]), tuple(x.shape)
        run.lengths = [x.shape[1]] * len(self.blocks)
        groups = to_device(run.tokens.groups, x.device)
        units: Any = run.tokens.grids
        if self.by_frame and self.layout.packed:
            units = tuple(((1, h, w), h * w) for (t, h, w), _ in units for _ in range(t))
        for row in range(x.shape[0]):
            for (grid, n), part in zip(units, groups.split([n for _, n in units])):
                each = part.shape[1] if self.by_patch else 1
                if each > 1:
                    part, grid, n = part.reshape(-1, 1), None, part.numel()
                run.crops.append(Crop(len(run.crops), row, part, grid, torch.arange(n, device=x.device), each))

    def _run_stages(self, run: TowerRun, k: int, x: Tensor) -> Tensor:
        """The stages at block k on x [T, N, C]; the returned states hold what was merged."""
        before = sum(crop.alive.shape[0] for crop in run.crops)
        for stage, at in zip(self.stages, self.places):
            if k in at:
                x = self._run(run, stage, k, at[-1], x)
        if sum(crop.alive.shape[0] for crop in run.crops) < before:
            run.cut = self._compact(run)
            run.bias = self._size_bias(run)
            run.memo.clear()
        for key in [key for key in run.rows if self.needs[key] <= k]:
            del run.rows[key]
        return x

    def _run(self, run: TowerRun, stage: Stage, k: int, last: int, x: Tensor) -> Tensor:
        todo, views = [], []
        for crop in run.crops:
            (budget,) = stage.budgets([crop.n // crop.each])
            budget = None if budget is None else budget * crop.each
            if budget is None or budget < crop.alive.shape[0]:
                todo.append(crop)
                views.append(self._visual(run, stage, crop, (k, last), budget, x))
        if not todo:
            return x
        with deferring() as checks, timed(x.device), full_precision(x.device):
            answers = ask(stage, views, least=k != last)  # before its last block a schedule may keep more, not less
        run.verdicts.append(Verdict(checks))
        if not x.is_cuda or not stage.method.trusted:
            run.settle()
        for crop, view, answer in zip(todo, views, answers):
            if answer.merges:
                x = _merged(x, crop, answer)
            crop.alive = crop.alive.index_select(0, answer.idx.to(crop.alive.device))
            self._report(run, stage, crop, k, view, answer)
        return x

    def _visual(
        self, run: TowerRun, stage: Stage, crop: Crop, block: tuple[int, int], budget: int | None, x: Tensor
    ) -> Visual:
        whole = crop.alive.shape[0] == crop.n
        signals = {}
        for need in stage.method.needs:
            if self._readable(need):
                signals[need] = self._signal(run, crop, block[0] + need.offset, need.kind)
        return Visual(
            x=_of_tokens(x, crop),
            budget=budget,
            grid=crop.grid if whole else None,
            spans=(Span(0, crop.grid),) if whole and crop.grid else (),
            signals=signals,
            state=crop.states.setdefault(id(stage.method), {}),
            block=block,
        )

    def _signal(self, run: TowerRun, crop: Crop, layer: int, kind: str) -> Tensor:
        """[m] or [m, C] float32: mean over the patches of each token."""
        found = run.rows.get((layer, kind))
        if not found:
            raise UnsupportedModel(
                f"block {layer} of {type(self.tower).__name__} did not pass the attention interface, so its {kind!r} "
                "cannot be read; choose a method without signals"
            )
        if len(found) > 1:
            found[:] = [torch.cat([part.flatten(0, 1) for part in found])[None]]
        of_tokens = _of_tokens(self._restored(run, layer, found[0]), crop)
        if kind_of(kind).over_queries and self.layout.packed:
            of_tokens = of_tokens / run.queries[layer][crop.number]
        return of_tokens if kind_of(kind).vector else of_tokens[:, 0]

    def _restored(self, run: TowerRun, layer: int, x: Tensor) -> Tensor:
        """Rows [T, n, C] that block `layer` saw, for all N positions."""
        cut = run.cuts[layer]
        return x if cut is None else cut.restore(x)

    def restore(self, layer: int, kind: str, x: Tensor) -> Tensor:
        """A signal of block `layer` that was read for stages before the LLM, for all N positions of the tower."""
        run = self._local.run
        if run is None or run.cuts.get(layer) is None:
            return x
        x = self._restored(run, layer, x)
        if kind_of(kind).over_queries and self.layout.packed:  # the reader divides by the queries of an unpruned tower
            for crop, queries in zip(run.crops, run.queries[layer]):
                x[:, crop.groups.flatten()] *= crop.groups.numel() / queries
        return x

    def _compact(self, run: TowerRun) -> Compaction:
        """The cut from N rows to the prefix and the patches that are left; shorter rows are padded on the right."""
        assert run.tokens is not None
        keep = torch.zeros(run.shape[:2], dtype=torch.bool, device=run.crops[0].alive.device)
        keep[:, : run.tokens.prefix] = True
        counts = [run.tokens.prefix] * run.shape[0]
        for crop in run.crops:
            keep[crop.row].index_fill_(0, crop.patches.flatten(), True)
            counts[crop.row] += crop.patches.numel()
        return right_padded(keep, counts)

    def _size_bias(self, run: TowerRun) -> Tensor | None:
        """[T, n] float32: log of how many tokens each row stands for, where merged ones weigh; None if none do.

        Towers that pack images take none: their masks are segment lengths.
        """
        sizes = [
            (crop, state["size"])
            for crop in run.crops
            for stage in self.stages
            if getattr(stage.method, "weighs", False)
            and (state := crop.states.get(id(stage.method), {})).get("size") is not None
        ]
        if not sizes or run.cut is None:
            return None
        if self.layout.packed:
            note = "sizes of merged tokens do not enter attention in a tower that packs images into one row"
            run.notes.extend([note] if note not in run.notes else [])
            return None
        whole = sizes[0][1].new_zeros(run.shape[:2])
        for crop, size in sizes:
            patches = crop.patches
            whole[crop.row, patches.flatten()] = size.clamp(min=1e-3).log().repeat_interleave(patches.shape[1])
        return run.cut.cut(whole, 1)

    def _report(self, run: TowerRun, stage: Stage, crop: Crop, k: int, view: Visual, answer: Assignment) -> None:
        note = view.state.get("note")
        if note and note not in run.notes:
            run.notes.append(note)
        run.results.append(
            UnitResult(
                row=crop.row,
                image=crop.number,
                part=None,
                modality=self.modality,
                method=stage.method.name,
                where=("vit", k),
                n=view.n,
                positions=crop.alive,
                idx=answer.idx,
                order=answer.order,
                scores=answer.scores,
                spans=view.spans,
                grid=view.grid,
                assignment=answer,
            )
        )


def places(stage: Stage, depth: int) -> range:
    """The blocks k (0..depth) that ("vit", k or a slice) means in a tower of which `depth` blocks are used.

    Negative numbers count from the last used block; k = depth is what that block puts out, and a slice reaches it only
    by a stop beyond.
    """
    name, where = stage.method.name or type(stage.method).__name__, stage.where
    valid = f"choose an int in {-depth}..{depth} (of this tower {depth} blocks are used) or a slice of them"
    if not (isinstance(where, tuple) and len(where) == 2 and where[0] == "vit"):
        raise ValueError(f"{name} at {where!r}: a stage in the tower is at ('vit', k); {valid}")
    k = where[1]
    if isinstance(k, slice):
        start, stop = (end if end is None or end >= 0 else end + depth for end in (k.start, k.stop))
        found = range(start or 0, depth if stop is None else min(stop, depth + 1), k.step or 1)
        if not found or found[0] < 0:
            raise ValueError(f"{name} at {where!r} acts at no block; {valid}")
        return found
    if not isinstance(k, int) or not -depth <= k <= depth:
        raise ValueError(f"{name} at {where!r}; {valid}")
    k = k + depth if k < 0 else k
    return range(k, k + 1)


def right_padded(keep: Tensor, counts: Sequence[int]) -> Compaction:
    """From a mask [T, N] (True = stays) and its row sums: towers look for the CLS token at the left end."""
    n = max(counts)
    index = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :n]
    valid = None
    if min(counts) != n:
        valid = torch.arange(n, device=keep.device)[None] < to_device(torch.tensor(counts), keep.device)[:, None]
    return Compaction(index, valid, (keep.cumsum(1) - 1).clamp(min=0))


def _of_tokens(x: Tensor, crop: Crop) -> Tensor:
    """[T, N, C] -> [m, C]: the crop's tokens, each the mean of its patches."""
    patches = crop.patches.to(x.device)
    rows = x[crop.row].index_select(0, patches.flatten())
    if patches.shape[1] == 1:
        return rows
    return rows.view(*patches.shape, -1).float().mean(1).to(x.dtype)


def _merged(x: Tensor, crop: Crop, answer: Assignment) -> Tensor:
    """x [T, N, C] with what flows into the kept tokens; patch by patch where a token has several."""
    patches = crop.patches.to(x.device)
    new = answer.apply(x[crop.row].index_select(0, patches.flatten()).view(*patches.shape, -1))
    at = patches.index_select(0, answer.idx).flatten()
    return x.index_put((torch.full_like(at, crop.row), at), new.flatten(0, 1))


def _seated(run: TowerRun, x: Tensor) -> Tensor:
    """x [T, N, C] with the patches left side by side: each row of them where the token of its first patch stands."""
    for crop in run.crops:
        if crop.each == 1 or crop.alive.shape[0] == crop.n:
            continue
        if crop.alive.shape[0] % crop.each:
            raise VtpruneError(
                f"{crop.alive.shape[0]} patches left in the tower do not make tokens of {crop.each} each"
            )
        left = crop.alive.view(-1, crop.each)
        crop.seats = crop.groups.view(-1, crop.each).index_select(0, left[:, 0] // crop.each)
        to, from_ = crop.seats.flatten(), crop.patches.flatten()
        x = x.index_put((torch.full_like(to, crop.row), to), x[crop.row].index_select(0, from_))
    return x


def _shorter(lengths: Tensor, run: TowerRun) -> Tensor:
    """Cumulative segment lengths [S + 1] of a packed tower after the cut; segments with nothing left go."""
    assert run.cut is not None
    keep = torch.zeros(run.shape[1], dtype=lengths.dtype, device=lengths.device)
    keep[run.cut.index[0].to(lengths.device)] = 1
    return F.pad(keep.cumsum(0, dtype=lengths.dtype), (1, 0))[lengths.long()].unique_consecutive()


def _padding(valid: Tensor, attention: str | None, hidden: Tensor) -> Tensor:
    """The mask that hides the pads of shorter rows, valid [T, n], as the attention implementation wants it."""
    valid, dtype = valid.to(hidden.device), hidden.dtype
    if "flash" in (attention or ""):
        return valid.long()
    if attention != "eager":
        return valid[:, None, None, :]
    blocked = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, torch.finfo(dtype).min)
    return blocked[:, None, None, :]


def _with_bias(mask: Tensor | None, bias: Tensor, hidden: Tensor) -> Tensor:
    """An attention mask (None, bool or additive, [T, 1, .., n]) and a bias on keys [T, n], as one additive mask."""
    bias = bias.to(hidden.device, hidden.dtype)[:, None, None, :]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.expand(torch.broadcast_shapes(bias.shape, mask.shape)).masked_fill(
            ~mask, torch.finfo(hidden.dtype).min
        )
    return torch.maximum(mask + bias, mask.new_tensor(torch.finfo(mask.dtype).min))


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    return {**dict(zip(names, args)), **kwargs}
