"""What stands in for methods of one model instance: it counts the calls that run, and cleans up however they end.

PyTorch's hooks do not: not even those of always_call=True run for a KeyboardInterrupt.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.covering import cover, standing
from ..core.errors import VtpruneError
from . import cache as kv
from . import packed
from .base_call import begin_base_call, may_prune, recognised
from .compilers import outside

if TYPE_CHECKING:
    from ..core.result import Last
    from ..model_adapters.entries import Features
    from .decode import DecodeStep
    from .prefill import Prefill
    from .session import Patch


class Running:
    """Which threads are inside a call of one patched model; a copy starts with none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: dict[int, int] = {}
        self._closed = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """A call of this thread. While the patch is being removed, a thread that is in no call yet waits."""
        me = threading.get_ident()
        with self._changed:
            while self._closed and me not in self._calls:
                self._changed.wait()
            self._calls[me] = self._calls.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._calls[me] -= 1
                if not self._calls[me]:
                    del self._calls[me]
                self._changed.notify_all()

    @contextmanager
    def none(self) -> Iterator[None]:
        """A time without calls: waits for those that run. Raises VtpruneError inside a call, which would not end."""
        with self._changed:
            if threading.get_ident() in self._calls:
                raise VtpruneError(
                    "this thread is inside a call of the patched model, whose patch cannot be removed meanwhile: call "
                    "handle.remove() after generate or forward has returned"
                )
            while self._closed:
                self._changed.wait()
            self._closed = True
            try:
                while self._calls:
                    self._changed.wait()
                yield
            finally:
                self._closed = False
                self._changed.notify_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> Running:
        return Running()

    def __reduce__(self) -> Any:
        return Running, ()


class Local(threading.local):
    """Per-thread state of one patched model; a copy or an unpickled one starts empty."""

    def __init__(self) -> None:
        self.prefill: Prefill | None = None
        self.features: dict[str, Features | None] = {}
        self.observing = False
        self.last: Last | None = None
        self.step: DecodeStep | None = None  # a decode step at which stages act
        self.dry_running = False  # a layer is run up to its attention product, before it runs
        self.told: dict[str, Any] = {}  # what `generate` was told of grids, which it keeps from the model
        self.made: dict[Any, Any] = {}  # masks and rotary tables that layers of this call share
        self.samples: packed.Samples | None = None  # of packed rows, while each is a row of its own
        self.prompt_length: int | None = None  # tokens up to the end of the prompt of the `generate` under way
        self.pruned_past = False  # layers of the cache of this call store fewer tokens than they answer for
        self.own_arguments = False  # some of them want padding, positions or heads of their own
        self.depth = 0  # calls of the base and the text model under way, one inside the other

    def clear(self) -> None:
        """Nothing of a call is left, and nothing of one that was interrupted before."""
        self.prefill, self.step, self.made, self.dry_running, self.features = None, None, {}, False, {}
        self.samples = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Local:
        return Local()

    def __reduce__(self) -> Any:
        return Local, ()


class Cover:
    """Stands before a method of a module, on the instance, and calls what stood there."""

    def __init__(self, patch: Patch, module: nn.Module, name: str) -> None:
        self.patch, self.module, self.__name__ = patch, module, name
        self.original = standing(module, name)

    def install(self) -> Callable[[], None]:
        """Stand there; the returned function undoes it, unless somebody stands before this by then."""
        self._uncover = cover(self.module, self.__name__, self)
        return self.remove  # bound, so that a copied model's undo undoes the copy

    def remove(self) -> None:
        """Let what stood there show again."""
        if self.module.__dict__.get(self.__name__) is self:
            self._uncover()

    @property
    def __signature__(self) -> Any:  # generate() reads the parameters to decide what to pass
        return inspect.signature(self.original)

    @property
    def __wrapped__(self) -> Any:
        return self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Forward(Cover):
    """The forward of the base or the text model. A call from inside another leaves the cleaning to it.

    A compiler sees decode steps as they are; a call that is pruned runs in plain Python.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patch = self.patch
        if patch.removed or not torch.compiler.is_compiling():
            return self._run(*args, **kwargs)
        text = self.module is patch.adapter.text
        if patch.busy() if text else may_prune(patch, self.module, args, kwargs):
            return self._run_outside(*args, **kwargs)
        return self._traced(text, *args, **kwargs)

    @outside
    def _run_outside(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        patch = self.patch
        # Inside another call nothing is to wait for: that one is counted.
        with nullcontext() if patch.local.depth else patch.running.one():
            if patch.removed:  # while this call waited
                return self.original(*args, **kwargs)
            text, done = self.module is patch.adapter.text, False
            if not text and not patch.local.depth:
                patch.local.clear()
            patch.local.depth += 1
            before, kv.inside.on = kv.inside.on, True
            try:
                args, kwargs = (args, kwargs) if text else begin_base_call(patch, self.module, args, kwargs)
                output, done = self.original(*args, **kwargs), True
                samples = patch.local.samples
                return output if text or samples is None else packed.pack_output(output, samples)
            finally:
                patch.local.depth -= 1
                if text and not done:
                    patch.roll_back()
                kv.inside.on = before
                if not patch.local.depth and not (text and done):  # the hook behind it comes yet
                    patch.local.clear()

    def _traced(self, text: bool, *args: Any, **kwargs: Any) -> Any:
        """Without locks and clean-up, which cannot be traced: `generate` is counted already."""
        patch = self.patch
        kv.inside.on = True
        patch.local.depth += 1
        args, kwargs = (args, kwargs) if text else begin_base_call(patch, self.module, args, kwargs)
        output = self.original(*args, **kwargs)
        patch.local.depth -= 1
        if not text:
            patch.local.clear()
            kv.inside.on = False
        return output


class Generate(Cover):
    """`model.generate`, of which it notes where the prompt ends and which grids it was given.

    Assisted decoding and prompt lookup feed guessed tokens with the prompt, and without a cache every step feeds the
    answer so far: nothing in those calls themselves tells them from a prompt. And `generate` encodes images by itself,
    but does not hand their grids on to the model.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patch, local = self.patch, self.patch.local
        with patch.running.one():
            if patch.removed:
                return self.original(*args, **kwargs)
            before = local.prompt_length, local.told  # an assistant may be this model as well
            local.prompt_length, local.told = _end_of(args, kwargs), recognised(patch, kwargs)
            try:
                return self.original(*args, **kwargs)
            finally:
                local.prompt_length, local.told = before


def _end_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens up to the end of the prompt; a mask counts those of earlier turns where the ids are the new ones."""
    given = [kwargs.get("attention_mask"), kwargs.get("inputs_embeds"), kwargs.get("input_ids")]
    given += [kwargs.get("inputs"), *args[:1]]
    sizes = [x.shape[1] for x in given if torch.is_tensor(x) and x.dim() > 1]
    if not sizes:
        return None
    cache: Any = kv.renamed(kwargs).get(kv.NAME)
    past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    return sizes[0] if sizes[0] > past else past + sizes[0]
