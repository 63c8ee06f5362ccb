"""The old name of `vtprune.evals.speed.bench_kernels`."""

from vtprune.evals.speed.bench_kernels import compact_against_gathers as compact_against_gathers
from vtprune.evals.speed.bench_kernels import kernels as kernels
from vtprune.evals.speed.bench_kernels import main as main
from vtprune.evals.speed.bench_kernels import merge_against_index_add as merge_against_index_add
from vtprune.evals.speed.bench_kernels import merge_against_loop as merge_against_loop
from vtprune.evals.speed.bench_kernels import scatter_matching as scatter_matching
from vtprune.evals.speed.bench_kernels import scatter_merging as scatter_merging
from vtprune.evals.speed.bench_kernels import tome_against_scatter as tome_against_scatter

if __name__ == "__main__":
    main()
