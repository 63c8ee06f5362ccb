"""`Plan`: what the stages of one patch ask of one model, worked out once when the patch is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.method import Method, Stage
from ..core.signal import Signal, SignalKind
from ..model_adapters.base import Adapter
from ..signals import kind_of

LINEAR = "linear_attention"  # the kind of layer whose memory is a state and no keys
# The method of a text model that adds visual features to its hidden states between layers.
DEEPSTACK = "_deepstack_process"


@dataclass(frozen=True)
class Plan:
    """Where stages act and what they read.

    stages: all of them, in order. before: those between projector and LLM, inside: those at decoder layers, in_tower:
        those in the vision tower. at_decode: those that act at decode. stage_layers: the layers of `inside`.
    of_heads: layers where stages choose among heads.
    depth, layer_types: of the decoder. masks_in_base: it receives 4-D masks that the base model built. flash: it runs
        on flash attention. deepstack: how many of its first layers have visual features added behind them.
    first_layer: the first decoder layer with a stage, or `depth`. first_hook: the first whose arguments are looked
        after. dry_run_layers: those whose own attention a stage that stands there reads, so that they run twice.
    tower_needs: signals that stages before the LLM read from the vision tower. of_words: those that stages inside the
        LLM read from the embeddings. head_signals: those of heads that stages read.
    reweighing: methods that change attention; the checks let one through.
    by_clip: a stage compares the frames of a sample, so what stages see of a sample are its clips.
    renumber: a stage before the LLM or in the tower lowers the position ids of what it keeps.
    keeps_all: all tokens stay, so a call is the unpatched model's own and nothing needs to be refused.
    """

    stages: list[Stage]
    before: list[Stage]
    inside: list[Stage]
    in_tower: list[Stage]
    at_decode: list[Stage]
    of_heads: list[int]
    depth: int
    masks_in_base: bool
    layer_types: list[str]
    deepstack: int
    stage_layers: frozenset[int]
    first_layer: int
    first_hook: int
    flash: bool
    dry_run_layers: frozenset[int]
    tower_needs: frozenset[Signal]
    of_words: list[SignalKind]
    head_signals: list[SignalKind]
    reweighing: list[Method]
    by_clip: bool
    renumber: bool
    keeps_all: bool

    @classmethod
    def of(cls, adapter: Adapter, stages: Sequence[Stage]) -> Plan:
        """The plan of stages on a model; whether the model can hold them is for `checks.check_stages` to say."""
        depth, flash = len(adapter.layers), "flash" in adapter.attention()
        before = [s for s in stages if s.where == "llm"]
        inside = [s for s in stages if isinstance(s.where, int)]
        first = min((layer_of(s) for s in inside), default=depth)
        needs = [need for s in inside for need in s.method.needs]
        reweighing: list[Method] = []
        for stage in stages:
            if stage.method.reweighs and stage.method not in reweighing:
                reweighing.append(stage.method)
        vision = getattr(adapter.config, "vision_config", None)
        return cls(
            stages=list(stages),
            before=before,
            inside=inside,
            in_tower=[s for s in stages if isinstance(s.where, tuple)],
            at_decode=[s for s in stages if "decode" in s.method.phases],
            of_heads=[layer_of(s) for s in inside if s.method.of == "heads"],
            depth=depth,
            masks_in_base=adapter.masks_in_base,
            layer_types=adapter.layer_types,
            deepstack=len(getattr(vision, "deepstack_visual_indexes", None) or ()),
            stage_layers=frozenset(map(layer_of, inside)),
            first_layer=first,
            first_hook=0 if flash else first,
            flash=flash,
            dry_run_layers=frozenset(layer_of(s) for s in inside for need in s.method.needs if need.layer == 0),
            tower_needs=frozenset(need for s in before for need in s.method.needs),
            of_words=[kind for kind in dict.fromkeys(map(kind_of, needs)) if kind.source == "embeddings"],
            head_signals=[kind for kind in dict.fromkeys(map(kind_of, needs)) if kind.source == "heads"],
            reweighing=reweighing,
            by_clip=any(s.per == "sample" and s.method.video for s in stages),
            renumber=any(s.compact for s in stages if not isinstance(s.where, int)),
            keeps_all=all(s.keeps_all for s in stages) and not reweighing,
        )

    @property
    def linear(self) -> bool:
        """True if some decoder layers have a state in place of keys."""
        return LINEAR in self.layer_types


def layer_of(stage: Stage) -> int:
    """The decoder layer of a stage that stands at one."""
    assert isinstance(stage.where, int)
    return stage.where
