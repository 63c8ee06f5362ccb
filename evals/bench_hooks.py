"""The old name of `vtprune.evals.speed.bench_hooks`."""

from vtprune.evals.speed.bench_hooks import HooksReport as HooksReport
from vtprune.evals.speed.bench_hooks import hooks as hooks
