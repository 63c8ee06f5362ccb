"""The old import path of `vtprune.hf.attention_probe`."""

from .hf.attention_probe import HEADS, interface_of, read, reweighed
from .hf.attention_probe import probe as attach
from .hf.attention_probe import probe_change as attach_change

__all__ = ["HEADS", "attach", "attach_change", "interface_of", "read", "reweighed"]
