"""What a patched model encodes: `FeatureRecorder` stands before `get_image_features` and notes what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.signal import KEPT
from ..kernels import recording
from ..kernels.clock import Clock, timing
from ..model_adapters.entries import Features
from .compilers import outside

if TYPE_CHECKING:
    from .session import Patch


class EncodedFeatures:
    """Features this model encoded, found again by the output or its first tensor; forgotten when those are gone.

    Two keys, because beams re-stack the tensors of an output, and users re-wrap tensors in a new output.
    """

    def __init__(self) -> None:
        from torch.utils.weak import WeakIdKeyDictionary

        self._known = WeakIdKeyDictionary()

    def add(self, output: Any, features: Features) -> None:
        """Remember the features of one encoder output."""
        for key in _keys(output):
            self._known[key] = features

    def find(self, output: Any) -> Features | None:
        """Features of an encoder output (or of what generate() made of it), or None if another model encoded it."""
        return next((self._known[key] for key in _keys(output) if key in self._known), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedFeatures:
        return EncodedFeatures()

    def __reduce__(self) -> Any:
        return EncodedFeatures, ()


def _keys(output: Any) -> list[Any]:
    """The output and its first tensor, as far as they can be referred to weakly: a tuple cannot."""
    pooled = getattr(output, "pooler_output", output)
    while isinstance(pooled, list | tuple) and pooled:
        pooled = pooled[0]
    first = pooled if isinstance(pooled, Tensor) else None
    return [key for key in (output, first) if key is not None and not isinstance(key, tuple | list)]


class FeatureRecorder:
    """Stands in for `base.get_image_features` on the instance and notes sizes, grids and signals of what it returns.

    original: what stood there. tower: `TowerSignals` of stages before the LLM, inside: `TowerStages`; None where there
    is nothing to do.
    """

    def __init__(self, patch: Patch, modality: str, original: Callable[..., Any], tower: Any, inside: Any) -> None:
        self.patch, self.modality, self.original, self.tower, self.inside = patch, modality, original, tower, inside
        self.__name__ = f"get_{modality}_features"

    @property
    def __signature__(self) -> Any:  # generate() reads the parameters to decide what to pass
        return inspect.signature(self.original)

    @outside
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.patch.local.depth:  # the base model, whose call is counted, encodes
            return self._record(args, kwargs)
        with self.patch.running.one():
            if self.patch.removed:  # somebody kept the function beyond the patch, or this call waited
                return self.original(*args, **kwargs)
            return self._record(args, kwargs)

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        local = self.patch.local
        if local.observing:  # video features may be computed through the image path
            return self.original(*args, **kwargs)
        local.observing = True
        try:
            call = inspect.signature(self.original).bind(*args, **kwargs).arguments
            call = {**call, **call.pop("kwargs", {})}
            if self.tower or self.inside:
                output, as_tuple, found = self._read(call, args, kwargs)
            else:
                output, as_tuple = self._encode(args, kwargs)
                found = self.patch.adapter.observe(self.modality, call, output, [])
            if local.depth:  # else they will be known by the output
                local.features[self.modality] = found
            self.patch.encoded.add(output, found)
            return output.to_tuple() if as_tuple else output
        finally:
            local.observing = False

    def _read(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool, Features]:
        """Encode while readers and stages are at work in the tower."""
        clocks: list[Clock] = []
        try:
            if self.tower:
                self.tower.start()
            if self.inside:
                self.inside.start(call)
            with recording() as kernels, timing(clocks):
                output, as_tuple = self._encode(args, kwargs)
                signals = self.tower.finish(call, output) if self.tower else []
                run = self.inside.finish(output) if self.inside else None
            if run and run.kept:
                signals = [{**s, KEPT: k} for s, k in zip(signals or [{}] * len(run.kept), run.kept)]
            found = self.patch.adapter.observe(self.modality, call, output, signals)
            found.tower, found.kernels, found.clocks = run and run.report(), kernels, clocks
        finally:
            if self.inside:
                self.inside.stop()
            if self.tower:
                self.tower.stop()
        return output, as_tuple, found

    def _encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """The features by name, and whether the caller gets them as a tuple, which tells no names."""
        wants = kwargs.get("return_dict")
        if wants is None:
            wants = getattr(self.patch.adapter.base.config, "return_dict", True)
        if wants:
            return self.original(*args, **kwargs), False
        output = self.original(*args, **{**kwargs, "return_dict": True})
        return output, hasattr(output, "to_tuple")
