"""The embedded tiny LLaVA: balanced questions, blind controls, a checkpoint that answers, a script that trains."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import vtprune
from vtprune.evals.toys import image as tiny
from vtprune.evals.toys.image import asks, fast, model, scenes
from vtprune.evals.toys.image.score import score
from vtprune.methods.in_llm.schedule import FLOOR

LEARNED = ("color", "shape", "position", "exist", "ocr", "easy-color", "easy-shape", "easy-yesno")


@pytest.fixture(scope="module")
def loaded() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return tiny.load()


@pytest.fixture(scope="module")
def asked() -> list[tiny.Question]:
    return tiny.questions(per_capability=48)


def as_rows(questions: list[tiny.Question]) -> list[tuple]:
    return [(q.image.tobytes(), q.image_id, q.prompt, q.answer, q.capability, q.template) for q in questions]


def test_questions_are_complete_and_ordered(asked):
    assert [q.capability for q in asked] == [c for c in tiny.CAPABILITIES for _ in range(48)]
    assert all(q.prompt.startswith("<s> <image> ") and q.prompt.endswith(" answer:") for q in asked)
    assert all(q.image.size == (64, 64) and q.image.mode == "RGB" for q in asked)


def test_same_seed_same_questions(asked):
    assert as_rows(tiny.questions(per_capability=48)) == as_rows(asked)
    assert as_rows(tiny.questions(per_capability=48, seed=5)) != as_rows(asked)


def test_a_selection_keeps_the_order_of_capabilities():
    found = tiny.questions(per_capability=3, capabilities=["ocr", "easy-color", "count"])
    assert [q.capability for q in found] == ["count"] * 3 + ["ocr"] * 3 + ["easy-color"] * 3


def test_answers_balance_per_template(asked):
    used = defaultdict(Counter)
    for q in asked:
        used[q.template][q.answer] += 1
    exact = ("count", "count SHAPEs", "count COLOR shapes", "where", "left or right", "top or bottom", *asks.RELATIONS)
    for template in exact:
        assert max(used[template].values()) - min(used[template].values()) <= 1, template
    for template, share in {"color": 0.25, "shape": 0.45, "easy-color": 0.2, "easy-shape": 0.4}.items():
        assert max(used[template].values()) <= share * 48, template
    assert used["easy-yesno"] == {"yes": 24, "no": 24}


def test_yes_and_no_come_in_pairs_of_one_wording():
    by_wording = defaultdict(Counter)
    for q in tiny.questions(per_capability=310, capabilities=["easy-yesno"]):
        by_wording[q.prompt][q.answer] += 1
    assert all(c["yes"] == c["no"] for c in by_wording.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_capability": 400}, "312"),
        ({"per_capability": 0}, "at least 1"),
        ({"capabilities": ["colour"]}, "choose from color"),
    ],
)
def test_impossible_requests_name_the_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.questions(**arguments)


def test_heldout_scenes_are_not_training_scenes():
    rng = scenes.heldout_rng(777001)
    heldout = {scenes.make_scene(rng).pixels.tobytes() for _ in range(200)}
    for step in range(20):
        for seed in (0, 777001):
            rng = scenes.training_rng(seed, step)
            assert not heldout & {scenes.make_scene(rng).pixels.tobytes() for _ in range(16)}


def test_answers_are_true_of_the_scene():
    """Recount from the drawn pixels' owner map, which the askers never look at."""
    rng = scenes.heldout_rng(1)
    for _ in range(200):
        scene = scenes.make_scene(rng)
        drawn = {int(o) for o in set(scene.owner.flatten().tolist()) if 0 < o < scenes.DIGIT_OWNER}
        for ask in asks.ask_count(scene, rng):
            assert int(ask.answer) == len(drawn)
        for ask in asks.ask_position(scene, rng):
            reference = ask.text.replace(" shape", "").split("the ")[1].split(" ?")[0].split(" on ")[0].split(" at ")[0]
            (item,) = [i for name, i in asks.references(scene) if name == reference]
            ys, xs = (scene.owner == scene.items.index(item) + 1).nonzero()
            middle = {"left": xs.min() < 32, "right": xs.max() > 31, "top": ys.min() < 32, "bottom": ys.max() > 31}
            assert all(middle[word] for word in ask.answer.split())


def test_a_uniform_guess_is_what_blind_means(asked):
    zero, shuffled = tiny.blind(asked, "zero"), tiny.blind(asked, "shuffle")
    for q, z, s in zip(asked, zero, shuffled, strict=True):
        assert (z.prompt, z.answer, s.prompt, s.answer) == (q.prompt, q.answer, q.prompt, q.answer)
        assert z.image.getcolors() == [(64 * 64, model.MEAN_RGB)]
        assert s.image_id != q.image_id
    for capability in tiny.CAPABILITIES:
        before = Counter(q.image_id for q in asked if q.capability == capability)
        assert before == Counter(q.image_id for q in shuffled if q.capability == capability)
    with pytest.raises(ValueError, match="shuffle"):
        tiny.blind(asked, "noise")
    with pytest.raises(ValueError, match="too few pictures"):
        tiny.blind(asked[:1], "shuffle")


def test_zero_mode_is_zero_for_the_model(loaded, asked):
    _, processor = loaded
    q = tiny.blind(asked[:1])[0]
    inputs = processor(images=[q.image], text=[q.prompt], return_tensors="pt")
    assert inputs["pixel_values"].abs().max() == 0


def test_checkpoint_is_small_stock_and_complete():
    assert sum(f.stat().st_size for f in tiny.CHECKPOINT.iterdir()) <= 8 * 2**20
    weights = load_file(tiny.CHECKPOINT / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    net, info = LlavaForConditionalGeneration.from_pretrained(tiny.CHECKPOINT, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in net.parameters()) == 2_279_936


def test_one_image_becomes_256_placeholders(loaded, asked):
    _, processor = loaded
    inputs = processor(images=[asked[0].image], text=[asked[0].prompt], return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert (ids == model.IMAGE).sum() == model.VISUAL_TOKENS == 256
    assert ids[0] == model.BOS
    assert model.UNK not in ids
    assert ids[-1] == model.ANSWER


def test_greedy_answers_are_right(loaded, asked):
    wanted = [[q for q in asked if q.capability == c][:12] for c in LEARNED]
    scores = score(*loaded, [q for group in wanted for q in group])
    assert sum(s.n for s in scores.values()) == 96
    assert sum(s.answer * s.n for s in scores.values()) / 96 >= 0.9
    assert sum(s.stopped * s.n for s in scores.values()) / 96 >= 0.9


def right(loaded, questions: list[tiny.Question], method: str, **options: Any) -> float:
    """The share of right answers with 11 % of the visual tokens, the plain mean over kinds."""
    with vtprune.patch(loaded[0], method, keep=0.11, **options):
        scores = score(*loaded, questions)
    return sum(s.answer for s in scores.values()) / len(scores)


@pytest.mark.parametrize("method", ["pyramiddrop", "sparsevlm", "transprune"])
def test_kept_positions_read_digits_and_renumbered_ones_do_not(loaded, asked, method):
    digits = [q for q in asked if q.capability == "ocr"]
    assert right(loaded, digits, method) > 0.6
    assert right(loaded, digits, method, positions="compact") < 0.4


def test_no_schedule_begins_before_the_text_has_looked(loaded, asked):
    """What the first layer attends to says less than what the layers behind it do: the floor of schedules."""
    few = [q for c in tiny.CAPABILITIES for q in [q for q in asked if q.capability == c][:16]]
    first, behind = (right(loaded, few, "fastv", layer=layer) for layer in (1, FLOOR))
    assert behind > first + 0.1


def test_score_tells_wrong_from_right(loaded, asked):
    colors = [q for q in asked if q.capability == "color"][:16]
    wrong = [replace(q, answer=next(c for c in scenes.COLOR_NAMES if c != q.answer)) for q in colors]
    assert score(*loaded, wrong)["color"].answer <= 0.1
    unfinished = [replace(q, answer=q.answer.split()[0]) for q in asked if q.template == "where"][:16]
    seen = score(*loaded, unfinished)["position"]
    assert seen.answer >= 0.9  # "top" of "top left" is right
    assert seen.stopped <= 0.1  # and is not followed by the end token


def test_left_padded_batch_equals_singles(loaded, asked):
    net, processor = loaded
    picked = [next(q for q in asked if q.capability == c) for c in ("shape", "relation", "ocr", "easy-yesno")]

    def logits(group):
        inputs = processor(
            images=[q.image for q in group], text=[q.prompt for q in group], return_tensors="pt", padding=True
        )
        with torch.inference_mode():
            return net(**inputs).logits[:, -1]

    together = logits(picked)
    for row, q in zip(together, picked, strict=True):
        torch.testing.assert_close(row, logits([q])[0], atol=1e-3, rtol=1e-4)


def test_packed_questions_equal_single_ones(loaded, asked):
    """The training forward (packed, blocked attention, cut last layers) has the stock model's logits."""
    from vtprune.evals.toys.image.packing import pack

    net, processor = loaded
    q = next(q for q in asked if q.capability == "relation")
    texts = (
        "what number is written ?",
        q.prompt.split("<image> ")[1].removesuffix(" answer:"),
        "where is the red shape ?",
    )
    rows = [asks.Ask(t, "yes", "exist", "exist", t, 2) for t in texts]
    inputs = processor(images=[q.image], text=[q.prompt], return_tensors="pt")
    batch = pack([scenes.np.asarray(q.image)], [rows], {}, False)
    with torch.inference_mode():
        features, _ = fast.tower_features(net, inputs["pixel_values"])
        visual = fast.project(net, features)
        hidden = fast.question_hidden(net, visual, batch.ids, batch.segments, batch.positions)
        packed = hidden @ net.get_input_embeddings().weight.T
        for segment, text in enumerate(texts):
            full = processor(images=[q.image], text=[f"<s> <image> {text} answer: yes"], return_tensors="pt")
            single = net(**full).logits[0, fast.PREFIX :]
            torch.testing.assert_close(packed[0][batch.segments[0] == segment], single, atol=1e-3, rtol=1e-4)


def test_training_runs_and_resumes(tmp_path: Path):
    pytest.importorskip("easy_vqa", reason="training reads the train split of the easy-vqa package")
    from vtprune.evals.toys.image.train import Trainer, train

    whole = train(tmp_path / "whole", scale=1e-3, progress=False)
    stopped = Trainer(tmp_path / "stopped", seed=0, scale=1e-3)
    stopped.out.mkdir()
    for _ in range(5):
        stopped.step()
    stopped.save()
    stopped.close()
    resumed = train(tmp_path / "stopped", scale=1e-3, progress=False)
    expected, got = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    LlavaForConditionalGeneration.from_pretrained(resumed)
    LlavaProcessor.from_pretrained(resumed)
    with pytest.raises(ValueError, match="another folder"):
        train(tmp_path / "stopped", seed=1, scale=1e-3, progress=False)
