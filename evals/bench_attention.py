"""The old name of `vtprune.evals.speed.bench_attention`."""

from vtprune.evals.speed.bench_attention import PROBLEMS as PROBLEMS
from vtprune.evals.speed.bench_attention import attention as attention
from vtprune.evals.speed.bench_attention import eager as eager
