"""FlowCut against a slow restatement: CLIP blocks walked by hand in float64, one patch at a time where it scores."""

from __future__ import annotations

import math
from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Stage, Visual
from vtprune.methods.in_vit.flowcut import CLS, CLS_VALUE, MEAN_QUERY, VALUE_NORM

LAYERS = 9
SIDE = 7


@pytest.fixture(scope="module")
def deep() -> Any:
    """A tiny LLaVA whose tower has blocks enough for a schedule: its projector reads the output of the last but one."""
    config = families._config(
        "llava",
        families._text("llama"),
        families._tower("clip_vision_model", 4 * SIDE, layers=LAYERS),
        **families._INDEX,
        image_seq_length=SIDE**2,
    )
    torch.manual_seed(0)
    model = families.transformers.LlavaForConditionalGeneration._from_config(config)
    families._spread(model)
    return model.eval()


def inputs(images: int, only: int | None = None) -> dict[str, Tensor]:
    """Prompts of one image each; brighter and brighter, so that attention concentrates differently."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(images, 3, 4 * SIDE, 4 * SIDE, generator=generator)
    pixels *= torch.linspace(0.3, 3.0, images)[:, None, None, None]
    ids = torch.tensor([[families.BOS, *[families.IMAGE] * SIDE**2, 31, 32]]).expand(images, -1)
    rows = slice(None) if only is None else slice(only, only + 1)
    return {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "pixel_values": pixels[rows]}


def run(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Any]:
    with vtprune.patch(model, "flowcut", **options) as handle, torch.no_grad():
        return model(**batch).logits, handle.last


# -- the oracle -------------------------------------------------------------------------------------------------------


def attention(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax [H, n, n], values [H, n, d] and the output [n, C] of one CLIP attention, x [n, C] normalised."""
    a = block.self_attn
    heads, width = a.num_heads, a.head_dim
    q, k, v = (f(x).view(-1, heads, width).transpose(0, 1) for f in (a.q_proj, a.k_proj, a.v_proj))
    weights = (q @ k.mT / math.sqrt(width)).softmax(-1)
    return weights, v, a.out_proj((weights @ v).transpose(0, 1).flatten(1))


@torch.no_grad()
def by_hand(model: Any, pixels: Tensor, target: int) -> tuple[list[int], list[int], Tensor]:
    """(patches left, tokens after every block, their states) of one image [1, 3, H, W], in float64."""
    tower = reference.copy.deepcopy(model.base_model.vision_tower).double()
    x = tower.pre_layrnorm(tower.embeddings(pixels.double()))[0]
    patches, total, lengths = list(range(SIDE**2)), None, []
    for i, block in enumerate(tower.encoder.layers[: LAYERS - 1]):
        weights, values, out = attention(block, block.layer_norm1(x))
        x = x + out
        x = x + block.mlp(block.layer_norm2(x))
        n, left = len(patches), (LAYERS - 2) - i - 1
        if n > target:
            p, scores = score(weights, values)
            total = scores if total is None else [0.5 * old + 0.5 * new for old, new in zip(total, scores, strict=True)]
            if left % 2 == 0:
                keep = target if left == 0 else max(n - rate(p, n, target, left), target)
                best = sorted(sorted(range(n), key=lambda j: -total[j])[:keep])
                patches, total = [patches[j] for j in best], [total[j] for j in best]
                x = torch.stack([x[0], *[x[1 + j] for j in best]])
        lengths.append(len(patches) + 1)
    return patches, lengths, x[1:]


def score(weights: Tensor, values: Tensor) -> tuple[list[float], list[float]]:
    heads, tokens = weights.shape[:2]
    a = [sum(float(weights[h, 0, j]) for h in range(heads)) / heads for j in range(1, tokens)]
    alike = [torch.stack([values[h, 0] @ values[h, j] for j in range(tokens)]).softmax(0) for h in range(heads)]
    b = [sum(float(alike[h][j]) for h in range(heads)) / heads for j in range(1, tokens)]
    e = [float(values[:, j].mean(0).abs().sum()) for j in range(1, tokens)]
    p, q = [x / sum(a) for x in a], [x / sum(b) for x in b]
    return p, [(pj + qj) * ej for pj, qj, ej in zip(p, q, e, strict=True)]


def rate(p: list[float], n: int, target: int, left: int) -> int:
    entropy = -sum(x * math.log(x) for x in p if x > 0) / math.log(n)
    return round((n - target) / math.sqrt(left) * (1 - entropy**2))


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [4, 12, 30])
def test_schedule_scores_and_states(deep: Any, target: int) -> None:
    batch = inputs(3)
    _, last = run(deep, batch, keep=target)
    for image in range(3):
        patches, lengths, _ = by_hand(deep, batch["pixel_values"][image : image + 1], target)
        mine = [u for u in last.tower_units if u.image == image]
        assert last.units[image].idx.tolist() == patches
        counts = {u.where[1]: len(u.idx) for u in mine}
        assert [counts.get(k, target) + 1 for k in range(1, LAYERS - 1)] == lengths[:-1]
    assert last.tower_lengths["image"][-1] == target + 1


def test_counts_follow_each_image_or_the_batch(deep: Any) -> None:
    """By default a batch equals its images; as in the official code, the one that prunes most decides for all."""
    batch = inputs(3)
    together, last = run(deep, batch, keep=8)
    ways = [tuple(len(u.idx) for u in last.tower_units if u.image == i) for i in range(3)]
    assert len(set(ways)) > 1, "the test wants images with schedules of their own"
    for i in range(3):
        alone, own = run(deep, inputs(3, only=i), keep=8)
        assert torch.equal(own.units[0].idx, last.units[i].idx)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=2e-5)
    _, last = run(deep, batch, keep=8, count="batch")
    shared = {tuple(len(u.idx) for u in last.tower_units if u.image == i) for i in range(3)}
    assert len(shared) == 1
    assert all(a <= min(b) for a, b in zip(shared.pop(), zip(*ways)))


def test_the_budget_is_due_before_or_after_the_last_block(deep: Any) -> None:
    depth = LAYERS - 1
    for end, last_block in (("before", depth - 1), ("after", depth)):
        _, last = run(deep, inputs(1), keep=8, end=end)
        assert last.tower_units[-1].where == ("vit", last_block)
        assert len(last.tower_units[-1].idx) == len(last.units[0].idx) == 8


@pytest.mark.parametrize("family", ["paligemma", "qwen2_vl", "qwen2_5_vl", "internvl", "gemma3"])
def test_families(family: str) -> None:
    """Exactly the budget of every image, whatever the tower; without CLS the mean query stands in, and that is said."""
    model, batch = families.model(family), families.inputs(family, rows=(2, 1))
    _, last = run(model, batch, keep=0.5)
    sizes = {tuple(unit): len(unit) for row in batch.units for unit in row}
    tiles = {"internvl": 9}  # a budget per tile
    for unit in last.units:
        size = next(n for positions, n in sizes.items() if set(unit.positions.tolist()) <= set(positions))
        each = tiles.get(family, size)
        assert len(unit.idx) == round(0.5 * each) * (size // each)
    assert any("mean query" in note for note in last.notes) == (family != "internvl")


def test_without_cls_the_mean_query_flows() -> None:
    generator = torch.Generator().manual_seed(2)
    g, e = torch.rand(10, generator=generator), torch.rand(10, generator=generator)
    answer = vtprune.create("flowcut")(Visual(torch.zeros(10, 3), 4, signals={MEAN_QUERY: g, VALUE_NORM: e}))
    theirs = sorted(range(10), key=lambda j: -float(g[j] / g.sum() * e[j]))[:4]
    assert answer.idx.tolist() == sorted(theirs)


def test_zero_attention_is_no_nan() -> None:
    """An attention weight that underflows to 0 has no entropy; the official code fails there."""
    row = torch.tensor([0.9, 0.1, 0.0, 0.0, 0.0, 0.0])
    unit = Visual(torch.zeros(6, 2), 2, signals={CLS: row, CLS_VALUE: row, VALUE_NORM: torch.ones(6)}, block=(1, 5))
    assert vtprune.create("flowcut")(unit).idx.tolist() == [0, 1, 2, 3]
    ties = {CLS: torch.zeros(6), CLS_VALUE: torch.zeros(6), VALUE_NORM: torch.ones(6)}
    assert vtprune.create("flowcut")(Visual(torch.zeros(6, 2), 2, signals=ties)).idx.tolist() == [0, 1]


def test_a_stage_at_one_block_prunes_at_once(deep: Any) -> None:
    with vtprune.patch(deep, Stage(("vit", 3), vtprune.create("flowcut"), keep=8)) as handle, torch.no_grad():
        deep(**inputs(1))
        (unit,) = handle.last.tower_units
    assert (unit.where, unit.n, len(unit.idx)) == (("vit", 3), SIDE**2, 8)


def by_hand_in_llm(model: Any, batch: Any, layer: int, row: int) -> tuple[list[int], list[float]]:
    """(positions of a sample's visual tokens, their scores) from the dense layer before, head by head in float64."""
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = []
    undo = vtprune.tap.attach(
        model.get_decoder().layers[layer - 1].self_attn, lambda m, q, k, v, mask, scale: seen.append((q, k, v, scale))
    )
    with torch.no_grad():
        model(**batch)
    undo()
    ((q, k, v, scale),) = seen
    visual = [
        p for p, token in enumerate(batch["input_ids"][row].tolist()) if token in (families.IMAGE, families.VIDEO)
    ]
    group = q.shape[1] // k.shape[1]
    p, flow = [0.0] * len(visual), [0.0] * len(visual)
    for head in range(q.shape[1]):
        keys, values = k[row, head // group].double(), v[row, head // group].double()
        attention = torch.stack([scale * q[row, head, -1].double() @ keys[j] for j in visual]).softmax(0)
        alike = torch.stack([values[-1] @ values[j] / math.sqrt(values.shape[1]) for j in visual]).softmax(0)
        for at in range(len(visual)):
            p[at] += float(attention[at]) / q.shape[1]
            flow[at] += float(alike[at]) / q.shape[1]
    norms = [float(v[row, :, j].double().mean(0).abs().sum()) for j in visual]
    return visual, [(a + b) * e for a, b, e in zip(p, flow, norms, strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "mistral3"])
def test_second_stage_in_the_llm(family: str, attention: str) -> None:
    """A left-padded batch, all images of a sample together."""
    model, batch = families.model(family, attention), families.inputs(family, rows=(2, 1))
    with vtprune.patch(model, "flowcut_llm", keep=9) as handle, torch.no_grad():
        model(**batch)
        units = handle.last.units
    for row, unit in enumerate(units):
        visual, scores = by_hand_in_llm(model, batch, 2, row)
        torch.testing.assert_close(unit.scores.double(), torch.tensor(scores).double(), rtol=1e-4, atol=1e-6)
        best = sorted(sorted(range(len(visual)), key=lambda j: -scores[j])[:9])
        assert unit.positions.tolist() == [visual[j] for j in best]


@pytest.mark.parametrize("keep", [0.25, 0.8, 6])
def test_both_stages(keep: float | int) -> None:
    """Twice the budget leaves the tower, the budget the LLM's second layer."""
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    _, last = run(model, batch, keep=keep, llm_layer=2)
    final = round(keep * 25) if isinstance(keep, float) else keep
    tower = min(25, round(2 * keep * 25) if isinstance(keep, float) else 2 * keep)
    assert [len(u.idx) for u in last.units] == ([tower] if tower < 25 else []) + [final]
    text = batch["input_ids"].shape[1] - 25
    assert last.lengths == [text + tower] * 2 + [text + final] * 2


def test_signals_of_the_tower_are_refused_inside_the_llm() -> None:
    with pytest.raises(ValueError, match="a signal of the vision tower"):
        vtprune.patch(families.model("llava"), Stage(2, vtprune.create("flowcut"), keep=0.5))


@pytest.mark.parametrize(("option", "value"), [("end", "middle"), ("count", "crop")])
def test_options_are_checked(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option}='{value}': choose"):
        vtprune.create("flowcut", **{option: value})


# -- the official patch unit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.5, 2])
@pytest.mark.parametrize("family", ["qwen2_vl", "glm4v"])
def test_single_patches_become_tokens_in_the_order_they_stood(family: str, keep: float | int) -> None:
    """What the tower's last block puts out for the patches left, merged as it stands, is what the LLM is given."""
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    tower, shown = model.base_model.visual, []
    with vtprune.patch(model, "flowcut", keep=keep, unit="patch") as handle, torch.no_grad():
        hook = tower.blocks[-1].register_forward_hook(lambda m, a, out: shown.append(out), prepend=True)
        features = model.base_model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output[0]
        hook.remove()
        logits = model(**batch).logits
        last = handle.last
        (unit,) = last.units
        patches = last.tower_units[-1].positions
        each = tower.spatial_merge_size**2
        (out,) = shown
        out = out.reshape(-1, out.shape[-1])
        assert len(out) == len(patches) == each * len(unit.idx)
        assert torch.equal(unit.idx, patches[::each] // each), "a token stands where its first patch stood"
        if family == "qwen2_vl":  # GLM-4V has a norm and a convolution before its merger
            torch.testing.assert_close(features[unit.idx], tower.merger(out), rtol=0, atol=1e-6)
    assert logits.isfinite().all()
    assert len(set(unit.idx.tolist())) == len(unit.idx)


def test_the_patch_unit_drops_other_patches_than_the_block_unit() -> None:
    model, batch = families.model("qwen2_vl"), families.inputs("qwen2_vl", rows=(1, 2))
    left = {}
    for unit in ("block", "patch"):
        with vtprune.patch(model, "flowcut", keep=0.5, unit=unit) as handle, torch.no_grad():
            model(**batch)
            left[unit] = [len(u.idx) for u in handle.last.units], handle.last.index
    assert left["block"][0] == left["patch"][0], "the LLM gets the same number of tokens"
    with vtprune.patch(model, "flowcut", keep=1.0, unit="patch"), torch.no_grad():
        whole = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(whole, model(**batch).logits)


def test_where_the_patch_unit_cannot_work() -> None:
    with pytest.raises(vtprune.UnsupportedModel, match=r"several blocks.*unit='block'"):
        vtprune.patch(families.model("qwen3_vl"), "flowcut", keep=0.5, unit="patch")
    stages = [
        Stage(("vit", slice(1, None)), vtprune.create("flowcut", unit="patch"), keep=0.5),
        Stage("llm", vtprune.create("hiprune"), keep=0.2),
    ]
    with pytest.raises(vtprune.UnsupportedModel, match="unit='block'"):
        vtprune.patch(families.model("qwen2_vl"), stages)
    with pytest.raises(ValueError, match="unit='tile'"):
        vtprune.create("flowcut", unit="tile")
