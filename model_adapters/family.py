"""A family of vision-language models: what it does its own way, and how it is registered and found.

A family is one class in one file, registered by `@family` in `vtprune.registry.FAMILIES`; plug-ins bring theirs by the
entry-point group "vtprune.families", whose entries name such a class or the module that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch

from vtprune.core.errors import UnsupportedModel
from vtprune.core.visual import Span
from vtprune.registry import FAMILIES

from . import rasters
from .entries import Features, Unit
from .tower_layout import Call, Layout, Modality

Status = Literal["tested", "same shape", "refused"]
F = TypeVar("F", bound="type[Family]")


class Family:
    """What one family of vision-language models does its own way. A subclass overrides what differs from the default.

    The model types, as `config.model_type` spells them, stand in the class itself and are not inherited:
    tested: those whose tiny models are in the conformance suite. same_shape: those whose code in transformers was read
        and makes its calls in the same shape; nothing is known of their towers. refused: those that cannot be pruned
        exactly, and why.
    note: one sentence for lists.

    The functions get the base model (`model.base_model`), whose config says the numbers; a family holds nothing.
    """

    tested: ClassVar[Sequence[str]] = ()
    same_shape: ClassVar[Sequence[str]] = ()
    refused: ClassVar[Mapping[str, str]] = {}
    note: ClassVar[str] = ""

    masks_in_base: ClassVar[bool] = False
    """The base model builds 4-D masks from the padding mask before it calls the text model."""
    token_types: ClassVar[Sequence[str]] = ("mm_token_type_ids",)
    """Arguments that may tell the types of tokens (0 text, 1 image, 2 video); the first that a call has counts."""
    video_token: ClassVar[Modality] = "video"
    """The modality whose token id the frames of a video are written with."""
    uses_image_sizes: ClassVar[bool] = False
    """The raster of an image follows from its size in pixels, which the argument `image_sizes` tells."""
    image_layout: ClassVar[Layout | None] = None
    """How the tokens of the vision tower become visual tokens of images; without one, nothing is read in the tower."""
    video_layout: ClassVar[Layout | None] = None
    """The same for videos."""

    # -- rasters: where an image or a video lies inside its own tokens

    def spans(self, base: Any, modality: str, call: Call, sizes: Sequence[int]) -> list[tuple[Span, ...]]:
        """Spans of every entry of a feature call; an empty tuple where the raster is unknown.

        call: bound arguments of the feature call; sizes: tokens per entry.
        """
        grid = call.get(f"{modality}_grid_thw")
        image_sizes = rasters.image_sizes_of(call) if self.uses_image_sizes else None
        if grid is not None and len(grid) == len(sizes):
            return [rasters.merged_grid(base, thw, n) for thw, n in zip(rasters.ints(grid), sizes)]
        if modality == "video":
            return self.video_spans(base, call, sizes)
        if image_sizes is not None:
            return [self.sized_spans(base, n, size, call) for n, size in zip(sizes, image_sizes)]
        return [self.image_spans(base, n) for n in sizes]

    def image_spans(self, base: Any, n: int) -> tuple[Span, ...]:
        """Spans of an image of n tokens of which nothing else is known."""
        return rasters.square(n)

    def sized_spans(self, base: Any, n: int, size: tuple[int, int], call: Call) -> tuple[Span, ...]:
        """Spans of an image of n tokens whose (height, width) in pixels is `size`; asked if `uses_image_sizes`."""
        return self.image_spans(base, n)

    def sized_tokens(self, base: Any, size: tuple[int, int], call: Call) -> int:
        """Tokens of an image of (height, width) pixels; asked if `uses_image_sizes`."""
        raise NotImplementedError(f"{type(self).__name__} uses image sizes: define sized_tokens")

    def video_spans(self, base: Any, call: Call, sizes: Sequence[int]) -> list[tuple[Span, ...]]:
        """Spans of every video: equal square frames, as many as the pixels show."""
        pixels = call.get("pixel_values_videos", call.get("pixel_values"))  # the name in 5.17 is that of images
        frames = pixels.shape[1] if torch.is_tensor(pixels) and pixels.dim() == 5 else 0
        each = self.frame_tokens(base)
        return [rasters.square_frames(n, frames or (n // each if each else 0)) for n in sizes]

    def frame_tokens(self, base: Any) -> int:
        """Tokens of a video frame where the family fixes them; 0 where it does not."""
        return 0

    def is_told(self, base: Any, modality: str, call: Call) -> bool:
        """Whether rasters follow from the number of tokens and what `call` says of the grids, without any pixels."""
        grid = call.get(f"{modality}_grid_thw")
        if grid is not None or hasattr(base.config.vision_config, "spatial_merge_size"):
            return grid is not None
        if modality == "video":
            return self.frame_tokens(base) > 0
        return not self.uses_image_sizes or call.get("image_sizes") is not None

    def sizes_told(self, base: Any, modality: str, call: Call) -> list[int] | None:
        """Tokens of every image or video of the call as its grids tell them; None where it says nothing of them."""
        grid, image_sizes = call.get(f"{modality}_grid_thw"), rasters.image_sizes_of(call)
        merge = getattr(base.config.vision_config, "spatial_merge_size", None)
        if grid is not None and merge:
            return [t * h * w // merge**2 for t, h, w in rasters.ints(grid)]
        if modality == "video" or image_sizes is None or not self.uses_image_sizes:
            return None
        return [self.sized_tokens(base, size, call) for size in image_sizes]

    # -- units: what the entries of the vision encoder are in the prompt

    def entries(self, modality: str, features: Features, total: int) -> Features:
        """The entries as the prompt writes them, before they are handed out over its `total` visual tokens."""
        return features

    def units(self, modality: str, units: list[Unit]) -> list[Unit]:
        """The units that the entries become: one each, unless tiles are joined to an image or split by text."""
        return units

    # -- vision tower

    def layout(self, base: Any, modality: Modality) -> Layout | None:
        """How the tokens of this model's tower become visual tokens of a modality; None if that is not known."""
        return self.image_layout if modality == "image" else self.video_layout


@dataclass(frozen=True)
class Known:
    """One model type in the list of families. note: why it is refused, or what is said of its family."""

    model_type: str
    status: Status
    note: str
    family: type[Family]


def family(cls: F) -> F:
    """Class decorator: make a `Family` known under each of the model types that it lists.

    Raises TypeError if the class is no `Family` or lists no model types, ValueError if one of them is taken or listed
    twice.

    >>> @family
    ... class MyFamily(Llava):
    ...     tested = ("my_llava",)
    """
    if not _is_family(cls):
        raise TypeError(f"@family: {cls!r} must be a class derived from vtprune.model_adapters.Family")
    names = _names(cls)
    if not cls.__module__.startswith(f"{__package__}."):
        FAMILIES.import_own()  # a name that one of our families has is refused here, and not when ours are imported
    for name in names:
        FAMILIES.check_free(name, cls, f"@family: {_path(cls)} lists {name!r}, but")
    for name in names:
        FAMILIES.add(name, cls, "@family")
    return cls


def _is_family(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Family)


def _make(thing: Any) -> None:
    """Make what every look-up makes, of a class."""
    if _is_family(thing):
        thing()


def _names(cls: type[Family]) -> list[str]:
    """The model types that a class itself lists. Raises TypeError and ValueError as `family` does."""
    names: list[str] = []
    for attribute in ("tested", "same_shape", "refused"):
        listed = cls.__dict__.get(attribute, ())
        if isinstance(listed, str):
            raise TypeError(
                f"@family: {_path(cls)}.{attribute}={listed!r} must be a tuple of model types: ({listed!r},)"
            )
        names += listed
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"@family: {_path(cls)} lists {', '.join(map(repr, twice))} more than once")
    if not names:
        raise TypeError(
            f"@family: {_path(cls)} lists no model types: set tested, same_shape or refused in the class itself"
        )
    return names


def _known_as(name: str, cls: type[Family]) -> Known:
    """What the class that lists a name says of it."""
    if name in cls.__dict__.get("refused", {}):
        return Known(name, "refused", cls.refused[name], cls)
    return Known(name, "tested" if name in cls.__dict__.get("tested", ()) else "same shape", cls.note, cls)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def families() -> list[Known]:
    """All model types that are known, sorted by name, with their status, a note and the class of their family."""
    FAMILIES.load()
    return [_known_as(name, FAMILIES.known[name]) for name in sorted(FAMILIES.known)]


def failures() -> list[str]:
    """One sentence for every plug-in of families that was left out, with the reason."""
    return FAMILIES.failures()


def model_types(status: Status) -> list[str]:
    """The model types of one status, sorted by name."""
    return [known.model_type for known in families() if known.status == status]


def is_supported(model_type: Any) -> bool:
    """Whether models of this type can be pruned."""
    FAMILIES.load()
    cls = FAMILIES.known.get(model_type)
    return cls is not None and _known_as(model_type, cls).status != "refused"


def family_of(model: Any, model_type: str, otherwise: str = "") -> Family:
    """The family of a model type. Raises UnsupportedModel if it is refused or not known, with the ways out.

    model: the model, for messages. otherwise: what else works, for messages.
    """
    failed, cls = FAMILIES.load(), FAMILIES.known.get(model_type)
    known = None if cls is None else _known_as(model_type, cls)
    if known is not None and known.status != "refused":
        return known.family()
    name, tested = f"{type(model).__name__} ({model_type})", ", ".join(model_types("tested"))
    if known is not None:
        raise UnsupportedModel(f"{name} cannot be pruned: {known.note}; tested families: {tested}")
    if model_type in failed:
        raise UnsupportedModel(f"{name} cannot be pruned: {failed[model_type]}")
    raise UnsupportedModel(
        f"{name} is not a vision-language model vtprune knows; tested families: {tested}; same call shape: "
        f"{', '.join(model_types('same shape'))}; {otherwise}pass the whole model, no part of it"
    )


FAMILIES.accept(_is_family, _make)
