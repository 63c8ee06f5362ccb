"""PruneSID: groups by principal directions, and tokens group by group, in LLaVA and in Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune.evals.parity.compare import grid_of, listed, ordered, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.methods.shared.principal import principal_parts
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_prunesid_")
def prunesid(arrays: Arrays, folder: Path) -> str:
    """Groups, and tokens in the official order, the CLS token among them; exact directions."""
    hidden = torch.from_numpy(arrays["hidden"])
    rows = torch.nn.functional.pad(torch.from_numpy(arrays["cls_attn"]).mean(1)[:, 1:], (1, 0))
    grid_of(arrays, hidden.shape[1] - 1)
    method: Any = create("prunesid", rule="cls", cls="keep", order="official")
    for budget in arrays["budgets"].tolist():
        for crop, (x, row) in enumerate(zip(hidden, rows)):
            what = f"of crop {crop} at {budget}"
            same(f"groups {what}", _groups(x[1:], budget // 4), arrays[f"group_{budget}"][crop])
            answer = method(Visual(x, budget, signals=dict(zip(method.needs, (row, x)))))
            same(f"tokens {what}", ordered(answer), arrays[f"index_{budget}"][crop])
            same(f"rows {what}", answer.apply(x), x[ordered(answer)])
    return f"groups and tokens at {listed(arrays['budgets'])} of {hidden.shape[1]}, {len(hidden)} crop(s)"


@case("leaders_prunesid_qwen_")
def prunesid_qwen(arrays: Arrays, folder: Path) -> str:
    """Groups, and tokens group by group, or sorted where there are more than 150."""
    x = torch.from_numpy(arrays["features"])
    method: Any = create("prunesid", rule="component")
    counts = [max(round(len(x) * need / 576), 16) for need in arrays["need_token_num"].tolist()]
    for j, budget in enumerate(counts):
        same(f"groups of run {j}", _groups(x, max(budget // 4, 4)), arrays[f"group_{j}"])
        answer = method(Visual(x, budget))
        same(f"tokens of run {j}", answer.idx if budget > 150 else ordered(answer), arrays[f"index_{j}"])
    return f"groups and tokens at {listed(counts)} of {len(x)}"


def _groups(x: Tensor, count: int) -> Tensor:
    return principal_parts(x.double(), count).argmax(1)
