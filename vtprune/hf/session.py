"""`Patch`: everything that is installed on one model instance, and how it is taken off again.

Order in one forward pass: `base_call` (is there something to prune?) -> the vision encoder with its readers ->
`hooks.before_text` (stages before the LLM) -> `hooks.before_layer` (stages inside) -> `hooks.after_text` (cache and
output lengths). What cleans up after a call, however it ends, stands in `calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from ..core.covering import cover, standing
from ..core.errors import UnsupportedModel
from ..core.method import Stage
from ..core.result import Last
from ..model_adapters.base import Adapter
from ..model_adapters.entries import MODALITIES
from . import cache as kv
from . import hooks
from .calls import Forward, Generate, Local, Running
from .checks import check_reads, check_stages
from .compilers import announce, is_pruning
from .features import EncodedFeatures, FeatureRecorder
from .plan import DEEPSTACK, Plan
from .readers import install_readers


class Patch:
    """What one `vtprune.patch` put on a vision-language model. `remove()` takes it off."""

    def __init__(self, model: nn.Module, stages: Sequence[Stage]) -> None:
        self.adapter = Adapter(model)
        self.notes: list[str] = []
        self.plan = Plan.of(self.adapter, stages)
        self.local = Local()
        self.encoded = EncodedFeatures()
        self.running, self.removed = Running(), False
        self.latest: Last | None = None
        self._undo: list[Callable[[], None]] = []
        check_stages(self.adapter, self.plan)
        check_reads(self.adapter, self.plan)
        try:
            self.install()
        except BaseException:
            self.remove()
            raise

    @property
    def root(self) -> nn.Module:
        """The module that is patched, whatever it was found in."""
        return self.adapter.base

    @property
    def stages(self) -> list[Stage]:
        """The stages in force."""
        return self.plan.stages

    def busy(self) -> bool:
        """True while this thread prunes a prompt."""
        return self.local.prefill is not None

    # -- installing and removing --------------------------------------------------------------------------------------

    def undo(self, function: Callable[[], None]) -> None:
        """Call a function when the patch is removed; the last one first."""
        self._undo.append(function)

    def install(self) -> None:
        """Put hooks, forwards, readers and recorders on the model."""
        adapter, plan, self.removed = self.adapter, self.plan, False
        text, layers = adapter.text, adapter.layers
        self.undo(text.register_forward_pre_hook(partial(hooks.before_text, self), with_kwargs=True).remove)
        self.undo(text.register_forward_hook(partial(hooks.after_text, self), with_kwargs=True).remove)
        self.forwards = [Forward(self, module, "forward") for module in (adapter.base, text)]
        self._undo += [forward.install() for forward in self.forwards]
        for i in range(plan.first_hook, plan.depth):
            hook = partial(hooks.before_layer, self, i)
            self.undo(layers[i].register_forward_pre_hook(hook, with_kwargs=True).remove)
        self._announced: set[nn.Module] = set()
        self.announce(*layers[plan.first_hook :])
        if plan.first_layer < plan.deepstack:
            self.add_features: Callable[..., Tensor] = standing(text, DEEPSTACK)
            self.undo(cover(text, DEEPSTACK, partial(hooks.add_features, self)))
        install_readers(self)
        self._record_features()
        if hasattr(type(adapter.model), "generate"):
            self.undo(Generate(self, adapter.model, "generate").install())

    def announce(self, *modules: nn.Module) -> None:
        """Let compilers know of the hooks on these modules; once each."""
        for module in modules:
            if module not in self._announced:
                self._announced.add(module)
                self.undo(announce(module, partial(is_pruning, self.local)))

    def _record_features(self) -> None:
        """Stand before the encoders of the base model, with the readers and the stages of their towers."""
        base, plan = self.adapter.base, self.plan
        for modality in MODALITIES:
            name = f"get_{modality}_features"
            if modality not in self.adapter.token_ids or not hasattr(type(base), name):
                continue
            tower = stages = None
            if plan.tower_needs:
                from .tower_signals import TowerSignals, reader_of

                tower = reader_of(partial(TowerSignals, base, modality), plan.tower_needs)
                self._undo += tower.install() if tower else []
            if plan.in_tower:
                from .tower import TowerStages

                stages = TowerStages(base, modality, plan.in_tower)
                self._undo += stages.install()
                if tower and stages.by_patch:
                    raise UnsupportedModel(
                        "single patches chosen inside the tower leave no token where it was, so signals for a stage "
                        "before the LLM cannot be placed: choose whole tokens (unit='block'), or a rule without signals"
                    )
                if tower:
                    tower.restore = stages.restore
            recorder = FeatureRecorder(self, modality, standing(base, name), tower, stages)
            self.undo(cover(base, name, recorder))

    def check_still_in_place(self) -> None:
        """Refuse a call of the text model alone where another library put its own forward before this patch."""
        if any(forward.module.__dict__.get("forward") is not forward for forward in self.forwards):
            raise hooks.refuse_changed_forward()

    def remove(self) -> None:
        """Undo everything, once calls in other threads have ended; safe to call twice."""
        with self.running.none():
            while self._undo:
                self._undo.pop()()
            self.removed = True

    def release(self) -> None:
        """Let go of the model, once removed for good."""
        del self.adapter

    def roll_back(self) -> None:
        """A call of the text model did not end well: its cache holds what it held before."""
        prefill, step = self.local.prefill, self.local.step
        if step is not None:
            step.roll_back()
        elif prefill is not None and prefill.opened and prefill.cache is not None:
            kv.roll_back(prefill.cache, prefill.past)
