"""Methods that choose for one image at a time, in the blocks of a plain vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..core.ask import ask
from ..core.errors import UnsupportedCall, UnsupportedModel
from ..core.method import Method, Stage
from ..core.reduction import Reducer, Reduction, Tokens, keep_rows
from ..core.signal import Signal
from ..core.visual import Visual
from ..kernels import recorded
from ..signals import kind_of


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
    def trusted(self) -> bool:
        """True, because `ask` has checked the answers already."""
        return True

    @property
    def reads(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(quantity(need) for need in self.method.needs))

    def reduce(self, t: Tokens, left: int) -> Reduction:
        if recorded():
            raise UnsupportedCall(
                f"{self.method.name} chooses image by image, on the host, which torch.export, torch.onnx and torch.jit "
                f"cannot record: export with a method for whole batches ({', '.join(_recordable())}), or unpatch first"
            )
        units = []
        for b in range(t.x.shape[0]):
            signals = {need: _of_image(t, quantity(need), b) for need in self.method.needs}
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


def quantity(need: Signal) -> str:
    """What stands for a signal in `Tokens.signals`."""
    kind = kind_of(need)
    return kind.vit or kind.name


def _of_image(t: Tokens, what: Any, b: int) -> Tensor:
    x = t.read(what)[b]
    return x.transpose(0, 1).flatten(1)[t.prefix :] if what == "keys" else x[t.prefix :]
