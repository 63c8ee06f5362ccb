"""Fewer tokens in vision state-space models (ToP-ViM, https://arxiv.org/abs/2409.18962), as tensor functions.

A scan's hidden state decays at every position. Tokens that are simply cut out take their decay with them; an aligned
scan lets the state go on decaying over their places, without their input. How the paper does that was not readable:
this is our reading of its "hidden state alignment". The published models were fine-tuned after pruning.
"""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


def official_scores(backward: Tensor) -> Tensor:
    """[B, N]: the sum over channels of the backward branch's output [B, D, N] in the order it was scanned.

    The official code does not flip it back, so a score belongs to the mirrored token; pass `backward.flip(-1)` for its
    own. It does not clip channels either.
    """
    return backward.float().sum(1)


def keep(scores: Tensor, ratio: float, cls: int | None = None) -> Tensor:
    """[B, K] kept places in scan order, of scores [B, N]: ceil(ratio * patches), ties to the lower place.

    cls: place of a CLS token, which stays, in the middle of what is left; K then is odd, one more where it would not
    be. Every sample chooses for itself (in the official code samples behind the first may keep their CLS token twice).
    Raises ValueError for a ratio outside (0, 1] or a place outside the sequence.
    """
    n = scores.shape[1]
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio}: a share in (0, 1]")
    if cls is not None and not 0 <= cls < n:
        raise ValueError(f"cls={cls}: a place of this sequence, 0..{n - 1}, or None")
    patches = n if cls is None else n - 1
    count = ceil(ratio * patches)
    if cls is None:
        return _best(scores, count)
    count += count % 2 == 0
    others = scores.float().index_fill(1, torch.tensor([cls], device=scores.device), -torch.inf)
    kept = _best(others, min(count - 1, patches))
    middle = kept.new_full((len(kept), 1), cls)
    return torch.cat([kept[:, : count // 2], middle, kept[:, count // 2 :]], 1)


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values


def in_direction(kept: Tensor, rank: Tensor) -> Tensor:
    """Kept places [B, K] in the order of another scan direction, rank [N]: the time at which it visits each place."""
    return kept.gather(1, rank.to(kept.device)[kept].argsort(1))


def scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    aligned: bool = True,
) -> tuple[Tensor, Tensor]:
    """Selective scan over the kept tokens: outputs [B, D, K] and the last hidden state [B, D, S], float32.

    h_t = exp(a delta_t) h_{t-1} + delta_t b_t u_t and y_t = c_t h_t + d u_t, with softplus(delta + bias) for delta.
    u, delta: [B, D, N]. a: [D, S]. b, c: [B, S, N]. d, bias: [D] or None. kept: [B, K] ascending, None for all.
    aligned: between two kept tokens the state decays by the sum of all deltas in between, and behind the last one to
        the end, as if removed tokens had no input; False: as if they had never been there. One step per kept token.
    """
    u, delta, a, b, c = (x.float() for x in (u, delta, a, b, c))
    delta = F.softplus(delta if bias is None else delta + bias[:, None])
    total, end = delta.cumsum(-1), delta.sum(-1)
    if kept is not None:
        wide = kept[:, None]
        u, delta, total = (x.gather(2, wide.expand(-1, x.shape[1], -1)) for x in (u, delta, total))
        b, c = (x.gather(2, wide.expand(-1, x.shape[1], -1)) for x in (b, c))
    gap = total.diff(dim=-1, prepend=torch.zeros_like(total[..., :1])) if aligned else delta
    state = u.new_zeros(*u.shape[:2], a.shape[1])
    ys = []
    for t in range(u.shape[2]):
        decay = (gap[..., t, None] * a).exp()
        state = decay * state + (delta[..., t] * u[..., t])[..., None] * b[:, None, :, t]
        ys.append((state * c[:, None, :, t]).sum(-1))
    y = torch.stack(ys, -1)
    if aligned:
        state = ((end - total[..., -1])[..., None] * a).exp() * state
    return y if d is None else y + d[:, None] * u, state
