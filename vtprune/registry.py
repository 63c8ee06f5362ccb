"""The list of methods: registration by decorator, creation by name, plug-ins through entry points."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module, metadata
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, TypeVar

from .core.method import Method

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
def _load() -> dict[str, str]:
    """Import every module below vtprune.methods and every plug-in, once; what failed, by the plug-in's name.

    A plug-in is code of somebody else: one that fails is warned of by name and takes nothing else down.
    """
    for module in _walk("vtprune.methods"):
        import_module(module)
    failed: dict[str, str] = {}
    for entry in metadata.entry_points(group="vtprune.methods"):
        before = dict(_registry)
        try:
            loaded = entry.load()
            why = "" if _registers(loaded, before) else _missing(loaded)
            for cls in (cls for name, cls in _registry.items() if name not in before and not required(cls)):
                str(cls().needs)  # what every list of methods asks
        except (Exception, SystemExit) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        if not why:
            continue
        names = [entry.name, *(name for name in _registry if name not in before)]
        _registry.clear()
        _registry.update(before)  # half a plug-in is none
        whose = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
        told = f"plug-in {entry.name!r} ({entry.value}){whose} was left out: {why}"
        for name in names:
            failed[name] = f"{failed[name]}; {told}" if name in failed else told
        warnings.warn(told, RuntimeWarning, stacklevel=2)
    return failed


def _registers(loaded: Any, before: dict[str, type[Method]]) -> bool:
    """Whether an entry point gave methods: it is one, or its module brings some (imported now or earlier)."""
    if isinstance(loaded, type) and issubclass(loaded, Method):
        return any(cls is loaded for cls in _registry.values())
    module = loaded.__name__ if isinstance(loaded, ModuleType) else getattr(loaded, "__module__", None)
    inside = (cls.__module__ == module or cls.__module__.startswith(f"{module}.") for cls in _registry.values())
    return _registry.keys() != before.keys() or any(inside)


def _missing(loaded: Any) -> str:
    if isinstance(loaded, type) and issubclass(loaded, Method):
        return "the class is not registered: decorate it with @vtprune.register(name, paper=..., seam=...)"
    kind = "a module" if isinstance(loaded, ModuleType) else f"{type(loaded).__name__} {loaded!r:.80}"
    return (
        f"it is {kind} and registers no method: name a class decorated with @vtprune.register(name, paper=..., "
        "seam=...), or the module that holds it; nothing is called"
    )


def required(cls: type[Method]) -> list[str]:
    """The options without which a method cannot be made."""
    missing, options = dataclasses.MISSING, dataclasses.fields(cls)  # type: ignore[arg-type]
    return [f.name for f in options if f.init and f.default is missing and f.default_factory is missing]


def failures() -> list[str]:
    """One sentence for every plug-in that was left out, with the reason."""
    return list(dict.fromkeys(_load().values()))


def _walk(package: str) -> Iterator[str]:
    for info in iter_modules(import_module(package).__path__, package + "."):
        yield info.name
        if info.ispkg:
            yield from _walk(info.name)


def get(name: str) -> type[Method]:
    """The class registered under `name`; KeyError-free: an unknown name lists the known ones."""
    failed = _load()
    if name not in _registry and name in failed:
        raise ValueError(f"method {name!r} is not there: {failed[name]}")
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
