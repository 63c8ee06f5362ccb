"""Pruning the tokens of state space models, and their scan over what is left."""

from __future__ import annotations

from pathlib import Path

from vtprune.evals.parity.compare import agree, close, real, tensor
from vtprune.evals.parity.registry import Arrays, case
from vtprune.methods.in_vit import ssm_keep


@case("topvim_prune_")
def topvim(arrays: Arrays, folder: Path) -> str:
    """Tokens kept at every layer by the first item of the batch (others keep CLS twice in the official code)."""
    score = ssm_keep.official_scores(tensor(arrays, "xai_b"))[:1]
    hidden, residual, total = tensor(arrays, "hidden")[:1], tensor(arrays, "residual")[:1], []
    agree("layers", len(arrays["layers"]), sum(name.endswith("_hidden") for name in arrays))
    for step in range(len(arrays["layers"])):
        n = hidden.shape[1]
        kept = ssm_keep.keep(score[:, :n], real(arrays["keep_ratio"]), cls=n // 2)
        hidden, residual = (x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])) for x in (hidden, residual))
        close(f"hidden {step}", hidden, arrays[f"step{step}_hidden"][:1])
        close(f"residual {step}", residual, arrays[f"step{step}_residual"][:1])
        total.append(str(kept.shape[1]))
    return f"{arrays['hidden'].shape[1]} -> {' -> '.join(total)} tokens, CLS in the middle; first item of the batch"


@case("ssm_scan_")
def ssm_scan(arrays: Arrays, folder: Path) -> str:
    """The scan over all tokens, over kept ones only, and with the hidden state carried over removed ones."""
    u, delta, a, b, c, d, bias = (tensor(arrays, name) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    kept = tensor(arrays, "keep").long().expand(len(u), -1)
    worst = []
    for name, state, index, aligned in (
        ("y_full", "last_full", None, False),
        ("y_compact", "last_compact", kept, False),
        ("y_zeroinput_at_kept", "last_zeroinput", kept, True),
    ):
        y, last = ssm_keep.scan(u, delta, a, b, c, d, bias, index, aligned=aligned)
        worst += [close(name, y, arrays[name]), close(state, last, arrays[state])]
    return f"outputs and last states, {kept.shape[1]} of {u.shape[-1]} tokens; within {max(worst):.1g}"
