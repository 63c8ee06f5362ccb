"""The tap: what it reads equals an eager run, and the tapped model cannot tell that it is there."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
)

from vtprune.tap import attach, read
from vtprune.types import UnsupportedCall, UnsupportedModel

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def clip(implementation: str = "sdpa") -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SMALL, image_size=20, patch_size=4)
    model = CLIPVisionModel._from_config(config, attn_implementation=implementation).eval()
    return _peaked(model)


def llama(implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=1, head_dim=16, vocab_size=64)
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()
    return _peaked(model)


@torch.no_grad()
def _peaked(model: nn.Module) -> nn.Module:
    """Larger weights, so that attention is far from uniform."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
    return model


def tower_attention(model: nn.Module) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.endswith("self_attn")]


def pixels(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 20, 20, generator=torch.Generator().manual_seed(3))


def prompt() -> dict[str, torch.Tensor]:
    """Two rows, the second left-padded by three."""
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Collected(list):
    """A sink that keeps one kind of signal."""

    def __init__(self, kind: str, **options) -> None:
        super().__init__()
        self.kind, self.options = kind, options

    def __call__(self, module, q, k, v, mask, scaling) -> None:
        self.append(read(self.kind, q, k, v, mask, scaling, **self.options))


def never(*_) -> None:
    raise AssertionError("an undone sink was called")


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_cls_and_received_equal_the_eager_matrix(implementation, layer):
    matrix = clip("eager")(pixels(), output_attentions=True).attentions[layer]  # [B, H, N, N]
    model = clip(implementation)
    cls, received, blocked = Collected("cls"), Collected("received"), Collected("received", block=7)
    for sink in (cls, received, blocked):
        attach(tower_attention(model)[layer], sink)
    with torch.no_grad():
        model(pixels())
    torch.testing.assert_close(cls[0], matrix.mean(1)[:, 0, 1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(received[0], matrix.mean((1, 2)), atol=1e-6, rtol=0)
    torch.testing.assert_close(blocked[0], received[0], atol=1e-6, rtol=0)


def test_keys_and_values_are_the_projections_with_heads_side_by_side():
    model = clip()
    attention = tower_attention(model)[1]
    keys, values, entering = Collected("keys"), Collected("values"), []
    attach(attention, keys)
    attach(attention, values)
    attention.register_forward_pre_hook(lambda m, a, k: entering.append(k.get("hidden_states", *a)), with_kwargs=True)
    with torch.no_grad():
        model(pixels())
        torch.testing.assert_close(keys[0], attention.k_proj(entering[0]))
        torch.testing.assert_close(values[0], attention.v_proj(entering[0]))


def test_the_wide_cls_row_and_mean_keys_equal_the_projections():
    """One head of 32 channels in place of two of 16; the scale follows."""
    model = clip()
    attention = tower_attention(model)[2]
    wide, mean, entering = Collected("cls_full"), Collected("mean_keys"), []
    attach(attention, wide)
    attach(attention, mean)
    attention.register_forward_pre_hook(lambda m, a, k: entering.append(k.get("hidden_states", *a)), with_kwargs=True)
    with torch.no_grad():
        model(pixels())
        q, k = attention.q_proj(entering[0]).double(), attention.k_proj(entering[0]).double()
    expected = torch.stack([torch.softmax(k[b] @ q[b, 0] / 32**0.5, 0)[1:] for b in range(2)]).float()
    torch.testing.assert_close(wide[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(mean[0], ((k[..., :16] + k[..., 16:]) / 2).float(), atol=1e-6, rtol=0)


def test_the_wide_cls_row_keeps_to_the_mask():
    q, k, v = torch.randn(3, 2, 2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    seen = torch.arange(6) < torch.tensor([[6], [4]])
    row = read("cls_full", q, k, v, seen[:, None, None], 0.5)
    short = read("cls_full", q[1:, :, :4], k[1:, :, :4], v, None, 0.5)
    torch.testing.assert_close(row[1:, :3], short)
    assert (row[1, 3:] == 0).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_last_row_equals_the_eager_matrix_with_grouped_heads_and_left_padding(implementation):
    matrix = llama("eager")(**prompt(), output_attentions=True).attentions[1]
    model, rows = llama(implementation), Collected("last_row")
    attach(model.model.layers[1].self_attn, rows)
    with torch.no_grad():
        model(**prompt())
        model(prompt()["input_ids"])  # no padding: sdpa then runs without a mask
    torch.testing.assert_close(rows[0], matrix.mean(1)[:, -1], atol=1e-6, rtol=0)
    assert (rows[0][1, :3] == 0).all()
    unpadded = llama("eager")(prompt()["input_ids"], output_attentions=True).attentions[1]
    torch.testing.assert_close(rows[1], unpadded.mean(1)[:, -1], atol=1e-6, rtol=0)


def test_last_row_ignores_the_empty_part_of_a_static_cache():
    model, rows = llama(), Collected("last_row")
    attach(model.model.layers[1].self_attn, rows)
    ids = prompt()["input_ids"]
    with torch.no_grad():
        model(ids)
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    length = ids.shape[1]
    torch.testing.assert_close(rows[1][:, :length], rows[0], atol=1e-6, rtol=0)
    assert (rows[1][:, length:] == 0).all()


def test_padding_neither_gives_nor_receives():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 10, 4).unbind(0)
    real = torch.arange(10) < torch.tensor([[10], [6], [3]])
    for mask in (
        real[:, None, None].expand(-1, 1, 10, -1),
        real[:, None, None],
        torch.zeros(3, 1, 10, 10).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min),
    ):
        got = read("received", q, k, v, mask, 0.5)
        for b, n in enumerate((10, 6, 3)):
            alone = (q[b, :, :n] @ k[b, :, :n].mT * 0.5).softmax(-1).mean((0, 1))
            torch.testing.assert_close(got[b, :n], alone)
            assert (got[b, n:] == 0).all()


def test_unknown_kind_lists_the_known_ones():
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="received"):
        read("entropy", x, x, x, None, 1.0)


# --- what the model notices: nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("make", "inputs"), [(clip, lambda: {"pixel_values": pixels()}), (llama, prompt)])
def test_outputs_are_bit_identical_and_the_config_comes_back(make, inputs, implementation):
    model = make(implementation)
    with torch.no_grad():
        before = model(**inputs(), output_hidden_states=True).hidden_states
        attention = tower_attention(model)
        configs = [m.config for m in attention]
        undo = [attach(m, Collected("received")) for m in attention]
        tapped = model(**inputs(), output_hidden_states=True).hidden_states
        for back in undo:
            back()
        after = model(**inputs(), output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(before, tapped, after))
    assert all(m.config is config for m, config in zip(attention, configs))
    assert not any(hasattr(config, "vtprune_probe") for config in configs)


def test_only_one_module_is_touched():
    model = clip()
    first, second, _ = tower_attention(model)
    undo = attach(second, Collected("cls"))
    assert first.config is not second.config
    assert first.config._attn_implementation == model.config._attn_implementation == "sdpa"
    undo()
    assert first.config is second.config


def test_sub_configs_are_left_alone():
    module = tower_attention(clip())[0]
    config = LlavaConfig()
    config._attn_implementation = "sdpa"
    module.config = config
    attach(module, never)
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nested_taps_are_undone_in_any_order(order):
    model = clip()
    module = tower_attention(model)[1]
    config = module.config
    sinks = [Collected("cls"), Collected("received"), Collected("keys")]
    undo = [attach(module, sink) for sink in sinks]
    for calls, last in enumerate(order, start=1):
        with torch.no_grad():
            model(pixels())
        assert all(len(sinks[i]) == calls for i in order[calls - 1 :])
        undo[last]()
        undo[last]()  # a second undo does nothing
    assert module.config is config
    with torch.no_grad():
        model(pixels())
    assert [len(sinks[i]) for i in order] == [1, 2, 3]


def test_the_same_sink_twice_is_two_taps():
    model, sink = clip(), Collected("cls")
    module = tower_attention(model)[0]
    undo, _ = attach(module, sink), attach(module, sink)
    undo()
    with torch.no_grad():
        model(pixels())
    assert len(sink) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_and_checkpointing(reentrant):
    def gradients(tap: bool) -> list[torch.Tensor]:
        model = llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        seen = Collected("values")
        if tap:
            attach(model.model.layers[1].self_attn, seen)
        model(**prompt(), labels=prompt()["input_ids"], use_cache=False).loss.backward()
        assert not any(v.requires_grad for v in seen)
        assert len(seen) == 2 * tap  # forward, and its recomputation in backward
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True)))


def test_a_copied_model_can_be_tapped_and_runs():
    model, sink = clip(), Collected("cls")
    undo = attach(tower_attention(model)[1], sink)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(pixels()).last_hidden_state, model(pixels()).last_hidden_state)
        undo()
        assert torch.equal(twin(pixels()).last_hidden_state, model(pixels()).last_hidden_state)
    assert len(sink) == 1  # the twin reports to a sink of its own


def test_threads_share_a_tapped_module():
    model, inputs = clip(), [torch.randn(1, 3, 20, 20) for _ in range(6)]
    rows: dict[int, list[torch.Tensor]] = {}

    def sink(module, q, k, v, mask, scaling) -> None:
        rows.setdefault(threading.get_ident(), []).append(read("cls", q, k, v, mask, scaling))

    attach(tower_attention(model)[1], sink)
    with torch.no_grad():
        expected = [model(x).last_hidden_state for x in inputs]
    outputs: list[torch.Tensor | None] = [None] * len(inputs)

    @torch.no_grad()
    def work(i: int) -> None:
        outputs[i] = model(inputs[i]).last_hidden_state

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
    assert sum(map(len, rows.values())) == 2 * len(inputs)


def test_a_tapped_layer_compiles_without_a_graph_break():
    model, rows = llama(), []

    def sink(module, q, k, v, mask, scaling) -> None:
        if q.shape[2] > 1:
            rows.append(read("last_row", q, k, v, mask, scaling))

    attach(model.model.layers[1].self_attn, sink)
    with torch.no_grad():
        expected = model(**prompt()).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**prompt()).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(rows) == 2


class _NoSquare(TorchDispatchMode):
    """Fails on any tensor with two dimensions of at least `limit`."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.seen = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.seen += 1
                assert sum(n >= self.limit for n in x.shape) < 2, f"{func} made {tuple(x.shape)}"
        return out


def test_received_forms_no_square_matrix():
    n = 200
    q, k = torch.randn(2, 1, 2, n, 4).unbind(0)
    with _NoSquare(n) as watch:
        got = read("received", q, k, k, None, 0.5, block=16)
    assert watch.seen > n // 16
    torch.testing.assert_close(got, (q @ k.mT * 0.5).softmax(-1).mean((1, 2)))


# --- flash attention, without a GPU: the same interface, its two habits -----------------------------------------------


def _reference_flash(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Looks its kernel up by the config's name, and takes packed sequences by their boundaries."""
    assert module.config._attn_implementation == "reference_flash_attention_2"
    cuts = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(cuts, 2) for x in (query, key, value)))
    out = [nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in parts]
    return torch.cat(out, 2).transpose(1, 2), None


@pytest.fixture
def flash():
    AttentionInterface.register("reference_flash_attention_2", _reference_flash)
    yield "reference_flash_attention_2"
    for name in [n for n in AttentionInterface._global_mapping if n.startswith("reference_flash")]:
        del AttentionInterface._global_mapping[name]


def test_flash_is_still_recognised_and_finds_its_own_name(flash):
    from transformers.utils.generic import is_flash_attention_requested

    model, rows = clip(), Collected("cls")
    with torch.no_grad():
        plain = model(pixels()).last_hidden_state
    for module in tower_attention(model):
        module.config._attn_implementation = flash
    module = tower_attention(model)[1]
    attach(module, rows)
    assert is_flash_attention_requested(module.config)
    assert is_flash_attention_requested(module.config, version=2)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()).last_hidden_state, plain)
    assert rows[0].shape == (2, 25)


def test_flash_segments_are_shown_one_by_one(flash):
    module = tower_attention(clip())[0]
    module.config._attn_implementation = flash
    received = Collected("received")
    attach(module, received)
    with torch.no_grad():
        module(torch.randn(1, 9, 32), cu_seq_lens_q=torch.tensor([0, 4, 9]))
    assert [r.shape for r in received] == [(1, 4), (1, 5)]
    torch.testing.assert_close(torch.stack([r.sum() for r in received]), torch.ones(2))


def test_flash_padding_mask_and_window(flash):
    module = tower_attention(clip())[0]
    module.config._attn_implementation = flash
    rows = Collected("last_row")
    attach(module, rows)
    real = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        module(torch.randn(1, 5, 32), attention_mask=real)
        assert (rows[0][:, :2] == 0).all()
        assert torch.allclose(rows[0].sum(-1), torch.ones(1))
        with pytest.raises(UnsupportedCall, match="window of 4"):
            module(torch.randn(1, 5, 32), sliding_window=4)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_modules_without_the_interface_are_refused():
    siglip = SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=20, patch_size=4))
    head = next(m for m in siglip.modules() if isinstance(m, nn.MultiheadAttention))
    mlp = next(m for name, m in siglip.named_modules() if name.endswith("mlp"))
    for module in (head, mlp, nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModel, match=type(module).__name__):
            attach(module, never)


def test_switching_the_implementation_while_tapped_is_refused():
    model = clip()
    attach(tower_attention(model)[1], Collected("cls"))
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedCall, match="'sdpa' to 'eager'"):
        model(pixels())


def test_soft_capped_logits_and_block_masks_are_refused():
    module = tower_attention(clip("eager"))[0]
    attach(module, never)
    with pytest.raises(UnsupportedModel, match="softcap"):
        module(torch.randn(1, 5, 32), softcap=30.0)

    class BlockMask:
        def __radd__(self, other: torch.Tensor) -> torch.Tensor:
            return other

    with pytest.raises(UnsupportedCall, match="BlockMask"):
        module(torch.randn(1, 5, 32), attention_mask=BlockMask())


def test_import_stays_light():
    code = "import sys, vtprune.tap; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("additive", [False, True])
def test_the_mean_query_of_images_that_share_a_row(additive: bool) -> None:
    """Two images and padding in one row, kept apart by a mask: each as if alone, times its share of the queries."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 9, 8, generator=g), torch.randn(2, 2, 9, 8, generator=g)
    seen = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    for a, b in ((0, 3), (3, 7)):  # the last two are padding
        seen[:, :, a:b, a:b] = True
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    whole = read("mean_query", q, k, k, mask, 0.3)
    for a, b in ((0, 3), (3, 7)):
        alone = read("mean_query", q[:, :, a:b], k[:, :, a:b], k, None, 0.3)
        torch.testing.assert_close(whole[:, a:b], alone * (b - a) / 7)
    assert whole[:, 7:].abs().max() == 0
    padded = seen.any(2, keepdim=True).expand_as(seen)  # one image: padding alone
    torch.testing.assert_close(
        read("mean_query", q, k, k, padded, 0.3)[:, :7],
        read("mean_query", q[:, :, :7], k[:, :, :7], k, None, 0.3),
    )
