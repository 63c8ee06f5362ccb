"""`Stream`: prune a video whose features arrive in parts, without holding all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .core.method import Method, Per, Stage
from .core.select import Selected, run_stages
from .kernels import check_finite
from .recipe import Recipe
from .registry import methods, required
from .selection import Grid, laid_out, stages_of

Signals = Mapping[Any, Tensor]


@dataclass(frozen=True)
class _Held:
    """What a stream holds of a video between parts: less than a window of frames, and the frame before them.

    kind: rows, columns, channels, dtype and device of all frames. start: the tokens of all frames before. features,
    signals: of the frames held.
    """

    kind: tuple[int, int, int, torch.dtype, torch.device]
    start: int
    before: Tensor | None
    features: Tensor
    signals: Signals


class Stream:
    """`select` for a video whose features arrive in parts: what is kept of each part, without holding the video.

    Every part is asked about by itself and shares out its own budget. Of the video no more is held than the last frame,
    with which `evs` compares the next one, and the frames of a window that is not complete: `dycoke` looks at four
    together, so up to three wait for a later part, or for `finish`.

    Parts together are what `select` keeps of the whole video, however they are divided: with per="frame"; for `aim` and
    `dycoke` without keep, and with a keep that gives every frame of complete windows a whole number of tokens (any
    other is rounded part by part). `evs` scores tokens as in the whole video, and they compete within a part. Rules
    that choose among the tokens of the whole video at once are refused.

    method, options: as for `select`, one stage. keep: a share; with per="frame" also a count of tokens a frame.
    per: "frame" asks any method about each frame by itself. text: [M, D] embeddings of the text beside the video.

    >>> stream = vtprune.Stream("dycoke", keep=0.25)
    >>> kept = [stream.push(x, grid=(16, 14, 14)) for x in parts] + [stream.finish()]
    >>> torch.cat([part.features for part in kept])  # what the LLM gets
    >>> torch.cat([part.idx + part.start for part in kept])  # where it stood in the video
    """

    def __init__(
        self,
        method: str | Method | Stage | Recipe,
        *,
        keep: float | int | None = None,
        per: Per | None = None,
        text: Tensor | None = None,
        **options: Any,
    ) -> None:
        """Raises what `select` raises, and ValueError for a rule or a budget that needs the whole video."""
        stages = stages_of(method, keep, {"per": per}, options)
        if len(stages) != 1:
            raise ValueError(f"{len(stages)} stages: a later stage finds no frames any more, so a Stream runs one")
        (self._stage,) = stages
        self._window, self._text = _window(self._stage), text
        self._held: _Held | None = None

    def push(self, features: Tensor, grid: Grid, signals: Signals | None = None) -> Selected:
        """What is kept of the frames that are complete with this part; n=0 if all of them wait.

        features: [N, D] of the next frames, in raster order. grid: (t, h, w) with t * h * w = N; t may differ from part
        to part. signals: what the method reads of the vision tower, as for `select`.

        Its idx count in the n tokens that it is about, which begin at `Selected.start` of the video. After an error,
        also of features that hold NaN or Inf, the stream is as it was before the call.
        """
        signals = {} if signals is None else signals
        if not isinstance(features, Tensor):
            said = "pass a tensor [N, D], the next frames of one video; each video has a Stream of its own"
            raise TypeError(f"features={features!r:.80}: {said}")
        (features,), (unit,), _ = laid_out(features, grid, None, True, signals, self._text, None)
        if unit.grid is None:
            raise TypeError("grid is missing: pass (t, h, w), the frames of this part and the rows and columns of each")
        kind = (*unit.grid[1:], features.shape[1], features.dtype, features.device)
        held = self._held or _Held(kind, 0, None, features[:0], {})
        if kind != held.kind:
            new, old = (", ".join(map(str, one)) for one in (kind, held.kind))
            raise ValueError(
                f"this part has frames of ({new}), those before had ({old}): rows, columns, channels, dtype, device. "
                "A video has frames of one kind; finish() ends it, and another one may begin"
            )
        if len(held.features):
            if signals.keys() != held.signals.keys():
                raise ValueError(f"signals {list(signals)}: the frames that wait came with {list(held.signals)}")
            features = torch.cat([held.features, features])
            signals = {key: torch.cat([held.signals[key], x]) for key, x in signals.items()}
        answer, self._held = self._answered(replace(held, features=features, signals=signals), self._window)
        return answer

    def finish(self) -> Selected:
        """What is kept of the frames that wait still; then the next part begins another video."""
        if self._held is None:
            raise ValueError("finish() without a push() before it: there is no video to end")
        answer, _ = self._answered(self._held, 1)
        self._held = None
        return answer

    def _answered(self, held: _Held, window: int) -> tuple[Selected, _Held]:
        """What is kept of whole windows, and what is held then: copies, so that no part lives on in a view."""
        h, w = held.kind[:2]
        n = len(held.features) // (window * h * w) * window * h * w
        rest = [x[n:].clone() for x in (held.features, *held.signals.values())]
        last = [held.features[n - h * w : n].detach().clone()] if n else []
        check_finite([*rest, *last])  # a later part would pay for it
        now = replace(held, features=rest[0], signals=dict(zip(held.signals, rest[1:])))
        if not n:
            none = torch.empty(0, dtype=torch.int64, device=held.features.device)
            return Selected(0, none, held.features[:0].clone(), start=held.start), now
        x, signals = held.features[:n], {key: x[:n] for key, x in held.signals.items()}
        images, units, text = laid_out(x, (n // (h * w), h, w), None, True, signals, self._text, None)
        units[0].before = held.before
        (answer,) = run_stages(images, units, [self._stage], text)
        return replace(answer, start=held.start), replace(now, start=held.start + n, before=last[0])


def _window(stage: Stage) -> int:
    """The frames that come together; ValueError for a rule or a budget that needs the whole video."""
    name = stage.method.name or type(stage.method).__name__
    if stage.keep_total is not None:
        raise ValueError(f"{name}: keep_total={stage.keep_total} is one for the whole video: pass keep in its place")
    if isinstance(stage.keep, int) and stage.per != "frame":
        raise ValueError(
            f"{name}: keep={stage.keep} counts tokens of the whole video, whose length a Stream does not know: pass a "
            "share in (0, 1], or per='frame' for a count of tokens a frame"
        )
    window = 1 if stage.per == "frame" else stage.method.window
    if window is None:
        others = [cls.name for cls in methods() if not required(cls) and cls().window]
        raise ValueError(
            f"{name} chooses among the tokens of the whole video at once, so it cannot be asked about parts: choose a "
            f"rule that looks at a few frames at a time ({', '.join(others)}, as they are without options), or "
            "per='frame', which asks any method about each frame by itself"
        )
    return window
