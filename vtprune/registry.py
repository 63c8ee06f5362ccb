"""One list each of methods, families and signals: registration, look-up by name, plug-ins through entry points."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib import import_module, metadata
from pkgutil import iter_modules
from threading import RLock
from types import ModuleType
from typing import Any, Generic, TypeVar

from .core.method import Method, trust
from .core.signal import SignalKind

T = TypeVar("T")
M = TypeVar("M", bound=type[Method])
SEAMS = ("pre_llm", "in_llm", "in_vit")


class Registry(Generic[T]):
    """Things known by name: those of this package, and those that plug-ins bring by an entry point.

    kind: what one of them is called in messages, "method". group: the group of entry points that brings more; an entry
        names one of the things or the module that registers some, and nothing is called.
    package: the package whose modules register our own; it is imported when the first name is looked up.
    accepts: true of what an entry may name, in place of a module; None: whatever is registered.
    check: called with each thing that a plug-in brought; what it raises leaves the plug-in out.
    how: how one is registered, for messages.

    A plug-in is code of somebody else: one that fails is warned of by name and takes nothing else down.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        *,
        package: str | None = None,
        accepts: Callable[[Any], bool] | None = None,
        check: Callable[[T], object] = str,
        how: str = "register it",
    ) -> None:
        self.kind, self.group = kind, group
        self._package, self._accepts, self._check, self._how = package, accepts, check, how
        self.known: dict[str, T] = {}
        self.parts: dict[str, T] = {}
        self._failed: dict[str, str] | None = None
        self._loaded = False  # all of them; `_failed` is there as soon as plug-ins are being imported
        self._lock = RLock()

    def add(self, name: str, thing: T, where: str) -> None:
        """Make a thing known. where: the call that did it, for messages. A reload may bring the same thing again.

        Raises ValueError if the name is taken; the message lists the names that are.
        """
        self.check_free(name, thing, f"{where}:")
        self.known[name] = thing

    def check_free(self, name: str, thing: T, told: str) -> None:
        """Raise ValueError if something else has the name; the message begins as told, and lists the names taken."""
        known = self.known.get(name)
        if known is not None and not _same(known, thing):
            raise ValueError(
                f"{told} the name is taken by {_path(known)}; these names are taken: {', '.join(sorted(self.known))}"
            )

    def accept(self, accepts: Callable[[Any], bool], check: Callable[[T], object]) -> None:
        """Set what the constructor takes under these names, from where the class of the things is defined."""
        self._accepts, self._check = accepts, check

    def get(self, name: str, parts: bool = False) -> T:
        """The thing of that name. Raises ValueError on an unknown name and lists the known ones.

        parts: those too that are no more than a part of another one, which lists leave out.
        """
        failed = self.load()
        if name in self.known:
            return self.known[name]
        if parts and name in self.parts:
            return self.parts[name]
        if name in failed:
            raise ValueError(f"{self.kind} {name!r} is not there: {failed[name]}")
        near = get_close_matches(name, self.known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"unknown {self.kind} {name!r}{hint}; choose one of: {', '.join(sorted(self.known)) or 'none'}"
        )

    def all(self) -> list[T]:
        """All of them, sorted by name."""
        self.load()
        return [self.known[name] for name in sorted(self.known)]

    def failures(self) -> list[str]:
        """One sentence for every plug-in that was left out, with the reason."""
        return list(dict.fromkeys(self.load().values()))

    def forget(self) -> None:
        """Look for plug-ins again when the next name is looked up."""
        self._failed, self._loaded = None, False

    def load(self) -> dict[str, str]:
        """Import our own modules and every plug-in, once; what failed, by the plug-in's name and those it began."""
        if self._loaded:  # no lock: compilers cannot trace one
            return self._failed or {}
        with self._lock:
            if self._failed is None:
                failed: dict[str, str] = {}
                self.import_own()
                self._failed = failed  # a plug-in may look up names while it is imported
                for entry in metadata.entry_points(group=self.group):
                    self._load_one(entry, failed)
                self._loaded = True
            return self._failed

    def import_own(self) -> None:
        """Import the modules of this package that register our own."""
        for module in _walk(self._package) if self._package else ():
            import_module(module)

    def _load_one(self, entry: metadata.EntryPoint, failed: dict[str, str]) -> None:
        before = dict(self.known)
        try:
            loaded = entry.load()
            why = "" if self._registers(loaded, before) else self._missing(loaded)
            for name in [name for name in self.known if name not in before]:
                self._check(self.known[name])
        except (Exception, SystemExit) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        if not why:
            return
        names = [entry.name, *(name for name in self.known if name not in before)]
        self.known.clear()
        self.known.update(before)  # half a plug-in is none
        whose = f" of {entry.dist.name} {entry.dist.version}" if entry.dist else ""
        told = f"plug-in {entry.name!r} ({entry.value}){whose} was left out: {why}"
        for name in names:
            failed[name] = f"{failed[name]}; {told}" if name in failed else told
        warnings.warn(told, RuntimeWarning, stacklevel=5)

    def _registers(self, loaded: Any, before: dict[str, T]) -> bool:
        """Whether an entry gave things: it is one, or its module brings some (imported now or earlier)."""
        if not isinstance(loaded, ModuleType) and any(thing is loaded for thing in self.known.values()):
            return True
        if self._accepts is not None and self._accepts(loaded):
            return False
        module = loaded.__name__ if isinstance(loaded, ModuleType) else getattr(loaded, "__module__", None)
        homes = (_home(thing) for thing in self.known.values())
        inside = (home == module or home.startswith(f"{module}.") for home in homes)
        return self.known.keys() != before.keys() or any(inside)

    def _missing(self, loaded: Any) -> str:
        if self._accepts is not None and self._accepts(loaded):
            return f"the class is not registered: decorate it with {self._how}"
        kind = "a module" if isinstance(loaded, ModuleType) else f"{type(loaded).__name__} {loaded!r:.80}"
        return (
            f"it is {kind} and registers no {self.kind}: name a class decorated with {self._how}, or the module that "
            "holds it; nothing is called"
        )


def _home(thing: Any) -> str:
    """The module that defines a class, or an instance's class."""
    return str(getattr(thing, "__module__", None) or type(thing).__module__)


def _same(one: Any, other: Any) -> bool:
    """Whether both are one thing, or a class (or function) and the one that a reload of its module made."""
    reloaded = hasattr(one, "__qualname__") and hasattr(other, "__qualname__") and _path(one) == _path(other)
    return one is other or reloaded


def _path(thing: Any) -> str:
    return f"{_home(thing)}.{getattr(thing, '__qualname__', None) or type(thing).__qualname__}"


def _walk(package: str) -> Iterator[str]:
    for info in iter_modules(import_module(package).__path__, package + "."):
        yield info.name
        if info.ispkg:
            yield from _walk(info.name)


def _is_method(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Method)


def _ask_needs(cls: type[Method]) -> None:
    """Ask what every list of methods asks, of a class that can be made without options."""
    if not required(cls):
        str(cls().needs)


METHODS: Registry[type[Method]] = Registry(
    "method",
    "vtprune.methods",
    package="vtprune.methods",
    accepts=_is_method,
    check=_ask_needs,
    how="@vtprune.register(name, paper=..., seam=...)",
)
# What a family is stands in `model_adapters`, which says here what it accepts.
FAMILIES: Registry[Any] = Registry(
    "family",
    "vtprune.families",
    package="vtprune.model_adapters",
    how="@vtprune.model_adapters.family.family",
)
SIGNALS: Registry[SignalKind] = Registry(
    "signal",
    "vtprune.signals",
    package="vtprune.signals",
    accepts=lambda thing: isinstance(thing, SignalKind),
    how="@vtprune.signals.signal(name, shape=..., where=...)",
)


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
        if not _is_method(cls):
            raise TypeError(f"@register({name!r}): {cls!r} must be a class derived from vtprune.Method")
        if seam not in SEAMS:
            raise ValueError(f"@register({name!r}): seam={seam!r}, choose one of {', '.join(SEAMS)}")
        if not paper.startswith("http"):
            raise ValueError(f"@register({name!r}): paper={paper!r} must be a URL")
        if own := getattr(cls, "positions", None):
            raise TypeError(
                f"@register({name!r}): positions={own!r} would change nothing, because stages keep position ids unless "
                "they are told to renumber; say in official_positions what official code does"
            )
        made = cls
        if "__dataclass_fields__" not in cls.__dict__:
            made = dataclasses.dataclass(frozen=True)(cls)  # type: ignore[assignment]
        METHODS.add(name, made, f"@register({name!r})")
        made.name, made.paper, made.seam = name, paper, seam
        return made

    return add


def register_own(name: str, *, paper: str, seam: str) -> Callable[[M], M]:
    """`register` for the methods of this package, whose tests show what `Method.trusted` says."""

    def add(cls: M) -> M:
        return trust(register(name, paper=paper, seam=seam)(cls))

    return add


def part(cls: M) -> M:
    """Class decorator: a method that is only a stage of another one's schedule; it carries name, paper, seam itself.

    Recipes know it by its name; `create` and `methods` do not.
    """
    METHODS.parts[cls.name] = cls
    return cls


def required(cls: type[Method]) -> list[str]:
    """The options without which a method cannot be made."""
    missing, options = dataclasses.MISSING, dataclasses.fields(cls)  # type: ignore[arg-type]
    return [f.name for f in options if f.init and f.default is missing and f.default_factory is missing]


def options(cls: type[Method]) -> list[str]:
    """The names of the options of a method."""
    return [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]


def failures() -> list[str]:
    """One sentence for every plug-in of methods that was left out, with the reason."""
    return METHODS.failures()


def get(name: str) -> type[Method]:
    """The class registered under `name`. Raises ValueError on an unknown name and lists the known ones."""
    return METHODS.get(name)


def create(name: str, **given: Any) -> Method:
    """Make a method by name; an unknown option raises TypeError with the valid ones."""
    return make(get(name), given)


def make(cls: type[Method], given: dict[str, Any]) -> Method:
    """Make a method of its options; an unknown one raises TypeError with the valid ones."""
    valid = options(cls)
    for option in given:
        if option not in valid:
            raise TypeError(f"{cls.name} has no option {option!r}; valid options: {', '.join(valid) or 'none'}")
    return cls(**given)


def methods() -> list[type[Method]]:
    """All registered methods, sorted by name; each carries `.name`, `.seam`, `.paper` and `.needs`."""
    return METHODS.all()
