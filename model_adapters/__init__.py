"""Which module of a Hugging Face model is what, and what families do their own way; no pruning maths."""

from .family import Family, Known, families

__all__ = ["Family", "Known", "families"]
