"""The seam: hooks on one model instance that cut tokens before or inside the LLM, and undo every trace.

Order in one forward pass: base-pre (is there something to prune?) -> the vision encoder with its taps -> text-pre
(stage "llm") -> layer-pre (stages at layers) -> text-post (cache and output lengths). Cleaning up: `vtprune.calls`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import cache as kv
from . import packed
from .calls import Forward, Generate, Running
from .clock import Clock, timing
from .compact import hide, in_window, mask_for, tensor_mask
from .compilers import announce, outside, outside_while_busy, refuse_tracers
from .covering import cover, standing
from .frame import LINEAR, Frame, Last
from .kernels import recording
from .model_adapters.generic import MODALITIES, Adapter, Features
from .recall import ROW, Step
from .signals import kind_of
from .tap import HEADS, reweighed
from .types import KEPT, Method, Signal, Stage, UnsupportedCall, UnsupportedModel

# The method of a text model that adds visual features to its hidden states between layers.
DEEPSTACK = "_deepstack_process"


# Arguments that tell the grids of images and videos.
TOLD = ("image_grid_thw", "video_grid_thw", "image_sizes", "vision_aspect_ratio")
MERGED = (
    "inputs_embeds came without pixel values, encoded features or mm_token_type_ids: if features are merged into them, "
    "nothing tells where, and nothing was pruned"
)


class Local(threading.local):
    """Per-thread state of one patched model; a copy or an unpickled one starts empty."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.features: dict[str, Features | None] = {}
        self.observing = False
        self.last: Last | None = None
        self.step: Step | None = None  # a decode step at which stages act
        self.ahead = False  # a layer is being looked at before it runs
        self.told: dict[str, Any] = {}  # what `generate` was told of grids, which it keeps from the model
        self.placed: tuple[Any, ...] = ()  # the last position ids that were lowered, and what came of them
        self.samples: packed.Samples | None = None  # of packed rows, while each is a row of its own
        self.prompt: int | None = None  # tokens up to the end of the prompt of the `generate` under way
        self.depth = 0  # calls of the base and the text model under way, one inside the other

    def clear(self) -> None:
        """Nothing of a call is left, and nothing of one that was interrupted before."""
        self.frame, self.step, self.placed, self.ahead, self.features = None, None, (), False, {}
        self.samples = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Local:
        return Local()

    def __reduce__(self) -> Any:
        return Local, ()


class Seen:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Seen:
        return Seen()

    def __reduce__(self) -> Any:
        return Seen, ()


def _keys(output: Any) -> list[Any]:
    """The output and its first tensor, as far as they can be referred to weakly: a tuple cannot."""
    return [key for key in (output, _first_tensor(output)) if key is not None and not isinstance(key, tuple | list)]


def _first_tensor(output: Any) -> Tensor | None:
    pooled = getattr(output, "pooler_output", output)
    while isinstance(pooled, list | tuple) and pooled:
        pooled = pooled[0]
    return pooled if isinstance(pooled, Tensor) else None


class Observer:
    """Stands in for `base.get_image_features` on the instance and notes sizes, grids and signals of what it returns.

    original: what stood there. tower: `TowerSignals` of stages before the LLM, inside: `TowerStages`; None where there
    is nothing to do.
    """

    def __init__(self, session: Session, modality: str, original: Callable[..., Any], tower: Any, inside: Any) -> None:
        self.session, self.modality, self.original, self.tower, self.inside = session, modality, original, tower, inside
        self.__name__ = f"get_{modality}_features"

    @property
    def __signature__(self) -> Any:  # generate() reads the parameters to decide what to pass
        return inspect.signature(self.original)

    @outside
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.session.running.one():
            if self.session.removed:  # somebody kept the function beyond the patch, or this call waited
                return self.original(*args, **kwargs)
            return self._observe(args, kwargs)

    def _observe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        local = self.session.local
        if local.observing:  # video features may be computed through the image path
            return self.original(*args, **kwargs)
        local.observing = True
        try:
            call = self.__signature__.bind(*args, **kwargs).arguments
            call = {**call, **call.pop("kwargs", {})}
            if self.tower:
                self.tower.start()
            if self.inside:
                self.inside.start(call)
            clocks: list[Clock] = []
            with recording() as kernels, timing(clocks):
                output, as_tuple = self._encode(call, args, kwargs)
                signals = self.tower.finish(call, output) if self.tower else []
                run = self.inside.finish(output) if self.inside else None
            if run and run.kept:
                signals = [{**s, KEPT: k} for s, k in zip(signals or [{}] * len(run.kept), run.kept)]
            found = self.session.adapter.observe(self.modality, call, output, signals)
            found.tower, found.kernels, found.clocks = run and run.report(), kernels, clocks
            if local.depth:  # else they will be known by the output
                local.features[self.modality] = found
            self.session.seen.add(output, found)
            output = output.to_tuple() if as_tuple else output
        finally:
            local.observing = False
            if self.inside:
                self.inside.stop()
            if self.tower:
                self.tower.stop()
        return output

    def _encode(self, call: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """The features by name, and whether the caller gets them as a tuple, which tells no names."""
        wants = kwargs.get("return_dict")
        if wants is None:
            wants = getattr(self.session.adapter.base.config, "return_dict", True)
        if wants:
            return self.original(*args, **kwargs), False
        output = self.original(*args, **{**kwargs, "return_dict": True})
        return output, hasattr(output, "to_tuple")


class _Looked(Exception):
    """Ends a layer's forward once its queries and keys are known."""


class Session:
    """Everything that is installed on one model. `remove()` takes it off."""

    def __init__(self, model: nn.Module, stages: list[Stage]) -> None:
        self.adapter = Adapter(model)
        self.notes: list[str] = []
        self.stages = [self._placeable(stage) for stage in stages]
        # Where all tokens stay, a call is the unpatched model's own and nothing needs to be refused.
        self.inert = all(stage.keeps_all for stage in self.stages) and not self.reweighing
        self.local = Local()
        self.seen = Seen()
        self.running, self.removed = Running(), False
        self.latest: Last | None = None
        self._undo: list[Callable[[], None]] = []
        self._check()
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def root(self) -> nn.Module:
        """The module that is patched, whatever it was found in."""
        return self.adapter.base

    @property
    def frame(self) -> Frame | None:
        """The frame whose stages act and read signals by now; none where all tokens stay."""
        frame = self.local.frame
        return frame if frame is not None and frame.opened and not self.inert else None

    @property
    def first_layer(self) -> int:
        """The first decoder layer with a stage, or the number of layers."""
        return min((s.where for s in self.stages if isinstance(s.where, int)), default=len(self.adapter.layers))

    @property
    def deep(self) -> int:
        """How many of the first decoder layers have visual features added behind them."""
        return len(getattr(getattr(self.adapter.config, "vision_config", None), "deepstack_visual_indexes", None) or ())

    @property
    def first_hook(self) -> int:
        """The first decoder layer whose arguments are looked after."""
        return 0 if "flash" in self.adapter.attention() else self.first_layer

    @property
    def at_decode(self) -> list[Stage]:
        """Stages that act at decode."""
        return [s for s in self.stages if "decode" in s.method.phases]

    @property
    def of_heads(self) -> list[int]:
        """Layers where stages choose among heads."""
        return [s.where for s in self.stages if s.method.of == "heads"]  # type: ignore[misc]

    @property
    def head_signals(self) -> list[str]:
        """The signals of heads that those stages read."""
        return list(dict.fromkeys(n.kind for s in self.stages if s.method.of == "heads" for n in s.method.needs))

    @property
    def reweighing(self) -> list[Method]:
        """Methods that change attention; `_check` lets one through."""
        found: list[Method] = []
        for stage in self.stages:
            if stage.method.reweighs and stage.method not in found:
                found.append(stage.method)
        return found

    @property
    def tower_needs(self) -> set[Signal]:
        """Signals that stages before the LLM read from the vision tower."""
        return {n for s in self.stages if s.where == "llm" for n in s.method.needs}

    def _placeable(self, stage: Stage) -> Stage:
        """The stage, which keeps positions where its method would renumber by default and the model cannot."""
        if stage.positions is not None or not stage.compact or not self.adapter.mrope:
            return stage
        name = stage.method.name or type(stage.method).__name__
        note = f"{name}: positions are kept, because renumbering is undefined for M-RoPE ({self.adapter.model_type})"
        if note not in self.notes:
            self.notes.append(note)
        return replace(stage, positions="keep")

    def _check(self) -> None:
        """Refuse stages this model cannot hold, by name."""
        a, depth = self.adapter, len(self.adapter.layers)
        for stage in self.stages:
            name = stage.method.name or type(stage.method).__name__
            if isinstance(stage.where, bool) or not (stage.where == "llm" or isinstance(stage.where, int | tuple)):
                raise ValueError(f"where={stage.where!r}: choose 'llm', a decoder layer 0..{depth - 1} or ('vit', k)")
            if isinstance(stage.where, int):
                self._check_layer(name, stage.where)
            if stage.compact and a.mrope:
                raise UnsupportedModel(
                    f"{name}: positions='compact' is undefined for M-RoPE position ids ({a.model_type}); use 'keep'"
                )
        self._check_decode()
        self._check_changes()
        inner = [s.where for s in self.stages if isinstance(s.where, int)]
        if inner != sorted(inner):
            raise ValueError(f"stages at layers {inner} must stand in increasing order")

    def _check_decode(self) -> None:
        stages = self.at_decode
        for stage in stages:
            name, last = stage.method.name, stages[0].where
            if not isinstance(stage.where, int) or stage.where < 1:
                raise ValueError(
                    f"{name} at {stage.where!r}: it acts at decode, on the attention of the layer before, so place it "
                    "at a decoder layer >= 1"
                )
            if {s.method.name for s in stages} != {name} or len({s.where for s in stages}) != len(stages):
                raise ValueError(
                    f"stages of {', '.join(dict.fromkeys(s.method.name for s in stages))} act at decode: choose one of "
                    "these methods, at most once a layer"
                )
            deeper = [s for s in self.stages if isinstance(s.where, int) and s.where > last and s not in stages]  # type: ignore[operator]
            if deeper:
                raise ValueError(
                    f"{deeper[0].method.name} at layer {deeper[0].where} drops tokens behind {name} at layer {last}, "
                    f"which chooses among them at decode: let {name} stand behind all other stages"
                )
            if stage.compact:
                raise ValueError(f"{name}: positions='compact' is undefined where tokens come back; use 'keep'")
            if LINEAR in self.adapter.layer_types:
                raise UnsupportedModel(
                    f"{name} chooses at decode among the keys that layers store, but {self.adapter.model_type} has "
                    f"layers of kind {LINEAR}, which store none: use a method that acts while the prompt is read"
                    f"{self._way_out(stage)}"
                )
            if "prefill" in stage.method.phases and stage.where < self.deep:
                raise UnsupportedModel(
                    f"{name} at layer {stage.where} lets tokens come back at decode, when {self.adapter.model_type} no "
                    f"longer adds visual features after its first {self.deep} layers: use layer {self.deep} or later"
                )
            if "prefill" in stage.method.phases and "flash" in self.adapter.attention():
                raise UnsupportedModel(
                    f"{name} lets tokens come back at decode, which needs masks that flash attention does not take: "
                    "load the model with attn_implementation='sdpa'"
                )
            if "prefill" in stage.method.phases and self.adapter.masks_in_base:
                raise UnsupportedModel(
                    f"{name} lets tokens come back at decode, but {self.adapter.model_type} reads its prompt in both "
                    "directions, so they would see later tokens: use a method that acts while the prompt is read"
                )

    def _check_changes(self) -> None:
        """What changes attention itself, and not only what it sees."""
        heads = [s for s in self.stages if s.method.of == "heads"]
        for stage in heads:
            if not isinstance(stage.where, int) or stage.where < 1:
                raise ValueError(
                    f"{stage.method.name} at {stage.where!r} chooses among heads by what they said in the layers "
                    "before: place it at a decoder layer >= 1"
                )
        names = [method.name for method in self.reweighing]
        if len(names) > 1:
            raise ValueError(f"{', '.join(names)} with different options change the attention of all layers: use one")
        if (names or heads) and "flash" in self.adapter.attention():
            name = names[0] if names else heads[0].method.name
            raise UnsupportedModel(
                f"{name} changes softmax rows or single heads, which flash attention does not show: load the model "
                "with attn_implementation='sdpa', or leave out values= and heads="
            )

    def _check_layer(self, name: str, layer: int) -> None:
        a, depth = self.adapter, len(self.adapter.layers)
        if not 0 <= layer < depth:
            raise ValueError(f"{name} at layer {layer}: the model has layers 0..{depth - 1}")
        others = sorted(set(a.layer_types) - {"full_attention", LINEAR})
        if others:
            raise UnsupportedModel(
                f"{name} at layer {layer}: {a.model_type} has layers of kind {', '.join(others)}, and a stage inside "
                "the LLM needs layers that see all tokens; use one that acts before the LLM"
            )
        if layer < self.deep and not hasattr(type(a.text), DEEPSTACK):
            raise UnsupportedModel(
                f"{name} at layer {layer}: {a.model_type} adds visual features after its first {self.deep} layers in a "
                f"way that cannot be followed (no {DEEPSTACK}); use layer {self.deep} or later"
            )

    # -- installing and removing ------------------------------------------------------------------------------------

    def busy(self) -> bool:
        """True while this thread prunes a prompt."""
        return self.local.frame is not None

    def _install(self) -> None:
        a, self.removed = self.adapter, False
        self._undo.append(a.text.register_forward_pre_hook(self._text_pre, with_kwargs=True).remove)
        self._undo.append(a.text.register_forward_hook(self._text_post, with_kwargs=True).remove)
        self.forwards = [Forward(self, module, "forward") for module in (a.base, a.text)]
        self._undo += [forward.install() for forward in self.forwards]
        for i in range(self.first_hook, len(a.layers)):
            hook = partial(self._layer_pre, i)
            self._undo.append(a.layers[i].register_forward_pre_hook(hook, with_kwargs=True).remove)
        self._announced: set[nn.Module] = set()
        self._announce(*a.layers[self.first_hook :])
        if self.first_layer < self.deep:
            self._add = standing(a.text, DEEPSTACK)
            self._undo.append(cover(a.text, DEEPSTACK, self._add_features))
        self._tap_layers()
        self._observe_towers()
        self._watch_generate()

    def _announce(self, *modules: nn.Module) -> None:
        """Let compilers know of the hooks on these modules; once each."""
        for module in modules:
            if module not in self._announced:
                self._announced.add(module)
                self._undo.append(announce(module, self.busy))

    def _tap_layers(self) -> None:
        from .tap import attach, attach_change

        self._watched: set[tuple[str, int, bool]] = set()
        for stage in self.stages:
            for need in stage.method.needs if isinstance(stage.where, int) else ():
                layer, kind = stage.where + need.offset, kind_of(need)  # type: ignore[operator]
                if "llm" not in kind.where:
                    raise ValueError(
                        f"{stage.method.name} at layer {stage.where} reads {need.kind!r}, a signal of the vision "
                        "tower: use the method's own place, 'llm' or ('vit', k)"
                    )
                if layer < 0:
                    raise ValueError(
                        f"{stage.method.name} at layer {stage.where} reads layer {layer}: use layer {-need.offset} or "
                        "later"
                    )
                if need.offset > 0:
                    raise ValueError(
                        f"{stage.method.name} at layer {stage.where} reads layer {layer}, which has not run yet: use "
                        "the offset 0 (the layer itself) or a negative one"
                    )
                if (kind.source == "heads") != (stage.method.of == "heads"):
                    raise ValueError(
                        f"{stage.method.name} chooses among {stage.method.of} and reads {need}: signals of heads, such "
                        "as 'head_output', are for methods that choose among heads, and these read nothing else"
                    )
                if (kind.so_far or kind.source == "heads") and need.offset != -1:
                    raise ValueError(
                        f"{stage.method.name} at layer {stage.where} reads {need}, which is a sum over all layers that "
                        "ran: use the offset -1"
                    )
                self._check_readable(stage, need)
                if kind.source in ("embeddings", "heads"):
                    continue
                if kind.source == "rotary":
                    if not self._first_watch(need.kind, layer):
                        continue
                    attention = attention_of(self.adapter.layers[layer])
                    hook = attention.register_forward_pre_hook(
                        partial(self._rope_sink, need.kind, layer), with_kwargs=True
                    )
                    self._undo.append(hook.remove)
                    self._announce(attention)
                    continue
                if kind.source == "modules":
                    self._watch_modules(stage, need.kind, layer)
                    continue
                attention, own = attention_of(self.adapter.layers[layer]), need.offset == 0
                self._announce(attention)
                if "decode" in stage.method.phases:
                    if need != ROW:
                        raise ValueError(f"{stage.method.name} reads {need} at decode, where there is only {ROW}")
                    self._undo.append(attach(attention, partial(self._step_sink, layer)))
                if "prefill" not in stage.method.phases:
                    continue
                for i in _layers_of(need, stage.where):  # type: ignore[arg-type]
                    if self._first_watch(need.kind, i, own):
                        attention = attention_of(self.adapter.layers[i])
                        self._undo.append(attach(attention, partial(self._row_sink, need.kind, i, own), before=own))
                        self._announce(attention)
        for layer in self.looked_at:
            self._undo.append(attach(attention_of(self.adapter.layers[layer]), self._stop, before=True))
        for i, layer in enumerate(self.adapter.layers if self.reweighing or self.of_heads else ()):
            self._undo.append(attach_change(attention_of(layer), partial(self._change, i)))
            self._announce(attention_of(layer))

    def _first_watch(self, kind: str, layer: int, own: bool = False) -> bool:
        """True the first time: several stages may read one quantity, which is computed once."""
        first = (kind, layer, own) not in self._watched
        self._watched.add((kind, layer, own))
        return first

    def _check_readable(self, stage: Stage, need: Signal) -> None:
        """Linear attention has a state in place of attention rows."""
        kinds = self.adapter.layer_types
        found = [i for i in _layers_of(need, stage.where) if kinds[i] == LINEAR]  # type: ignore[arg-type]
        if not found:
            return
        needs = stage.method.needs
        first = max(-other.offset for other in needs)
        read = {k: [i for other in needs for i in _layers_of(other, k)] for k in range(first, len(kinds))}
        fit = [k for k, layers in read.items() if all(kinds[i] != LINEAR for i in layers)]
        raise UnsupportedModel(
            f"{stage.method.name} at layer {stage.where} reads layer {found[0]} of {self.adapter.model_type}, whose "
            f"kind is {LINEAR}: there are no attention rows; use {f'a layer of {fit}' if fit else 'another method'}"
            f"{self._way_out(stage)}"
        )

    def _way_out(self, stage: Stage) -> str:
        """The option of another stage's method that leaves this stage out, where it brought it."""
        for other in (s.method for s in self.stages if s.method is not stage.method):
            for option in (f.name for f in fields(other) if getattr(other, f.name) is True):  # type: ignore[arg-type]
                rest = replace(other, **{option: False}).stages(None, len(self.adapter.layers))  # type: ignore[type-var]
                if all(type(s.method) is not type(stage.method) for s in rest):
                    return f", or leave this stage out of {other.name}: {option}=False"
        return ""

    def _watch_modules(self, stage: Stage, kind: str, layer: int) -> None:
        if layer == stage.where:
            raise ValueError(
                f"{stage.method.name} at layer {layer} reads the {kind} of that layer, which has not run yet: use a "
                "negative offset"
            )
        if not self._first_watch(kind, layer):
            return
        for module in (attention_of(self.adapter.layers[layer]), mlp_of(self.adapter.layers[layer])):
            hook = partial(self._module_sink, kind, layer)
            self._undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)
            self._announce(module)

    @property
    def looked_at(self) -> set[int]:
        """Layers whose own attention a stage that stands there reads."""
        inside = [s for s in self.stages if isinstance(s.where, int)]
        return {s.where for s in inside for need in s.method.needs if need.layer == 0}  # type: ignore[misc]

    def _observe_towers(self) -> None:
        base = self.adapter.base
        needs, inside = self.tower_needs, [s for s in self.stages if isinstance(s.where, tuple)]
        for modality in MODALITIES:
            name = f"get_{modality}_features"
            if modality not in self.adapter.token_ids or not hasattr(type(base), name):
                continue
            tower = stages = None
            if needs:
                from .model_adapters.towers import TowerSignals

                tower = TowerSignals(base, modality, needs)
                self._undo += tower.install()
            if inside:
                from .tower import TowerStages

                stages = TowerStages(base, modality, inside)
                self._undo += stages.install()
                if tower and stages.by_patch:
                    raise UnsupportedModel(
                        "single patches chosen inside the tower leave no token where it was, so signals for a stage "
                        "before the LLM cannot be placed: choose whole tokens (unit='block'), or a rule without signals"
                    )
                if tower:
                    tower.restore = stages.restore
            observer = Observer(self, modality, standing(base, name), tower, stages)
            self._undo.append(cover(base, name, observer))

    def _watch_generate(self) -> None:
        model = self.adapter.model
        if hasattr(type(model), "generate"):
            self._undo.append(Generate(self, model, "generate").install())

    def remove(self) -> None:
        """Undo everything, once calls in other threads have ended; safe to call twice."""
        with self.running.none():
            while self._undo:
                self._undo.pop()()
            self.removed = True

    def release(self) -> None:
        """Let go of the model, once removed for good."""
        del self.adapter

    # -- hooks ------------------------------------------------------------------------------------------------------

    def base_pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the base model runs: its arguments, in which a mask over the past may be another."""
        call = self.adapter.bind(module, args, kwargs)
        tokens = _tokens_of(call)
        if tokens is not None and tokens.shape[1] > 1:  # decode steps leave here: nothing to prune
            self._refuse(call)
            if self._may_prune(call):
                call = self._begin(call, tokens)
        if self.adapter.masks_in_base:
            call = self._past_mask_2d(call, call.get(kv.NAME))
        return (args, kwargs) if call is kwargs else ((), call)

    def base_post(self, output: Any) -> Any:
        """What the base model returns, in which packed rows are packed again."""
        samples = self.local.samples
        return output if samples is None else packed.pack_output(output, samples)

    def may_prune(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True for a call of the base model that is a prompt with features, or embeddings that may hold some."""
        call = self.adapter.bind(module, args, kwargs)
        tokens = _tokens_of(call)
        return tokens is not None and tokens.shape[1] > 1 and self._may_prune(call)

    def _may_prune(self, call: dict[str, Any]) -> bool:
        return call.get("input_ids") is None or bool(self.adapter.given(call))

    def recognised(self, call: dict[str, Any]) -> dict[str, Any]:
        """The grids that a call of `generate` was given; features it brings will be found again."""
        ends = ("_grid_thw", "_sizes", "_aspect_ratio")
        told = {k: v for k, v in call.items() if k.endswith(ends) and v is not None}
        encoded = call.get("mm_encoder_outputs")
        for modality, output in encoded.items() if isinstance(encoded, Mapping) else ():
            # Beams repeat the entries later on, so they are counted now.
            known = None if output is None else self._known(modality, told, output)
            if known is not None:
                self.seen.add(output, known)
        return told

    def _begin(self, call: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        """Start to prune this prompt, if it has visual tokens and says where; the call that goes on."""
        code = self.adapter.visual_code(call)
        if code is not None:
            refuse_tracers(tokens)
            if not self.inert:
                call, code = self._unpack(call, code)
            self.local.features = self._brought(call)
            frame = self.local.frame = Frame(self.adapter, self.stages, code, notes=list(self.notes))
            frame.foresee(call, self.local.prompt)
            if frame.behind and frame.cache is not None and not self.inert:
                self._refuse_guesses()
        elif call.get("input_ids") is None:
            self._unplaced(call)
        return call

    def roll_back(self) -> None:
        """A call of the text model did not end well: its cache holds what it held before."""
        frame, step = self.local.frame, self.local.step
        if step is not None:
            step.roll_back()
        elif frame is not None and frame.opened and frame.cache is not None:
            kv.roll_back(frame.cache, frame.past)

    def _unplaced(self, call: dict[str, Any]) -> None:
        """A prompt as embeddings without features, of which nothing tells where features were merged into them."""
        if self.adapter.types_of(call) is not None:
            return
        told = {**self.local.told, **{k: v for k, v in call.items() if v is not None}}
        named = [k for k in TOLD if k.endswith(("_thw", "_sizes")) and k in told]
        if named and any(not stage.keeps_all for stage in self.stages):
            raise UnsupportedCall(
                f"this call has {', '.join(named)} and inputs_embeds without placeholders or pixel values, so features "
                "seem to be merged already, and nothing tells where: pass mm_token_type_ids (0 text, 1 image, 2 "
                "video), or input_ids with mm_encoder_outputs"
            )
        self.local.last = self.latest = Last.untouched(call["inputs_embeds"], len(self.adapter.layers), MERGED)

    def _brought(self, call: dict[str, Any]) -> dict[str, Features | None]:
        """What is known of features that were there before this call; pixels are encoded in the course of it."""
        encoded, adapter = call.get("mm_encoder_outputs"), self.adapter
        told = {**self.local.told, **{k: v for k, v in call.items() if v is not None}}
        if not adapter.given(call):
            return {m: adapter.brought(m, told, None) for m in adapter.token_ids}
        found = encoded.items() if isinstance(encoded, Mapping) else ()
        return {m: self._known(m, told, v) for m, v in found if v is not None}  # recognised, not taken for the last

    def _known(self, modality: str, told: dict[str, Any], output: Any) -> Features | None:
        found = self.seen.find(output)
        return self.adapter.brought(modality, told, output) if found is None else found

    def _unpack(self, call: dict[str, Any], code: Tensor) -> tuple[dict[str, Any], Tensor]:
        """A call whose rows hold several samples, with each in a row of its own; its visual tokens."""
        caches = self._caches(call)
        samples = packed.find(call, code, self.adapter, caches=caches)
        if samples is None:
            # What is said of rows that hold one sample each would be out of step with cut rows, and adds nothing.
            told = [name for name in packed.LENGTHS if name in call]
            return {k: v for k, v in call.items() if k not in told} if told else call, code
        if caches:
            packed.refuse_cache(samples)
        self.local.samples = samples
        call = packed.unpack(call, samples, (code.shape[0], code.shape[1]), LINEAR in self.adapter.layer_types)
        return call, samples.unpack(code)

    def _caches(self, call: dict[str, Any]) -> bool:
        """True if this call stores keys and values."""
        use, text = call.get("use_cache"), self.adapter.text
        if use is None:
            use = getattr(text.config, "use_cache", False)
        again = text.training and text.gradient_checkpointing and torch.is_grad_enabled()
        return call.get(kv.NAME) is not None or bool(use and not again)

    @outside_while_busy
    def _text_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.local.depth:  # called without the base model
            if any(forward.module.__dict__.get("forward") is not forward for forward in self.forwards):
                raise UnsupportedCall(
                    "another library changed the forward of this model after vtprune.patch, which is not seen any "
                    "more: call vtprune.unpatch(model) and patch again"
                )
            self.local.clear()
        call = self.adapter.bind(module, args, kwargs)
        cache = call.get(kv.NAME)
        layer = kv.state(cache, kv.reference_layer(cache)) if cache is not None else None
        self._check_places(cache)
        self._open_step(cache, call)
        if layer is not None:
            if not self.adapter.masks_in_base:
                call = self._past_mask_2d(call, cache)
            if layer.shift is not None:
                call = self._shift_positions(call, layer)
        frame = self.local.frame
        if frame is not None and call.get("inputs_embeds") is not None:
            frame.open(call, self.local.features, inert=self.inert)
            if self.inert:
                frame.keep_all()
            else:
                call = self._prune(frame, call)
        return None if call is kwargs else ((), call)

    def _prune(self, frame: Frame, call: dict[str, Any]) -> dict[str, Any]:
        """Run the stages before the LLM; the text model's call with what they left."""
        self._check_frame()
        if frame.run_stages("llm", call["inputs_embeds"]):
            call = self._cut_text_call(frame, call)
        inside = [s for s in self.stages if isinstance(s.where, int)]
        for kind in dict.fromkeys(kind_of(need) for stage in inside for need in stage.method.needs):
            if kind.source == "embeddings":
                frame.read_embeds(kind.name, call["inputs_embeds"])
        return call

    @outside_while_busy
    def _text_post(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        try:
            return self._close(output)
        finally:
            if not self.local.depth:
                self.local.clear()

    def _close(self, output: Any) -> Any:
        frame, step = self.local.frame, self.local.step
        if step is not None:
            return self._close_step(step, output)
        if frame is None or not frame.opened:
            return None
        try:
            frame.settle()
            frame.check_cache(getattr(output, kv.NAME, None))
        except BaseException:
            self.roll_back()
            raise
        if frame.compaction is not None or frame.recalls or frame.speaking:
            cache = getattr(output, kv.NAME, None)
            cache = cache if cache is not None else frame.cache
            if cache is not None:
                frame.shrink_cache(cache)
        if frame.compaction is not None:
            output = packed.replaced(output, frame.compaction.restore(output[0]))
        self.local.last = self.latest = frame.report()
        return output

    def _open_step(self, cache: Any, call: dict[str, Any]) -> None:
        """Before a call on a cache with stages that act at decode: one token is a step, several see everything."""
        if not kv.recalls(cache):
            return
        embeds = call.get("inputs_embeds")
        if embeds is None or embeds.shape[1] > 1:
            prompt = self.local.prompt
            if prompt is not None and embeds is not None and cache.get_seq_length() + embeds.shape[1] > prompt:
                self._refuse_guesses()
            kv.show_all(cache)
        elif all(getattr(kv.state(cache, s.where), "recall", None) is not None for s in self.at_decode):  # type: ignore
            self.local.step = Step(cache, self.at_decode)

    def _close_step(self, step: Step, output: Any) -> Any:
        try:
            step.settle()
        except BaseException:
            step.roll_back()
            raise
        last = self.local.last or self.latest
        if last is not None:
            last.recalled.update(step.kept())
        return packed.replaced(output, output[0][:, -1:]) if step.back else output

    @outside_while_busy
    def _layer_pre(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame, step = self.frame, self.local.step
        hidden = args[0] if args else kwargs["hidden_states"]
        if frame is None and step is None and hidden.shape[1] == 1 and kwargs.get("attention_mask") is None:
            held = kv.state(kv.renamed(kwargs).get(kv.NAME), i)
            if held is None or (held.valid is None and held.lag is None and held.heads is None):
                return None  # decode without padding: every layer sees all it stores, so there is nothing to change
        call = self.adapter.bind(module, args, kwargs)
        cache = call.get(kv.NAME)
        reference = kv.reference_layer(cache) if cache is not None else 0
        if step is not None:
            hidden = step.enter(i, hidden)
            call = {**call, "hidden_states": hidden[:, -1:]}
        held = kv.state(cache, i) if cache is not None else None
        layer = held if i != reference else None
        changed = dict(call)
        if layer is not None:
            self._past_mask_layer(changed, layer, kv.state(cache, reference))
        if frame is not None:
            if i in self.looked_at:
                self._look(i, module, dict(changed), frame)
            ids, rope = call.get("position_ids"), call.get("position_embeddings")
            changed["hidden_states"] = frame.run_layer(i, call["hidden_states"], ids, rope)
            frame.cut_layer_call(i, changed)
        self._lower_positions(changed, frame.lags[i] if frame else None, held.lag if held else None)
        if step is not None:
            step.extend(i, hidden, changed, self.adapter.attention())
        heads = frame.heads[i] if frame else None
        heads = held.heads if heads is None and held is not None else heads
        if heads is not None:
            changed[HEADS] = heads
        if "flash" in self.adapter.attention() and (frame or held or step):
            # Flash attention takes gaps in position ids for packed sequences; rotary embeddings are already made.
            width = changed["hidden_states"].shape[1]
            if torch.is_tensor(changed.get("position_ids")):
                changed["position_ids"] = torch.arange(width, device=changed["position_ids"].device)[None]
        # Positional, because gradients pass reentrant checkpoints by no other way.
        return (changed.pop("hidden_states"),), changed

    def _add_features(self, hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
        """The text model's own step on what its layers run on by now: hidden [B, n, D], where [B, L], [S, D]."""
        if self.local.frame is not None:
            where, features = self.local.frame.cut_features(where, features)
        return self._add(hidden, where, features)

    @outside_while_busy
    def _row_sink(
        self,
        kind: str,
        layer: int,
        own: bool,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        frame = self.frame
        if frame is not None and q.shape[2] > 1 and self.local.ahead == own:
            frame.read_rows(kind, layer, q, k, v, mask, scaling)

    def _step_sink(self, layer: int, module: nn.Module, *product: Any) -> None:
        if self.local.step is not None:
            self.local.step.read_row(layer, module, *product)

    @outside_while_busy
    def _change(
        self,
        i: int,
        out: Tensor,
        heads: Tensor | None,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The attention product out [B, n, H, d] of layer i as the methods want it."""
        for method in self.reweighing:
            out = reweighed(q, k, v, mask, scaling, method.reweigh)
        if heads is not None:
            out = out * heads.to(out.device)[:, None, :, None]
        frame = self.frame
        if frame is not None and out.shape[1] > 1 and i < max(self.of_heads, default=0):
            with torch.no_grad():
                frame.read_heads(self.head_signals, out)
        return out

    @outside_while_busy
    def _module_sink(
        self, kind: str, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        frame = self.frame
        before = args[0] if args else kwargs["hidden_states"]
        if frame is not None and not self.local.ahead and before.shape[1] > 1:
            with torch.no_grad():
                frame.read_module(kind, i, before, out[0] if isinstance(out, tuple) else out)

    def _look(self, i: int, layer: nn.Module, call: dict[str, Any], frame: Frame) -> None:
        """Run layer i up to its attention product on what enters it, for the signals of stages that stand there."""
        frame.cut_layer_call(i, call)
        cache = call.get(kv.NAME)
        held = kv.state(cache, i) if cache is not None else None
        self._lower_positions(call, frame.lags[i], held.lag if held else None)
        if cache is not None:
            call[kv.NAME] = kv.Glance(cache, frame.past_at(i))
        self.local.ahead = True
        try:
            with torch.no_grad():
                layer.forward(**call)
        except _Looked:
            return
        finally:
            self.local.ahead = False
        raise UnsupportedModel(f"{type(layer).__name__} ran without an attention product that could be looked at")

    @outside_while_busy
    def _stop(self, *_: Any) -> None:
        if self.local.ahead:
            raise _Looked

    @outside_while_busy
    def _rope_sink(
        self, kind: str, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        frame, rope = self.frame, kwargs.get("position_embeddings")
        if frame is None or (args[0] if args else kwargs["hidden_states"]).shape[1] == 1:
            return
        if not isinstance(rope, tuple) or rope[0].dim() != 3:
            raise UnsupportedModel(
                f"{type(module).__name__} has no rotary embedding [B, n, d] of a single axis, which the signal "
                f"{kind!r} divides out: choose a method or version without it"
            )
        frame.read_places(kind, layer, rope)

    # -- what the hooks do ------------------------------------------------------------------------------------------

    def _refuse(self, call: dict[str, Any]) -> None:
        """Calls that cannot be pruned right."""
        from transformers.cache_utils import Cache, EncoderDecoderCache

        cache = call.get(kv.NAME)
        paged = "paged" in self.adapter.attention() or (cache is not None and not isinstance(cache, Cache))
        if paged and self.adapter.features_given(call):
            raise UnsupportedCall(
                f"paged caches and continuous batching ({type(cache).__name__}) cannot hold pruned prompts: use "
                "model.generate with its own cache, or handle.remove() first; requests without images work"
            )
        if isinstance(cache, EncoderDecoderCache):
            raise UnsupportedCall("an encoder-decoder cache cannot hold pruned prompts; use a DynamicCache")
        if cache is not None and not self.inert and self.adapter.features_given(call):
            mixed = [x for x in cache.layers if kv.is_static(x) and getattr(x, "is_sliding", False)]
            if mixed:
                raise UnsupportedCall(
                    "a static cache with sliding-window layers cannot hold pruned prompts; drop "
                    "cache_implementation='static' (a DynamicCache works)"
                )

    def _refuse_guesses(self) -> None:
        """Calls whose last tokens are guesses, where these change what a stage chooses or cannot be chosen for."""
        if self.at_decode:
            raise UnsupportedCall(
                f"{self.at_decode[0].method.name} chooses among the visual tokens at every decode step, but this call "
                "verifies several guessed tokens at once, as assisted decoding and prompt lookup do: leave out "
                "assistant_model and prompt_lookup_num_tokens, or use a method that acts while the prompt is read only"
            )
        inside = [s.method.name for s in self.stages if isinstance(s.where, int)]
        if inside and self.adapter.masks_in_base:
            raise UnsupportedCall(
                f"{inside[0]} acts inside the LLM, and {self.adapter.model_type} reads its prompt in both directions, "
                "so guessed tokens (assisted decoding, prompt lookup) would have a say in which tokens stay: leave out "
                "assistant_model and prompt_lookup_num_tokens, or use a method that acts before the LLM"
            )

    def _check_frame(self) -> None:
        frame, text = self.local.frame, self.adapter.text
        assert frame is not None
        again = text.training and text.gradient_checkpointing and torch.is_grad_enabled()
        if self.first_layer < len(self.adapter.layers) and again:
            raise UnsupportedCall(
                "gradient checkpointing re-runs decoder layers, which a stage inside the LLM cannot follow: use stages "
                "before the LLM, or model.gradient_checkpointing_disable()"
            )
        wanted = self.tower_needs
        features = self.local.features
        missing = [m for m in frame.modalities() if (known := features.get(m)) is None or known.elsewhere]
        inside = [s for s in self.stages if isinstance(s.where, tuple)]
        if inside and missing:
            raise UnsupportedCall(
                f"{inside[0].method.name} acts inside the vision tower, but the {missing[0]} features came pre-encoded "
                "from elsewhere: pass pixel_values, or encode through the patched model's own get_image_features"
            )
        if wanted and missing:
            kinds = ", ".join(sorted(map(str, wanted)))
            raise UnsupportedCall(
                f"the method needs {kinds} of the vision tower, but the {missing[0]} features came pre-encoded from "
                "elsewhere: pass pixel_values, or encode through the patched model's own get_image_features"
            )

    def _past_mask_2d(self, call: dict[str, Any], cache: Any) -> dict[str, Any]:
        """Bring a mask over the past into the coordinates of what the cache stores."""
        layer = kv.state(cache, kv.reference_layer(cache)) if cache is not None else None
        mask = call.get("attention_mask")
        if layer is None or not layer.remask:
            return call
        if mask is None:
            if layer.valid is None:
                return call
            tokens = call.get("inputs_embeds")
            tokens = tokens if tokens is not None else call["input_ids"]
            total = int(layer.get_seq_length()) + tokens.shape[1]
            mask = torch.ones(tokens.shape[0], total, dtype=torch.long, device=tokens.device)
        if isinstance(mask, dict):
            new: Any = {k: self._past_mask_any(m, layer) for k, m in mask.items()}
        else:
            new = self._past_mask_any(mask, layer)
        return {**call, "attention_mask": new}

    def _past_mask_any(self, mask: Any, layer: kv.Pruned) -> Any:
        if mask is None:
            return None
        mask = tensor_mask(mask)
        return kv.past_mask_2d(mask, layer) if mask.dim() == 2 else kv.past_mask(mask, layer, layer)

    def _past_mask_layer(self, call: dict[str, Any], layer: kv.Pruned, reference: kv.Pruned | None) -> None:
        """Give one layer the mask over its own past, in place of the one sized by the reference layer."""
        mask = call.get("attention_mask")
        if mask is not None:
            call["attention_mask"] = kv.past_mask(mask, layer, reference)
        elif layer.valid is not None:
            hidden = call["hidden_states"]
            stored = int(layer.get_seq_length()) - layer.dropped
            valid = hidden.new_ones(hidden.shape[0], stored + hidden.shape[1], dtype=torch.bool)
            valid[:, : layer.prefix] = layer.valid
            call["attention_mask"] = mask_for(self.adapter.attention(), valid, hidden.shape[1], hidden.dtype)

    def _shift_positions(self, call: dict[str, Any], layer: kv.Pruned) -> dict[str, Any]:
        """positions="compact": a new token's id is its logical position less what its row dropped."""
        ids, embeds = call.get("position_ids"), call["inputs_embeds"]
        if ids is None:
            ids = torch.arange(embeds.shape[1], device=embeds.device)[None] + layer.get_seq_length()
        assert layer.shift is not None
        return {**call, "position_ids": ids - layer.shift.to(ids.device)[:, None]}

    def _lower_positions(self, call: dict[str, Any], lag: Tensor | None, held: Tensor | None) -> None:
        """positions="compact" inside the LLM: this layer's own ids, by `lag` [B, n] of this call and `held` [B]."""
        if lag is None and held is None:
            return
        key = (call["position_ids"], lag, held)
        if (
            not torch.compiler.is_compiling()
            and self.local.placed
            and all(a is b for a, b in zip(key, self.local.placed))
        ):
            ids, embeddings = self.local.placed[3:]
        else:
            ids = call["position_ids"] if lag is None else call["position_ids"] - lag.to(call["position_ids"].device)
            ids = ids if held is None else ids - held.to(ids.device)[:, None]
            embeddings = self.adapter.text.rotary_emb(call["hidden_states"], ids)  # type: ignore[operator]
            if not torch.compiler.is_compiling():
                self.local.placed = (*key, ids, embeddings)
        call["position_ids"], call["position_embeddings"] = ids, embeddings

    def _check_places(self, cache: Any) -> None:
        """Refuse a cache whose layers renumber, store other tokens or are silent where this patch does not look."""
        layers = getattr(cache, "layers", ())
        for layer in layers[: self.first_hook]:
            if getattr(layer, "uneven", False) or getattr(layer, "lag", None) is not None:
                raise UnsupportedCall(
                    "this cache was filled by a patched model that dropped tokens (or renumbered them) inside the LLM, "
                    "at layers where this patch has no stage: continue with the same patch, or start a new cache"
                )
        for layer in layers[: min(self.of_heads, default=len(layers))]:
            if getattr(layer, "heads", None) is not None:
                raise UnsupportedCall(
                    "this cache was filled by a patched model whose heads are silent in layers where this patch "
                    "silences none: continue with the same patch, or start a new cache"
                )

    def _cut_text_call(self, frame: Frame, call: dict[str, Any]) -> dict[str, Any]:
        """Every sequence-length argument of the text model, cut."""
        new = frame.cut_call(call)
        mask = new["attention_mask"]
        if isinstance(mask, dict):
            window = getattr(self.adapter.text.config, "sliding_window", None)
            sliding = mask.get("sliding_attention")
            if window and sliding is not None:
                mask["sliding_attention"] = in_window(sliding, mask.get("full_attention"), window)
        elif mask is None:
            # Without a mask transformers takes gaps in the position ids for packed sequences.
            c = frame.compaction
            assert c is not None
            real = torch.ones(c.index.shape, dtype=torch.long, device=c.index.device)
            past = real.new_ones(real.shape[0], frame.past)
            new["attention_mask"] = torch.cat([past, real if c.valid is None else hide(real, c.valid)], dim=1)
        return new


def _tokens_of(call: dict[str, Any]) -> Tensor | None:
    """Ids or embeddings of a call of the base model."""
    ids = call.get("input_ids")
    return ids if ids is not None else call.get("inputs_embeds")


def _layers_of(need: Signal, where: int) -> range:
    """The decoder layers that a stage at `where` reads for a signal."""
    kind, last = kind_of(need), where + need.offset
    if kind.source == "embeddings":
        return range(0)
    return range(0 if kind.so_far else last, last + 1)


def mlp_of(layer: nn.Module) -> nn.Module:
    """The feed-forward module of a decoder layer."""
    for name in ("mlp", "feed_forward"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise UnsupportedModel(f"{type(layer).__name__} has no feed-forward module whose transitions could be read")


def attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention module of a decoder layer."""
    for name in ("self_attn", "attention", "attn"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise UnsupportedModel(f"{type(layer).__name__} has no self-attention module to read signals from")
