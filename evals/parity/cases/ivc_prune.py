"""IVC-Prune: seeds, foreground and anchors from stored values and rotary tables."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import agree, real, same, tensor
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_ivcprune")
def ivc_prune(arrays: Arrays, folder: Path) -> str:
    """All kept positions, and the foreground and the anchors where the other shares are 0."""
    from vtprune.methods.in_llm.ivc_prune import COS, LOGSUM, ROWS, SIN, VALUES

    values = tensor(arrays, "values")[0].float()  # [H, S, d]
    start, n, length = int(arrays["image_start"]), int(arrays["image_len"]), values.shape[1]
    image, text = slice(start, start + n), slice(start + n, length)
    logits = values @ values.mT * values.shape[-1] ** -0.5
    signals = {
        ROWS: logits.softmax(-1).mean(0)[text, image].T,
        VALUES: values[:, image].transpose(0, 1).flatten(1),
        LOGSUM: logits.logsumexp(-1)[:, image].T,
        COS: tensor(arrays, "cos")[0, image].float().mean(-1),
        SIN: tensor(arrays, "sin")[0, image].float().mean(-1),
    }
    shares = {name: real(arrays[f"{key}_ratio"]) for name, key in
              (("seeds", "seed"), ("foreground", "foreground"), ("anchors", "ivc"))}  # fmt: skip
    unit = Visual(torch.zeros(n, 1), None, signals=signals)
    kept = create("ivc_prune", **shares)(unit).idx + start
    whole = torch.cat([torch.arange(start), kept, torch.arange(start + n, length)])
    same("kept", whole, arrays["keep"])
    foreground = create("ivc_prune", **{**shares, "anchors": 0.0})(unit).idx + start
    same("foreground", foreground, arrays["foreground"])
    agree("anchors among the kept", set(arrays["ivc"].tolist()) <= set(kept.tolist()), True)
    agree("others", set(kept.tolist()) - set(foreground.tolist()) <= set(arrays["ivc"].tolist()), True)
    return f"{len(kept)} of {n} tokens, {len(foreground)} of the foreground"
