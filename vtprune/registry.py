"""The list of methods: registration by decorator, creation by name, plug-ins through entry points."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module, metadata
from pkgutil import iter_modules
from typing import Any, TypeVar

from .types import Method

M = TypeVar("M", bound=type[Method])
SEAMS = ("pre_llm", "in_llm", "in_vit")
_registry: dict[str, type[Method]] = {}


def register(name: str, *, paper: str, seam: str) -> Callable[[M], M]:
    """Class decorator: make a `Method` known under `name`.

    name: what users pass to `vtprune.patch`. paper: URL of the source (required; a plain baseline gives the URL
    of a paper that uses it). seam: "pre_llm", "in_llm" or "in_vit". The class becomes a frozen dataclass if it is
    none yet.
    Raises ValueError on a duplicate name or an unknown seam, TypeError if the class is no `Method`.

    >>> @vtprune.register("first", paper="https://example.org", seam="pre_llm")
    ... class First(vtprune.Method):
    ...     def __call__(self, v):
    ...         return vtprune.Assignment(torch.arange(v.budget, device=v.x.device))
    """

    def add(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise TypeError(f"@register({name!r}): {cls!r} must be a class derived from vtprune.Method")
        if seam not in SEAMS:
            raise ValueError(f"@register({name!r}): seam={seam!r}, choose one of {', '.join(SEAMS)}")
        if not paper.startswith("http"):
            raise ValueError(f"@register({name!r}): paper={paper!r} must be a URL")
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"@register({name!r}): the name is taken by {known.__module__}.{known.__qualname__}")
        if "__dataclass_fields__" not in cls.__dict__:
            cls = dataclasses.dataclass(frozen=True)(cls)  # type: ignore[assignment]
        cls.name, cls.paper, cls.seam = name, paper, seam
        _registry[name] = cls
        return cls

    return add


@lru_cache(maxsize=1)
def _load() -> None:
    """Import every module below vtprune.methods and every plug-in, once."""
    for module in _walk("vtprune.methods"):
        import_module(module)
    for entry in metadata.entry_points(group="vtprune.methods"):
        loaded = entry.load()
        if isinstance(loaded, type) and issubclass(loaded, Method) and loaded.name not in _registry:
            raise ValueError(
                f"plug-in {entry.name!r} ({entry.value}) is not registered: decorate the class with "
                "@vtprune.register(name, paper=..., seam=...)"
            )


def _walk(package: str) -> Iterator[str]:
    for info in iter_modules(import_module(package).__path__, package + "."):
        yield info.name
        if info.ispkg:
            yield from _walk(info.name)


def get(name: str) -> type[Method]:
    """The class registered under `name`; KeyError-free: an unknown name lists the known ones."""
    _load()
    if name not in _registry:
        near = get_close_matches(name, _registry, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown method {name!r}{hint}; choose one of: {', '.join(sorted(_registry))}")
    return _registry[name]


def create(name: str, **options: Any) -> Method:
    """Make a method by name; an unknown option raises TypeError with the valid ones."""
    cls = get(name)
    valid = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for option in options:
        if option not in valid:
            raise TypeError(f"{name} has no option {option!r}; valid options: {', '.join(valid) or 'none'}")
    return cls(**options)


def methods() -> list[type[Method]]:
    """All registered methods, sorted by name; each carries `.name`, `.seam`, `.paper` and `.needs`."""
    _load()
    return [_registry[name] for name in sorted(_registry)]
