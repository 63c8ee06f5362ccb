"""Model types whose calls have the common shape in every respect."""

from __future__ import annotations

from .family import Family, family


@family
class SameShape(Family):
    same_shape = (
        "aya_vision",
        "cohere2_vision",
        "got_ocr2",
        "fast_vlm",
        "lfm2_vl",
        "ovis2",
        "perception_lm",
        "video_llama_3",
    )
    note = "read in transformers' source, not run"
