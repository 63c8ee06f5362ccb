"""Lets torchvision of the registry be imported beside a torch without CUDA: it names two operators that must exist.

`make test-vllm` puts this module on the path of its environment, for all processes of vLLM. A user who takes torch and
torchvision from the same index does not need it.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
defined: list[Any] = []  # a library lives as long as its object


class Finder(importlib.abc.MetaPathFinder):
    """Defines the operators when torchvision is about to be imported, and steps aside."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(operator)
            defined.append(library)


sys.meta_path.insert(0, Finder())
