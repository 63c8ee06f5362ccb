"""Tensor operations with one signature and several implementations; nothing of vtprune is imported here."""

from .attention import attention_received, attention_rows

__all__ = ["attention_received", "attention_rows"]
