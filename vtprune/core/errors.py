"""The errors that vtprune raises on purpose."""

from __future__ import annotations


class VtpruneError(Exception):
    """Base class of everything vtprune raises on purpose."""


class UnsupportedModel(VtpruneError):
    """The model cannot be pruned exactly; the message names the cause and the way out."""


class UnsupportedCall(VtpruneError):
    """The model can be pruned, but not in this call; the message names the cause and the way out."""
