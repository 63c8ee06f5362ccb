"""Compilers and tracers around a patched model: pruning stays outside their graphs, and they learn of a patch.

Which tokens are kept depends on what an image shows, so a graph cannot hold it. While a prompt is pruned, hooks and
hooked modules run in plain Python: `torch.compile` breaks its graph there (`fullgraph=True` says so), and goes on with
everything else. Decode steps have nothing to prune and are traced whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

Hook = TypeVar("Hook", bound=Callable[..., Any])
_untraced = partial(torch.compiler.disable, reason="vtprune prunes visual tokens outside of compiled graphs")


def outside(function: Hook) -> Hook:
    """The function, which a compiler never traces."""
    return cast(Hook, _untraced(function))


def outside_while_busy(hook: Hook) -> Hook:
    """The method, which a compiler does not trace while the `busy` of its object says that a prompt is pruned."""
    plain = _untraced(hook)

    @wraps(hook)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs) if self.busy() else hook(self, *args, **kwargs)

    return cast(Hook, chosen)


def is_pruning(local: Any) -> bool:
    """True while this thread prunes a prompt, by the per-thread state of its patch."""
    return local.prefill is not None


def announce(module: nn.Module, busy: Callable[[], bool]) -> Callable[[], None]:
    """Run the forward of a hooked module outside of compilers while busy(); return the undo.

    Code that was compiled before takes no notice of a new hook, nor of one that is gone, but it does of a forward that
    the instance has or has no longer: so it is compiled again, with the hooks that stand there now.
    """
    own = module.__dict__.get("forward")  # accelerate puts one there
    inner = partial(type(module).forward, module) if own is None else own
    ours = partial(_forward, busy, inner)
    ours.__wrapped__ = inner  # type: ignore[attr-defined]  # for its signature
    module.__dict__["forward"] = ours
    return partial(_restore, module, ours, own)


def _forward(busy: Callable[[], bool], inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _called(inner, *args, **kwargs) if busy() else inner(*args, **kwargs)


@outside
def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _restore(module: nn.Module, ours: Any, own: Any) -> None:
    if module.__dict__.get("forward") is not ours:
        return  # another library put its own around ours, which now does nothing but call the one before
    del module.__dict__["forward"]
    if own is not None:
        module.__dict__["forward"] = own
