"""What HoliTom's segments and its reduction cost on one core: `python -m vtprune.evals.speed.bench_video [--json]`.

The rival of the segments is the published form: windows counted in a [T, T, P] tensor, and a programme that compares
one cell after the other, each a tensor. The reduction stands beside the prefill it makes smaller.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from vtprune.evals.speed.meter import best_in_turns, one_thread
from vtprune.methods.shared.segments import Segment, cut, run_lengths, still_places
from vtprune.registry import create
from vtprune.types import Visual

# The LLM of LLaVA-OneVision 0.5B (Qwen2 0.5B).
TEXT: dict[str, Any] = {
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 8, "max_position_embeddings": 32768,
}  # fmt: skip
LAYERS, WORDS = 24, 60


def clip(t: int, p: int, d: int, scene: int = 16) -> Tensor:
    """[T, P, D] features of a made-up video: still scenes with noise, in which a third of the places flickers."""
    g = torch.Generator().manual_seed(0)
    scenes = torch.randn(-(-t // scene), p, d, generator=g)
    x = scenes[torch.arange(t) // scene] + 0.3 * torch.randn(t, p, d, generator=g)
    x[:, ::3] = torch.randn(t, len(range(0, p, 3)), d, generator=g)
    return x


def rival(same: Tensor) -> list[Segment]:
    """Segments from same [T - 1, P] bool, cell by cell."""
    t = len(same) + 1
    still = torch.zeros(t, t, same.shape[1])
    for a in range(t - 1):
        still[a, a + 1 :] = same[a:].float().cumprod(0)
    saved = still.sum(-1) * (torch.arange(t) - torch.arange(t)[:, None]).clamp(min=0)
    best, width = torch.zeros(t + 1), [1] * t
    for i in range(t):
        best[i + 1] = best[i]
        for w in range(2, i + 2):
            total = best[i + 1 - w] + saved[i + 1 - w, i]
            if total > best[i + 1]:
                best[i + 1], width[i] = total, w
    segments, last = [], t - 1
    while last >= 0:
        segments.append((last - width[last] + 1, last))
        last -= width[last]
    return segments[::-1]


def segmentation(t: int = 256, p: int = 196, repeats: int = 5) -> dict[str, Any]:
    """CPU seconds of both forms on one thread, best of `repeats` taken in turns."""
    unit = torch.nn.functional.normalize(clip(t, p, 16), dim=-1)
    same = (unit[1:] * unit[:-1]).sum(-1) > 0.8
    with one_thread():
        forms = [lambda: torch.tensor(cut(still_places(run_lengths(same)))), lambda: torch.tensor(rival(same))]
        (ours, theirs), found = best_in_turns(forms, repeats)
    row: dict[str, Any] = {"frames": t, "places": p, "segments": len(found[0]), "threads": 1, "repeats": repeats}
    row |= {"seconds": ours, "rival_seconds": theirs, "speedup": theirs / ours}
    return row | {"same_segments": torch.equal(*found)}


def reduction(t: int = 64, p: int = 196, d: int = 896, keep: float = 0.15, repeats: int = 3) -> dict[str, Any]:
    """CPU seconds of `holitom` from features to merged features, and of the dense prefill, on one thread.

    The prefill is that of one layer of the LLM on all T * P tokens and 60 words, times 24; embeddings, final norm and
    output head are left out, so the share is an upper limit.
    """
    x = clip(t, p, d).flatten(0, 1)
    method = create("holitom")
    seen = torch.rand(t * p, generator=torch.Generator().manual_seed(1))
    v = Visual(x, round(keep * t * p), grid=(t, 1, p), video=True, signals=dict.fromkeys(method.needs, seen))
    with one_thread(), torch.inference_mode():
        (whole,), _ = best_in_turns([lambda: method(v).apply(x)], repeats)
        layer = _layer_seconds(t * p + WORDS)
    row: dict[str, Any] = {
        "frames": t,
        "places": p,
        "d": d,
        "keep": keep,
        "dtype": "float32",
        "threads": 1,
        "repeats": repeats,
    }
    row |= {"seconds": whole, "layer_seconds": layer, "prefill_seconds": LAYERS * layer}
    return row | {"share": whole / (LAYERS * layer)}


def _layer_seconds(n: int) -> float:
    """CPU seconds of one layer of the LLM on n tokens; once, after a short run."""
    from transformers import Qwen2Config, Qwen2Model

    model = Qwen2Model(Qwen2Config(**TEXT, num_hidden_layers=1)).eval()
    x = torch.randn(1, n, TEXT["hidden_size"], generator=torch.Generator().manual_seed(2))
    model(inputs_embeds=x[:, :64], use_cache=False)
    start = time.thread_time()
    model(inputs_embeds=x, use_cache=False)
    return time.thread_time() - start


def main() -> None:
    """Print both measurements."""
    from vtprune.evals.report import environment, one_line

    parser = argparse.ArgumentParser(prog="python -m vtprune.evals.speed.bench_video", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of sentences")
    options = parser.parse_args()
    found = {"segmentation": segmentation(), "reduction": reduction()}
    where = environment("cpu", "float32", 1, cpu_threads=1)
    if options.json:
        print(json.dumps({"environment": where, **found}, indent=1))
        return
    print(one_line(where))
    cuts, whole = found["segmentation"], found["reduction"]
    print(
        f"segments of {cuts['frames']} frames of {cuts['places']}: {1e3 * cuts['seconds']:.1f} ms against "
        f"{1e3 * cuts['rival_seconds']:.1f} ms cell by cell, {cuts['speedup']:.0f} times faster; same "
        f"{cuts['segments']} segments: {'yes' if cuts['same_segments'] else 'NO'}"
    )
    print(
        f"holitom of {whole['frames']} x {whole['places']} x {whole['d']} at {whole['keep']}: "
        f"{1e3 * whole['seconds']:.0f} ms, {whole['share']:.2%} of the dense prefill, {whole['prefill_seconds']:.0f} s "
        f"(one layer of {whole['layer_seconds']:.1f} s, times {LAYERS})"
    )


if __name__ == "__main__":
    main()
