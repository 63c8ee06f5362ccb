"""What stands in for methods of one model instance: it counts the calls that run, and cleans up however they end.

PyTorch's hooks do not: not even those of always_call=True run for a KeyboardInterrupt.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import cache as kv
from .types import VtpruneError

if TYPE_CHECKING:
    from .hooks import Session


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


class Method:
    """Stands in for a method of a module on the instance."""

    def __init__(self, session: Session, module: nn.Module, name: str) -> None:
        self.session, self.module, self.__name__ = session, module, name
        self.before = module.__dict__.get(name)  # of another library

    def install(self) -> Callable[[], None]:
        """Stand there; the returned function undoes it, unless somebody stands before this by then."""
        self.module.__dict__[self.__name__] = self
        return self.remove  # bound, so that a copied model's undo undoes the copy

    def remove(self) -> None:
        """Let what stood there show again."""
        if self.module.__dict__.get(self.__name__) is not self:
            return
        if self.before is None:
            del self.module.__dict__[self.__name__]
        else:
            self.module.__dict__[self.__name__] = self.before

    @property
    def original(self) -> Callable[..., Any]:
        """What the instance would do."""
        return self.before or partial(getattr(type(self.module), self.__name__), self.module)

    @property
    def __signature__(self) -> Any:  # generate() reads the parameters to decide what to pass
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Forward(Method):
    """Stands in for the forward of the base or the text model. A call from inside another leaves the cleaning to it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        if torch.compiler.is_compiling():  # locks and interrupts cannot be traced, and generate is counted already
            return self._traced(*args, **kwargs)
        with session.running.one():
            if session.removed:  # while this call waited
                return self.original(*args, **kwargs)
            text, done = self.module is session.adapter.text, False
            if not text and not session.local.depth:
                session.local.clear()
            session.local.depth += 1
            held = kv.enter()
            try:
                args, kwargs = (args, kwargs) if text else session.base_pre(self.module, args, kwargs)
                output, done = self.original(*args, **kwargs), True
                return output
            finally:
                session.local.depth -= 1
                if text and not done:
                    session.roll_back()
                kv.leave(held)
                if not session.local.depth and not (text and done):  # the hook behind it comes yet
                    session.local.clear()

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        session, text = self.session, self.module is self.session.adapter.text
        kv.enter()
        session.local.depth += 1
        args, kwargs = (args, kwargs) if text else session.base_pre(self.module, args, kwargs)
        output = self.original(*args, **kwargs)
        session.local.depth -= 1
        if not text:
            session.local.clear()
            kv.leave()
        return output


class Generate(Method):
    """Stands in for `model.generate` and notes where the prompt ends.

    Assisted decoding and prompt lookup feed guessed tokens with the prompt, and without a cache every step feeds the
    answer so far: nothing in those calls themselves tells them from a prompt.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.session.running.one():
            local = self.session.local
            before, local.prompt = local.prompt, _end_of(args, kwargs)  # an assistant may be this model as well
            try:
                return self.original(*args, **kwargs)
            finally:
                local.prompt = before


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
