"""The embedded tiny Qwen2.5-VL: balanced questions about clips, blind controls, a checkpoint that answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vtprune
from vtprune.evals.accuracy import Exam, evaluate, plans, prepare
from vtprune.evals.toys import video as tiny_video

pytest.importorskip("torchvision", reason="the stock video processor needs it")

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from vtprune.evals.toys.packing import lay, word_by_word
from vtprune.evals.toys.video import asks, clips, fast, model


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny_video.load()


@pytest.fixture(scope="module")
def asked() -> list[tiny_video.Question]:
    return tiny_video.questions(per_capability=48)


def as_rows(questions: list[tiny_video.Question]) -> list[tuple]:
    return [(q.video.frames.tobytes(), q.video_id, q.prompt, q.answer, q.capability, q.template) for q in questions]


def test_questions_are_complete_ordered_and_seeded(asked) -> None:
    assert [q.capability for q in asked] == [c for c in tiny_video.CAPABILITIES for _ in range(48)]
    assert all(q.video.frames.shape == (16, 48, 48, 3) for q in asked)
    assert as_rows(tiny_video.questions(per_capability=48)) == as_rows(asked)
    assert as_rows(tiny_video.questions(per_capability=48, seed=5)) != as_rows(asked)
    some = tiny_video.questions(per_capability=3, capabilities=["count", "first"])
    assert [q.capability for q in some] == ["first"] * 3 + ["count"] * 3
    with pytest.raises(ValueError, match="choose from first, order"):
        tiny_video.questions(capabilities=["colour"])
    with pytest.raises(ValueError, match="at least 1"):
        tiny_video.questions(per_capability=0)


def test_answers_balance_per_template(asked) -> None:
    used = defaultdict(Counter)
    for q in asked:
        used[q.template][q.answer] += 1
    assert {t: len(c) for t, c in used.items()} == {
        "first": 6, "last": 6, "order": 2, "direction": 4, "count": 4, "shape": 3,
    }  # fmt: skip
    assert all(max(c.values()) - min(c.values()) <= 1 for c in used.values())


def test_answers_are_true_of_the_pixels() -> None:
    """Retell every clip from its pixels: when a colour first shows, and where its middle goes."""
    rng = clips.heldout_rng(1)
    palette = np.array([clips.COLORS[name] for name in clips.COLOR_NAMES], np.int16)
    for _ in range(60):
        clip = clips.make_clip(rng)
        near = np.abs(clip.frames[..., None, :].astype(np.int16) - palette).max(-1) < 24
        shown = near.sum((1, 2)) > 20  # [16, colours]
        seen = [i for i in np.argsort(np.where(shown.any(0), shown.argmax(0), 99), kind="stable") if shown[:, i].any()]
        told = {ask.text: ask.answer for kind in asks.ASKERS.values() for ask in kind(clip, rng)}
        assert told["how many shapes appear ?"] == str(len(seen))
        if len(seen) > 1:
            assert told["which color came first ?"] == clips.COLOR_NAMES[seen[0]]
            assert told["which color came last ?"] == clips.COLOR_NAMES[seen[-1]]
        for color in seen:
            name = clips.COLOR_NAMES[color]
            times = np.nonzero(shown[:, color])[0]
            first, last = (np.argwhere(near[t, ..., color]).mean(0) for t in (times[0], times[-1]))
            (dy, dx), way = last - first, told.get(f"which way does {name} move ?")
            if way is None:
                assert max(abs(dx), abs(dy)) < 1.5
            else:
                step = np.array(clips.WAYS[way])
                assert step @ (dx, dy) >= len(times) - 2
        for text, answer in told.items():
            if text.startswith("did "):
                _, a, _, _, b, _ = text.split()
                earlier = seen.index(clips.COLOR_NAMES.index(a)) < seen.index(clips.COLOR_NAMES.index(b))
                assert answer == ("yes" if earlier else "no")


def test_heldout_clips_are_not_training_clips() -> None:
    rng = clips.heldout_rng(777001)
    heldout = {clips.make_clip(rng).frames.tobytes() for _ in range(100)}
    for step in range(5):
        for seed in (0, 777001):
            rng = clips.training_rng(seed, step)
            assert not heldout & {clips.make_clip(rng).frames.tobytes() for _ in range(16)}


def test_blind_questions_keep_everything_but_the_clip(loaded, asked) -> None:
    zero, shuffled = tiny_video.blind(asked, "zero"), tiny_video.blind(asked, "shuffle")
    for q, z, s in zip(asked, zero, shuffled, strict=True):
        assert (z.prompt, z.answer, s.prompt, s.answer) == (q.prompt, q.answer, q.prompt, q.answer)
        assert s.video_id != q.video_id
    inputs = prepare(*loaded, [zero[0].prompt], [zero[0].video])
    assert inputs["pixel_values_videos"].abs().max() < 1e-6


def test_checkpoint_is_small_stock_and_complete() -> None:
    assert sum(f.stat().st_size for f in tiny_video.CHECKPOINT.iterdir()) <= 8 * 2**20
    weights = load_file(tiny_video.CHECKPOINT / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    net, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_video.CHECKPOINT, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in net.parameters()) == 1_101_376


def test_one_clip_becomes_288_placeholders(loaded, asked) -> None:
    inputs = prepare(*loaded, [asked[0].prompt], [asked[0].video])
    ids = inputs["input_ids"][0]
    assert (ids == model.VIDEO).sum() == model.VISUAL_TOKENS == 288
    assert inputs["second_per_grid_ts"] == pytest.approx(0.25)
    assert ids[0] == model.BOS
    assert model.UNK not in ids
    assert ids[-1] == model.ANSWER


def test_greedy_answers_are_right(loaded, asked) -> None:
    picked = [q for c in tiny_video.CAPABILITIES for q in [q for q in asked if q.capability == c][:16]]
    right, stopped = Exam(*loaded, picked, batch=20).run()
    assert right.mean() >= LEARNED
    assert stopped.mean() >= LEARNED


LEARNED = 0.9


def test_kept_features_change_no_answer(loaded, asked) -> None:
    """The features of a clip, handed over, give what encoding it anew gives: the grid must travel with them."""
    picked = asked[::24]
    held = Exam(*loaded, picked, batch=4)
    assert held.answers() == held.answers(needs_tower=True) == Exam(*loaded, picked, batch=1, memory=0).answers()
    with vtprune.patch(loaded[0], "divprune", keep=0.25):
        assert held.answers() == held.answers(needs_tower=True)


def test_rules_about_frames_see_the_frames(loaded, asked) -> None:
    exam = Exam(*loaded, asked[::48], batch=5)
    exam.answers()  # features are kept from here on
    for plan in plans(["evs", "divprune"], [0.1], seeds=1):
        with plan.applied(loaded[0]) as handle:
            assert not plan.needs_tower
            exam.answers()
            assert {unit.grid for unit in handle.last.units} == {(8, 6, 6)}, plan.label


def test_methods_that_a_model_cannot_take_are_noted(loaded, asked) -> None:
    few = asked[::24]
    report = evaluate(*loaded, few, ["divprune", "flowcut"], [0.25], seeds=1, progress=False, skip=True)
    names = {row["method"] for row in report.rows}
    assert {"dense", "blind-zero", "random", "uniform", "divprune"} <= names
    notes = [note for note in report.notes if note.startswith("Not run")]
    assert ("flowcut" in names) != any("flowcut" in note for note in notes)


def test_packed_questions_equal_single_ones(loaded, asked) -> None:
    """The training forward (windows by hand, packed questions, blocked attention) has the stock model's logits."""
    net, processor = loaded
    clip = next(q.video for q in asked if q.capability == "order")
    texts = ("which color came first ?", "did red come before blue ?", "how many shapes appear ?")
    rows = [asks.Ask(t, "yes", "order", "order", t, 2) for t in texts]
    batch = lay(fast.patches([clip.frames]).float(), [rows], word_by_word(model.VOCABULARY), 1, {}, False)
    with torch.inference_mode():
        inputs = prepare(net, processor, [texts[0]], [clip])
        # Their bfloat16 is what training sees; compared are the values of the processor.
        torch.testing.assert_close(batch.pixels.flatten(0, 2), inputs["pixel_values_videos"], atol=0.02, rtol=0.01)
        visual = fast.visual_tokens(net, inputs["pixel_values_videos"].view(1, clips.SLOTS, -1, 96))
        hidden = fast.question_hidden(net, visual, batch.ids, batch.segments, batch.positions)
        packed = hidden @ net.get_input_embeddings().weight.T
        for segment, text in enumerate(texts):
            full = processor(
                videos=[clip.frames],
                video_metadata=[clip.metadata],
                text=[f"<s> <|vision_start|> <|video_pad|> <|vision_end|> {text} answer: yes"],
                return_tensors="pt",
            )
            single = net(**full).logits[0, fast.PREFIX :]
            torch.testing.assert_close(packed[0][batch.segments[0] == segment], single, atol=2e-3, rtol=1e-3)


def test_training_runs_and_resumes(tmp_path: Path) -> None:
    from vtprune.evals.toys.video.train import VideoTrainer, train

    whole = train(tmp_path / "whole", scale=1e-3, progress=False)
    stopped = VideoTrainer(tmp_path / "stopped", seed=0, scale=1e-3)
    stopped.out.mkdir()
    for _ in range(5):
        stopped.step()
    stopped.save()
    stopped.close()
    resumed = train(tmp_path / "stopped", scale=1e-3, progress=False)
    expected, got = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    Qwen2_5_VLForConditionalGeneration.from_pretrained(resumed)
    Qwen2_5_VLProcessor.from_pretrained(resumed)
    with pytest.raises(ValueError, match="another folder"):
        train(tmp_path / "stopped", seed=1, scale=1e-3, progress=False)
