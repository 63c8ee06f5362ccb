"""Stages inside the vision tower of a vision-language model, as hooks on its blocks and their attention modules.

Inside a block only the kept tokens are there; between blocks, and after the last one, every dropped position is
answered by a kept token. So the hidden states that anybody sees have all N rows, and projector, placeholder count and
`generate` work unchanged; before the LLM the dropped positions leave the prompt (`KEPT` says which).

    tower_plan       which stages act at which blocks, what they read, and what is refused
    tower_run        one features call: its images, and which patches are left
    tower_stages     asks the methods at one block
    tower_arguments  cuts the arguments of attention
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedCall
from ..core.method import Stage
from ..kernels import HostCopy, each
from ..model_adapters.tower_layout import Call, Modality, per_entry, sizes_of
from ..signals import kind_of
from .attention_probe import probe
from .compilers import announce, outside_while_busy
from .tower_arguments import cut_arguments, named_arguments
from .tower_plan import TowerPlan, signals_read
from .tower_run import TowerRun, begin, marks_of_kept, with_patches_joined
from .tower_signals import tower_rows
from .tower_stages import run_stages


class _Local(threading.local):
    """The features call of this thread; a copy starts without one."""

    run: TowerRun | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Local:
        return _Local()

    def __reduce__(self) -> Any:
        return _Local, ()


class TowerStages:
    """The stages inside one vision tower.

    base: the VLM's base model. modality: the features calls in which they act. stages: their `where` is ("vit", k).
    Raises UnsupportedModel or ValueError for stages this tower cannot hold.

        stages = TowerStages(model.base_model, "image", [stage])
        undo = stages.install()
        stages.start(call)                      # bound arguments of the features call
        output = model.base_model.get_image_features(**call)
        run = stages.finish(output)             # run.kept: [n] per entry
    """

    def __init__(self, base: Any, modality: Modality, stages: Sequence[Stage]) -> None:
        self.plan = TowerPlan.of(base, modality, stages)
        self.needs = signals_read(self.plan)
        self._local = _Local()

    @property
    def by_patch(self) -> bool:
        """True if the stages choose among single patches."""
        return self.plan.by_patch

    def install(self) -> list[Callable[[], None]]:
        """Register the hooks; the returned functions take them off."""
        plan, undo = self.plan, list[Callable[[], None]]()
        acted = [k for acts_at in plan.acts_at for k in acts_at]
        for k in range(min([plan.depth - 1, *acted, *(k for k, _ in self.needs)]), len(plan.blocks)):
            block, attention = plan.blocks[k], plan.attention[k]
            undo.append(block.register_forward_pre_hook(partial(self._before_block, k), with_kwargs=True).remove)
            # First among its hooks: transformers records hidden states with one, and they shall have all rows.
            undo.append(block.register_forward_hook(partial(self._after_block, k), prepend=True).remove)
            undo.append(attention.register_forward_pre_hook(self._before_attention, with_kwargs=True).remove)
            undo += [announce(module, self.busy) for module in (block, attention)]
        for layer, name in sorted(self.needs):
            undo.append(probe(plan.attention[layer], partial(self._read, layer, name)))
        return undo

    # -- one features call ------------------------------------------------------------------------------------------

    def busy(self) -> bool:
        """True during a features call of this thread."""
        return self._local.run is not None

    def start(self, call: Call) -> None:
        """Begin a features call, in this thread. Raises UnsupportedCall under gradient checkpointing."""
        keeps_all = all(isinstance(s.keep, float) and s.keep == 1.0 for s in self.plan.stages)
        if (
            torch.is_grad_enabled()
            and not keeps_all
            and any(b.training and getattr(b, "gradient_checkpointing", False) for b in self.plan.blocks)
        ):
            raise UnsupportedCall(
                "gradient checkpointing re-runs the tower's blocks, which a stage inside it cannot follow: use stages "
                "before the LLM, or model.activation_checkpointing_disable(), in older transformers "
                "gradient_checkpointing_disable()"
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
        plan, run = self.plan, self.stop()
        assert run is not None
        run.raise_if_failed()
        if run.marks is None:
            return run
        call, marks = plan.call(run.call, sizes_of(output)), run.marks.read()
        entries = per_entry(call, plan.layout, plan.modality, marks[..., None])
        for entry in entries:
            if not bool(torch.isin(entry, torch.arange(3.0)).all()):
                raise UnsupportedCall(
                    f"{plan.base.config.model_type} resizes this image's features after the tower, which mixes kept "
                    "and dropped tokens: use a stage before the LLM ('llm'), or images of fewer tiles"
                )
        run.kept = [entry[:, 0].to(torch.int8) - 1 for entry in entries]
        return run

    def restore(self, layer: int, name: str, x: Tensor) -> Tensor:
        """A signal of block `layer` that was read for stages before the LLM, for all N positions of the tower."""
        run = self._local.run
        if run is None or run.cut_at.get(layer) is None:
            return x
        x = run.restored(layer, x)
        if kind_of(name).over_queries and self.plan.packed:  # the reader divides by the queries of an unpruned tower
            counts = [image.n for image in run.images]
            shares = [n * run.at.shape[1] / queries for n, queries in zip(counts, run.queries[layer])]
            x[0, run.at.flatten()] *= each(shares, counts, x.device).repeat_interleave(run.at.shape[1])[:, None]
        return x

    # -- hooks ------------------------------------------------------------------------------------------------------

    @outside_while_busy
    def _before_block(self, k: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._local.run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        full = hidden[None] if hidden.dim() == 2 else hidden
        if not run.images:
            begin(self.plan, run, full)
        x = run_stages(self.plan, self.needs, run, k, full)
        run.cut_at[k] = run.cut
        run.queries[k] = [n * run.at.shape[1] for n in run.counts()]
        if run.cut is not None:
            x, run.lengths[k] = run.cut.cut(x, 1), run.cut.n
        elif x is full:
            return None
        if k == self.plan.last_block and not self.by_patch:
            self._nothing_more(run)
        # Positional, because transformers looks for the first hidden state there.
        rest = {name: v for name, v in kwargs.items() if name != "hidden_states"}
        return (x[0] if hidden.dim() == 2 else x, *args[1:]), rest

    @outside_while_busy
    def _after_block(self, k: int, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._local.run
        if run is None:
            return None
        out = output[0] if isinstance(output, tuple) else output
        short = out[None] if out.dim() == 2 else out
        x = short if run.cut is None else run.cut.restore(short)
        if k == self.plan.depth - 1:
            x = run_stages(self.plan, self.needs, run, self.plan.depth, x)
            x = with_patches_joined(run, x) if self.by_patch else x
            self._nothing_more(run)
        if x is short:
            return None
        x = x[0] if out.dim() == 2 else x
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _nothing_more(self, run: TowerRun) -> None:
        """Nothing more will be dropped: what is left starts for the host, which then waits for no later block."""
        if run.cut is not None and run.marks is None:
            run.marks = HostCopy(marks_of_kept(run))

    @outside_while_busy
    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything else that has the length of the tower's sequence is an argument of the attention module."""
        run = self._local.run
        if run is None or run.cut is None:
            return None
        call = named_arguments(module, args, kwargs)
        call = cut_arguments(run, self.plan.tower.config._attn_implementation, call)
        return (call.pop("hidden_states"),), call

    @outside_while_busy
    def _read(
        self,
        layer: int,
        name: str,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        run, packed = self._local.run, self.plan.packed
        if run is None:
            return
        parts = [(q, k, v, mask)]
        if packed and mask is not None:  # one product for all images, each attending to itself
            sizes = run.queries[layer]
            parts = [(*part, None) for part in zip(*(t.split(sizes, dim=2) for t in (q, k, v)))]
        for part in parts:
            run.signals.setdefault((layer, name), []).append(tower_rows(name, *part, scaling, packed))
