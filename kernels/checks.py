"""Input checks shared by the kernels and the methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_finite(tensors: Sequence[Tensor], what: str = "features") -> None:
    """Raise ValueError if any element is NaN or Inf; one transfer to the host for the whole sequence."""
    if not tensors or bool(torch.stack([t.isfinite().all() for t in tensors]).all()):
        return
    for unit, tensor in enumerate(tensors):
        bad = ~tensor.isfinite()
        if bad.any():
            where = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{what} of unit {unit} hold {int(bad.sum())} NaN or Inf (the first at {where}): scores "
                "would be meaningless; check the pixels, or use bfloat16 if the tower overflows in float16"
            )
