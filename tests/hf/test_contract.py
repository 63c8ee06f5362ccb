"""What the seam takes for granted in transformers, a sentence each: an upgrade shall fail here and not in a logit."""

from __future__ import annotations

import inspect
from typing import Any

import families
import pytest
import torch
from transformers import AttentionInterface, DynamicCache, GenerationMixin, StaticCache, cache_utils

from vtprune import cache as kv

every_family = pytest.mark.parametrize("family", families.NAMES)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def seen(module: torch.nn.Module, run: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """(args, kwargs) of every call of a module during run()."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        run()
    hook.remove()
    return calls


@every_family
def test_the_five_public_handles(family: str) -> None:
    model = families.model(family)
    assert model.base_model is not model, "model.base_model must be the multimodal model without its LM head"
    text = model.get_decoder()
    assert isinstance(text.layers, torch.nn.ModuleList), "get_decoder() must return the text model, with .layers"
    assert isinstance(text.norm, torch.nn.Module), "the text model must have a final .norm"
    tower = model.get_encoder(modality="image")
    assert any(tower is m for m in model.modules()), 'get_encoder(modality="image") must return a submodule'
    assert isinstance(model.config.image_token_id, int), "config.image_token_id must name the image placeholder"
    if families.FAMILIES[family].video:
        assert isinstance(model.config.video_token_id, int), "config.video_token_id must name the video placeholder"
    embedding = model.base_model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding), "base_model.get_input_embeddings() must be the token embedding"


@every_family
def test_features_come_after_the_projector(family: str) -> None:
    """get_*_features(...).pooler_output holds one entry of LLM-sized features per image, tile, frame or video."""
    model, batch = families.model(family), families.inputs(family, rows=(2,))
    name = "get_video_features" if families.FAMILIES[family].video else "get_image_features"
    function = getattr(model.base_model, name, None)
    assert function is not None, f"base_model.{name} must exist: features are observed there"
    with torch.no_grad():
        pixels = next(v for k, v in batch.items() if k.startswith("pixel_values"))
        rest = [k for k in parameters(function)[1:] if k in batch and not k.startswith("pixel_values")]
        out = function(pixels, **{k: batch[k] for k in rest})
    entries = [entry.reshape(-1, entry.shape[-1]) for entry in out.pooler_output]
    assert {e.shape[-1] for e in entries} == {families.WIDTH}, "pooler_output must be projected to the LLM's width"
    wanted = sum(len(unit) for unit in batch.units[0])
    newlines = len(batch.units[0])  # LLaVA-OneVision up to 5.17 appends a video's newline after encoding
    assert sum(len(e) for e in entries) in (wanted, wanted - newlines), "one feature per placeholder"


@every_family
def test_what_the_text_model_receives(family: str) -> None:
    model, batch = families.model(family), families.inputs(family)
    (call,) = seen(model.get_decoder(), lambda: model(**batch, use_cache=True))
    args, kwargs = call
    assert not args, "base_model must call the text model by keyword, so that a pre-hook can replace arguments"
    needed = {"inputs_embeds", "attention_mask", "position_ids", kv.NAME}
    assert needed <= set(kwargs), f"the text model must receive {sorted(needed)}"
    embeds = kwargs["inputs_embeds"]
    assert embeds.shape == (*batch["input_ids"].shape, families.WIDTH), "features must be inside inputs_embeds already"
    if "deepstack_visual_embeds" in kwargs and kwargs["deepstack_visual_embeds"] is not None:
        mask = kwargs["visual_pos_masks"]
        rows = {len(d) for d in kwargs["deepstack_visual_embeds"]}
        assert rows == {int(mask.sum())}, "deepstack features must be rows for the True positions of visual_pos_masks"


@every_family
def test_what_a_decoder_layer_receives(family: str) -> None:
    model, batch = families.model(family), families.inputs(family)
    text = model.get_decoder()
    out: list[Any] = []
    hook = text.layers[1].register_forward_hook(lambda m, a, o: out.append(o))
    (call,) = seen(text.layers[1], lambda: model(**batch, use_cache=True))
    hook.remove()
    args, kwargs = call
    assert len(args) <= 1, "only hidden_states may be positional in a decoder layer's call"
    needed = {"attention_mask", "position_embeddings", kv.NAME}
    assert needed <= set(kwargs), f"decoder layers must receive {sorted(needed)} by keyword"
    cos = kwargs["position_embeddings"][0]
    assert cos.shape[-2] == batch["input_ids"].shape[1], "rotary embeddings must have the sequence in dimension -2"
    assert torch.is_tensor(out[0]), "a decoder layer must return its hidden states as a bare tensor"


def test_cache_layers_answer_about_length() -> None:
    for layer in (cache_utils.DynamicLayer, cache_utils.StaticLayer, cache_utils.DynamicSlidingWindowLayer):
        assert "query_length" in parameters(layer.get_mask_sizes), (
            f"{layer.__name__}.get_mask_sizes(query_length) must exist: pruned layers answer through it"
        )
        for name in ("get_seq_length", "update", "reset", "reorder_cache"):
            assert callable(getattr(layer, name, None)), (
                f"{layer.__name__}.{name} must exist: pruned layers override it"
            )
    for name in ("batch_repeat_interleave", "batch_select_indices"):
        assert callable(getattr(cache_utils.DynamicLayer, name, None)), f"DynamicLayer.{name} must exist"


def test_dynamic_layers_size_masks_by_their_own_length() -> None:
    """Known to count twice if one is overridden without the other; vtprune.cache relies on exactly this."""

    class Longer(cache_utils.DynamicLayer):
        def get_seq_length(self) -> int:
            return super().get_seq_length() + 7

    layer = Longer()
    layer.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
    assert layer.get_mask_sizes(1) == (13, 0), "DynamicLayer.get_mask_sizes must build on get_seq_length()"


def test_caches_are_lists_of_layers() -> None:
    text = families.model("llava").config.get_text_config()
    for cache in (DynamicCache(config=text), StaticCache(text, max_cache_len=8)):
        assert isinstance(cache.layers, list), "cache.layers must be a list whose entries can be replaced"
    assert StaticCache(text, max_cache_len=8).layers[0].is_compileable, "static layers are told by .is_compileable"
    sliding: Any = StaticCache(families.model("gemma3").config.get_text_config(), max_cache_len=8).layers
    assert [layer.is_sliding for layer in sliding] == [True, False] * 2, "sliding layers are told by .is_sliding"


def test_attention_functions_can_be_registered() -> None:
    needed = ["module", "query", "key", "value", "attention_mask"]
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert parameters(sdpa_attention_forward)[:5] == needed, "attention functions take (module, q, k, v, mask, ...)"
    assert callable(AttentionInterface.register), "AttentionInterface.register must exist: signals are read there"
    layer = families.model("llava").get_decoder().layers[0]
    assert hasattr(layer.self_attn.config, "_attn_implementation"), (
        "an attention module must look its function up through its own config._attn_implementation"
    )


@pytest.mark.parametrize("family", families.IMAGES)
def test_generate_encodes_before_prefill_or_passes_pixels(family: str) -> None:
    """The prefill of generate carries pixels or `mm_encoder_outputs`; decode steps carry neither."""
    model, batch = families.model(family), families.inputs(family)
    calls = seen(model.base_model, lambda: model.generate(**batch, max_new_tokens=3, do_sample=False))
    given = [
        any(k.startswith("pixel_values") and v is not None for k, v in kwargs.items())
        or bool(kwargs.get("mm_encoder_outputs"))
        for _, kwargs in calls
    ]
    lengths = [(args[0] if args else kwargs["input_ids"]).shape[1] for args, kwargs in calls]
    assert lengths == [batch["input_ids"].shape[1], 1, 1], "one prefill over the whole prompt, then one token a step"
    assert given[0], "the prefill must carry pixel_values or mm_encoder_outputs"


def test_generate_asks_the_cache_how_long_the_conversation_is() -> None:
    source = inspect.getsource(GenerationMixin._prefill)
    assert "get_seq_length" in source, "generate must slice a second turn by cache.get_seq_length()"


@every_family
def test_positions_count_axes_only_with_mrope(family: str) -> None:
    model = families.model(family)
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    assert ("mrope_section" in rope) == families.FAMILIES[family].mrope, (
        "config.rope_parameters['mrope_section'] must tell multi-axis positions"
    )
    if families.FAMILIES[family].mrope:
        assert callable(model.base_model.get_rope_index), "M-RoPE families must offer base_model.get_rope_index"


def test_layer_types_tell_which_layers_attend_to_everything() -> None:
    kinds = {
        name: set(families.model(name).config.get_text_config().layer_types or []) for name in ("gemma3", "qwen3_5")
    }
    assert kinds["gemma3"] == {"sliding_attention", "full_attention"}, "config.layer_types must name sliding layers"
    assert kinds["qwen3_5"] == {"linear_attention", "full_attention"}, "config.layer_types must name linear layers"
