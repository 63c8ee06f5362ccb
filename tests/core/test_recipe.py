"""`vtprune.Recipe`: stages as a document, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import vits

import vtprune
from vtprune import Assignment, Method, Recipe, Stage, Visual, registry

# Other values than the defaults, of every option that a method takes a choice of.
OTHER: dict[str, dict[str, Any]] = {
    "aim_inllm": {"rates": (0.5, 0.25, 0.0)},
    "dycoke_kv": {"layer": 4},
    "fastv": {"layer": 3},
    "flowcut": {"unit": "patch", "count": "batch", "llm_layer": 2},
    "hiprune": {"alpha": 0.2},
    "holitom": {"tau": 0.65, "beta": None, "inner": False},
    "lazyllm": {"layers": (2, 5), "ratios": (0.5, 0.25)},
    "random": {"seed": 7},
    "sparsevlm": {"version": "v1", "preset": 64},
    "spatten": {"heads": 0.5, "values": 0.9},
    "todre": {"objective": "kcenter", "pivot": "random", "seed": 2, "threshold": None},
    "transprune": {"history": (1, 2)},
    "visionzip": {"contextual": 3, "merge_mode": "average", "order": "official", "fallback": "error"},
}
NAMES = [cls.name for cls in vtprune.methods()]
BARE = [name for name in NAMES if registry.required(registry.get(name))]
DEPTH = 28


def round_trip(stages: list[Stage]) -> Recipe:
    recipe = Recipe.of(stages)
    text = recipe.to_json()
    again = Recipe.from_json(text)
    assert list(again.stages) == stages
    assert again == recipe
    assert again.to_json() == text
    assert [type(stage.method) for stage in again.stages] == [type(stage.method) for stage in stages]
    return again


def test_every_method_can_be_made_without_options() -> None:
    """What the round trips below rely on, to leave none out."""
    assert not BARE
    assert set(OTHER) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_comes_back_with_its_options(name: str) -> None:
    for options in ({}, OTHER.get(name, {})):
        method = vtprune.create(name, **options)
        again = round_trip([Stage(method.default_where(), method, keep=0.25)]).stages[0].method
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            ours, theirs = getattr(method, field.name), getattr(again, field.name)
            assert (ours, type(ours)) == (theirs, type(theirs)), field.name


@pytest.mark.parametrize("keep", [0.25, 1.0, 64, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_published_schedule_comes_back_as_its_stages(name: str, keep: float | int) -> None:
    stages = vtprune.create(name).stages(keep, DEPTH)
    again = round_trip(stages)
    assert [(s.where, s.keep, type(s.keep)) for s in again.stages] == [(s.where, s.keep, type(s.keep)) for s in stages]
    if name in ("holitom", "todre") and keep != 1.0:
        assert len(again.stages) > 1


METHOD = vtprune.create("divprune")
STAGES = [
    Stage("pre_llm", METHOD, keep=0.25, per="crop", newlines="drop", positions="compact"),
    Stage("llm", METHOD, keep_total=64, per="sample", clips=(8, 4)),
    Stage(8, METHOD, keep=3),
    Stage(("vit", 2), METHOD, keep=0.5),
    Stage(("vit", -1), METHOD, keep=0.5),
    Stage(("vit", slice(1, None)), METHOD, keep=0.5),
    Stage(("vit", slice(0, 12, 3)), METHOD, keep_total=1.0),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: str(s.where))
def test_every_part_of_a_stage_comes_back(stage: Stage) -> None:
    again = round_trip([stage]).stages[0]
    for field in dataclasses.fields(Stage):
        ours, theirs = getattr(stage, field.name), getattr(again, field.name)
        assert (ours, type(ours)) == (theirs, type(theirs)), field.name


def test_the_document() -> None:
    recipe = Recipe.of(Stage(("vit", slice(1, None)), vtprune.create("random", seed=3), keep=8))
    assert json.loads(recipe.to_json()) == {
        "schema": "vtprune.recipe",
        "version": 1,
        "vtprune": vtprune.__version__,
        "stages": [
            {
                "where": ["vit", {"start": 1, "stop": None, "step": None}],
                "method": "random",
                "options": {"seed": 3},
                "keep": 8,
                "keep_total": None,
                "per": "image",
                "newlines": "compete",
                "positions": "keep",
                "clips": None,
            }
        ],
    }


def test_two_words_for_one_place() -> None:
    stage = Stage("pre_llm", METHOD, keep=0.5)
    assert stage == Stage("llm", METHOD, keep=0.5)
    document = json.loads(Recipe.of(stage).to_json())
    for word in ("pre_llm", "llm"):
        document["stages"][0]["where"] = word
        assert Recipe.from_json(json.dumps(document)).stages == (stage,)
    model, batch = families.model("llava"), families.inputs("llava", (1, 2))
    kept = []
    for word in ("pre_llm", "llm"):
        with torch.no_grad(), vtprune.patch(model, Stage(word, METHOD, keep=0.5)) as handle:
            kept.append((model(**batch).logits, handle.last.index))
    assert torch.equal(kept[0][0], kept[1][0])
    assert torch.equal(kept[0][1], kept[1][1])


def test_patch_takes_a_recipe_and_the_handle_gives_one(tmp_path: Path) -> None:
    model, batch = families.model("llava"), families.inputs("llava", (1, 2))
    with torch.no_grad(), vtprune.patch(model, "todre", keep=0.5, seed=3) as handle:
        wanted = model(**batch).logits
        handle.recipe.save(tmp_path / "recipe.json")
        assert list(handle.recipe.stages) == handle.stages
    with torch.no_grad(), vtprune.patch(model, Recipe.load(tmp_path / "recipe.json")) as again:
        assert torch.equal(model(**batch).logits, wanted)
        assert again.stages == handle.stages
    with pytest.raises(TypeError, match=r"keep, per cannot be combined with stages"):
        vtprune.patch(model, handle.recipe, keep=0.5, per="crop")


def test_a_plain_vision_transformer_takes_one_too() -> None:
    model, images = vits.model("timm-deit"), vits.images()
    with torch.no_grad(), vtprune.patch(model, "tome", keep=0.5) as handle:
        wanted, recipe = vits.run(model, images), handle.recipe
    with torch.no_grad(), vtprune.patch(model, Recipe.from_json(recipe.to_json())):
        assert torch.equal(vits.run(model, images), wanted)


GOOD = json.loads(Recipe.of(Stage("llm", METHOD, keep=0.25)).to_json())
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("schema", "vtprune.recipes", ValueError, "schema='vtprune.recipes': this reads 'vtprune.recipe'"),
    ("version", 2, ValueError, "version=2 .*this vtprune reads 1"),
    ("version", True, ValueError, "version=True"),
    ("vtprune", 1, TypeError, "vtprune=1"),
    ("stages", {}, TypeError, "stages={}"),
    ("stages", [], ValueError, "an empty list of stages"),
    ("stages", [3], TypeError, "stage 0 is 3: it must be an object with the keys where, method"),
    ("author", "me", ValueError, "unknown key 'author' in the recipe; valid keys: schema, version, vtprune, stages"),
    ("stages.0.kep", 1, ValueError, "unknown key 'kep' in stage 0; valid keys: where, method, options, keep, "),
    ("stages.0.method", "divprun", ValueError, "unknown method 'divprun' .*did you mean 'divprune'.*choose one of: "),
    ("stages.0.method", 4, TypeError, "method=4 in stage 0"),
    ("stages.0.options", {"sed": 1}, ValueError, "divprune has no option 'sed' in stage 0; valid options: "),
    ("stages.0.options", [], TypeError, r"options=\[\] in stage 0"),
    ("stages.0.where", "in_llm", ValueError, "where='in_llm' in stage 0: choose 'pre_llm'"),
    ("stages.0.where", ["tower", 1], ValueError, r"where=\['tower', 1\]"),
    (
        "stages.0.where",
        ["vit", {"begin": 1}],
        ValueError,
        "unknown key 'begin' in where .*: start, stop, step",
    ),
    ("stages.0.where", 1.5, ValueError, "where=1.5"),
    ("stages.0.where", True, ValueError, "where=True"),
    ("stages.0.keep", 0, ValueError, "keep=0 keeps nothing"),
    ("stages.0.keep", "0.5", TypeError, "keep='0.5' is a str"),
    ("stages.0.per", "tile", ValueError, "per='tile': choose 'image' or"),
    ("stages.0.newlines", "stay", ValueError, "newlines='stay': choose"),
    ("stages.0.positions", "new", ValueError, "positions='new': choose"),
    ("stages.0.clips", [2], ValueError, r"clips=\(2,\) divides samples"),
]


@pytest.mark.parametrize(("path", "value", "error", "match"), BAD)
def test_a_document_with_a_fault_is_refused(path: str, value: Any, error: type[Exception], match: str) -> None:
    document = json.loads(json.dumps(GOOD))
    *parents, key = path.split(".")
    place = document
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    place[key] = value
    with pytest.raises(error, match=match):
        Recipe.from_json(json.dumps(document))


@pytest.mark.parametrize("key", [*GOOD, *(f"stages.{key}" for key in GOOD["stages"][0])])
def test_every_key_is_asked_for(key: str) -> None:
    document = json.loads(json.dumps(GOOD))
    place = document["stages"][0] if "." in key else document
    del place[key.split(".")[-1]]
    with pytest.raises(ValueError, match=f"lacks '{key.split('.')[-1]}'"):
        Recipe.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "this recipe is no JSON"),
        ('{"schema": 1, "schema": 2}', "'schema' stands twice"),
        ('{"keep": NaN}', "NaN in a recipe"),
    ],
)
def test_what_is_no_document(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Recipe.from_json(text)


def test_what_cannot_be_written() -> None:
    class Mine(Method):
        def __call__(self, v: Visual) -> Assignment:
            return Assignment(torch.arange(v.budget or 1))

    with pytest.raises(ValueError, match=r"Mine is not the method registered as ''.*@vtprune\.register"):
        Recipe.of(Stage("llm", Mine(), keep=0.5))
    with pytest.raises(TypeError, match=r"pass a sequence of vtprune\.Stage"):
        Recipe.of([vtprune.create("divprune")])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"where='middle': choose 'pre_llm'"):
        Recipe.of(Stage("middle", METHOD, keep=0.5))
    recoverable = vtprune.create("recoverable", text_similarity=lambda v: v.x[:, 0])
    with pytest.raises(ValueError, match=r"option 'text_similarity' of recoverable is <function .*finite numbers"):
        Recipe.of(Stage("llm", recoverable, keep=0.5))
    with pytest.raises(ValueError, match=r"option 'seed' of random is nan"):
        Recipe.of(Stage("llm", vtprune.create("random", seed=float("nan")), keep=0.5))
