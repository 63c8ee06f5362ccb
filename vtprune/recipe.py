"""`Recipe`: the stages of a pruning run as a JSON document that is checked as it is read, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import registry
from .core.method import Method, Stage, Where, check_keep

SCHEMA, VERSION = "vtprune.recipe", 1
TOP = ("schema", "version", "vtprune", "stages")
STAGE = ("where", "method", "options", "keep", "keep_total", "per", "newlines", "positions", "clips")
SLICE = ("start", "stop", "step")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stages that can be written down, sent and read again: `vtprune.patch(model, recipe)`.

    stages: a tuple of `Stage`, of registered methods. made_with: the version of vtprune that wrote it, for people.
    All options are written, also those at their defaults, so a default that changes later changes no recipe; only a
    function that is a default is left out, and another function is refused.

    >>> recipe = vtprune.Recipe.of([vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.25)])
    >>> vtprune.Recipe.from_json(recipe.to_json()) == recipe
    True
    """

    stages: tuple[Stage, ...]
    made_with: str = dataclasses.field(default_factory=lambda: _version(), compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.stages, Stage) or not all(isinstance(stage, Stage) for stage in self.stages):
            raise TypeError(f"stages={self.stages!r:.120}: pass a sequence of vtprune.Stage objects")
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("an empty list of stages prunes nothing; pass at least one Stage")
        for stage in self.stages:
            _check_known(stage.method)
            _written_where(stage.where)
            for name, value in written_options(stage.method).items():
                _plain(value, f"option {name!r} of {stage.method.name}")

    @classmethod
    def of(cls, stages: Stage | Sequence[Stage]) -> Recipe:
        """The recipe of a stage or of several.

        Raises TypeError for anything that is no stage, and ValueError for a method without a registered name or an
        option that JSON cannot hold.
        """
        return cls((stages,) if isinstance(stages, Stage) else tuple(stages))

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """Read a document that `to_json` wrote.

        Raises ValueError for text that is no JSON, and for an unknown schema, version, key, method, option or value,
        which it names together with the valid ones; TypeError for a value of a wrong type.
        """
        try:
            document = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"this recipe is no JSON: {error}") from error
        _check_keys(document, TOP, "the recipe")
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema={document['schema']!r}: this reads {SCHEMA!r}")
        if type(document["version"]) is not int or document["version"] != VERSION:
            raise ValueError(f"version={document['version']!r} of {SCHEMA!r} is unknown: this vtprune reads {VERSION}")
        if not isinstance(document["vtprune"], str):
            raise TypeError(f"vtprune={document['vtprune']!r}: it is the version that wrote the recipe, a string")
        if not isinstance(document["stages"], list):
            raise TypeError(f"stages={document['stages']!r:.80}: it is a list of stages")
        stages = tuple(_read_stage(entry, f"stage {i}") for i, entry in enumerate(document["stages"]))
        return cls(stages, made_with=document["vtprune"])

    def to_json(self) -> str:
        """The document, indented, with a newline at its end."""
        document = {
            "schema": SCHEMA,
            "version": VERSION,
            "vtprune": self.made_with,
            "stages": [_written_stage(stage) for stage in self.stages],
        }
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a file; raises as `from_json` and as `open` do."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, in place of what stood there."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def method_of(
    method: str | Method, keep: float | int | None, keep_total: float | int | None, options: dict[str, Any]
) -> Method:
    """The method that a user named, or the instance passed; raises where a budget is missing or an option unknown."""
    if isinstance(method, str):
        made = registry.create(method, **options)
    elif isinstance(method, Method):
        if options:
            raise TypeError(f"{', '.join(options)}: a Method instance already carries its options")
        made = method
    else:
        names = ", ".join(m.name for m in registry.methods())
        raise TypeError(f"method={method!r}: pass a name ({names}), a Method, a Stage, a list of Stages or a Recipe")
    made = made.resolved
    if keep is None and keep_total is None and not made.adaptive:
        raise TypeError(f"{made.name}: keep is missing; use a float in (0, 1] (share) or an int >= 1 (tokens)")
    check_keep(keep)
    return made


def given_stages(method: Any, keep: float | int | None, options: dict[str, Any]) -> list[Stage] | None:
    """The stages of what carries its own: a Stage, a list of them or a Recipe; None for a name or a method."""
    if isinstance(method, Recipe):
        method = method.stages
    if not isinstance(method, Stage) and (not isinstance(method, Sequence) or isinstance(method, str)):
        return None
    stages = [method] if isinstance(method, Stage) else list(method)
    if keep is not None or options:
        given = ", ".join(["keep"] * (keep is not None) + list(options))
        raise TypeError(f"{given} cannot be combined with stages: set them on each Stage")
    for stage in stages:
        if not isinstance(stage, Stage):
            raise TypeError(f"{stage!r} is no Stage; a list must hold vtprune.Stage objects only")
    if not stages:
        raise ValueError("an empty list of stages prunes nothing; pass at least one Stage")
    return stages


def _version() -> str:
    from vtprune import __version__

    return __version__


# -- writing ------------------------------------------------------------------------------------------------------


def _written_stage(stage: Stage) -> dict[str, Any]:
    method = stage.method
    entry = {name: getattr(stage, name) for name in STAGE[3:]}
    head = {"where": _written_where(stage.where), "method": method.name, "options": written_options(method)}
    return head | entry


def written_options(method: Method) -> dict[str, Any]:
    """All options, but for functions that are the default: these have no form in JSON."""
    fields = [f for f in dataclasses.fields(method) if f.init]  # type: ignore[arg-type]
    values = {f.name: (getattr(method, f.name), f.default) for f in fields}
    return {name: value for name, (value, default) in values.items() if not (callable(value) and value is default)}


def _written_where(where: Where) -> Any:
    if where == "llm" or type(where) is int:
        return where
    if isinstance(where, tuple) and len(where) == 2 and isinstance(where[0], str):
        tower, k = where
        if isinstance(k, slice):
            parts = {name: getattr(k, name) for name in SLICE}
            if all(part is None or type(part) is int for part in parts.values()):
                return [tower, parts]
        elif type(k) is int:
            return [tower, k]
    raise ValueError(
        f"where={where!r}: choose 'pre_llm', a decoder layer (an int) or ('vit', k) with an int or a slice"
    )


def _check_known(method: Method) -> None:
    """Raise ValueError unless the name of a method gives its class."""
    known = registry.METHODS
    known.load()
    if type(method) not in (known.known.get(method.name), known.parts.get(method.name)):
        raise ValueError(
            f"{type(method).__name__} is not the method registered as {method.name!r}, so a recipe cannot name it: "
            "decorate the class with @vtprune.register(name, paper=..., seam=...)"
        )


def _plain(value: Any, what: str) -> None:
    """Raise ValueError unless JSON holds a value as it is (lists stand for tuples)."""
    if isinstance(value, tuple):
        for part in value:
            _plain(part, what)
    elif isinstance(value, float) and value not in (float("inf"), -float("inf")) and value == value:
        return
    elif not (value is None or type(value) in (bool, int, str)):
        raise ValueError(
            f"{what} is {value!r:.80}: a recipe holds finite numbers, strings, True, False, None and tuples"
        )


# -- reading ------------------------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object of the recipe: give it once")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} in a recipe: numbers must be finite")


def _check_keys(entry: Any, valid: Sequence[str], what: str) -> None:
    """Raise unless an object has exactly the valid keys."""
    if not isinstance(entry, dict):
        raise TypeError(f"{what} is {entry!r:.80}: it must be an object with the keys {', '.join(valid)}")
    for key in entry:
        if key not in valid:
            raise ValueError(f"unknown key {key!r} in {what}; valid keys: {', '.join(valid)}")
    missing = [key for key in valid if key not in entry]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(map(repr, missing))}; it has the keys {', '.join(valid)}")


def _read_stage(entry: Any, what: str) -> Stage:
    _check_keys(entry, STAGE, what)
    name, options = entry["method"], entry["options"]
    if not isinstance(name, str):
        raise TypeError(f"method={name!r} in {what}: it is the name of a method, a string")
    cls = registry.METHODS.get(name, parts=True)
    valid = registry.options(cls)
    if not isinstance(options, dict):
        raise TypeError(f"options={options!r:.80} in {what}: it is an object with options of {name}")
    for option in options:
        if option not in valid:
            raise ValueError(f"{name} has no option {option!r} in {what}; valid options: {', '.join(valid) or 'none'}")
    method = registry.make(cls, {option: _tuples(value) for option, value in options.items()})
    clips = entry["clips"]
    rest = {key: entry[key] for key in ("keep", "keep_total", "per", "newlines", "positions")}
    return Stage(_read_where(entry["where"], what), method, **rest, clips=None if clips is None else _tuples(clips))


def _read_where(where: Any, what: str) -> Where:
    if isinstance(where, str) or type(where) is int:
        if isinstance(where, str) and where not in ("llm", "pre_llm"):
            raise ValueError(f"where={where!r} in {what}: choose 'pre_llm', a decoder layer (an int) or ['vit', k]")
        return where
    if isinstance(where, list) and len(where) == 2 and where[0] == "vit":
        k = where[1]
        if type(k) is int:
            return "vit", k
        _check_keys(k, SLICE, f"where of {what}")
        if all(part is None or type(part) is int for part in k.values()):
            return "vit", slice(k["start"], k["stop"], k["step"])
    raise ValueError(
        f"where={where!r} in {what}: choose 'pre_llm', a decoder layer (an int), ['vit', k] with an int, or ['vit', "
        "{'start': .., 'stop': .., 'step': ..}]"
    )


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that options are."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
