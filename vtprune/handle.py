"""`patch` and `Handle`: install the hooks on one model instance, and take them off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .core.cost import TextCost, text_cost
from .core.method import Method, Stage, check_keep
from .recipe import Recipe, given_stages, method_of

if TYPE_CHECKING:
    from torch import nn

    from .hf.session import Patch
    from .hf.vit import VitPatch

_KEY = "_vtprune"
_STAGE_OPTIONS = ("keep_total", "per", "newlines", "positions", "clips")


class Handle:
    """The patch of one model. A context manager: leaving the block removes it.

    >>> with vtprune.patch(model, "divprune", keep=0.25) as handle:
    ...     model.generate(**inputs)
    ...     print(handle.summary())
    """

    __slots__ = ("_cost", "_name", "_root", "_session")  # without them, help() would not fit a screen

    def __init__(self, model: nn.Module, session: Patch | VitPatch) -> None:
        self._root: nn.Module | None = session.root
        self._session, self._name = session, type(model).__name__
        self._cost = _cost_of(model)
        self._enter()

    @property
    def stages(self) -> list[Stage]:
        """The stages in force."""
        return list(self._session.stages)

    @property
    def recipe(self) -> Recipe:
        """The stages as a document that `patch` takes; ValueError where one holds a method that is not registered."""
        return Recipe.of(self.stages)

    @property
    def last(self) -> Any:  # which of the two it is depends on the model, and no checker knows
        """What the last prefill with visual tokens kept, a `Last`, of this thread if it ran one; None before the first.
        Of a plain vision transformer a `VitLast`. Both have `to_dict()` and `draw(image)`."""
        return self._session.local.last or self._session.latest

    def summary(self) -> str:
        """A table of what `last` tells: tokens by image, tower and layer, time, FLOPs and memory saved, notes."""
        from .summary import summary

        return summary(self, self._cost)

    def _repr_html_(self) -> str:
        from .summary import html

        return html(self.last, self.summary())

    @property
    def active(self) -> bool:
        """True until removed."""
        return self._root is not None and self._root.__dict__.get(_KEY) is self

    def remove(self) -> None:
        """Leave the model as it was before `patch`, and of the patch only `last`; safe to call twice.

        Waits for calls in other threads; those that begin meanwhile wait, and run without it. Caches already produced
        stay valid where rows and layers store the same number of tokens; the others refuse to go on without the patch.
        Raises VtpruneError inside a call of the model in this thread.
        """
        self._session.remove()
        if self._root is None:
            return
        if self.active:
            del self._root.__dict__[_KEY]
        self._root = None
        self._session.release()

    def _enter(self) -> None:
        self._session.root.__dict__[_KEY] = self

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        places = ", ".join(f"{s.method.name or type(s.method).__name__} at {s.where!r}" for s in self.stages)
        return f"<vtprune.Handle of {self._name}: {places}{'' if self.active else ' (removed)'}>"


def _cost_of(model: Any) -> TextCost | None:
    """The cost model of the LLM, in the model's dtype; None of a vision transformer and where it is not known."""
    config: Any = getattr(model, "config", None)
    dtype = getattr(model, "dtype", None)
    if dtype is None or not hasattr(type(model), "get_decoder"):
        return None
    return text_cost(config.get_text_config(), dtype.itemsize)


def patch(
    model: nn.Module,
    method: str | Method | Stage | Sequence[Stage] | Recipe,
    *,
    keep: float | int | None = None,
    add: bool = False,
    **options: Any,
) -> Handle:
    """Prune the visual tokens of `model`, an unmodified Hugging Face VLM, from its next call on.

    Also of a plain vision transformer of timm, open_clip or transformers, inside its blocks: then `keep` counts the
    patches that leave the last block, and a stage is at ("vit", k), in the middle of block k, or a slice of them.

    The model may stand in a wrapper: those of peft, DistributedDataParallel, `torch.compile`, a value head
    (`pretrained_model`) or a pipeline. Then the model inside is patched, whose own calls are pruned, whoever makes
    them. `torch.compile` breaks its graph around a prompt that is pruned, and compiles decode steps whole.

    method: a name from `vtprune.methods()`, a `Method`, a `Stage`, a list of `Stage`s, or a `Recipe`.
    keep: float in (0, 1] = share of a unit's visual tokens, int >= 1 = tokens per unit (more than there are keeps
        all). 1.0 computes exactly what the unpatched model computes. Required with a name or a `Method`, unless the
        method decides by itself (`Method.adaptive`) or `keep_total` is given.
    add: add the stages to those of an earlier patch of this model, instead of refusing to patch twice.
    options: of the method (with a name), and those of its stages: `keep_total` in place of keep (one total for all
        units of a row), `per` = "image" | "crop" | "frame" | "sample", `clips` = frames of each clip where a sample is
        several, `newlines` = "compete" | "keep" | "drop", `positions` = "keep" | "compact"; see `Stage`.

    Logits, `last_hidden_state` and `hidden_states[-1]` have the length of the prompt: a dropped token is answered by
    the last kept one before it. The other `hidden_states` and `attentions` have the length their layer ran on
    (`handle.last.lengths`), and of packed rows one row a sample. Several samples packed into one row (position ids that
    restart without a mask, a 4-D mask of blocks, `cu_seq_lens_q`, `seq_idx`) are each pruned as if alone, without a
    cache. Tokens that the attention mask hides are no candidates: budgets count what is seen.

    Returns a `Handle`; `handle.remove()` or leaving a `with` block undoes everything.
    Raises UnsupportedModel for a model that cannot be pruned exactly, ValueError or TypeError for bad options.

    >>> handle = vtprune.patch(model, "divprune", keep=0.25)
    >>> first = Stage("pre_llm", vtprune.create("divprune"), keep=0.5)
    >>> vtprune.patch(model, [first, Stage(8, vtprune.create("fastv"), keep=0.25)])
    >>> vtprune.patch(model, vtprune.Recipe.load("recipe.json"))
    """
    from .model_adapters.vit_blocks import vit_of
    from .model_adapters.wrappers import unwrapped

    model = unwrapped(model)
    vit = vit_of(model)
    stages = _stages(model, method, keep, options, vit is not None)
    before = next(iter(_handles(model)), None)
    if before is not None and not add:
        raise ValueError(
            f"this model is already patched ({before!r}): call handle.remove() or vtprune.unpatch(model) first, or "
            "pass add=True to add the stages"
        )
    if vit is not None:
        if before is not None:
            raise ValueError("add=True is for vision-language models: pass a vision transformer all its stages at once")
        from .hf.vit import VitPatch

        return Handle(model, VitPatch(vit, stages))
    from .hf.session import Patch

    if before is not None:
        if not isinstance(before._session, Patch):
            raise ValueError(f"a part of this model is patched alone ({before!r}): call vtprune.unpatch(model) first")
        stages = sorted([*before.stages, *stages], key=lambda s: s.where if isinstance(s.where, int) else -1)
        before._session.remove()
    try:
        session = Patch(model, stages)
    except BaseException:
        if before is not None:
            before._session.install()  # type: ignore[union-attr]
        raise
    if before is not None:
        before.remove()
    return Handle(model, session)


def unpatch(model: nn.Module) -> None:
    """Remove the patch of `model`, or of the model that it wraps, if there is one."""
    for handle in _handles(model):
        handle.remove()


def _handles(model: Any) -> list[Handle]:
    """The patches in force on a model, its parts, or what it wraps."""
    modules = getattr(model, "modules", None) or model.model.modules  # a pipeline is no module
    return [module.__dict__[_KEY] for module in modules() if _KEY in module.__dict__]


def _stages(
    model: nn.Module, method: Any, keep: float | int | None, options: dict[str, Any], plain: bool
) -> list[Stage]:
    """plain: the model is a vision transformer alone, every block of which a method given by name may use."""
    stages = given_stages(method, keep, options)
    if stages is not None:
        return stages
    where = {k: options.pop(k) for k in _STAGE_OPTIONS if k in options}
    made = method_of(method, keep, where.get("keep_total"), options)
    keep = check_keep(keep)
    if plain:
        if where:
            raise TypeError(f"{', '.join(where)}: for vision-language models; a vision transformer takes keep only")
        return [Stage(("vit", slice(None)), made, keep=keep)]
    import dataclasses

    from .model_adapters.base import Adapter

    # Options are those of the method's own rule; the other parts of a schedule have their own policy, but they see the
    # same clips.
    stages = made.stages(keep, len(Adapter(model).layers))
    clips = {k: v for k, v in where.items() if k in ("per", "clips") and where.get("per") == "sample"}

    def options_of(stage: Stage) -> dict[str, Any]:
        return where if isinstance(stage.method, type(made)) else clips if isinstance(stage.where, int) else {}

    return [dataclasses.replace(stage, **options_of(stage)) for stage in stages]
