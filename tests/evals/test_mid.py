"""The mid model: its pictures and questions, its training step against the stock classes, and what it answers."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals.accuracy.marking import mark
from vtprune.evals.toys import mid
from vtprune.evals.toys.asks import Balance
from vtprune.evals.toys.fast import _Adapted, _share, linear, prefixed_hidden
from vtprune.evals.toys.mid.asks import ASKERS, WORN, training_asks
from vtprune.evals.toys.mid.content import DIGITS, GARMENTS, heldout
from vtprune.evals.toys.mid.labels import make_labels
from vtprune.evals.toys.mid.scenes import CELLS, GRID, PATCH, SHAPES, SIDE, heldout_rng, make_scene, training_rng


@pytest.fixture(scope="module")
def asked() -> list[mid.Question]:
    return mid.questions(per_capability=20)


def test_questions_are_complete_and_repeat_themselves(asked: list[mid.Question]) -> None:
    assert Counter(q.capability for q in asked) == dict.fromkeys(mid.CAPABILITIES, 20)
    again = mid.questions(per_capability=20)
    assert [(q.prompt, q.answer) for q in again] == [(q.prompt, q.answer) for q in asked]
    assert all((np.asarray(a.image) == np.asarray(b.image)).all() for a, b in zip(asked, again))
    other = mid.questions(per_capability=20, seed=1)
    assert [q.prompt for q in other] != [q.prompt for q in asked]


def test_answers_balance(asked: list[mid.Question]) -> None:
    """No guess without the picture gets far: a kind's most frequent answer is not much ahead of the others."""
    for kind in mid.CAPABILITIES:
        answers = Counter(q.answer for q in asked if q.capability == kind)
        assert max(answers.values()) <= max(20 / len(answers) + 3, 0.55 * 20), (kind, answers)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown capabilities"):
        mid.questions(capabilities=["smell"])


def test_training_pictures_are_other_pictures() -> None:
    drawn = [make_scene(training_rng(0, step), heldout()).pixels.tobytes() for step in range(40)]
    rng = heldout_rng(777001)
    kept = [make_scene(rng, heldout()).pixels.tobytes() for _ in range(40)]
    assert not set(drawn) & set(kept)


def test_shapes_stand_where_the_scene_says() -> None:
    """The pixels that an item owns have their middle at the item's centre, and lie in the picture."""
    rng = random.Random(3)
    seen = Counter()
    for _ in range(60):
        scene = make_scene(rng, heldout())
        for i, item in enumerate(scene.items):
            ys, xs = np.nonzero(scene.owner == i + 1)
            middle = ((xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2)
            slack = 20 if item.kind == "digit" else 6  # a digit's ink is not centred in its box
            assert np.abs(np.subtract(middle, (item.cx, item.cy))).max() < slack
            seen[item.word] += 1
    assert {*SHAPES, *DIGITS, *GARMENTS} == set(seen)


def test_answers_are_true_of_the_picture() -> None:
    rng = random.Random(5)
    told = Counter()
    for _ in range(200):
        scene = make_scene(rng, heldout())
        shapes = scene.of("shape")
        for ask in ASKERS["color"](scene, rng):
            (item,) = [item for item in shapes if f"the {item.word}?" in ask.text]
            assert ask.answer == item.color_word
            told["color"] += 1
        for ask in ASKERS["count"](scene, rng):
            words = ask.text.removeprefix("how many ").removesuffix(" are there?").removesuffix(" shapes").rstrip("s")
            fits = [item for item in shapes if words in ("shape", item.word, item.color_word)]
            assert ask.answer == DIGITS[len(fits)]
            told["count"] += 1
        for ask in ASKERS["relation"](scene, rng):
            names = [ask.text.removeprefix("is the ").removesuffix("?").split(f" {ask.template} the ")]
            first, second = (
                next(s for s in shapes if set(name.removesuffix(" shape").split()) <= {s.word, s.color_word})
                for name in names[0]
            )
            gap = {"left of": second.cx - first.cx, "right of": first.cx - second.cx}
            gap |= {"above": second.cy - first.cy, "below": first.cy - second.cy}
            assert ask.answer == ("yes" if gap[ask.template] > 0 else "no")
            told["relation"] += 1
        for ask in ASKERS["worn"](scene, rng):
            (cell,) = [cell for cell in CELLS if cell in ask.text]
            row, column = cell.split()
            (item,) = [
                item
                for item in scene.items
                if (item.cy < SIDE / 2) == (row == "top") and (item.cx < SIDE / 2) == (column == "left")
            ]
            assert ask.answer == WORN[item.word]
            told["worn"] += 1
    assert min(told.values()) > 50


def test_labels_name_what_a_patch_shows() -> None:
    rng = random.Random(8)
    scene = next(s for s in (make_scene(rng, heldout()) for _ in range(50)) if s.of("shape") and s.of("digit"))
    labels = make_labels([scene, make_scene(rng, heldout())])
    for i, item in enumerate(scene.items):
        patch = int(item.cy) // PATCH * GRID + int(item.cx) // PATCH
        if (scene.owner.reshape(GRID, PATCH, GRID, PATCH)[patch // GRID, :, patch % GRID] == i + 1).mean() > 0.6:
            assert labels[item.kind][0, patch] == item.value
            assert labels["center_row"][0, patch] == patch // GRID
    corner = labels["kind"][0, 0], labels["row"][0, 17], labels["column"][0, 17]
    assert corner[1:] == (1, 1)
    assert {name: values.shape for name, values in labels.items()} == dict.fromkeys(labels, torch.Size([2, GRID**2]))


def test_an_adapted_layer_has_the_gradients_of_its_parts() -> None:
    torch.manual_seed(0)
    x, weight, down, up = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 4), (6, 4), (3, 4), (6, 3)))
    for tensor in (x, down, up):
        tensor.requires_grad_(True)
    want = x @ weight.T + 2 * (x @ down.T) @ up.T
    assert torch.allclose(_Adapted.apply(x, weight, down, up, 2.0), want)
    assert torch.autograd.gradcheck(lambda *given: _Adapted.apply(given[0], weight, *given[1:], 2.0), (x, down, up))


def test_packed_questions_equal_the_stock_model_on_shared_key_heads() -> None:
    """Two questions side by side behind one prefix, through PEFT's layers, against `LlamaModel` asked one by one."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    lm = LlamaModel(config).eval()
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]), lm)
    for name, value in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.2)
    prefix = torch.randn(1, 7, 48)
    questions = [[5, 6, 7], [9, 8, 7, 6]]
    ids = torch.tensor([[*questions[0], *questions[1]]])
    segments = torch.tensor([[0] * 3 + [1] * 4])
    positions = torch.tensor([[*range(7), *range(7, 10), *range(7, 11)]])
    with torch.no_grad():
        packed = prefixed_hidden(lm, prefix, ids, segments, positions)[0]
        for own, got in zip(questions, packed.split([3, 4])):
            inputs = torch.cat([prefix, lm.embed_tokens(torch.tensor([own]))], 1)
            want = lm(inputs_embeds=inputs).last_hidden_state[0, 7:]
            assert torch.allclose(got, want, atol=1e-5)
    assert _share(torch.arange(4.0).view(1, 1, 4), 4, 2).tolist() == [[[0, 1, 0, 1, 2, 3, 2, 3]]]
    layer = nn.Linear(3, 2)
    assert torch.equal(linear(torch.ones(3), layer), layer(torch.ones(3)))


def test_training_asks_every_kind() -> None:
    rng, balance = random.Random(1), Balance(6)
    kinds = Counter(a.capability for _ in range(60) for a in training_asks(make_scene(rng, heldout()), rng, balance))
    assert set(kinds) == {*mid.CAPABILITIES, "caption"}


def test_the_adapter_is_small() -> None:
    files = list(mid.ADAPTER.iterdir())
    assert {file.name for file in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20


@pytest.mark.slow
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_model_looks_and_can_be_pruned(asked: list[mid.Question]) -> None:
    """Fetches the pretrained parts at its first run. Well above chance on what it was asked to see."""
    model, processor = mid.load()
    assert len(model.model.language_model.layers) == 30
    right: dict[str, list[bool]] = {}
    kinds = {kind: [q for q in asked if q.capability == kind] for kind in ("color", "shape", "position", "exist")}
    chosen = [q for some in kinds.values() for q in some[:8]]
    for q in chosen:
        inputs = processor(images=[q.image], text=[q.prompt], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right.setdefault(q.capability, []).append(mark(text, True, q.answer)[0])
    assert {kind: sum(hits) >= 5 for kind, hits in right.items()} == dict.fromkeys(right, True), right
    with vtprune.patch(model, "divprune", keep=0.25) as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert [len(unit.idx) for unit in handle.last.units] == [64]


@pytest.mark.slow
def test_the_commands_take_it(tmp_path: Path) -> None:
    some = ["--mid", "--limit", "2", "--capability", "color", "--keep", "0.25", "--seeds", "1"]
    done = CliRunner().invoke(app, ["eval", *some, "--method", "divprune", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "the mid model" in (tmp_path / "eval.md").read_text()
