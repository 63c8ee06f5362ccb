"""Where the stages of a schedule stand, and how many tokens each leaves."""

from __future__ import annotations

from collections.abc import Sequence

FLOOR = 3  # the layers before it look at single tokens; hardly any query has found what the question asks for


def in_proportion(points: Sequence[int], of: int, depth: int, floor: int | None = None) -> tuple[int, ...]:
    """The layers that stand in a model of `depth` where `points` stand in one of `of`, to the nearest layer.

    None stands before `floor`, and no two are the same layer: in a shallow model they move back, and what finds no
    layer any more is left out. floor: None is 3, but not behind the middle, nor behind the first of `points`; so
    published layers come back as they are at their own depth.
    """
    first = min(FLOOR, points[0], depth // 2) if floor is None else floor
    layers: list[int] = []
    for point in points:
        layers.append(max(layers[-1] + 1 if layers else first, min(depth - 1, round(depth * point / of))))
    return tuple(layer for layer in layers if layer < depth)


def layer_at(layer: int | float, depth: int) -> int:
    """The layer that an int, or a share of the depth in (0, 1), means in a model of `depth`, at least 1."""
    return layer if isinstance(layer, int) else max(1, min(depth - 1, round(layer * depth)))


def pyramid(keep: float | int, stages: int) -> list[float | int]:
    """What each stage leaves until `keep`: a share is reached in equal factors, a count doubles towards the front."""
    if isinstance(keep, int):
        return [keep << later for later in reversed(range(stages))]
    return [tidy(keep ** ((i + 1) / stages)) for i in range(stages - 1)] + [keep]


def in_steps_of(published: Sequence[float], keep: float | int, stages: int) -> list[float | int]:
    """What each stage leaves until `keep`, so that it drops in the proportion of the published shares, which fall.

    Fewer stages than published take the last of them, more drop in equal steps. A count is taken for the last
    published share of what there is.
    """
    last = published[-1]
    if stages > len(published):
        dropped = [(i + 1) / stages for i in range(stages)]
    else:
        dropped = [(1 - share) / (1 - last) for share in published[-stages:]]
    if isinstance(keep, int):
        return [max(keep, round(keep * (1 + (1 / last - 1) * (1 - d)))) for d in dropped]
    return [tidy(1 - d * (1 - keep)) for d in dropped[:-1]] + [keep]


def tidy(share: float) -> float:
    """A computed share without the last bits' noise: a share that is cut off to a count must not fall below a whole."""
    return round(share, 12)


def check_layer(name: str, layer: int | float) -> None:
    """Raise unless the layer is an int >= 1 or a share of the depth in (0, 1)."""
    ways = "use an int >= 1 or a share of the depth in (0, 1)"
    if isinstance(layer, bool) or not isinstance(layer, int | float):
        raise TypeError(f"layer={layer!r} is a {type(layer).__name__}: {ways}")
    if not (layer >= 1 if isinstance(layer, int) else 0.0 < layer < 1.0):
        raise ValueError(f"layer={layer}: {name} reads the layer before, so {ways}")


def check_layers(name: str, layers: Sequence[int] | None, option: str = "layers") -> None:
    """Raise unless the layers are ints >= 0 that ascend, or None."""
    if layers is None:
        return
    whole = isinstance(layers, Sequence) and all(isinstance(k, int) and not isinstance(k, bool) for k in layers)
    if not whole or not layers:
        raise TypeError(f"{option}={layers!r}: {name} takes a tuple of decoder layers, such as (8, 16, 24)")
    if min(layers) < 0 or list(layers) != sorted(set(layers)):
        raise ValueError(f"{option}={layers!r}: {name} needs ascending layers >= 0")


def check_one(name: str, keep: float | int | None, ratios: Sequence[float] | None, option: str = "ratios") -> None:
    """Raise if both the end of a schedule and its shares are given."""
    if keep is not None and ratios is not None:
        raise TypeError(f"{name}: keep={keep} and {option}={ratios}: give one of them")


def check_shares(name: str, shares: Sequence[float] | None, stages: int) -> None:
    """Raise unless there is one share in (0, 1] for each stage, none above the one before, or None."""
    if shares is None:
        return
    if len(shares) != stages:
        raise ValueError(f"ratios={shares!r}: {name} has {stages} stages, give one share for each")
    if not all(isinstance(s, float) and 0.0 < s <= 1.0 for s in shares) or list(shares) != sorted(shares)[::-1]:
        raise ValueError(f"ratios={shares!r}: {name} needs floats in (0, 1], none above the one before")
