"""The old import path of `vtprune.hf.vit` and the files beside it."""

from .hf.vit import VitPatch as VitSession
from .hf.vit_each_image import EachImage
from .hf.vit_last import VitLast
from .hf.vit_run import VitRun

__all__ = ["EachImage", "VitLast", "VitRun", "VitSession"]
