"""The old import path of `vtprune.hf.decode`: pickled caches name `vtprune.recall.Recall`."""

from .hf.decode import DecodeSelection as Recall

__all__ = ["Recall"]
