"""Nothing of a call survives it, however it ended: state, memory, caches, and the patch while calls run."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor, nn

import vtprune
from vtprune import UnsupportedCall, VtpruneError
from vtprune import cache as kv

METHODS = ["divprune", "visionzip", "average_pool", "fastv", "pyramiddrop", "spatten", "dycoke_kv", "lazyllm", "todre"]
patch: Any = vtprune.patch


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def places(model: Any) -> dict[str, nn.Module]:
    tower = next(m for name, m in model.named_modules() if name.endswith(("vision_tower", "visual")))
    return {
        "tower": [m for m in tower.modules() if isinstance(m, nn.Linear)][3],
        "projector": [m for m in tower.modules() if isinstance(m, nn.Linear)][-1],
        "first layer": model.get_decoder().layers[0],
        "layer": model.get_decoder().layers[2].mlp,
        "last layer": model.get_decoder().layers[-1],
        "norm": model.get_decoder().norm,
    }


def interrupt(module: nn.Module, error: type[BaseException], call: Callable[[], Any]) -> None:
    """Run a call that ends in this module."""

    def stop(*_: Any) -> None:
        raise error

    hook = module.register_forward_hook(stop)
    try:
        with pytest.raises(error):
            call()
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["tower", "projector", "first layer", "layer", "last layer", "norm"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_next_call_starts_clean(family: str, place: str, error: type[BaseException]) -> None:
    """Text of the same length, embeddings into the text model alone, an image: as on a fresh patched model."""
    model, batch = families.model(family), families.inputs(family)
    length = batch["input_ids"].shape[1]
    text = families.build(family, [[families.Piece([families.BOS]), families.text(3, length - 1)]])
    embeds = model.get_input_embeddings()(text["input_ids"])
    for method in ("divprune", "fastv", "dycoke_kv"):
        with patch(model, method, keep=0.4):
            right = [m.logits for m in (model(**text), model(**batch))]
            alone = model.get_decoder()(inputs_embeds=embeds)[0]
            for call in (model, model.generate):
                for i, ask in enumerate([text, batch]):
                    interrupt(places(model)[place], error, lambda call=call: call(**batch))
                    assert torch.equal(model(**ask).logits, right[i])
                interrupt(places(model)[place], error, lambda call=call: call(**batch))
                assert torch.equal(model.get_decoder()(inputs_embeds=embeds)[0], alone)


@pytest.mark.parametrize("where", ["decode", "encode"])
def test_an_interrupt_outside_the_prompt(where: str) -> None:
    """While features are encoded by hand, and at a decode step with stages of its own."""
    model, batch = families.model("llava"), families.inputs("llava")
    for method in ("visionzip", "dycoke_kv", "lazyllm"):
        with patch(model, method, keep=0.4):
            right = reference.greedy(model, batch, 4)[1]
            if where == "encode":
                call = lambda: model.get_image_features(pixel_values=batch["pixel_values"])  # noqa: E731
                interrupt(places(model)["tower"], KeyboardInterrupt, call)
            else:
                cache = model(**batch, use_cache=True).past_key_values
                word = {"input_ids": torch.tensor([[40]]), kv.NAME: cache}
                interrupt(places(model)["layer"], KeyboardInterrupt, lambda word=word: model(**word))
            assert torch.equal(reference.greedy(model, batch, 4)[1], right)


@pytest.mark.parametrize("place", ["layer", "norm"])
def test_an_unpatched_model_still_refuses_the_cache(place: str) -> None:
    batch = families.inputs("llava", rows=(1, 2))
    model, word = families.model("llava"), torch.tensor([[40], [41]])
    with patch(model, "fastv", keep=0.4):
        cache = model(**batch, use_cache=True).past_key_values
        for call in (model, lambda **call: model.get_decoder()(inputs_embeds=model.get_input_embeddings()(word))):
            interrupt(places(model)[place], KeyboardInterrupt, lambda call=call: call(**batch))
    with pytest.raises(UnsupportedCall, match="patched model"):
        model(input_ids=word, **{kv.NAME: cache})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["first layer", "layer", "last layer", "norm"])
@pytest.mark.parametrize("turn", ["prompt", "second prompt", "step"])
def test_a_cache_of_an_interrupted_call_is_as_before(method: str, place: str, turn: str) -> None:
    model, batch = families.model("llava"), families.inputs("llava")
    with patch(model, method, keep=0.4):
        from transformers import DynamicCache

        cache = DynamicCache()
        call: dict[str, Any] = dict(batch)
        if turn != "prompt":
            model(**batch, use_cache=True, **{kv.NAME: cache})
        if turn == "step":
            for word in (40, 41, 47):
                model(input_ids=torch.tensor([[word]]), **{kv.NAME: cache})
            call = {"input_ids": torch.tensor([[43]])}
            if method not in ("dycoke_kv", "lazyllm"):
                return  # an ordinary decode step, which transformers leaves as it is
        else:
            call.pop("attention_mask")
        before, length = copy.deepcopy(cache), cache.get_seq_length()
        interrupt(places(model)[place], KeyboardInterrupt, lambda: model(**call, use_cache=True, **{kv.NAME: cache}))
        assert cache.get_seq_length() == length
        for ask in (call, {"input_ids": torch.tensor([[52]])}):
            said = [model(**ask, use_cache=True, **{kv.NAME: c}).logits for c in (cache, before)]
            assert torch.equal(*said)


def wide_tensors(root: Any, least: int) -> list[Tensor]:
    """Tensors with a feature dimension that can be reached from an object, modules left out."""
    found, seen, todo = [], set(), [root]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, nn.Module | type) or (callable(x) and hasattr(x, "__code__")):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            found += [x] if x.dim() > 1 and x.shape[-1] >= least and x.is_floating_point() else []
            continue
        todo += [r for r in gc.get_referents(x) if not isinstance(r, str | int | float | bytes)]
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_only_indices_outlive_a_call(family: str) -> None:
    """Neither pixels nor features nor signals are kept, after a call, an encoding alone or an interrupt."""
    model = families.fresh(family)
    gc.freeze()  # what other tests hold is not looked at in each of the collections below
    stage = vtprune.Stage(("vit", 2), vtprune.create("random"), keep=0.6)
    for method in (
        "visionzip",
        "recoverable",
        "token_correlation",
        "hiprune",
        "fastv",
        "sparsevlm",
        "dycoke_kv",
        stage,
    ):
        options = {} if method is stage else {"keep": 0.4}
        try:
            handle = patch(model, method, **options)
        except (vtprune.UnsupportedModel, ValueError):
            continue
        for how in ("call", "encode", "interrupt"):
            batch = families.inputs(family, seed=len(how))
            pixels = batch["pixel_values"].clone()
            call = {**batch, "pixel_values": pixels}
            if how == "call":
                model(**call)
            elif how == "encode":
                rest = {k: v for k, v in call.items() if k in ("pixel_values", "image_grid_thw", "image_sizes")}
                model.get_image_features(**rest)
                del rest
            else:
                interrupt(places(model)["layer"], KeyboardInterrupt, lambda call=call: model(**call))
            dead = weakref.ref(pixels)
            del pixels, call, batch
            gc.collect()
            assert dead() is None, (method, how)
            session = handle._session
            kept = [handle.last, session.local.__dict__, list(session.encoded._known.values())]
            assert not wide_tensors(kept, 8), (method, how)
        handle.remove()


@pytest.mark.parametrize("method", ["divprune", "visionzip", "fastv", "lazyllm"])
def test_a_removed_handle_holds_no_model(method: str) -> None:
    model = families.fresh("llava")
    handle = patch(model, method, keep=0.4)
    model(**families.inputs("llava"))
    kept = handle.last.units[0].idx
    handle.remove()
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert handle.last.units[0].idx is kept
    assert not handle.active
    assert "removed" in repr(handle)
    handle.remove()


@pytest.mark.parametrize("method", ["divprune", "visionzip", "fastv", "dycoke_kv"])
def test_removal_waits_for_calls_of_other_threads(method: str) -> None:
    """Each of them answers as the patched or as the unpatched model, whole."""
    model, batch = families.fresh("llava"), families.inputs("llava")
    dense = reference.greedy(model, batch, 4)[0]
    for _ in range(3):
        handle = patch(model, method, keep=2)
        pruned = reference.greedy(model, batch, 4)[0]
        answers: list[Tensor] = []
        errors: list[BaseException] = []
        stop, begun = threading.Event(), threading.Barrier(4)

        def work(stop: Any = stop, begun: Any = begun, answers: Any = answers, errors: Any = errors) -> None:
            begun.wait()
            try:
                with torch.no_grad():
                    while not stop.is_set():
                        answers.append(reference.greedy(model, batch, 4)[0])
                        model(**batch)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait()
        while len(answers) < 2 and not errors:
            pass
        handle.remove()
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors
        assert all(torch.equal(a, dense) or torch.equal(a, pruned) for a in answers)
        assert torch.equal(reference.greedy(model, batch, 4)[0], dense)


def test_removal_inside_a_call_is_refused() -> None:
    model, batch = families.fresh("llava"), families.inputs("llava")
    handle = patch(model, "fastv", keep=0.4)
    right = model(**batch).logits
    hook = model.get_decoder().layers[1].register_forward_hook(lambda *_: handle.remove())
    with pytest.raises(VtpruneError, match="inside a call"):
        model(**batch)
    hook.remove()
    assert torch.equal(model(**batch).logits, right)
    handle.remove()
