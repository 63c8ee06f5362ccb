"""The old import path of `vtprune.core.framing`."""

from .core.framing import Words, clips_seen, clips_told

__all__ = [
    "Words",
    "clips_seen",
    "clips_told",
]
