"""The paired bootstrap: samples are drawn anew with replacement, the same ones for every way of pruning.

`scipy.stats.bootstrap(paired=True)` resamples for one statistic at a time. Here one resample has to serve every way of
pruning of a task, so that each can be compared with dense and with random, and means over tasks can be made of the
draws. A resample is how often each sample was drawn, so all means are one product of matrices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_BLOCK = 100  # resamples at a time, to bound memory
Array = NDArray[np.float64]


def resampled(parts: Array, rng: np.random.Generator, resamples: int = RESAMPLES) -> Array:
    """[resamples, ways, k]: means over n resampled samples of `parts` [ways, n, k]."""
    ways, n, k = parts.shape
    flat = parts.transpose(1, 0, 2).reshape(n, ways * k)
    even = np.full(n, 1 / n)
    blocks = [min(_BLOCK, resamples - start) for start in range(0, resamples, _BLOCK)]
    means = [rng.multinomial(n, even, size=size) @ flat / n for size in blocks]
    return np.concatenate(means).reshape(resamples, ways, k)


def interval(draws: Array | None) -> tuple[float, float] | tuple[None, None]:
    """The middle 95 % of the draws; (None, None) where there are none, or some are undefined."""
    if draws is None or not np.isfinite(draws).all():
        return None, None
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
