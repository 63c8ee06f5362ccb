"""What can be told of a model before anything of it is run: `vtprune inspect`.

Config and processor are read, weights never: the model is built on the meta device, which holds shapes alone. The
document, which `--json` prints behind its schema, "vtprune.inspect/1", and the version of vtprune:

    model               as it was named; class, model_type as its config says
    prunable, reason    false with one sentence where there is nothing to prune, or it cannot be done exactly
    family              status: "tested", "same shape", "refused" or "unknown"; note; tested: one sentence;
                        tower: {"image": bool, "video": bool}, whether the vision tower's signals can be read
    attention           the implementation in {"llm", "tower"}
    layers              the decoder's, by kind: {"full_attention": 28}
    input               kind ("image" or "video"), width, height, frames; visual_tokens, text_tokens;
                        units: [{"tokens", "grids": [[t, h, w], ...]}]; null without a processor
    gain                upper bounds, see `bound`; dense: {"llm_flops", "vision_flops", "kv_bytes"}, and
                        at: [{"keep", "visual_tokens", the same three, "llm_gain", "prefill_gain", "kv_gain"}]
    methods             [{"name", "seam", "takes": bool, "reason", "note"}], the reason where it is refused
    notes               what could not be told, and why

All but model, class, model_type, prunable, reason, family and notes are null where nothing is pruned;
numbers that nobody knows are null as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch

import vtprune
from vtprune import registry
from vtprune.core.cost import text_cost
from vtprune.core.method import budget
from vtprune.evals import models
from vtprune.evals.costs import vision_flops
from vtprune.evals.video import Video
from vtprune.model_adapters import families
from vtprune.model_adapters.base import Adapter
from vtprune.types import VtpruneError

KEEPS = (0.25, 0.11)
PROMPT = "What does it show?"
BOUND = (
    "an upper bound: a rule before the LLM that costs nothing itself, its prompt read once; a rule inside the LLM "
    "gains less, and one in the vision tower may also save a part of the vision side"
)
TESTED = {
    "tested": "every method against an oracle, on tiny random weights; no real checkpoint was run",
    "same shape": "nothing was run: its code in transformers calls its parts as a tested family does",
    "refused": "only that it is refused",
    "unknown": "nothing",
}


def inspect(name: str, seen: Any, prompt: str | None = None) -> dict[str, Any]:
    """The document on a folder or hub id. seen: the picture or `Video` that is asked about.

    Raises ValueError where no config can be read, or a model that takes no videos is asked about one.
    """
    config = models.config_of(name)
    kind = getattr(config, "model_type", None) or "unknown"
    known = next((k for k in families() if k.model_type == kind), None)
    document: dict[str, Any] = {
        "model": name, "class": _class_of(config), "model_type": kind,
        "prunable": False, "reason": None,
        "family": {
            "status": known.status if known else "unknown", "note": known.note if known else None,
            "tested": TESTED[known.status if known else "unknown"], "tower": {"image": False, "video": False},
        },
        "attention": None, "layers": None, "input": None, "gain": None, "methods": None, "notes": [],
    }  # fmt: skip
    if known is None or known.status == "refused":
        document["reason"] = _reason(name, config, document["class"], None if known is None else known.note)
        return document
    model = models.on_meta(config)
    adapter = Adapter(model)
    document["prunable"] = True
    for modality in adapter.token_ids:
        document["family"]["tower"][modality] = adapter.family.layout(adapter.base, modality) is not None  # type: ignore[arg-type]
    vision = getattr(config, "vision_config", None)
    document["attention"] = {"llm": adapter.attention(), "tower": getattr(vision, "_attn_implementation", None)}
    document["layers"] = dict(Counter(adapter.layer_types))
    document["methods"] = _methods(model, isinstance(seen, Video))
    try:
        processor = models.processor_of(name)
    except ValueError as error:
        document["notes"].append(f"Visual tokens are not counted. {error}")
        return document
    if isinstance(seen, Video):
        models.check_videos(name, processor)
    document["input"], inputs = _asked(adapter, processor, seen, prompt or PROMPT, document["notes"])
    document["gain"] = _gain(model, inputs, document["input"], document["notes"])
    return document


def _class_of(config: Any) -> str:
    return (getattr(config, "architectures", None) or [type(config).__name__])[0]


def _reason(name: str, config: Any, cls: str, note: str | None) -> str:
    """Why nothing of this model is pruned, in one sentence."""
    if note is not None:
        return f"{name} ({cls}) cannot be pruned: {note}"
    if all(getattr(config, part, None) is None for part in ("vision_config", "image_size", "num_channels")):
        return f"{name} ({cls}) is a text-only model: its config names nothing visual, so there is nothing to prune"
    if getattr(config, "vision_config", None) is None:
        return (
            f"{name} ({cls}) is no vision-language model; the blocks of a plain vision transformer are pruned by "
            'vtprune.patch(model, "tome", keep=0.5), which says whether it knows them'
        )
    tested = ", ".join(known.model_type for known in families() if known.status == "tested")
    return f"{name} ({cls}) is of no family that vtprune knows; tested families: {tested}"


def _methods(model: Any, video: bool) -> list[dict[str, Any]]:
    """Every registered method, and why this model cannot take it: each is patched in and taken off again."""
    found = []
    for cls in registry.methods():
        line: dict[str, Any] = {"name": cls.name, "seam": cls.seam, "takes": True, "reason": None, "note": None}
        found.append(line)
        if missing := registry.required(cls):
            line["note"] = f"not tried, as it needs options: {', '.join(missing)}"
            continue
        if cls.video and not video:
            line["note"] = "compares frames, so a still image leaves it little to go by"
        rule = cls()
        try:
            vtprune.patch(model, rule, keep=None if rule.adaptive else 0.25).remove()
        except (VtpruneError, ValueError) as error:
            line.update(takes=False, reason=str(error))
    return found


def _asked(adapter: Adapter, processor: Any, seen: Any, prompt: str, notes: list[str]) -> tuple[Any, dict[str, Any]]:
    """What the processor makes of the picture or clip, and the tokens of it."""
    from vtprune.evals.accuracy.exam import process

    inputs = dict(process(processor, [prompt], [seen]))
    kinds = adapter.token_kinds(inputs)
    if kinds is None:
        raise ValueError(f"{adapter.model_type}: the processor made no visual tokens, so there is nothing to count")
    told: dict[str, Any] = {"kind": "image", "frames": None}
    if isinstance(seen, Video):
        told = {"kind": "video", "frames": len(seen.frames)}
    told["width"], told["height"] = seen.frames.shape[2:0:-1] if told["frames"] else seen.size
    features = {modality: _features(adapter, modality, inputs) for modality in adapter.given(inputs)}
    units: list[dict[str, Any]] = []
    for unit in adapter.units(kinds, features):
        spans = unit.spans or (adapter.family.image_spans(adapter.base, unit.n) if unit.modality == "image" else ())
        units.append({"tokens": unit.n, "grids": [list(span.grid) for span in spans]})
    if not all(unit["grids"] for unit in units):
        notes.append("The grid of its visual tokens is known only once the model has run.")
    visual = sum(unit["tokens"] for unit in units)
    length = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else kinds.shape[1]
    return told | {"visual_tokens": visual, "text_tokens": length - visual, "units": units}, inputs


def _features(adapter: Adapter, modality: str, inputs: dict[str, Any]) -> Any:
    """Sizes and grids of the images or videos: as the call tells them, else as the encoder does on the meta device."""
    told = adapter.brought(modality, inputs, None)
    encode = getattr(adapter.base, f"get_{modality}_features")
    if told is not None:
        return told
    try:
        takes = signature(encode).parameters
        out = encode(**{k: v for k, v in _without_data(inputs).items() if k in takes}, return_dict=True)
        return adapter.observe(modality, inputs, out, [])
    except (RuntimeError, NotImplementedError, TypeError):  # it looks at values, which meta tensors have not
        return None


def _without_data(inputs: dict[str, Any]) -> dict[str, Any]:
    """Pixels as shapes alone; grids and ids keep their values."""
    return {k: v.to("meta") if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


def _gain(model: Any, inputs: dict[str, Any], asked: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
    """FLOPs and bytes of a dense prefill and of pruned ones, whose ratio no method exceeds."""
    dtype = getattr(model, "dtype", None) or torch.bfloat16
    text = text_cost(model.config.get_text_config(), torch.finfo(dtype).bits // 8)
    if text is None:
        notes.append("FLOPs are not counted: experts, or layers without attention, have no cost model here.")
        return None
    vision: int | None
    try:
        vision = vision_flops(model, _without_data(inputs))
    except (RuntimeError, NotImplementedError, TypeError):
        vision = None
        notes.append("FLOPs of its vision side cannot be counted without running it, so those of the LLM stand alone.")

    def costs(units: Sequence[int]) -> dict[str, Any]:
        length = asked["text_tokens"] + sum(units)
        return {"llm_flops": text.prefill(length), "vision_flops": vision, "kv_bytes": text.kv_bytes(length)}

    sizes = [unit["tokens"] for unit in asked["units"]]
    dense, at = costs(sizes), []
    for keep in KEEPS:
        left = [budget(keep, n) for n in sizes]
        now = costs(left)
        both = None if vision is None else (dense["llm_flops"] + vision) / (now["llm_flops"] + vision)
        at.append({
            "keep": keep, "visual_tokens": sum(left), **now, "llm_gain": dense["llm_flops"] / now["llm_flops"],
            "prefill_gain": both, "kv_gain": dense["kv_bytes"] / now["kv_bytes"],
        })  # fmt: skip
    return {"bound": BOUND, "dense": dense, "at": at}


def in_words(document: dict[str, Any]) -> list[str]:
    """The document as lines to read."""
    name, family = document["model"], document["family"]
    if not document["prunable"]:
        return [document["reason"]]
    kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in document["layers"].items())
    towers = [modality for modality, readable in family["tower"].items() if readable]
    lines = [
        f"{Path(name).name}: {document['class']} ({document['model_type']})",
        f"family     {family['status']}: {family['tested']}",
        f"           {family['note']}; signals of the vision tower are read for: {', '.join(towers) or 'nothing'}",
        f"attention  {document['attention']['llm']} in the LLM ({kinds} layers), "
        f"{document['attention']['tower']} in the vision tower",
    ]
    if document["input"] is not None:
        lines.append(f"input      {_input_in_words(document['input'])}")
    if document["gain"] is not None:
        lines.append(f"gain       {document['gain']['bound']}")
        lines += [f"           {_gain_in_words(line)}" for line in document["gain"]["at"]]
    takes = [m["name"] + "*" * (m["note"] is not None) for m in document["methods"] if m["takes"]]
    lines.append(f"methods    takes {len(takes)}: {', '.join(takes)}")
    notes: dict[str, list[str]] = {}
    for m in document["methods"]:
        if m["note"] is not None and m["takes"]:
            notes.setdefault(m["note"], []).append(m["name"])
    lines += [f"           * {', '.join(names)}: {note}" for note, names in notes.items()]
    lines += [f"           refuses {m['name']}: {m['reason']}" for m in document["methods"] if not m["takes"]]
    return lines + [f"note       {note}" for note in document["notes"]]


def _input_in_words(asked: dict[str, Any]) -> str:
    size = f"{asked['width']} x {asked['height']} pixels"
    what = f"an image of {size}" if asked["frames"] is None else f"a clip of {asked['frames']} frames of {size}"
    grids = Counter(" x ".join(map(str, g[g[0] == 1 :])) for unit in asked["units"] for g in unit["grids"])
    shown = ", ".join(f"{n} grids of {grid}" if n > 1 else f"a grid of {grid}" for grid, n in grids.items())
    where = f" in {shown}" if shown else ""
    return f"{what}: {asked['visual_tokens']} visual tokens{where}, beside {asked['text_tokens']} of text"


def _gain_in_words(line: dict[str, Any]) -> str:
    whole = "" if line["prefill_gain"] is None else f", with the vision side {line['prefill_gain']:.2f} times"
    return (
        f"keep {line['keep']} ({line['visual_tokens']} visual tokens): FLOPs of the LLM's prefill "
        f"{line['llm_gain']:.2f} times fewer at most{whole}; keys and values {line['kv_gain']:.2f} times"
    )
