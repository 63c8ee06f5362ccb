"""What a public model test suite asks of a stock model, asked of a patched one: every family, keep=1.0 and keep=0.5.

keep=1.0 has the stock model's values, bit by bit. keep=0.5 has its shapes, and the values of an oracle: the layers
walked by hand on the tokens that stay (`reference`), the stock model with the dropped tokens masked, or another way to
make the same call. A call that the stock model itself cannot take is skipped by name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import cache as kv

TOLERANCE = 1e-5
STEPS = 4
# One method before the LLM and one inside it; what the others do is the business of test_conformance.py.
METHODS = ("divprune", "fastv")
# Layers that see a window of the prompt admit no stage inside the LLM.
NO_LAYERS = {"gemma3": "sliding_attention", "gemma3-window": "sliding_attention"}
# Where hiding a token is not the same as dropping it: a window counts what is there, a state fades over it.
NO_MASKING = ("gemma3-window", "qwen3_5")
BIDIRECTIONAL = ("gemma3", "gemma3-window", "paligemma")


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@contextmanager
def patched(model: Any, family: str, method: str, keep: float) -> Iterator[tuple[Any, list[reference.Call]]]:
    """(handle, log of the method's calls); skips where the family refuses the method by name."""
    stages, log = reference.spy(vtprune.create(method).stages(keep, families.depth(model)))
    if family in NO_LAYERS and any(isinstance(stage.where, int) for stage in stages):
        with pytest.raises(vtprune.UnsupportedModel, match=NO_LAYERS[family]):
            vtprune.patch(model, stages)
        pytest.skip(f"refused as it should be: {family} has {NO_LAYERS[family]} layers")
    with vtprune.patch(model, stages) as handle:
        yield handle, log


def stock(call: Callable[[], Any]) -> Any:
    """What the unpatched model makes of a call; skips where it cannot take it."""
    try:
        return call()
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
        pytest.skip(f"the stock model refuses this call: {type(error).__name__}: {str(error)[:80]}")


def right_or_refused(call: Callable[[], Any], keep: float, cause: str) -> Any:
    """The call's answer, or None where it is refused by name; at keep=1.0 nothing is dropped, so nothing is refused."""
    try:
        return call()
    except vtprune.UnsupportedCall as refusal:
        if keep == 1.0 or cause not in str(refusal):
            raise
        return None


def cuts_of(log: list[reference.Call], batch: families.Inputs) -> dict[Any, list[reference.Cut]]:
    return reference.cuts_of_row(log, [0], batch.units)[0]


def last_logits(model: Any, family: str, batch: families.Inputs, log: list[reference.Call]) -> Tensor:
    """The oracle's logits [V] behind the last token of one row."""
    compact = reference.renumbers(log)
    return reference.pruned_logits(model, reference.dense(model, batch), cuts_of(log, batch), compact=compact)[-1]


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", families.NAMES)
class TestPatchedModel:
    @pytest.fixture(autouse=True)
    def _without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def test_forward(self, family: str, method: str, keep: float) -> None:
        model, batch = families.model(family), families.inputs(family)
        dense = model(**batch, output_hidden_states=True)
        with patched(model, family, method, keep) as (handle, log):
            out = model(**batch, output_hidden_states=True)
            asked = list(log)
            base = model.base_model(**batch)
        assert out.logits.shape == dense.logits.shape
        assert base.last_hidden_state.shape[:2] == batch["input_ids"].shape
        assert len(out.hidden_states) == len(dense.hidden_states)
        close(out.hidden_states[-1], base.last_hidden_state)
        assert handle.last is not None
        if keep == 1.0:
            assert torch.equal(out.logits, dense.logits)
            assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, dense.hidden_states, strict=True))
            assert [len(unit.idx) for unit in handle.last.units] == [unit.n for unit in handle.last.units]
            return
        close(out.logits[0, -1], last_logits(model, family, batch, asked))
        first = batch.units[0][0][0]
        if family not in BIDIRECTIONAL:
            close(out.logits[:, :first], dense.logits[:, :first])  # what stands before the image never sees it

    def test_text_only(self, family: str, method: str, keep: float) -> None:
        """Nothing to prune: bit by bit the stock model, in a forward pass and in generate."""
        model, batch = families.model(family), families.inputs(family, rows=(0,))
        dense, said = model(**batch).logits, reference.greedy(model, batch, 2)[1]
        with patched(model, family, method, keep):
            assert torch.equal(model(**batch).logits, dense)
            assert torch.equal(reference.greedy(model, batch, 2)[1], said)

    def test_generate(self, family: str, method: str, keep: float) -> None:
        model, batch = families.model(family), families.inputs(family)
        words, dense = reference.greedy(model, batch, STEPS)
        with patched(model, family, method, keep) as (_, log):
            tokens, logits = reference.greedy(model, batch, STEPS)
        assert tokens.shape == words.shape
        if keep == 1.0:
            assert torch.equal(tokens, words)
            assert torch.equal(logits, dense)
            return
        compact = reference.renumbers(log)
        theirs = reference.expected(model, family, (1,), 0, cuts_of(log, batch), tokens[0], compact=compact)
        close(logits[0], theirs)

    def test_beams(self, family: str, method: str, keep: float) -> None:
        model, batch = families.model(family), families.inputs(family)
        options = {
            "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": STEPS, "do_sample": False,
            "output_scores": True, "return_dict_in_generate": True,
        }  # fmt: skip
        dense = stock(lambda: model.generate(**batch, **options))
        with patched(model, family, method, keep) as (_, log):
            out = model.generate(**batch, **options)
        assert out.sequences.shape == dense.sequences.shape
        if keep == 1.0:
            assert torch.equal(out.sequences, dense.sequences)
            assert torch.equal(out.sequences_scores, dense.sequences_scores)
            return
        each = [len(call.units) // 3 for call in log]  # every beam brings the image
        one = [reference.Call(c.stage, c.units[:n], c.answers[:n]) for c, n in zip(log, each, strict=True)]
        compact = reference.renumbers(log)
        for words, score in zip(out.sequences[:, batch["input_ids"].shape[1] :], out.sequences_scores, strict=True):
            logits = reference.expected(model, family, (1,), 0, cuts_of(one, batch), words, compact=compact)
            close(score, logits.log_softmax(-1)[torch.arange(STEPS), words].sum() / STEPS)

    def test_assisted(self, family: str, method: str, keep: float) -> None:
        """Greedy's words, or a refusal that names assisted decoding; the same for prompt lookup."""
        model, batch = families.model(family), families.inputs(family)
        assistant = _assistant(family)
        options = {"max_new_tokens": 6, "do_sample": False}
        words = model.generate(**batch, **options)
        ways = ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1})
        for way in ways:
            dense = stock(lambda way=way: model.generate(**batch, **options, **way))
            with patched(model, family, method, keep) as (handle, _):
                greedy = model.generate(**batch, **options)
                kept = [unit.idx for unit in handle.last.units]
                out = right_or_refused(lambda way=way: model.generate(**batch, **options, **way), keep, "assisted")
                if out is None:
                    continue
                assert out.shape == greedy.shape
                assert torch.equal(out, greedy)
                assert all(torch.equal(a, u.idx) for a, u in zip(kept, handle.last.units, strict=True))
            if keep == 1.0:
                assert torch.equal(out, dense)
                assert torch.equal(greedy, words)

    def test_padding_free(self, family: str, method: str, keep: float) -> None:
        """Two samples in one row whose position ids restart: each as alone, or a refusal that names packing."""
        model = families.model(family)
        singles = [families.inputs(family, rows=(1, 1), only=row) for row in (0, 1)]
        packed = _packed(model, family, singles)
        dense = stock(lambda: model(**packed, use_cache=False).logits)
        with patched(model, family, method, keep):
            out = right_or_refused(lambda: model(**packed, use_cache=False).logits, keep, "pack")
            if out is None:
                return
            assert out.shape == dense.shape
            if keep == 1.0:
                assert torch.equal(out, dense)
                return
            lengths = [single["input_ids"].shape[1] for single in singles]
            for part, single in zip(out[0].split(lengths), singles, strict=True):
                close(part, model(**single).logits[0], 5 * TOLERANCE)

    def test_labels(self, family: str, method: str, keep: float) -> None:
        """The loss is that of the logits that come back, right-padded as in training; the base model ignores labels."""
        model, batch = families.model(family), _right_padded(families.inputs(family, rows=(1, 1)))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels = labels.masked_fill(labels < families.FIRST_TEXT, -100)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        dense = model(**batch, labels=labels)
        with patched(model, family, method, keep):
            out = model(**batch, labels=labels)
            ahead = model(**batch, labels=labels, shift_labels=shifted)
            base = model.base_model(**batch, labels=labels).last_hidden_state
        assert out.logits.shape == dense.logits.shape
        assert base.shape[:2] == labels.shape
        if keep == 1.0:
            assert torch.equal(out.loss, dense.loss)
            assert torch.equal(out.logits, dense.logits)
        theirs = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), shifted.flatten())
        close(out.loss, theirs)
        close(ahead.loss, theirs)

    def test_return_dict(self, family: str, method: str, keep: float) -> None:
        model, batch = families.model(family), families.inputs(family)
        dense = stock(lambda: model(**batch, return_dict=False))
        features = _features(model, family, batch)
        plain = stock(lambda: features(return_dict=False))
        with patched(model, family, method, keep):
            whole = model(**batch).logits
            out = model(**batch, return_dict=False)
            got = features(return_dict=False)
        assert isinstance(out, tuple)
        assert len(out) == len(dense)
        assert torch.equal(out[0], whole)
        assert type(got) is type(plain)
        assert all(torch.equal(a, b) for a, b in zip(_tensors(got), _tensors(plain), strict=True))

    def test_masks_with_holes(self, family: str, method: str, keep: float) -> None:
        """Words in the middle that nobody may see: as the stock model with the dropped tokens hidden as well."""
        model, batch = families.model(family), families.inputs(family)
        words = (batch["input_ids"][0] >= families.FIRST_TEXT).nonzero().flatten()
        mask = batch["attention_mask"].clone()
        mask[0, [int(words[1]), int(words[-3])]] = 0
        holes = families.Inputs({**batch, "attention_mask": mask})
        dense = stock(lambda: model(**holes).logits)
        with patched(model, family, method, keep) as (_, log):
            out = model(**holes).logits
        assert out.shape == dense.shape
        if keep == 1.0:
            assert torch.equal(out, dense)
        elif family not in NO_MASKING:
            close(out[0, -1], reference.masked_logits(model, holes, cuts_of(log, batch))[-1])

    def test_mask_over_visual_tokens(self, family: str, method: str, keep: float) -> None:
        """Image tokens that nobody may see: the stock model's answer at keep=1.0; never a wrong one below."""
        model, batch = families.model(family), families.inputs(family)
        hidden = batch.units[0][0][-2:]
        mask = batch["attention_mask"].clone()
        mask[0, hidden] = 0
        holes = {**batch, "attention_mask": mask}
        dense = stock(lambda: model(**holes).logits)
        with patched(model, family, method, keep) as (handle, log):
            out = right_or_refused(lambda: model(**holes).logits, keep, "mask")
            if out is None:
                return
            kept = handle.last.index[0]
        assert out.shape == dense.shape
        if keep == 1.0:
            assert torch.equal(out, dense)
        elif family not in NO_MASKING:
            everything = reference.Cut(torch.arange(out.shape[1]), vtprune.Assignment(kept))
            (where,) = {call.stage.where for call in log}
            close(out[0, -1], reference.masked_logits(model, holes, {where: [everything]})[-1])

    def test_save_and_load(self, family: str, method: str, keep: float, tmp_path: Any) -> None:
        model, batch = families.model(family), families.inputs(family)
        dense = model(**batch).logits
        with patched(model, family, method, keep):
            pruned = model(**batch).logits
            model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        close(loaded(**batch).logits, dense)
        with patched(loaded, family, method, keep):
            close(loaded(**batch).logits, pruned)

    def test_resize_embeddings(self, family: str, method: str, keep: float) -> None:
        """The vocabulary grows under the patch: it goes on to prune, and the same as a patch made afterwards."""
        model, batch = copy.deepcopy(families.model(family)), families.inputs(family)
        with patched(model, family, method, keep):
            before = model(**batch).logits
            torch.manual_seed(0)
            model.resize_token_embeddings(families.VOCAB + 8)
            out = model(**batch).logits
        assert out.shape == (*before.shape[:2], families.VOCAB + 8)
        close(out[..., : families.VOCAB], before)
        dense = model(**batch).logits
        if keep == 1.0:
            assert torch.equal(out, dense)
        with patched(model, family, method, keep):
            assert torch.equal(model(**batch).logits, out)

    def test_inputs_embeds(self, family: str, method: str, keep: float) -> None:
        """Embeddings of the ids, placeholders among them, in place of the ids."""
        model, batch = families.model(family), families.inputs(family)
        call = {k: v for k, v in batch.items() if k != "input_ids"}
        call["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
        dense = stock(lambda: model(**call).logits)
        if not torch.equal(dense, model(**batch).logits):
            pytest.skip("the stock model places such a prompt otherwise than its ids")
        with patched(model, family, method, keep) as (handle, _):
            whole = model(**batch).logits
            kept = handle.last.index
            out = model(**call).logits
            assert torch.equal(handle.last.index, kept)
        assert torch.equal(out, whole)
        if keep == 1.0:
            assert torch.equal(out, dense)

    def test_cache_in_hand(self, family: str, method: str, keep: float) -> None:
        """A cache that the caller made, then word by word with nothing but ids; equals generate."""
        from transformers import DynamicCache

        model, batch = families.model(family), families.inputs(family)
        with patched(model, family, method, keep):
            tokens, logits = reference.greedy(model, batch, STEPS)
            cache = DynamicCache(config=model.config.get_text_config())
            out = model(**batch, **{kv.NAME: cache}, use_cache=True)
            for step in range(STEPS):
                close(out.logits[:, -1], logits[:, step])
                held = {kv.NAME: getattr(out, kv.NAME)}
                out = model(input_ids=tokens[:, step : step + 1], **held, use_cache=True)

    def test_unpatched_again(self, family: str, method: str, keep: float) -> None:
        model, batch = families.model(family), families.inputs(family)
        dense = model(**batch).logits
        with reference.untouched(model), patched(model, family, method, keep):
            model(**batch)
            model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert torch.equal(model(**batch).logits, dense)


_ASSISTANTS: dict[str, Any] = {}


def _assistant(family: str) -> Any:
    """A model that guesses otherwise than the one it assists."""
    name = families.FAMILIES[family].model_class
    if name not in _ASSISTANTS:
        other = copy.deepcopy(families.model(family))
        generator = torch.Generator().manual_seed(3)
        for weight in other.parameters():
            weight.data.add_(0.05 * torch.randn(weight.shape, generator=generator))
        _ASSISTANTS[name] = other
    return _ASSISTANTS[name]


def _packed(model: Any, family: str, singles: list[families.Inputs]) -> dict[str, Any]:
    """One row of all samples, as padding-free collators make it: position ids restart, no mask."""
    out: dict[str, Any] = dict(families.inputs(family, rows=(1, 1)))  # pixels as the processor stacks them
    del out["attention_mask"]
    if family.startswith(("smolvlm", "idefics3")):  # [B, tiles, ...], and there is one row now
        out |= {name: value.flatten(0, 1)[None] for name, value in out.items() if name.startswith("pixel")}
    for name in ("input_ids", "token_type_ids", "mm_token_type_ids"):
        if name in out:
            out[name] = torch.cat([single[name] for single in singles], 1)
    axes = [reference.positions(model, single) for single in singles]
    out["position_ids"] = torch.cat([torch.arange(single["input_ids"].shape[1]) for single in singles])[None]
    if axes[0] is not None:  # transformers tells packed samples by a row of text positions in front
        out["position_ids"] = torch.cat([out["position_ids"][None], torch.cat(axes, -1)])
    return out


def _right_padded(batch: families.Inputs) -> families.Inputs:
    """The same rows with their padding at the end."""
    out = families.Inputs(batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in batch:
            rows = [torch.cat([row[-n:], row[: len(row) - n]]) for row, n in zip(batch[name], lengths, strict=True)]
            out[name] = torch.stack(rows)
    return out


def _features(model: Any, family: str, batch: families.Inputs) -> Callable[..., Any]:
    """`get_*_features` of the model (Video-LLaVA: of its base model) on what the batch brings."""
    name = "get_video_features" if families.FAMILIES[family].video else "get_image_features"
    owner = model if hasattr(model, name) else model.base_model
    known = inspect.signature(getattr(model.base_model, name)).parameters
    given = {k: v for k, v in batch.items() if k in known and k not in ("input_ids", "attention_mask")}
    return lambda **extra: getattr(owner, name)(**given, **extra)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
