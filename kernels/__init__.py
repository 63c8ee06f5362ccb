"""Tensor operations with one signature and several implementations; nothing of vtprune is imported here."""

from .attention import attention_received, attention_rows
from .checks import check_finite
from .farthest_point import farthest_point

__all__ = ["attention_received", "attention_rows", "check_finite", "farthest_point"]
