"""Bad input gets an error that names the value, what is valid and the way out, and leaves the model as it was."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import families
import pytest
import reference
import torch
import transformers
from transformers import AutoConfig, StaticCache

import vtprune
from vtprune import Assignment, Stage, UnsupportedCall, UnsupportedModel, Visual
from vtprune import cache as kv
from vtprune.methods.in_llm.withdraw import Withdraw
from vtprune.types import Signal

ENCODES_FIRST = "mm_encoder_outputs" in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
RANGE = r"float in \(0, 1\].*int >= 1"


@pytest.fixture
def model() -> Iterator[Any]:
    """A tiny LLaVA that must come out of every test as it went in, even while still patched with keep=1.0."""
    model, batch = families.model("llava"), families.inputs("llava")
    with torch.no_grad():
        before = model(**batch).logits
        yield model
        vtprune.unpatch(model)
        assert torch.equal(model(**batch).logits, before)


@torch.no_grad()
def run(model: Any, **extra: Any) -> Any:
    return model(**{**families.inputs("llava"), **extra})


def still_works(model: Any, handle: vtprune.Handle) -> None:
    """After a refused call the next good call is pruned, and the one after removal is dense."""
    run(model)
    assert handle.last is not None
    handle.remove()


@pytest.mark.parametrize(
    ("keep", "error", "value"),
    [
        (0, ValueError, "keep=0 "),
        (0.0, ValueError, "keep=0.0 "),
        (1.5, ValueError, "keep=1.5 "),
        (-3, ValueError, "keep=-3 "),
        (-0.25, ValueError, "keep=-0.25 "),
        ("half", TypeError, "keep='half'"),
        (float("nan"), ValueError, "keep=nan "),
        (float("inf"), ValueError, "keep=inf "),
        (True, TypeError, "keep=True "),
    ],
)
def test_keep_outside_its_range(model: Any, keep: Any, error: type[Exception], value: str) -> None:
    with reference.untouched(model), pytest.raises(error, match=f"{value}.*{RANGE}"):
        vtprune.patch(model, "divprune", keep=keep)
    with pytest.raises(error, match=f"{value}.*{RANGE}"):
        Stage("llm", vtprune.create("divprune"), keep=keep)


def test_keep_missing(model: Any) -> None:
    with reference.untouched(model), pytest.raises(TypeError, match=r"divprune: keep is missing.*float.*int"):
        vtprune.patch(model, "divprune")


def test_more_tokens_than_there_are_keeps_all(model: Any) -> None:
    dense = run(model).logits
    with vtprune.patch(model, "divprune", keep=10_000):
        assert torch.equal(run(model).logits, dense)


def test_unknown_method_lists_the_names(model: Any) -> None:
    names = ".*".join(sorted(cls.name for cls in vtprune.methods()))
    with reference.untouched(model), pytest.raises(ValueError, match=f"'divprun'.*did you mean 'divprune'.*{names}"):
        vtprune.patch(model, "divprun", keep=0.5)


def test_unknown_option_lists_the_options(model: Any) -> None:
    with reference.untouched(model), pytest.raises(TypeError, match=r"todre has no option 'pivo'.*objective.*pivot"):
        vtprune.patch(model, "todre", keep=0.5, pivo="cls")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per": "tile"}, ValueError, "per='tile'.*'image'.*'frame'.*'sample'"),
        ({"positions": "new"}, ValueError, "positions='new'.*'keep'.*'compact'"),
    ],
)
def test_unknown_value_lists_the_values(model: Any, options: dict, error: type[Exception], message: str) -> None:
    with reference.untouched(model), pytest.raises(error, match=message):
        vtprune.patch(model, "uniform", keep=0.5, **options)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (3, TypeError, "3.*name.*divprune.*Method.*Stage"),
        ([], ValueError, "empty list.*at least one Stage"),
        (["divprune"], TypeError, "'divprune' is no Stage"),
    ],
)
def test_not_a_method(model: Any, method: Any, error: type[Exception], message: str) -> None:
    keep = None if isinstance(method, list) else 0.5
    with reference.untouched(model), pytest.raises(error, match=message):
        vtprune.patch(model, method, keep=keep)


def test_not_a_model() -> None:
    name: Any = "llava-hf/llava-1.5-7b-hf"
    with pytest.raises(TypeError, match=r"str.*pass the loaded Hugging Face model"):
        vtprune.patch(name, "divprune", keep=0.5)


def test_unsupported_model_is_named_and_families_listed() -> None:
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text_only = transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small))
    with reference.untouched(text_only), pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM.*llava.*qwen2_5_vl"):
        vtprune.patch(text_only, "divprune", keep=0.5)
    with pytest.raises(UnsupportedModel, match=r"Linear.*llava.*qwen2_5_vl"):
        vtprune.patch(torch.nn.Linear(2, 2), "divprune", keep=0.5)


def test_a_layer_that_does_not_exist(model: Any) -> None:
    fastv = vtprune.create("fastv")
    for layer in (4, -1):
        with reference.untouched(model), pytest.raises(ValueError, match=rf"layer {layer}.*0\.\.3"):
            vtprune.patch(model, Stage(layer, fastv, keep=0.5))
    with reference.untouched(model), pytest.raises(ValueError, match=r"'vision'.*'llm'"):
        vtprune.patch(model, Stage("vision", fastv, keep=0.5))


def test_a_stage_below_a_deepstack_layer_that_cannot_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.model("qwen3_vl")
    monkeypatch.delattr(type(model.get_decoder()), "_deepstack_process")
    with reference.untouched(model), pytest.raises(UnsupportedModel, match=r"layer 1.*use layer 2 or later"):
        vtprune.patch(model, Stage(1, vtprune.create("fastv"), keep=0.5))


def test_compact_positions_on_multi_axis_rope() -> None:
    model = families.model("qwen2_5_vl")
    with reference.untouched(model), pytest.raises(UnsupportedModel, match=r"compact.*'keep'"):
        vtprune.patch(model, "divprune", keep=0.5, positions="compact")


def test_patching_twice(model: Any) -> None:
    handle = vtprune.patch(model, "uniform", keep=0.5)
    first = run(model).logits
    with reference.untouched(model), pytest.raises(ValueError, match=r"already patched.*remove\(\).*unpatch.*add=True"):
        vtprune.patch(model, "divprune", keep=0.5)
    assert torch.equal(run(model).logits, first)
    with pytest.raises(ValueError, match=r"0\.\.3"):  # refused while adding: the first patch is put back
        vtprune.patch(model, Stage(9, vtprune.create("fastv"), keep=0.5), add=True)
    assert torch.equal(run(model).logits, first)
    still_works(model, handle)


def test_paged_cache(model: Any) -> None:
    class PagedCache:
        """Stands where continuous batching puts its own cache, which is no transformers.Cache."""

        def get_seq_length(self, layer: int = 0) -> int:
            return 0

    handle = vtprune.patch(model, "divprune", keep=0.5)
    with pytest.raises(UnsupportedCall, match=r"continuous batching.*PagedCache.*generate"):
        run(model, past_key_values=PagedCache())
    still_works(model, handle)


def test_paged_attention() -> None:
    model = families.fresh("llava")
    batch = families.inputs("llava")
    with torch.no_grad(), vtprune.patch(model, "divprune", keep=0.5):
        model.set_attn_implementation("paged|eager")
        with pytest.raises(UnsupportedCall, match=r"paged"):
            model(**batch)


@pytest.mark.skipif(not ENCODES_FIRST, reason="this transformers loses the image itself when it prefills in chunks")
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_chunked_prefill(model: Any, method: str) -> None:
    handle = vtprune.patch(model, method, keep=0.5)
    with pytest.raises(UnsupportedCall, match=r"prefill_chunk_size=None"):
        reference.greedy(model, families.inputs("llava"), 3, prefill_chunk_size=16)
    still_works(model, handle)


def test_static_cache_with_sliding_layers() -> None:
    model, batch = families.model("gemma3"), families.inputs("gemma3")
    with torch.no_grad():
        dense = model(**batch).logits
        with vtprune.patch(model, "divprune", keep=0.5):
            with pytest.raises(UnsupportedCall, match=r"static cache.*sliding.*DynamicCache"):
                reference.greedy(model, batch, 3, cache_implementation="static")
            cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
            with pytest.raises(UnsupportedCall, match=r"static cache.*sliding.*DynamicCache"):
                model(**batch, past_key_values=cache)
            model(**batch)
        assert torch.equal(model(**batch).logits, dense)


def test_unknown_sequence_length_argument(model: Any) -> None:
    handle = vtprune.patch(model, "divprune", keep=0.5)
    length = families.inputs("llava")["input_ids"].shape[1]
    with pytest.raises(UnsupportedCall, match=f"'per_layer_inputs'.*{length}.*llava"):
        run(model, per_layer_inputs=torch.zeros(1, length, 2, 4))
    still_works(model, handle)


@pytest.mark.skipif(not ENCODES_FIRST, reason="this transformers takes no encoded features")
def test_features_from_elsewhere_without_the_signal(model: Any) -> None:
    """todre with pivot="cls" reads the tower's CLS row; features encoded by somebody else carry none."""
    batch = families.inputs("llava")
    features = model.model.get_image_features(batch["pixel_values"])
    handle = vtprune.patch(model, "todre", keep=0.5, pivot="cls")
    without = {k: v for k, v in batch.items() if k != "pixel_values"}
    with torch.no_grad(), pytest.raises(UnsupportedCall, match=r"cls.*pre-encoded.*pixel_values"):
        model(**without, mm_encoder_outputs={"image": features})
    still_works(model, handle)


@pytest.mark.skipif(not ENCODES_FIRST, reason="this transformers takes no encoded features")
def test_features_from_elsewhere_are_fine_without_signals(model: Any) -> None:
    batch = families.inputs("llava")
    features = model.model.get_image_features(batch["pixel_values"])
    without = {k: v for k, v in batch.items() if k != "pixel_values"}
    with torch.no_grad(), vtprune.patch(model, "divprune", keep=0.5):
        assert torch.equal(model(**without, mm_encoder_outputs={"image": features}).logits, model(**batch).logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [cls.name for cls in vtprune.methods()])
def test_not_finite_features(model: Any, method: str, bad: float) -> None:
    """Broken pixels, or a tower that overflows, are said to be so, and not hidden by a selection."""
    pixels = families.inputs("llava")["pixel_values"].clone()
    pixels[0, 0, 3, 3] = bad
    handle = vtprune.patch(model, method, keep=0.5)
    steps = 1 if "prefill" in handle.stages[0].method.phases else 3
    with pytest.raises(ValueError, match=r"(features|scores|signals?|rows?|maps|attention).*NaN or Inf"):
        model.generate(**{**families.inputs("llava"), "pixel_values": pixels}, max_new_tokens=steps, do_sample=False)
    still_works(model, handle)


def test_no_image_at_all(model: Any) -> None:
    batch = families.inputs("llava", rows=(0, 0))
    with torch.no_grad():
        dense = model(**batch).logits
        with vtprune.patch(model, "divprune", keep=0.5) as handle:
            assert torch.equal(model(**batch).logits, dense)
            assert handle.last is None


class Broken(vtprune.Method):
    """Answers nonsense on demand."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, v: Visual) -> Assignment:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer(v)


@pytest.mark.parametrize("where", ["llm", 2])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (RuntimeError("out of ideas"), RuntimeError, "out of ideas"),
        (KeyError("k"), KeyError, "k"),
        (lambda v: None, vtprune.VtpruneError, "Broken.*Assignment"),
        (lambda v: Assignment(torch.arange(2)), vtprune.VtpruneError, "Broken kept 2 tokens of 25.*budget is 5"),
        (lambda v: Assignment(torch.zeros(5)), vtprune.VtpruneError, "Broken.*int64"),
    ],
)
def test_a_method_that_fails(model: Any, where: Any, answer: Any, error: type[Exception], message: str) -> None:
    """The error comes out, and the next call of the still patched model is not confused by what was left behind."""
    broken = Stage(where, Broken(answer), keep=5)
    words = families.inputs("llava", rows=(0,))
    dense = model(**words).logits
    handle = vtprune.patch(model, broken)
    with torch.no_grad(), pytest.raises(error, match=message):
        run(model)
    assert torch.equal(model(**words).logits, dense), "a text-only call right after the failure"
    with reference.untouched(model), pytest.raises(error, match=message):
        run(model)
    handle.remove()


@pytest.mark.parametrize(
    "answer",
    [
        lambda v: Assignment(torch.tensor([0, 1, 2, 3, 25])),
        lambda v: Assignment(torch.tensor([-1, 0, 1, 2, 3])),
        lambda v: Assignment(torch.tensor([0, 1, 2, 3, 3])),
        lambda v: Assignment(torch.tensor([4, 3, 2, 1, 0])),
    ],
    ids=("beyond the end", "negative", "twice", "not ascending"),
)
def test_an_answer_that_is_no_selection(model: Any, answer: Any) -> None:
    handle = vtprune.patch(model, Stage("llm", Broken(answer), keep=5))
    with pytest.raises(vtprune.VtpruneError, match=r"Broken"):
        run(model)
    handle.remove()


def merging(**change: Any) -> Any:
    """An answer that keeps the first tokens as they are, with parts of it changed; None leaves a part out."""

    def answer(v: Visual) -> Assignment:
        i = torch.arange(v.budget or v.n)
        parts = {"src": i, "dst": i, "w": torch.ones(len(i)), **{k: f(i, v) for k, f in change.items()}}
        return Assignment(i, **parts)

    return answer


def edited(part: str) -> Any:
    def answer(v: Visual) -> Assignment:
        {"x": v.x, "text": v.text, "signals": next(iter(v.signals.values()), v.x)}[part].mul_(2)
        return Assignment(torch.arange(v.budget or v.n))

    return answer


FAULTS = {
    "nan": (merging(w=lambda i, v: torch.full((len(i),), torch.nan)), "finite"),
    "inf": (merging(w=lambda i, v: torch.ones(len(i)).index_fill(0, i[1:2], torch.inf)), "finite"),
    "no weights": (merging(w=lambda i, v: None), "without w"),
    "no sources": (merging(src=lambda i, v: None), "without src"),
    "int weights": (merging(w=lambda i, v: torch.ones(len(i), dtype=torch.int64)), r"w=.*floating"),
    "float sources": (merging(src=lambda i, v: i.float()), r"src=.*int64"),
    "fewer sources": (merging(src=lambda i, v: i[1:]), r"dst="),
    "two-dimensional": (
        merging(src=lambda i, v: i[None], dst=lambda i, v: i[None], w=lambda i, v: i[None] * 1.0),
        "src=",
    ),
    "source beyond": (merging(src=lambda i, v: i + v.n - 2), r"src=.*within 0\.\."),
    "source below": (merging(src=lambda i, v: i - 1), r"src=.*within 0\.\."),
    "row beyond": (merging(dst=lambda i, v: i + 1), r"dst=.*within 0\.\."),
    "row without a source": (merging(dst=lambda i, v: i.clamp(min=1)), r"without \[0\]"),
    "scores": (merging(scores=lambda i, v: torch.zeros(len(i))), "scores="),
    "order of others": (merging(order=lambda i, v: i + 1), "no permutation"),
    "order twice": (merging(order=lambda i, v: i * 0), "no permutation"),
    "short order": (merging(order=lambda i, v: i[1:]), "order="),
    "device": (lambda v: Assignment(torch.arange(v.budget or v.n, device="meta")), "cpu"),
    "edited x": (edited("x"), r"changed v\.x"),
}


@pytest.mark.parametrize("where", ["llm", 2, ("vit", 2)], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_with_a_fault(model: Any, where: Any, fault: str) -> None:
    """The error names the method and the fault; model and cache are as they were."""
    answer, message = FAULTS[fault]
    right = run(model).logits
    cache = transformers.DynamicCache()
    with vtprune.patch(model, Stage(where, Broken(answer), keep=5)):
        with torch.no_grad(), pytest.raises(vtprune.VtpruneError, match=f"(?s)Broken.*{message}"):
            model(**families.inputs("llava"), use_cache=True, **{kv.NAME: cache})
        assert cache.get_seq_length() == 0
    assert torch.equal(run(model).logits, right)


@dataclasses.dataclass(frozen=True)
class AtDecode(vtprune.Method):
    """Answers nonsense at the second decode step."""

    answer: Any
    phases = ("decode",)
    per = "sample"

    @property
    def needs(self) -> Any:
        return (Signal("last_row", -1),)

    def __call__(self, v: Visual) -> Assignment:
        v.state["steps"] = v.state.get("steps", 0) + 1
        return self.answer(v) if v.state["steps"] == 2 else Assignment(torch.arange(v.budget or v.n))


@pytest.mark.parametrize("answer", [*(FAULTS[k][0] for k in ("scores", "order twice", "nan")), edited("signals")])
def test_an_answer_with_a_fault_at_decode(model: Any, answer: Any) -> None:
    """The step before it and the cache stand; with a right answer the step goes on as on a copy."""
    batch, words = families.inputs("llava"), torch.tensor([[40, 41]])
    with torch.no_grad(), vtprune.patch(model, Stage(2, AtDecode(answer), keep=5)):
        cache = model(**batch, use_cache=True).past_key_values
        model(input_ids=words[:, :1], **{kv.NAME: cache})
        length = cache.get_seq_length()
        for _ in range(2):  # its state is that before the step as well, so it fails again
            with pytest.raises(vtprune.VtpruneError, match="AtDecode"):
                model(input_ids=words[:, 1:], **{kv.NAME: cache})
            assert [cache.get_seq_length(i) for i in range(4)] == [length] * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("part", ["x", "text"])
def test_a_unit_that_was_changed_in_place(model: Any, mode: Any, part: str) -> None:
    stage, message = Stage("llm", Broken(edited(part)), keep=5), rf"Broken changed v\.{part}"
    with mode(), vtprune.patch(model, stage), pytest.raises(vtprune.VtpruneError, match=message):
        run(model)


def test_a_ragged_cache_in_an_unpatched_model(model: Any) -> None:
    """Rows that kept different counts need the patched model's mask: going on without it is refused, not wrong."""
    batch = families.inputs("llava", rows=(1, 2))
    with torch.no_grad(), vtprune.patch(model, "divprune", keep=0.5):
        cache = model(**batch, use_cache=True).past_key_values
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad(), pytest.raises(UnsupportedCall, match=r"patched model"):
        model(input_ids=torch.tensor([[40], [41]]), attention_mask=mask, past_key_values=cache)


def test_an_in_llm_method_below_the_layer_it_reads(model: Any) -> None:
    with reference.untouched(model), pytest.raises(ValueError, match=r"layer 0.*layer -1.*layer 1 or later"):
        vtprune.patch(model, Stage(0, vtprune.create("fastv"), keep=0.5))


def test_gradient_checkpointing_with_a_stage_inside_the_llm() -> None:
    model, batch = families.fresh("llava").train(), families.inputs("llava")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with vtprune.patch(model, "fastv", keep=0.5):
        with pytest.raises(UnsupportedCall, match=r"gradient checkpointing.*before the LLM"):
            model(**batch)
        model.gradient_checkpointing_disable()
        assert model(**batch).logits.isfinite().all()


IN_LLM = [cls.name for cls in vtprune.methods() if cls.seam == "in_llm"]
WITH_LAYERS = ["pyramiddrop", "transprune", "sparsevlm", "lazyllm", "spatten"]


@pytest.mark.parametrize("method", IN_LLM)
def test_any_in_llm_stage_outside_the_model(model: Any, method: str) -> None:
    for layer in (4, -1):
        with reference.untouched(model), pytest.raises(ValueError, match=rf"{method} at layer {layer}: .*0\.\.3"):
            vtprune.patch(model, Stage(layer, vtprune.create(method), keep=0.5))


@pytest.mark.parametrize("method", WITH_LAYERS)
def test_a_schedule_that_leaves_the_model(model: Any, method: str) -> None:
    """Layers meant for a deeper model are named, not wrapped around or left out."""
    with reference.untouched(model), pytest.raises(ValueError, match=rf"{method} at layer (9|10): .*0\.\.3"):
        vtprune.patch(model, method, keep=0.5, layers=(1, 2, 9))


@pytest.mark.parametrize("where", [1.0, True, None, "1"])
def test_a_place_that_is_none(model: Any, where: Any) -> None:
    """Not quietly never run."""
    with reference.untouched(model), pytest.raises(ValueError, match=rf"where={where!r}: choose 'llm'.*0\.\.3"):
        vtprune.patch(model, Stage(where, vtprune.create("fastv"), keep=0.5))


@pytest.mark.parametrize("method", WITH_LAYERS)
@pytest.mark.parametrize("layers", [(3, 2), (2, 2), (-1, 2)])
def test_layers_that_do_not_ascend(method: str, layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"layers=\({layers[0]}, {layers[1]}\).*ascending"):
        vtprune.create(method, layers=layers)


def test_stages_that_do_not_ascend(model: Any) -> None:
    stages = [Stage(layer, vtprune.create("fastv"), keep=0.5) for layer in (3, 1)]
    with reference.untouched(model), pytest.raises(ValueError, match=r"\[3, 1\] must stand in increasing order"):
        vtprune.patch(model, stages)


@pytest.mark.parametrize("method", ["pyramiddrop", "transprune", "lazyllm", "spatten"])
@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((0.5, 0.25, 0.0), r"ratios=\(0.5, 0.25, 0.0\).*floats in \(0, 1\]"),
        ((0.5, 0.25, -0.1), r"floats in \(0, 1\]"),
        ((1.5, 0.5, 0.2), r"floats in \(0, 1\]"),
        ((0.2, 0.4, 0.1), r"none above the one before"),
        ((0.5, 0.2), r"3 stages, give one share for each"),
        ((0.5, 0.2, float("nan")), r"floats in \(0, 1\]"),
    ],
)
def test_ratios_that_keep_nothing_or_grow(method: str, ratios: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtprune.create(method, ratios=ratios, layers=(1, 2, 3))


@pytest.mark.parametrize("method", IN_LLM)
def test_a_keep_that_keeps_nothing(model: Any, method: str) -> None:
    for keep in (0, 0.0):
        with reference.untouched(model), pytest.raises(ValueError, match=rf"keep={keep} .*{RANGE}"):
            vtprune.patch(model, method, keep=keep)


@pytest.mark.parametrize("stage", ["transprune", "sparsevlm", "withdraw"])
def test_a_prompt_without_text_behind_the_image(model: Any, stage: str) -> None:
    """Methods that ask the text take the last token, and say so."""
    batch = families.inputs("llava")
    end = batch.units[0][-1][-1] + 1
    short = {k: v[:, :end] if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
    method = Withdraw() if stage == "withdraw" else vtprune.create(stage)
    with torch.no_grad(), vtprune.patch(model, Stage(2, method, keep=None if stage == "withdraw" else 0.5)) as handle:
        assert model(**short).logits.isfinite().all()
        assert [n for n in handle.last.notes if "no text stands behind the image" in n]
        model(**batch)
        assert not [n for n in handle.last.notes if "no text" in n]


@torch.no_grad()
def cache_of(model: Any, method: str | None, batch: dict[str, Any], static: bool = False) -> Any:
    """The cache of a prompt that a model, patched or not, has read."""
    cache = StaticCache(model.config.get_text_config(), max_cache_len=80) if static else None
    if method is None:
        return model(**batch, use_cache=True, past_key_values=cache).past_key_values
    with vtprune.patch(model, method, keep=0.4):
        return model(**batch, use_cache=True, past_key_values=cache).past_key_values


@pytest.mark.parametrize("words", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_a_cache_pruned_inside_the_llm_in_an_unpatched_model(
    method: str, static: bool, attention: str, words: int
) -> None:
    """One mask cannot serve layers of several lengths: a static cache would even fit, and be wrong."""
    model, batch = families.model("llava", attention), families.inputs("llava")
    cache = cache_of(model, method, batch, static)
    with torch.no_grad(), pytest.raises(UnsupportedCall, match=r"rows or layers.*unpatched model.*new cache"):
        model(input_ids=torch.full((1, words), 40), past_key_values=cache)


@pytest.mark.parametrize("other", [("divprune", {}), ("fastv", {"layer": 3})])
def test_a_cache_pruned_inside_the_llm_under_another_patch(model: Any, other: tuple[str, dict[str, Any]]) -> None:
    cache = cache_of(model, "fastv", families.inputs("llava"))
    word: dict[str, Any] = {"input_ids": torch.tensor([[40]]), "past_key_values": cache}
    with vtprune.patch(model, other[0], keep=0.4, **other[1]), torch.no_grad():
        with pytest.raises(UnsupportedCall, match=r"layers where this patch has no stage: continue with the same"):
            model(**word)
        run(model)
    with vtprune.patch(model, "fastv", keep=0.4), torch.no_grad():
        model(**word)


@pytest.mark.parametrize("method", ["divprune", "fastv", "transprune"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_of_an_unpatched_model_in_a_patched_one(model: Any, method: str, static: bool) -> None:
    """What the cache holds stays whole; an image of a later turn is pruned as if the patch had always been there."""
    first = families.turn("llava", 1, seed=3)
    second = families.turn("llava", 1, seed=4, first=False)
    whole, new = families.build("llava", [[*first, *second]]), families.build("llava", [second])
    length = sum(len(piece.ids) for piece in first)
    new.update(input_ids=whole["input_ids"][:, length:], attention_mask=whole["attention_mask"])
    cache = cache_of(model, None, families.build("llava", [first]), static)
    stages = [replace(s, positions="keep") for s in vtprune.create(method).stages(0.4, 4)]
    stages, log = reference.spy(stages)
    with torch.no_grad(), vtprune.patch(model, stages):
        out = [model(**new, past_key_values=cache).logits[0, -1]]
        for word in (40, 41):
            out.append(model(input_ids=torch.tensor([[word]]), past_key_values=cache).logits[0, -1])
    cuts = reference.cuts_of_row(log, [0], [whole.units[0][1:]])[0]
    theirs = reference.masked_logits(model, whole, cuts, [40, 41])[-3:]
    torch.testing.assert_close(torch.stack(out), theirs, rtol=0, atol=1e-5)
