"""`VitLast`: what the last forward pass of a patched vision transformer did to its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.reduction import Reduction
from ..core.result import plain


@dataclass
class VitLast:
    """What the last forward pass did to the tokens of its batch.

    The model's outputs have the rows that are left, unless it lays them out on a grid (backbones, masked image
    modelling, depth, `forward_intermediates`): then every token gets the row that holds it, and a dropped one keeps its
    last state.
    """

    n: int
    """Rows before anything was reduced, prefix included."""
    prefix: int
    """Rows before the patches: CLS and registers."""
    lengths: list[int] = field(default_factory=list)
    """Rows behind every block."""
    steps: list[tuple[int, Reduction]] = field(default_factory=list)
    """(block, what it reduced), in order."""
    size: Tensor | None = None
    """[B, M] float32: for how many tokens each output row stands; None: one each."""
    notes: list[str] = field(default_factory=list)
    """What stood in for what."""
    valid: Tensor | None = None
    """[B, M] bool: which output rows are real where images are padded to one length; None: all."""

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

    def to_dict(self) -> dict[str, Any]:
        """All that is known as plain ints, floats, strings and lists, as `json.dumps` takes them; waits for the device.

        The fields by their names, but "steps" is [{"block", "rows"}], the rows left behind it, and "slots" and "index"
        are as the properties say; None where all stayed.
        """
        names = ("n", "prefix", "lengths", "slots", "index", "size", "valid", "notes")
        found = {name: plain(getattr(self, name)) for name in names}
        return found | {"steps": [{"block": k, "rows": step.index.shape[1]} for k, step in self.steps]}

    def draw(self, image: Any, row: int = 0, grid: tuple[int, int] | None = None) -> Any:
        """A PIL image: which patches of the picture became one token; dropped ones are dimmed.

        row: the picture's in the batch. grid: rows and columns of patches; a square unless said. Raises ValueError
        where the patches do not fill it.
        """
        from ..show import draw_slots

        return draw_slots(self, image, row, grid)

    def _repr_html_(self) -> str:
        from ..summary import html

        return html(self)
