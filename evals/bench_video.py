"""The old name of `vtprune.evals.speed.bench_video`."""

from vtprune.evals.speed.bench_video import LAYERS as LAYERS
from vtprune.evals.speed.bench_video import TEXT as TEXT
from vtprune.evals.speed.bench_video import WORDS as WORDS
from vtprune.evals.speed.bench_video import clip as clip
from vtprune.evals.speed.bench_video import main as main
from vtprune.evals.speed.bench_video import reduction as reduction
from vtprune.evals.speed.bench_video import rival as rival
from vtprune.evals.speed.bench_video import segmentation as segmentation

if __name__ == "__main__":
    main()
