"""The schedule of SparseVLM as its authors published it: behind which layers tokens go, and how many stay."""

from __future__ import annotations

BEHIND, OF = (2, 6, 15), 32  # the published layers, and the depth they are meant for
PUBLISHED = 576  # visual tokens of the model the lists below were published for; here they only become shares
# Visual tokens behind each of them, of those, by the published average; those of v1 with its merged tokens.
PRESETS = {
    "v1": {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)},
    "plus": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
