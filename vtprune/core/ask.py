"""Ask the method of a stage, and check what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import check
from .errors import VtpruneError
from .method import Stage
from .visual import Assignment, Visual


def ask(stage: Stage, views: Sequence[Visual], least: bool = False) -> list[Assignment]:
    """What the method of a stage answers, checked (`check_answers`), for units that it must not have changed.

    least: budgets are what must be left at least, as before the last block of a schedule.
    """
    name = stage.method.name or type(stage.method).__name__
    ours = stage.trusted
    given = [(what, x, _mark(x, ours)) for view in views for what, x in _tensors(view)]
    answers = stage.method.batch(views)
    for what, x, mark in given:
        if not _unchanged(x, mark):
            raise VtpruneError(
                f"{name} changed {what} of a unit in place, which other units and the model read as well: make a new "
                "tensor of it"
            )
    check_answers(stage, views, answers, least)
    return answers


def _tensors(view: Visual) -> Iterator[tuple[str, Tensor]]:
    yield "v.x", view.x
    if view.text is not None:
        yield "v.text", view.text
    if view.before is not None:
        yield "v.before", view.before
    for signal, x in view.signals.items():
        yield f"the signal {signal.kind!r} in v.signals", x


def _mark(x: Tensor, ours: bool) -> int | Tensor | None:
    """What tells whether a tensor was changed: its version, or a copy where inference mode counts none."""
    if not x.is_inference():
        return x._version
    return None if ours else x.clone()


def _unchanged(x: Tensor, mark: int | Tensor | None) -> bool:
    return mark is None or (torch.equal(x, mark) if isinstance(mark, Tensor) else x._version == mark)


def check_answers(stage: Stage, views: Sequence[Visual], answers: Sequence[Assignment], least: bool = False) -> None:
    """Raise VtpruneError unless every answer is an assignment of its budget to its unit; `least` as in `ask`.

    What only the device knows is one deferrable check.
    """
    name = stage.method.name or type(stage.method).__name__
    if not isinstance(answers, Sequence) or len(answers) != len(views):
        count = len(answers) if isinstance(answers, Sequence) else type(answers).__name__
        raise VtpruneError(f"{name}.batch answered {count} of {len(views)} units")
    for view, answer in zip(views, answers):
        idx = getattr(answer, "idx", None)
        if not isinstance(answer, Assignment) or not _is(idx, 1, view.x.device, torch.int64):
            raise VtpruneError(
                f"{name} must answer an Assignment with idx [K] int64, not {answer!r:.80}, on {view.x.device}"
            )
        _check_count(stage, name, view, len(answer.idx), least)
        fault = _shape_fault(view, answer)
        if fault:
            raise VtpruneError(
                f"{name} answered {fault} for a unit of {view.n} tokens of which it keeps {len(answer.idx)}"
            )
    conditions = _conditions(views, answers)
    if conditions:
        check(torch.cat([c.flatten() for c in conditions]).all(), lambda: _fault(name, views, answers))


def _check_count(stage: Stage, name: str, view: Visual, count: int, least: bool) -> None:
    exact, budget, n = stage.exact, view.budget, view.x.shape[0]
    if budget is None:
        return
    most = n if least or (not exact and count >= n) else budget
    if count > most or (count < budget and (exact or least)):
        raise VtpruneError(f"{name} kept {count} tokens of {n}, but its budget is {budget}")


def _is(x: Any, dims: int, device: torch.device, dtype: torch.dtype | None) -> bool:
    """True for a tensor of so many dimensions there; dtype None stands for any floating one."""
    if not isinstance(x, Tensor) or x.dim() != dims or x.device != device:
        return False
    return x.is_floating_point() if dtype is None else x.dtype == dtype


def _shape_fault(view: Visual, a: Assignment) -> str | None:
    """What the host sees is wrong with everything but idx."""
    k, n, device = len(a.idx), view.x.shape[0], view.x.device
    if a.order is not None and not (_is(a.order, 1, device, torch.int64) and len(a.order) == k):
        return f"order={_said(a.order)}, not [{k}] int64 on {device}"
    if a.scores is not None and not (_is(a.scores, 1, device, None) and len(a.scores) == n):
        return f"scores={_said(a.scores)}, not [{n}] floating on {device}"
    parts = {"src": a.src, "dst": a.dst, "w": a.w}
    if all(part is None for part in parts.values()):
        return None
    missing = [part for part, x in parts.items() if x is None]
    if missing:
        return f"src, dst and w without {' and '.join(missing)}"
    if view.x.shape[1] == 0:
        return "src, dst and w, which have no meaning at decode and for heads,"
    for part, x in parts.items():
        if not _is(x, 1, device, None if part == "w" else torch.int64) or len(x) != len(a.src):  # type: ignore[arg-type]
            return f"{part}={_said(x)}, not [{len(a.src)}] {'floating' if part == 'w' else 'int64'} on {device}"  # type: ignore
    return None


def _said(x: Any) -> str:
    return f"{list(x.shape)} {str(x.dtype)[6:]} on {x.device}" if isinstance(x, Tensor) else f"{x!r:.40}"


def _conditions(views: Sequence[Visual], answers: Sequence[Assignment]) -> list[Tensor]:
    """What must hold of all answers together, as tensors on the device."""
    idx, hit, rows, weights = [], [], [], []
    size = start = 0  # tokens and output rows of the units before
    for view, a in zip(views, answers):
        k, n = len(a.idx), view.x.shape[0]
        idx.append(torch.cat([a.idx[:1] + 1, a.idx.diff(), n - a.idx[-1:]]))
        if a.order is not None:
            hit.append((a.idx, a.order, n, size))
        if a.src is not None and a.dst is not None and a.w is not None:
            idx += [a.src + 1, n - a.src, a.dst + 1, k - a.dst]
            rows.append(a.dst.clamp(0, max(0, k - 1)) + start)
            start += k
            weights.append(a.w)
        size += n
    found = [torch.cat(idx) > 0] if idx else []
    if weights:
        found.append(torch.cat([w.isfinite() for w in weights]))
        rows_hit = torch.zeros(start, dtype=torch.bool, device=weights[0].device)
        found.append(rows_hit.index_fill_(0, torch.cat(rows), True) if start else rows_hit)
    if hit:
        picked = torch.zeros(size, dtype=torch.bool, device=hit[0][0].device)
        picked.index_fill_(0, torch.cat([order.clamp(0, n - 1) + at for _, order, n, at in hit]), True)
        found.append(picked.index_select(0, torch.cat([idx.clamp(0, n - 1) + at for idx, _, n, at in hit])))
    return found


def _fault(name: str, views: Sequence[Visual], answers: Sequence[Assignment]) -> VtpruneError:
    """The error that names the first answer with a fault that the device found."""
    view, a = next((v, a) for v, a in zip(views, answers) if not all(bool(c.all()) for c in _conditions([v], [a])))
    n, k = view.n, len(a.idx)
    steps = torch.cat([a.idx[:1] + 1, a.idx.diff(), n - a.idx[-1:]])
    if not bool((steps > 0).all()):
        return VtpruneError(
            f"{name} answered idx={a.idx.tolist()!r:.80} for a unit of {n} tokens: kept positions must be distinct, "
            f"ascending and within 0..{n - 1}; sort them (Assignment.order holds pick order)"
        )
    for part, x, most in (("src", a.src, n), ("dst", a.dst, k)):
        if x is not None and not bool(((x >= 0) & (x < most)).all()):
            return VtpruneError(f"{name} answered {part}={x.tolist()!r:.80}: they must be within 0..{most - 1}")
    if a.w is not None and a.dst is not None:
        if not bool(a.w.isfinite().all()):
            return VtpruneError(f"{name} answered merge weights w={a.w.tolist()!r:.80}: they must be finite numbers")
        empty = sorted(set(range(k)) - set(a.dst.tolist()))
        if empty:
            return VtpruneError(
                f"{name} answered dst without {empty!r:.80}: nothing flows into those of its {k} kept tokens, which "
                "would be zero; give each its own position as a source"
            )
    order = [] if a.order is None else a.order.tolist()
    return VtpruneError(f"{name} answered order={order!r:.80}, no permutation of idx={a.idx.tolist()!r:.80}")
