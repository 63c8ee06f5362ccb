"""Model types that cannot be pruned exactly, and why."""

from __future__ import annotations

from typing import ClassVar

from .family import Family, family

_WHOLE = "its language model is a whole CausalLM"


@family
class Refused(Family):
    refused: ClassVar = {
        "mllama": "its image tokens are not in the sequence (cross-attention)",
        "florence2": "it is an encoder-decoder",
        "blip-2": f"{_WHOLE} or encoder-decoder",
        "instructblip": f"{_WHOLE} or encoder-decoder",
        "llama4": _WHOLE,
        "granite4_vision": "its deepstack layout differs",
    }
