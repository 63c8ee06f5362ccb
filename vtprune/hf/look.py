"""A look at a layer about to run: of its projections only what signals ask is computed, and the layer takes its keys.

A dry run (`hooks._dry_run`) computes keys of all that enters the layer. Where every signal that is read there says
whose queries it asks (`SignalKind.asks`), the other queries and all values are left out; where no gradients are wanted,
the layer itself then takes the keys of what its stages left. Layers that project all three at once do so for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.covering import cover, standing
from ..core.signal import SignalKind
from ..kernels import to_device
from .prefill import Prefill
from .slots import PromptSlots

if TYPE_CHECKING:
    from .session import Patch

Project = Callable[..., Tensor]


def install_look(patch: Patch, i: int, attention: nn.Module, kinds: Sequence[SignalKind]) -> None:
    """Stand before the projections of the attention module of layer i, at which stages read signals of these kinds."""
    named = dict(attention.named_children())
    if not {"q_proj", "k_proj", "v_proj"} <= named.keys() or any(kind.asks == "all" for kind in kinds):
        return
    queries, keys, values = named["q_proj"], named["k_proj"], named["v_proj"]
    asks = frozenset(kind.asks for kind in kinds)
    patch.undo(cover(queries, "forward", partial(project_queries, patch, asks, standing(queries, "forward"))))
    patch.undo(cover(keys, "forward", partial(project_keys, patch, i, standing(keys, "forward"))))
    patch.undo(cover(values, "forward", partial(project_values, patch, standing(values, "forward"))))


def project_queries(
    patch: Patch, asks: frozenset[str], original: Project, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Queries of x [B, n, D]; in a dry run those that signals ask, and zeros."""
    prefill = patch.local.prefill
    if prefill is None or not patch.local.dry_running:
        return original(x, *args, **kwargs)
    (batch, n), prompt = x.shape[:2], PromptSlots(prefill)
    places = [to_device(prompt.last(n) + torch.arange(batch) * n, x.device)]
    places += [prompt.text_slots(row, x.device) + row * n for row in range(batch) if "words" in asks]
    asked = torch.cat(places)
    found = original(x.flatten(0, 1).index_select(0, asked)[None], *args, **kwargs)[0]
    return found.new_zeros(batch * n, found.shape[-1]).index_copy(0, asked, found).view(batch, n, -1)


def project_keys(patch: Patch, i: int, original: Project, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Keys of x [B, n, D]; in a dry run they are kept, for the layer to take them."""
    prefill = patch.local.prefill
    if prefill is None:
        return original(x, *args, **kwargs)
    if patch.local.dry_running:
        prefill.keys[i] = keys = original(x, *args, **kwargs)
        return keys
    known = prefill.keys.pop(i, None)
    # A dry run has no gradients, so a layer that wants some computes its own keys.
    return original(x, *args, **kwargs) if known is None or torch.is_grad_enabled() else known


def project_values(patch: Patch, original: Project, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Values of x [B, n, D]; in a dry run that of the first token stands for all of them, which nobody reads."""
    if not patch.local.dry_running:
        return original(x, *args, **kwargs)
    return original(x[:, :1], *args, **kwargs).expand(-1, x.shape[1], -1)


def hand_over(prefill: Prefill, i: int, cuts: int) -> None:
    """Cut the keys of layer i to what its stages left; cuts: how many cuts were made before them."""
    for merges, step in prefill.inner_cuts[cuts:]:
        if merges:  # the states of some tokens are others now, and so are their keys
            del prefill.keys[i]
            return
        prefill.keys[i] = step.cut(prefill.keys[i], 1)
