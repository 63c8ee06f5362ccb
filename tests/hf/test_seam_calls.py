"""Every way people call a model works on a patched one: generate in all its modes, training, threads, copies."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Stage, UnsupportedCall
from vtprune import cache as kv

TOLERANCE = 1e-5
patch: Any = vtprune.patch
# One selecting, one merging and one in-LLM method; a 1-D, an M-RoPE and a deepstack family.
some_methods = pytest.mark.parametrize("method", ["divprune", "average_pool", "fastv"])
some_families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
# Families whose text model counts positions 0, 1, 2, ... and reads causally.
PLAIN = [n for n, f in families.FAMILIES.items() if not f.mrope and f.types is None]
ROWS = (2, 0, 1)


@pytest.fixture
def words() -> families.Piece:
    return families.text(5, 6)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def oracle(family: str, log: list[reference.Call], tokens: Tensor, rows: tuple[int, ...], row: int) -> Tensor:
    units = [families.inputs(family, rows=rows, only=r).units[0] for r in range(len(rows))]
    cuts = reference.cuts_of_row(log, range(len(rows)), units)[row]
    model = families.model(family)
    compact = reference.renumbers(log)
    return reference.expected(model, family, rows, row, cuts, tokens, compact=compact)


@some_methods
@some_families
def test_sampling_and_several_answers(family: str, method: str) -> None:
    """Each of three sampled answers to each of two prompts has the oracle's logits for its own words."""
    model, rows = families.model(family), _rows_to_repeat(family)
    stages, log = reference.spy(vtprune.create(method).stages(0.5, families.depth(model)))
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4, "use_cache": True}
    with patch(model, stages):
        batch = families.inputs(family, rows=rows)
        out = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
        torch.manual_seed(0)
        again = model.generate(**batch, **options)
        torch.manual_seed(0)
        assert torch.equal(again, model.generate(**batch, **options))
    tokens, logits = out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1)
    assert len({tuple(t.tolist()) for t in tokens}) > 1
    for i in range(6):
        close(logits[i], oracle(family, _one_of_three(log[: len(stages)]), tokens[i], rows, i // 3))


def _rows_to_repeat(family: str) -> tuple[int, int]:
    """transformers 5.17 repeats the images of 1-D families one by one, which is right for one image a prompt only."""
    return (1, 2) if families.FAMILIES[family].mrope else (1, 1)


def _one_of_three(calls: list[reference.Call]) -> list[reference.Call]:
    """`generate` repeats each of the two rows three times in a row; the first holds one image."""
    each = len(calls[0].units) // 3
    picks = [0, *range(3, 2 + each)]
    return [reference.Call(c.stage, [c.units[i] for i in picks], [c.answers[i] for i in picks]) for c in calls]


@some_methods
@some_families
def test_beams(family: str, method: str) -> None:
    """Every best beam scores what the oracle gives its words, and is what beams without a cache find."""
    model, rows = families.model(family), _rows_to_repeat(family)
    batch = families.inputs(family, rows=rows)
    options = {"num_beams": 3, "max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True}
    stages, log = reference.spy(vtprune.create(method).stages(0.4, families.depth(model)))
    with patch(model, stages):
        cached = model.generate(**batch, **options, do_sample=False)
        plain = model.generate(**batch, **options, do_sample=False, use_cache=False)
    for row in range(2):
        words = cached.sequences[row, batch["input_ids"].shape[1] :]
        logits = oracle(family, _one_of_three(log[: len(stages)]), words, rows, row)
        score = logits.log_softmax(-1)[torch.arange(5), words].sum() / 5
        close(cached.sequences_scores[row], score)
    assert torch.equal(cached.sequences, plain.sequences)
    close(cached.sequences_scores, plain.sequences_scores)


@some_methods
@some_families
def test_static_cache_equals_dynamic(family: str, method: str) -> None:
    model, batch = families.model(family), families.inputs(family, rows=ROWS)
    with patch(model, method, keep=0.5):
        tokens, dynamic = reference.greedy(model, batch, 5)
        same, static = reference.greedy(model, batch, 5, cache_implementation="static")
    assert torch.equal(tokens, same)
    close(static, dynamic)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["uniform", "fastv"])
@pytest.mark.parametrize("family", [n for n in families.NAMES if not n.startswith("gemma3")])
def test_static_cache_where_only_the_cut_makes_padding(family: str, method: str, attention: str) -> None:
    """Rows of one length come without a mask; they keep different counts, before the LLM or inside."""
    model, image = families.model(family, attention), families.turn(family, 1, seed=3)
    words = [families.Piece([families.BOS]), families.text(8, sum(len(p.ids) for p in image) - 1)]
    with patch(model, method, keep=0.3):
        for batch in (families.build(family, [words, image]), families.inputs(family, rows=(1, 1))):
            tokens, dynamic = reference.greedy(model, batch, 3)
            same, static = reference.greedy(model, batch, 3, cache_implementation="static")
            assert torch.equal(tokens, same)
            close(static, dynamic)


@some_methods
@some_families
def test_a_row_that_keeps_all_it_has_is_the_longest(family: str, method: str) -> None:
    """The batch is as long as before, and still the other row stores other tokens than it was fed."""
    model, image = families.model(family), families.turn(family, 1, seed=3)
    words = [families.Piece([families.BOS]), families.text(8, sum(len(p.ids) for p in image) + 3)]
    batch, single = families.build(family, [words, image]), families.build(family, [image])
    stages, log = reference.spy(vtprune.create(method).stages(0.5, families.depth(model)))
    with patch(model, stages) as handle:
        tokens, ours = reference.greedy(model, batch, 4)
    assert handle.last.lengths[-1] == batch["input_ids"].shape[1]
    cuts = reference.cuts_of_row(log, [1], [[], single.units[0]])[0]
    full = reference.dense(model, single, tokens[1][:-1].tolist())
    close(ours[1], reference.pruned_logits(model, full, cuts)[-4:])
    close(ours[0], reference.greedy(model, families.build(family, [words]), 4)[1][0])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@some_methods
def test_compiled_decode_is_one_graph(family: str, method: str) -> None:
    """generate's own compiled decode step, fullgraph: no break, one graph for 6 steps and two prompts, same tokens."""
    from transformers.generation.configuration_utils import CompileConfig

    graphs = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    settings: Any = {"fullgraph": True, "dynamic": False, "backend": backend, "mode": None}
    config: Any = CompileConfig(**settings)
    config._compile_all_devices = True
    model, batch = families.fresh(family), families.inputs(family, rows=(1,))
    with patch(model, method, keep=0.5):
        tokens, logits = reference.greedy(model, batch, 7)
        options = {"cache_implementation": "static", "compile_config": config}
        for _ in range(2):
            same, compiled = reference.greedy(model, batch, 7, **options)
            assert torch.equal(tokens, same)
            close(compiled, logits)
    assert len(graphs) == 1
    torch._dynamo.reset()


SPECULATED = [
    "divprune", "average_pool", "recoverable", "fastv", "pyramiddrop", "sparsevlm", "spatten", "transprune",
    "aim_inllm", "todre", "flowcut", "holitom",
]  # fmt: skip


def _asked_again(family: str, method: str, words: families.Piece, **options: Any) -> None:
    """Greedy decoding and the same by another way: as many tokens, and the same visual tokens kept."""
    model = families.model(family)
    batch = families.build(family, [[*families.turn(family, 1), words, words]])  # the lookup finds repeated words
    with patch(model, method, keep=0.5) as handle:
        tokens, _ = reference.greedy(model, batch, 8)
        kept = [unit.idx for unit in handle.last.units]
        assert torch.equal(tokens, reference.greedy(model, batch, 8, **options)[0])
        again = [unit.idx for unit in handle.last.units]
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("method", SPECULATED)
@some_families
def test_prompt_lookup_equals_greedy(family: str, method: str, words: families.Piece) -> None:
    _asked_again(family, method, words, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("method", SPECULATED)
@some_families
def test_assisted_decoding_equals_greedy(family: str, method: str, words: families.Piece) -> None:
    """The assistant is the same model with noise on its weights, so that some of its guesses are wrong."""
    _asked_again(family, method, words, assistant_model=_noisy(family))


@pytest.mark.parametrize("method", SPECULATED)
def test_without_a_cache_every_step_keeps_what_the_prompt_says(method: str, words: families.Piece) -> None:
    _asked_again("llava", method, words, use_cache=False)


@cache
def _noisy(family: str) -> Any:
    torch.manual_seed(0)
    model = copy.deepcopy(families.model(family))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("method", ["dycoke_kv", "lazyllm"])
@pytest.mark.parametrize("turns", [1, 2])
def test_methods_that_choose_at_decode_refuse_guesses(method: str, turns: int, words: families.Piece) -> None:
    """Before anything is computed: neither the cache nor what the model says next has changed."""
    model = families.model("llava")
    batch = families.build("llava", [[*families.turn("llava", 1), words, words]])
    with patch(model, method, keep=0.5), torch.no_grad():
        right = reference.greedy(model, batch, 4)[0]
        call = dict(batch)
        if turns == 2:
            held = model(**batch, use_cache=True).past_key_values
            ids = torch.cat([batch["input_ids"], batch["input_ids"][:, -6:]], 1)
            call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), kv.NAME: held}
            other, length, word = copy.deepcopy(held), held.get_seq_length(), torch.tensor([[40]])
        with pytest.raises(UnsupportedCall, match=f"{method}.*prompt_lookup_num_tokens"):
            model.generate(**call, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        if turns == 2:
            assert held.get_seq_length() == length
            said = [model(input_ids=word, **{kv.NAME: c}).logits for c in (held, other)]
            assert torch.equal(*said)
        assert torch.equal(reference.greedy(model, batch, 4)[0], right)


def test_guesses_of_a_prompt_read_in_both_directions(words: families.Piece) -> None:
    """PaliGemma's prompt sees what is fed with it, so a stage inside the LLM would choose by the guess."""
    batch = families.build("paligemma", [[*families.turn("paligemma", 1), words, words]])
    model = families.model("paligemma")
    with patch(model, "fastv", keep=0.5), pytest.raises(UnsupportedCall, match=r"fastv.*both directions"):
        reference.greedy(model, batch, 8, prompt_lookup_num_tokens=3)


@some_methods
@some_families
def test_manual_loop_without_positions_or_mask(family: str, method: str) -> None:
    """The shortest loop people write: ids and cache only. The cache knows how long the conversation is."""
    model, batch = families.model(family), families.inputs(family)
    with patch(model, method, keep=0.5), torch.no_grad():
        tokens, logits = reference.greedy(model, batch, 5)
        call = {k: v for k, v in batch.items() if k != "attention_mask"}
        out = model(**call, use_cache=True)
        for step in range(5):
            close(out.logits[:, -1], logits[:, step])
            out = model(input_ids=tokens[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        assert out.past_key_values.get_seq_length() == batch["input_ids"].shape[1] + 5


@some_methods
@some_families
def test_no_cache_equals_cache(family: str, method: str) -> None:
    model, batch = families.model(family), families.inputs(family)
    with patch(model, method, keep=0.5):
        tokens, cached = reference.greedy(model, batch, 4)
        again, plain = reference.greedy(model, batch, 4, use_cache=False)
        assert torch.equal(tokens, again)
        close(plain, cached)


@pytest.mark.parametrize("method", ["divprune", "uniform", "average_pool"])
@pytest.mark.parametrize("family", PLAIN)
def test_compact_positions_equal_plain_pruned_embeddings(family: str, method: str) -> None:
    """positions="compact" is, bit for bit, the unpatched model on the shorter sequence of embeddings."""
    model, batch = families.model(family), families.inputs(family)
    stages, log = reference.spy(vtprune.create(method).stages(0.5, families.depth(model)))
    stages = [Stage(s.where, s.method, keep=s.keep, positions="compact") for s in stages]
    with patch(model, stages) as handle:
        tokens, logits = reference.greedy(model, batch, 5)
        kept = handle.last.index[0]
    embeds = _embeds(model, batch)
    cuts = reference.cuts_of_row(log, [0], batch.units)[0]["llm"]
    shorter = embeds.clone()
    for cut in cuts:
        shorter[0, cut.positions[cut.answer.idx]] = cut.answer.apply(embeds[0, cut.positions])
    shorter = shorter[:, kept]
    out = model.generate(
        inputs_embeds=shorter,
        attention_mask=torch.ones(1, len(kept), dtype=torch.long),
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, tokens)
    assert torch.equal(torch.stack(out.logits, 1), logits)


@torch.no_grad()
def _embeds(model: Any, batch: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_stages_add_up(family: str) -> None:
    """Before the LLM, then at layers 2 and 3: each stage sees what the one before left; equals the layer walk."""
    fastv = vtprune.create("fastv")
    chosen = [Stage("llm", vtprune.create("divprune"), keep=0.7), Stage(2, fastv, keep=0.4), Stage(3, fastv, keep=2)]
    stages, log = reference.spy(chosen)
    model, batch = families.model(family), families.inputs(family, rows=ROWS)
    with patch(model, stages) as handle:
        tokens, logits = reference.greedy(model, batch, 5)
        lengths = handle.last.lengths
    assert lengths[0] == lengths[1] > lengths[2] > lengths[3]
    assert [call.stage.where for call in log] == ["llm", 2, 3]
    for row in range(len(ROWS)):
        close(logits[row], oracle(family, log, tokens[row], ROWS, row))


@some_families
def test_the_cache_stores_less_and_answers_for_all(family: str) -> None:
    model, batch = families.model(family), families.inputs(family)
    length, (unit,) = batch["input_ids"].shape[1], batch.units[0]
    with patch(model, "fastv", keep=3), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert stored == [length, length, length - len(unit) + 3, length - len(unit) + 3]
    assert [cache.get_seq_length(i) for i in range(4)] == [length] * 4


def test_a_cache_outlives_the_patch() -> None:
    """Removing the patch between two words changes nothing for the conversation under way."""
    model, batch = families.model("llava"), families.inputs("llava")
    with torch.no_grad():
        with patch(model, "divprune", keep=0.5):
            cache = model(**batch, use_cache=True).past_key_values
            other = copy.deepcopy(cache)
            word = torch.tensor([[40]])
            patched = model(input_ids=word, past_key_values=cache).logits
        assert torch.equal(model(input_ids=word, past_key_values=other).logits, patched)


@some_methods
@some_families
def test_six_threads_on_one_model(family: str, method: str) -> None:
    model = families.model(family)
    if families.FAMILIES[family].mrope:  # upstream keeps rope_deltas on the module: only the forward is re-entrant
        run = torch.no_grad()(lambda batch: model(**batch).logits)
    else:
        run = lambda batch: reference.greedy(model, batch, 3)[1]  # noqa: E731
    batches = [families.inputs(family, rows=(1 + i % 2,), seed=i) for i in range(12)]
    with patch(model, method, keep=0.5):
        one_by_one = [run(b) for b in batches]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(run, batches))
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))


def _labels(batch: families.Inputs) -> Tensor:
    """Learn the last four words and the word right behind the image."""
    labels = torch.full_like(batch["input_ids"], -100)
    for at in (-4, -3, -2, -1, batch.units[0][-1][-1] + 1):
        labels[0, at] = batch["input_ids"][0, at]
    return labels


@some_methods
@some_families
def test_loss_equals_the_hand_cut_sequence(family: str, method: str) -> None:
    model, batch = families.model(family), families.inputs(family)
    labels = _labels(batch)
    stages, log = reference.spy(vtprune.create(method).stages(0.5, families.depth(model)))
    with patch(model, stages), torch.no_grad():
        out = model(**batch, labels=labels)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    cuts = reference.cuts_of_row(log, [0], batch.units)[0]
    logits = reference.pruned_logits(model, reference.dense(model, batch), cuts)
    close(out.loss, _loss(logits, labels[0, reference.survivors(cuts, labels.shape[1])]))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["divprune", "average_pool"])
@some_families
def test_training_equals_the_hand_cut_sequence(family: str, method: str, checkpointing: bool) -> None:
    """Loss and gradients of all decoder weights, with and without gradient checkpointing."""
    model, batch = families.fresh(family).train(), families.inputs(family)
    labels = _labels(batch)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stages, log = reference.spy(vtprune.create(method).stages(0.5, families.depth(model)))
    with patch(model, stages):
        out = model(**batch, labels=labels)
        out.loss.backward()
    trained = [*model.get_decoder().layers.parameters(), *model.get_decoder().norm.parameters()]
    ours = [p.grad.clone() for p in trained]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_encoder(modality="image").parameters())
    model.zero_grad()
    model.gradient_checkpointing_disable()
    cuts = reference.cuts_of_row(log[:1], [0], batch.units)[0]
    with_gradients: Any = reference.pruned_logits
    logits = with_gradients.__wrapped__(model, reference.dense(model, batch), cuts)
    loss = _loss(logits, labels[0, reference.survivors(cuts, labels.shape[1])])
    loss.backward()
    close(out.loss, loss)
    for mine, p in zip(ours, trained, strict=True):
        close(mine, p.grad)


@some_methods
def test_deepcopy_of_a_patched_model(method: str) -> None:
    model, batch = families.fresh("llava"), families.inputs("llava")
    dense = reference.greedy(model, batch, 3)[1]
    handle = patch(model, method, keep=0.5)
    pruned = reference.greedy(model, batch, 3)[1]
    twin = copy.deepcopy(model)
    assert torch.equal(reference.greedy(twin, batch, 3)[1], pruned)
    handle.remove()
    assert torch.equal(reference.greedy(model, batch, 3)[1], dense)
    assert torch.equal(reference.greedy(twin, batch, 3)[1], pruned), "the copy keeps its own patch"
    vtprune.unpatch(twin)
    assert torch.equal(reference.greedy(twin, batch, 3)[1], dense)


@some_methods
def test_saving_a_patched_model_saves_the_stock_model(method: str, tmp_path: Any) -> None:
    model, batch = families.fresh("qwen2_5_vl"), families.inputs("qwen2_5_vl")
    dense = reference.greedy(model, batch, 3)[1]
    with patch(model, method, keep=0.5):
        reference.greedy(model, batch, 1)
        model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "vtprune" not in json.dumps(json.loads(file.read_text())), file
    loaded = type(model).from_pretrained(tmp_path).eval()
    loaded.generation_config.suppress_tokens = model.generation_config.suppress_tokens
    assert torch.equal(reference.greedy(loaded, batch, 3)[1], dense)


@some_families
def test_hidden_states_have_the_length_each_layer_ran_on(family: str) -> None:
    model, batch = families.model(family), families.inputs(family)
    with patch(model, "fastv", keep=3) as handle, torch.no_grad():
        out = model(**batch, output_hidden_states=True)
        lengths = handle.last.lengths
    assert out.logits.shape[1] == batch["input_ids"].shape[1]
    assert [h.shape[1] for h in out.hidden_states[1:-1]] == lengths[:-1]
    assert len(out.hidden_states) == len(lengths) + 1


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("family", families.NAMES)
@torch.no_grad()
def test_arguments_and_outputs_at_full_length(family: str, method: str) -> None:
    """Labels in all forms, chosen logits, tuples and the last hidden states: as if nothing had been dropped."""
    if method == "fastv" and family.startswith("gemma3"):
        pytest.skip("sliding layers hold no stage inside the LLM")
    model, batch = families.model(family), families.inputs(family, rows=(2, 1))
    labels, length = batch["input_ids"], batch["input_ids"].shape[1]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with patch(model, method, keep=0.5):
        out, base = model(**batch, labels=labels), model.model(**batch, output_hidden_states=True)
        close(model(**batch, labels=labels, shift_labels=shifted).loss, out.loss)
        close(model(**batch, labels=labels, return_dict=False)[0], out.loss)
        close(model(**batch, logits_to_keep=torch.arange(length)).logits, out.logits)
        close(model(**batch, logits_to_keep=torch.tensor([1, length - 1])).logits, out.logits[:, [1, length - 1]])
        assert base.last_hidden_state.shape[1] == length
        assert torch.equal(base.hidden_states[-1], base.last_hidden_state)
        assert torch.equal(model.model(**batch, labels=labels).last_hidden_state, base.last_hidden_state)
        states = model.model(**batch, output_hidden_states=True, return_dict=False)
        assert torch.equal(states[0], base.last_hidden_state)
        assert any(isinstance(x, tuple) and x[-1] is states[0] for x in states[1:])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_5", "paligemma"])
@torch.no_grad()
def test_attentions_have_the_length_each_layer_ran_on(family: str) -> None:
    model, batch = families.model(family, "eager"), families.inputs(family, rows=(2, 1))
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * 4
    with patch(model, "fastv", keep=0.5) as handle:
        out = model(**batch, output_attentions=True)
        assert torch.equal(out.logits, model(**batch).logits)
        lengths = [n for n, kind in zip(handle.last.lengths, kinds, strict=True) if kind == "full_attention"]
    assert [a.shape[-2:] for a in out.attentions] == [(n, n) for n in lengths]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["divprune", "fastv", "lazyllm", "topk_cls"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_keep_all_under_gradient_checkpointing(family: str, method: str, reentrant: bool) -> None:
    model, batch = families.fresh(family).train(), families.inputs(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()

    def run() -> list[Tensor]:
        model.zero_grad()
        out = model(**batch, labels=batch["input_ids"])
        out.loss.backward()
        return [out.logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    stock = run()
    try:
        handle = patch(model, method, keep=1.0)
    except vtprune.UnsupportedModel:
        pytest.skip(f"{family} cannot hold {method}")
    with handle:
        assert all(torch.equal(a, b) for a, b in zip(run(), stock, strict=True))


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_generate_in_training_mode_with_checkpointing_left_on(method: str) -> None:
    """Without gradients nothing is run again, so there is nothing to refuse."""
    model, batch = families.fresh("qwen2_5_vl"), families.inputs("qwen2_5_vl")
    stock = reference.greedy(model, batch, 3)[0]
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not torch.equal(reference.greedy(model, batch, 3)[0], stock):
        pytest.skip("this transformers drops the cache under checkpointing, gradients or none")
    model.gradient_checkpointing_disable()
    model.eval()
    with patch(model, method, keep=0.5):
        tokens, logits = reference.greedy(model, batch, 3)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        same, ours = reference.greedy(model, batch, 3)
    assert torch.equal(tokens, same)
    close(ours, logits)


@pytest.mark.parametrize("family", ["gemma3", "gemma3-window"])
def test_keep_all_with_a_static_cache_and_sliding_layers(family: str) -> None:
    model, batch = families.model(family), families.inputs(family, rows=(1, 1))
    stock = reference.greedy(model, batch, 3, cache_implementation="static")[1]
    with patch(model, "divprune", keep=1.0):
        assert torch.equal(reference.greedy(model, batch, 3, cache_implementation="static")[1], stock)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_continuous_batching_of_text(method: str) -> None:
    """Requests without images run as on the unpatched model, whatever the patch."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no settings of continuous batching")
    model, words = families.fresh("llava"), [families.text(i, 5 + i).ids for i in range(3)]
    small = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=95, pad_token_id=0)

    def run() -> list[Any]:
        answers = model.generate_batch(words, generation_config=settings, continuous_batching_config=small)
        return [answers[key].generated_tokens for key in sorted(answers)]

    stock = run()
    assert all(stock)
    with patch(model, method, keep=0.5):
        assert run() == stock


@some_methods
@some_families
def test_tuple_output_and_logits_to_keep(family: str, method: str) -> None:
    model, batch = families.model(family), families.inputs(family)
    with patch(model, method, keep=0.5), torch.no_grad():
        whole = model(**batch).logits
        assert torch.equal(model(**batch, return_dict=False)[0], whole)
        close(model(**batch, logits_to_keep=2).logits, whole[:, -2:])


@pytest.mark.parametrize("family", families.NAMES)
def test_bfloat16(family: str) -> None:
    model = families.fresh(family).to(torch.bfloat16)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in families.inputs(family, rows=(1, 2)).items()}
    with torch.no_grad():
        dense = model(**batch).logits
        with patch(model, "divprune", keep=1.0):
            assert torch.equal(model(**batch).logits, dense)
        with patch(model, "average_pool", keep=0.5):
            out = model(**batch).logits
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("per", ["image", "sample"])
def test_two_images_share_a_budget_only_when_asked(per: str) -> None:
    model, batch = families.model("qwen2_5_vl"), families.inputs("qwen2_5_vl", rows=(2,))
    sizes = [len(unit) for unit in batch.units[0]]
    with patch(model, "divprune", keep=6, per=per) as handle, torch.no_grad():
        model(**batch)
        seen = [unit.n for unit in handle.last.units]
        kept = set(handle.last.index[0].tolist()) & {p for unit in batch.units[0] for p in unit}
    assert seen == (sizes if per == "image" else [sum(sizes)])
    assert len(kept) == (12 if per == "image" else 6)


@pytest.mark.parametrize("family", ["qwen2_5_vl-video", "qwen3_vl-video", "llava_next_video-video"])
def test_every_frame_has_its_budget(family: str) -> None:
    model, batch = families.model(family), families.inputs(family)
    frames = families.FAMILIES[family].sizes[0]
    frames = frames[0] if isinstance(frames, tuple) else frames
    (video,) = batch.units[0]
    with patch(model, "uniform", keep=2, per="frame") as handle, torch.no_grad():
        model(**batch)
        assert [unit.n for unit in handle.last.units] == [len(video) // frames] * frames
        kept = set(handle.last.index[0].tolist())
    each = len(video) // frames
    for t in range(frames):
        assert len(kept & set(video[t * each : (t + 1) * each])) == 2


@some_methods
def test_last_tells_what_stayed(method: str) -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(2, 1))
    length, mask = batch["input_ids"].shape[1], batch["attention_mask"].bool()
    handle = patch(model, method, keep=7)
    assert handle.last is None
    with torch.no_grad():
        model(**batch)
    handle.remove()
    last: Any = handle.last
    assert last.index.dtype == torch.int64
    assert last.src.shape == (2, length)
    for row in range(2):
        kept = last.index[row][last.valid[row]]
        visual = torch.tensor([p for unit in batch.units[row] for p in unit])
        assert torch.equal(kept, kept.unique()), "ascending and distinct"
        assert mask[row, kept].all()
        assert torch.isin(kept, visual).sum() == 7 * len(batch.units[row])
        assert torch.isin(kept, visual).logical_not().sum() == mask[row].sum() - len(visual)
        slots = last.src[row, kept]  # a kept position answers for itself
        assert torch.equal(last.index[row, slots], kept)
        assert (last.index[row, last.src[row]] <= torch.arange(length)).sum() >= length - int((~mask[row]).sum())
    assert [unit.row for unit in last.units] == [0, 0, 1]
    assert last.seconds >= 0


def test_inputs_are_not_changed() -> None:
    model, batch = families.model("qwen3_vl"), families.inputs("qwen3_vl", rows=ROWS)
    before = {k: v.clone() for k, v in batch.items()}
    with patch(model, "divprune", keep=0.5):
        reference.greedy(model, batch, 3)
    assert all(torch.equal(v, before[k]) for k, v in batch.items())


def test_context_manager_unpatch_and_add() -> None:
    model, batch = families.model("llava"), families.inputs("llava")
    with torch.no_grad():
        dense = model(**batch).logits
        with pytest.raises(RuntimeError, match="inside"), patch(model, "uniform", keep=3):
            raise RuntimeError("inside")
        assert torch.equal(model(**batch).logits, dense)
        handle = patch(model, "uniform", keep=0.8)
        both = patch(model, "fastv", keep=3, add=True)
        assert [stage.where for stage in both.stages] == ["llm", 2]
        assert both.active
        assert not handle.active
        assert not torch.equal(model(**batch).logits, dense)
        vtprune.unpatch(model)
        vtprune.unpatch(model)
        both.remove()
        assert torch.equal(model(**batch).logits, dense)


def test_pipeline(tmp_path: Any) -> None:
    """transformers' own pipeline takes a patched model object, one by one and in batches of two."""
    from PIL import Image
    from transformers import pipeline

    model, processor = families.fresh("llava"), _tiny_processor()
    pipe: Any = pipeline("image-text-to-text", model=model, processor=processor)
    pictures = [Image.new("RGB", (20, 20), color) for color in ("red", "navy")]
    asked = ["<image> w30 w31 w32", "<image> w33"]
    options = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 4}}
    with patch(model, "divprune", keep=0.5) as handle:
        single = [pipe(images=i, text=t, **options) for i, t in zip(pictures, asked, strict=True)]
        assert handle.last is not None
        together = pipe(images=pictures, text=asked, batch_size=2, **options)
        ours = [processor(images=i, text=t, return_tensors="pt") for i, t in zip(pictures, asked, strict=True)]
        plain = [reference.greedy(model, inputs, 4)[0][0] for inputs in ours]
    for one, both, tokens in zip(single, together, plain, strict=True):
        words = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert words
        assert _said(one).endswith(words)
        assert _said(both).endswith(words)


def _said(answer: Any) -> str:
    return answer[0]["generated_text"] if isinstance(answer, list) else answer["generated_text"]


def _tiny_processor() -> Any:
    """LLaVA's stock processor over a word-level tokenizer and 20-pixel images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(families.VOCAB)}
    special = {"<pad>": families.PAD, "<s>": families.BOS, "<image>": families.IMAGE}
    vocabulary = {k: v for k, v in vocabulary.items() if v not in special.values()} | special
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": 20, "width": 20}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
