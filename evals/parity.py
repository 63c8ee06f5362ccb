"""Compare our methods with stored outputs of the official codes: `python -m vtprune.evals.parity DIRECTORY`.

Every `*.npz` file of the directory is one case; the part of its name before the first match in the table below says
which method it belongs to. A method's case is a function marked `@case("prefix")`: it gets the arrays, runs our
method on the stored inputs and compares with the stored outputs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..registry import create
from ..types import Assignment, Signal, Span, Visual

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

Arrays = Mapping[str, Any]
Runner = Callable[[Arrays, Path], str]
TOLERANCE = 1e-4
INPUTS = ("model_",)  # files that cases read, no cases themselves
_runners: dict[str, Runner] = {}


class Mismatch(Exception):
    """Our result differs from the stored one; the message says where."""


@dataclass(frozen=True)
class Row:
    """One file: status is "passed", "failed" or "unknown"; detail says what was compared or what differs."""

    case: str
    status: str
    detail: str
    seconds: float


def case(prefix: str) -> Callable[[Runner], Runner]:
    """Run the decorated function on files that start with `prefix`; it returns a summary or raises `Mismatch`."""

    def add(runner: Runner) -> Runner:
        if prefix in _runners:
            raise ValueError(f"@case({prefix!r}): the prefix is taken by {_runners[prefix].__name__}")
        _runners[prefix] = runner
        return runner

    return add


def same(what: str, ours: Tensor, stored: Any) -> None:
    """Raise `Mismatch` unless two index sequences are equal, order included."""
    a, b = ours.tolist(), np.asarray(stored).tolist()
    if a != b:
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        raise Mismatch(
            f"{what}: {len(a)} against {len(b)} stored; at {at} ours {a[at : at + 3]}, stored {b[at : at + 3]}"
        )


def close(what: str, ours: Tensor, stored: Any) -> float:
    """Largest absolute difference; `Mismatch` if it exceeds the tolerance."""
    expected = torch.as_tensor(np.asarray(stored))
    if ours.shape != expected.shape:
        raise Mismatch(f"{what}: shape {tuple(ours.shape)} against {tuple(expected.shape)} stored")
    worst = float((ours.float() - expected.float()).abs().max())
    if not worst <= TOLERANCE:
        raise Mismatch(f"{what}: differs by {worst:.2g}, allowed {TOLERANCE:g}")
    return worst


@case("divprune_")
def divprune(arrays: Arrays, folder: Path) -> str:
    """Picks in order.

    The official code does not mask picked tokens, so repeated rows can come out twice: from the first repeat on, the
    rule is only that our picks are distinct; with repeated rows that is also checked with nothing dropped.
    """
    x = torch.from_numpy(arrays["features"])
    method = create("divprune")
    budgets = arrays["budgets"].tolist()
    cut = 0
    for k in budgets:
        ours = _ordered(method(Visual(x, k)))
        official = arrays[f"order_{k}"]
        distinct = _before_repeat(official)
        same(f"order at {k}", ours[:distinct], official[:distinct])
        if len(set(ours.tolist())) != k:
            raise Mismatch(f"order at {k}: {len(set(ours.tolist()))} distinct tokens")
        if distinct == k:
            same(f"kept at {k}", ours.sort().values, arrays[f"kept_{k}"])
        cut += distinct < k
    rule = f"; {cut} compared up to the first repeated official pick" if cut else ""
    if "duplicate_rows" in arrays:
        if len(set(_ordered(method(Visual(x, x.shape[0]))).tolist())) != x.shape[0]:
            raise Mismatch(f"a token is picked twice when all {x.shape[0]} are asked for")
        rule += f"; all {x.shape[0]} distinct despite {len(arrays['duplicate_rows'])} equal rows"
    return f"picks and order at {_list(budgets)} of {x.shape[0]}{rule}"


def _before_repeat(picks: np.ndarray) -> int:
    """Length of the longest start of `picks` without a repeated index."""
    repeats = np.setdiff1d(np.arange(len(picks)), np.unique(picks, return_index=True)[1])
    return int(repeats[0]) if len(repeats) else len(picks)


@case("todre_spec_")
def todre(arrays: Arrays, folder: Path) -> str:
    """Pivot and picks in order, both objectives; the pivot is looked for among the thumbnail's tokens."""
    x = torch.from_numpy(arrays["features"])
    n, thumbnail = x.shape[0], int(arrays["thumbnail_tokens"])
    parts = [(0, thumbnail), (thumbnail, n)] if thumbnail < n else [(0, n)]
    spans = tuple(Span(start, (1, 1, stop - start)) for start, stop in parts)
    signals = {Signal("cls", -1): torch.from_numpy(arrays["cls_attention"])}
    for objective in ("maxsum", "kcenter"):
        method = create("todre", objective=objective)
        for k in arrays["budgets"].tolist():
            answer = method(Visual(x, k, spans=spans, signals=signals))
            same(f"{objective} pivot", _ordered(answer)[:1], arrays["pivot"].reshape(1))
            same(f"{objective} order at {k}", _ordered(answer), arrays[f"order_{objective}_k{k}"])
            same(f"{objective} kept at {k}", answer.idx, arrays[f"keep_{objective}_k{k}"])
    return f"pivot, picks and order at {_list(arrays['budgets'].tolist())} of {n}, maxsum and kcenter"


@case("video_llava_pool")
def llava_pool(arrays: Arrays, folder: Path) -> str:
    """The two fixed-stride poolings of LLaVA's video models, features only."""
    x = torch.from_numpy(arrays["x"])
    frames, n, width = x.shape
    side = round(n**0.5)
    worst = []
    for mode in ("average", "bilinear"):
        answer = create("average_pool", mode=mode, stride=2)(
            Visual(x.reshape(-1, width), None, grid=(frames, side, side))
        )
        pooled = answer.apply(x.reshape(-1, width)).reshape(frames, -1, width)
        worst.append(close(mode, pooled, arrays[f"out_{mode}"]))
    return f"{frames} frames of {side}x{side}, average and bilinear: features within {max(worst):.1g}"


@case("fastv_prefill")
def fastv(arrays: Arrays, folder: Path) -> str:
    """The whole path: a stock LLaVA with the stored decoder weights, patched, one prefill."""
    model, inputs = _fastv_model(arrays, folder)
    full = close("unpruned states", _run(model, inputs).last_hidden_state[0], arrays["last_hidden_state_full"])
    worst, _ = _fastv_prefill(model, inputs, arrays)
    kept, length = len(arrays["kept_indices"]), inputs["input_ids"].shape[1]
    return f"stock LLaVA, {kept} of {length} tokens kept; scores and states within {max(full, worst):.1g}"


@case("fastv_kvcache_decode")
def fastv_decode(arrays: Arrays, folder: Path) -> str:
    """Prefill and one decode step on the returned cache: its lengths, the keys of layer K, the new token's states."""
    model, inputs = _fastv_model(arrays, folder)
    worst, cache = _fastv_prefill(model, inputs, arrays)
    stored = torch.tensor([layer.keys.shape[2] for layer in cache.layers])
    same("cached tokens per layer", stored, arrays["kv_lengths_after_prefill"])
    keys = close("keys of layer K", cache.layers[int(arrays["K"])].keys[0], arrays["keys_layer_K"])
    step = {"inputs_embeds": torch.from_numpy(arrays["decode_embed"])[None], "past_key_values": cache}
    state = close("decoded state", _run(model, step).last_hidden_state[0], arrays["decode_last_hidden_state"])
    return f"stock LLaVA, cache of {_list(stored.tolist())} tokens; all within {max(worst, keys, state):.1g}"


def _fastv_model(arrays: Arrays, folder: Path) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    visual = slice(int(arrays["sys_len"]), int(arrays["sys_len"]) + int(arrays["vis_len"]))
    return stock_llava(np.load(folder / "model_llama.npz"), torch.from_numpy(arrays["inputs_embeds"]), visual)


def _fastv_prefill(model: LlavaForConditionalGeneration, inputs: dict[str, Any], arrays: Arrays) -> tuple[float, Any]:
    """Largest difference of scores and states, and the cache; kept tokens must be equal."""
    from ..handle import patch

    with patch(model, "fastv", layer=int(arrays["K"]), keep=int(arrays["keep"])) as handle:
        out = _run(model, inputs)
        last = handle.last
    assert last is not None
    scores = last.units[0].scores
    assert scores is not None
    same("kept", last.index[0], arrays["kept_indices"])
    states = out.last_hidden_state[0, last.index[0]]
    differences = close("scores", scores, arrays["score_visual"]), close("states", states, arrays["last_hidden_state"])
    return max(differences), out.past_key_values


class Stored(torch.nn.Module):
    """Stands in for a projector: whatever the vision tower says, the visual tokens are the stored ones."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, _: Tensor) -> Tensor:
        features: Tensor = self.features  # type: ignore[assignment]
        return features


def stock_llava(
    weights: Arrays, embeds: Tensor, visual: slice
) -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    """A stock LLaVA whose decoder has stored LLaMA weights, and inputs that embed to embeds [L, D] exactly.

    The vocabulary rows are the text embeddings, one token each; the projector returns embeds[visual].
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    image = embeds[visual]
    text = torch.cat([embeds[: visual.start], embeds[visual.stop :]])
    image_token, side = text.shape[0], round(image.shape[0] ** 0.5)
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    decoder: dict[str, Any] = {
        "vocab_size": image_token + 1,
        "hidden_size": int(weights["hidden_size"]),
        "intermediate_size": int(weights["intermediate_size"]),
        "num_hidden_layers": int(weights["num_layers"]),
        "num_attention_heads": int(weights["num_heads"]),
        "num_key_value_heads": int(weights["num_kv_heads"]),
        "rms_norm_eps": float(weights["rms_norm_eps"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(weights["rope_theta"])},
    }
    whole: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**small, patch_size=1, image_size=side),
        "text_config": LlamaConfig(**decoder),
        "image_token_id": image_token,
        "vision_feature_layer": -1,
    }
    config = LlavaConfig(**whole)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.multi_modal_projector = Stored(image[None])
    vocabulary = torch.cat([text, torch.zeros(1, text.shape[1])])
    stored = {name: torch.from_numpy(weights[name]) for name in weights if weights[name].ndim}
    model.get_decoder().load_state_dict({"embed_tokens.weight": vocabulary, **stored})
    ids = torch.full((1, embeds.shape[0]), image_token)
    ids[0, : visual.start] = torch.arange(visual.start)
    ids[0, visual.stop :] = torch.arange(visual.start, image_token)
    return model, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, side, side)}


@torch.no_grad()
def _run(model: LlavaForConditionalGeneration, inputs: dict[str, Any]) -> Any:
    """Output of the base model, its hidden states after the final norm."""
    return model.model(**inputs, use_cache=True)


def _ordered(answer: Assignment) -> Tensor:
    assert answer.order is not None
    return answer.order


def _list(budgets: Sequence[int]) -> str:
    return "/".join(map(str, budgets))


def run(directory: Path, only: Sequence[str] = ()) -> list[Row]:
    """One row per file, by name; a case that raises is a failed case, not the end of the run."""
    rows = []
    for path in sorted(directory.glob("*.npz")):
        if path.name.startswith(INPUTS) or not path.name.startswith(tuple(only or ("",))):
            continue
        prefix = max((p for p in _runners if path.name.startswith(p)), key=len, default=None)
        if prefix is None:
            rows.append(Row(path.stem, "unknown", "no case for this prefix", 0.0))
            continue
        start = time.perf_counter()
        try:
            with np.load(path) as arrays:
                status, detail = "passed", _runners[prefix](arrays, directory)
        except Exception as error:  # whatever a method does wrong belongs into its row
            kind = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
            status, detail = "failed", f"{kind}{error}"
        rows.append(Row(path.stem, status, detail, time.perf_counter() - start))
    return rows


def show(rows: Sequence[Row]) -> None:
    """A table, one line per case."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = {"passed": "green", "failed": "red", "unknown": "yellow"}
    table = Table("case", "result", "compared", "seconds", title="Parity with stored outputs")
    for row in rows:
        mark = Text(row.status, style=colour[row.status])
        table.add_row(Text(row.case), mark, Text(row.detail), f"{row.seconds:.2f}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if at least one case ran and none failed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m vtprune.evals.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of *.npz files")
    parser.add_argument("--only", nargs="+", default=[], metavar="PREFIX", help="only files that start so")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    rows = run(options.directory, options.only)
    count = {status: sum(row.status == status for row in rows) for status in ("passed", "failed", "unknown")}
    if options.json:
        print(json.dumps({**count, "cases": [asdict(row) for row in rows]}, indent=1))
    else:
        show(rows)
        print(", ".join(f"{n} {status}" for status, n in count.items()))
    ran = count["passed"] + count["failed"]
    if not ran:
        known = ", ".join(sorted(_runners))
        print(f"no case ran in {options.directory}; known prefixes: {known}", file=sys.stderr)
    return 1 if count["failed"] or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
