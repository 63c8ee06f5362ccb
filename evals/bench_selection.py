"""The old name of `vtprune.evals.speed.bench_selection`."""

from vtprune.evals.speed.bench_selection import GPU_CASES as GPU_CASES
from vtprune.evals.speed.bench_selection import batches as batches
from vtprune.evals.speed.bench_selection import gpu as gpu
from vtprune.evals.speed.bench_selection import main as main
from vtprune.evals.speed.bench_selection import measure as measure
from vtprune.evals.speed.bench_selection import memory as memory
from vtprune.evals.speed.bench_selection import overhead as overhead
from vtprune.evals.speed.bench_selection import rival as rival
from vtprune.evals.speed.bench_selection import rival_first as rival_first
from vtprune.evals.speed.bench_selection import rival_loop as rival_loop

if __name__ == "__main__":
    main()
