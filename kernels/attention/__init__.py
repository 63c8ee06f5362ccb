"""Exact attention rows and column means without the N x N matrix."""

from .reference import attention_received, attention_rows

__all__ = ["attention_received", "attention_rows"]
