"""Which stages stand inside a vision tower, at which of its blocks they act, and which signals they read there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.errors import UnsupportedModel
from ..core.method import Stage
from ..core.signal import Signal
from ..model_adapters.tower_layout import Call, Layout, Modality, TowerCall, tower_of
from ..model_adapters.tower_tokens import blocks_of
from ..model_adapters.towers import attention_modules, has_cls, layer_index, layout_of
from ..signals import kind_of


@dataclass(frozen=True, eq=False)
class TowerPlan:
    """A vision tower and the stages inside it.

    base: the VLM's base model. modality: the features calls in which the stages act. layout: how the tower's tokens
    become visual tokens. blocks, attention: its blocks and their attention modules. depth: how many blocks the
    projector makes use of. acts_at: for each stage, the blocks at which it acts.
    """

    base: Any
    modality: Modality
    layout: Layout
    tower: Any
    blocks: nn.ModuleList
    attention: list[nn.Module]
    depth: int
    stages: list[Stage]
    acts_at: list[range]
    has_cls: bool

    @classmethod
    def of(cls, base: Any, modality: Modality, stages: Sequence[Stage]) -> TowerPlan:
        """The plan of these stages. Raises UnsupportedModel or ValueError for stages that the tower cannot hold."""
        layout, tower = layout_of(base, modality), tower_of(base, modality)
        blocks = blocks_of(tower)
        depth = layer_index(base, tower, len(blocks), None) + 1
        plan = cls(
            base, modality, layout, tower, blocks, attention_modules(tower), depth,
            list(stages), [blocks_of_stage(stage, depth) for stage in stages], has_cls(tower),
        )  # fmt: skip
        check_stages(plan)
        return plan

    @property
    def by_frame(self) -> bool:
        """True if the frames of a video are units of their own."""
        return any(stage.per == "frame" for stage in self.stages)

    @property
    def by_patch(self) -> bool:
        """True if the stages choose among single patches, and not among the patches of whole visual tokens."""
        return any(stage.method.by_patch for stage in self.stages)

    @property
    def last_block(self) -> int:
        """The last block at which a stage acts."""
        return max(acts_at[-1] for acts_at in self.acts_at)

    @property
    def packed(self) -> bool:
        """True of a tower that runs many images as one row of patches."""
        return self.layout.packed is not None

    def reads(self, need: Signal) -> bool:
        """Whether a signal is read of this tower: some are for towers with a CLS token, some for those without."""
        return not (need.without_cls if self.has_cls else kind_of(need).of_cls)

    def call(self, call: Call, sizes: Sequence[int] = ()) -> TowerCall:
        """A features call with these arguments, for the layout's functions."""
        return TowerCall(self.base, self.tower, call, f"{self.modality}_grid_thw", sizes)


def blocks_of_stage(stage: Stage, depth: int) -> range:
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


def signals_read(plan: TowerPlan) -> dict[tuple[int, str], int]:
    """(block, name) of every signal that the stages read, and the last block at which it is read."""
    found: dict[tuple[int, str], int] = {}
    for stage, acts_at in zip(plan.stages, plan.acts_at):
        for need in stage.method.needs:
            kind = kind_of(need)
            if "tower" not in kind.where or kind.source != "attention":
                raise UnsupportedModel(f"signal {need.kind!r} cannot be read inside a vision tower")
            for k in acts_at:
                if not 0 <= k + need.offset < k:
                    raise ValueError(
                        f"{stage.method.name} at tower block {k} reads block {k + need.offset}: use block "
                        f"{-need.offset} or later, and offsets below 0"
                    )
                if plan.reads(need):
                    key = k + need.offset, need.kind
                    found[key] = max(k, found.get(key, 0))
    return found


# -- what a tower cannot hold -----------------------------------------------------------------------------------------


def check_stages(plan: TowerPlan) -> None:
    """Raise ValueError for stages that do not go together, UnsupportedModel for those that the tower cannot run."""
    for stage in plan.stages:
        if stage.per == "sample" or stage.keep_total is not None:
            raise ValueError(
                f"{stage.method.name} at {stage.where!r}: in the tower every crop or image has its own budget; "
                "use keep=..., and per='image', 'crop' or 'frame'"
            )
    _check_blocks(plan)
    if plan.by_frame and any(stage.per != "frame" for stage in plan.stages):
        raise ValueError("stages in the tower must agree on per='frame': set it on all of them, or on none")
    if plan.by_patch and not all(stage.method.by_patch for stage in plan.stages):
        raise ValueError("stages in the tower must agree on what they choose among: single patches, or whole tokens")
    _check_tower(plan)


def _check_blocks(plan: TowerPlan) -> None:
    """Refuse a stage between the blocks of another one, which carries scores from block to block."""
    for i, (stage, acts_at) in enumerate(zip(plan.stages, plan.acts_at)):
        others = [k for j, blocks in enumerate(plan.acts_at) if j != i for k in blocks]
        between = [k for k in others if acts_at[0] <= k <= acts_at[-1]]
        if len(acts_at) > 1 and between:
            raise ValueError(
                f"{stage.method.name} acts at tower blocks {acts_at[0]}..{acts_at[-1]}, so no other stage may stand "
                f"at {between[0]}: its scores would go out of step"
            )


def _check_tower(plan: TowerPlan) -> None:
    """Refuse what this tower's attention, or the features it hands on from several blocks, do not allow."""
    weighing = [stage.method.name for stage in plan.stages if getattr(stage.method, "weighs", False)]
    if weighing and "flash" in (plan.tower.config._attn_implementation or ""):
        raise UnsupportedModel(
            f"{weighing[0]} biases attention by the size of merged tokens, which flash attention does not take: "
            "load the model with attn_implementation='sdpa'"
        )
    if plan.by_patch and getattr(plan.tower, "deepstack_visual_indexes", None):
        raise UnsupportedModel(
            f"{type(plan.tower).__name__} takes features from several blocks, whose patches must stay together: "
            "choose among whole tokens (unit='block')"
        )
