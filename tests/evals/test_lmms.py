"""lmms-eval, unmodified, with our models: scores, answers, token counts, and failures that are failures.

Run by `make test-lmms`, in an environment that has lmms-eval; without a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-lmms makes an environment with it")
pytest.importorskip("skimage", reason="scikit-image is not installed: make test-lmms makes an environment with it")

import checkpoints
import lmms_tasks

import vtprune
from vtprune.evals.tasks.benchmarks import Benchmarks
from vtprune.evals.tasks.cells import DENSE, Cell
from vtprune.integrations.lmms_eval import PREFIX, RunFailed

pytestmark = pytest.mark.lmms

KEEP = 0.25
CUT = Cell("divprune", vtprune.create("divprune"), KEEP)
WHOLE = Cell("divprune", vtprune.create("divprune"), 1.0)
FLOAT32 = {"dtype": "float32"}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava_next": ("llava_hf", FLOAT32),
    "qwen2_5_vl": ("qwen2_5_vl", {"min_pixels": 1024, "max_pixels": 4096}),
    "internvl": ("internvl_hf", {}),
    "gemma3": ("gemma3", {}),
}
# Works while the model is loaded, and raises when the seventh prompt comes.
LATE = """
import sys, torch, vtprune

seen = []

@vtprune.register("late", paper="https://example.org", seam="pre_llm")
class Late(vtprune.Method):
    def __call__(self, v):
        seen.append(1)
        if len(seen) > 6:
            raise RuntimeError("the seventh prompt")
        return vtprune.Assignment(torch.arange(v.budget, device=v.x.device))

from lmms_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module", autouse=True)
def _offline() -> None:
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        pytest.skip("needs HF_HUB_OFFLINE=1 in the environment, as make test-lmms sets it")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lmms_tasks.build(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.embedded("image", tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module")
def benchmarks(toy: Path, tasks: Path) -> Benchmarks:
    names = ["vt_shapes", "vt_share", "vt_tripled", "gqa"]
    return Benchmarks(str(toy), names, include=tasks, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def stock() -> Any:
    """Run a task with a stock class of lmms-eval, its arguments given: the sorted samples of its log."""

    def run(name: str, model: Path, tasks: Path, task: str, options: dict[str, Any]) -> list[dict[str, Any]]:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.models import get_model
        from lmms_eval.tasks import TaskManager

        wrapper = get_model(name)(pretrained=str(model), device="cpu", device_map="cpu", **options)
        manager = TaskManager("ERROR", include_path=str(tasks), model_name=name)
        found = simple_evaluate(wrapper, tasks=[task], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
        return found["samples"][task]

    return run


def command(toy: Path, tasks: Path, model: str, arguments: str, *more: str, code: str = "") -> Any:
    start = ["-c", code] if code else ["-m", "lmms_eval"]
    given = f"pretrained={toy},device_map=cpu,dtype=float32,{arguments}"
    line = [sys.executable, *start, "--model", model, "--model_args", given, "--device", "cpu", "--tasks", "vt_shapes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*line, "--include_path", str(tasks), *more], env=environment, capture_output=True, text=True, cwd=tasks
    )


def logged(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results and the samples that a run of lmms-eval has written."""
    (results,), (samples,) = folder.rglob("*_results.json"), folder.rglob("*_samples_vt_shapes.jsonl")
    return json.loads(results.read_text())["results"]["vt_shapes"], [
        json.loads(line) for line in samples.read_text().splitlines()
    ]


def by_hand(toy: Path, keep: float) -> list[str]:
    """What a loop over `generate` answers to the questions of vt_shapes."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(toy)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(toy, dtype=torch.float32).eval()
    said = []
    with vtprune.patch(model, "divprune", keep=keep):
        for row in lmms_tasks.rows_of_pictures(2):
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            inputs = processor(images=[row["image"]], text=text, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            said += processor.batch_decode(ids, skip_special_tokens=True)
    return said


@pytest.fixture(scope="module")
def run(toy: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The command of lmms-eval itself, with a pruned model."""
    out = tmp_path_factory.mktemp("out")
    more = ("--output_path", str(out), "--log_samples")
    done = command(toy, tasks, "vtprune_llava_hf", f"method=divprune,keep={KEEP}", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return logged(out)


@pytest.mark.slow
def test_the_command_and_the_grid_and_a_loop_by_hand_agree(
    run: tuple[Any, Any], benchmarks: Benchmarks, toy: Path
) -> None:
    results, samples = run
    lines = list(benchmarks.answers("vt_shapes", CUT))
    said = by_hand(toy, KEEP)
    right = [float(a.strip() == row["answer"]) for a, row in zip(said, lmms_tasks.rows_of_pictures(2))]
    assert 0.5 < fmean(right) < 1, "the questions tell a good answer from a bad one"
    assert [line["answer"] for line in lines] == said
    assert [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])] == said
    assert [line["parts"] for line in lines] == [[mark] for mark in right]
    assert benchmarks.score("vt_shapes", lines) == pytest.approx(fmean(right))
    assert results["right,none"] == pytest.approx(fmean(right))


@pytest.mark.slow
def test_token_counts_are_the_pruned_ones(run: tuple[Any, Any], benchmarks: Benchmarks) -> None:
    counts = [sample["token_counts"][0] for sample in sorted(run[1], key=lambda s: s["doc_id"])]
    lines = list(benchmarks.answers("vt_shapes", CUT))
    before = [line["prompt_tokens"][0] for line in lines]
    assert len(set(before)) > 1, "prompts of several lengths, so that a count of another sample would show"
    assert [count["input_tokens"] for count in counts] == [n - 192 for n in before], "64 of 256 visual tokens are kept"
    assert all(count["output_tokens"] > 0 for count in counts)
    assert all(line["visual_tokens"] == [256, 64] for line in lines)
    assert all(line["seconds"]["ttft"] > line["seconds"]["select"] > 0 for line in lines)


def test_keeping_all_answers_as_the_stock_class(benchmarks: Benchmarks, stock: Any, toy: Path, tasks: Path) -> None:
    expected = [s["filtered_resps"][0] for s in stock("llava_hf", toy, tasks, "vt_shapes", FLOAT32)]
    assert len(set(expected)) > 3
    for cell in (WHOLE, DENSE):
        assert [line["answer"] for line in benchmarks.answers("vt_shapes", cell)] == expected
    assert [line["answer"] for line in benchmarks.answers("vt_shapes", CUT)] != expected


def test_the_mark_of_a_sample_is_told_where_their_mean_is_the_score(benchmarks: Benchmarks) -> None:
    found = {task: list(benchmarks.answers(task, DENSE)) for task in ("vt_share", "vt_tripled")}
    assert [line["parts"] for line in found["vt_share"]] == [[1.0]] * 3
    assert [line["parts"] for line in found["vt_tripled"]] == [None] * 3
    assert benchmarks.score("vt_tripled", found["vt_tripled"]) == 3.0


def test_a_task_without_its_network_is_named_and_the_others_run(benchmarks: Benchmarks) -> None:
    assert [one["name"] for one in benchmarks.tasks] == ["vt_shapes", "vt_share", "vt_tripled"]
    assert benchmarks.tasks[0] == {"name": "vt_shapes", "metric": "right", "n": 22, "source": "lmms-eval"}
    assert list(benchmarks.missing) == ["gqa"]
    assert "GQA" in benchmarks.missing["gqa"]


def test_a_method_that_raises_raises(benchmarks: Benchmarks) -> None:
    class Broken(vtprune.Method):
        name = "broken"
        paper = seam = ""

        def __call__(self, v: vtprune.Visual) -> vtprune.Assignment:
            raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        list(benchmarks.answers("vt_share", Cell("broken", Broken(), KEEP)))
    assert len(list(benchmarks.answers("vt_share", DENSE))) == 3, "and the model is as it was"


@pytest.mark.slow
def test_a_method_that_raises_later_ends_the_command(toy: Path, tasks: Path, tmp_path: Path) -> None:
    more = ("--output_path", str(tmp_path), "--log_samples")
    done = command(toy, tasks, "vtprune_llava_hf", "method=late,keep=0.5", *more, code=LATE)
    assert done.returncode == 1
    assert "the seventh prompt" in done.stderr
    assert not list(tmp_path.rglob("*.json")), "no score is written"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "nix", "keep": 0.5}, "unknown method 'nix'"),
        ({"method": "todre:nix=1", "keep": 0.5}, "todre has no option 'nix'"),
        ({"method": "divprune"}, "keep is missing"),
        ({"method": "divprune", "keep": 1.5}, "keep=1.5: use a share"),
        ({"keep": 0.5}, "keep=0.5 without a method"),
        ({"method": "divprune", "recipe": "x.json"}, "recipe=x.json carries its own"),
        ({"recipe": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_wrong_arguments_end_the_run_before_the_weights_are_loaded(arguments: dict[str, Any], told: str) -> None:
    from lmms_eval.models import get_model

    with pytest.raises(RunFailed) as caught:
        get_model(f"{PREFIX}llava_hf")(pretrained="there is no such folder", **arguments)
    assert str(caught.value).startswith("vtprune: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_survive_the_commas_of_lmms_eval(toy: Path) -> None:
    from lmms_eval.models import get_model

    cls = get_model(f"{PREFIX}llava_hf")
    told = f"pretrained={toy},device_map=cpu,method=todre:objective=kcenter;pivot=center,keep=64"
    made = cls.create_from_arg_string(told, {"device": "cpu", "batch_size": 1})
    (stage,) = made.handle.stages
    assert (stage.keep, stage.method) == (64, vtprune.create("todre", objective="kcenter", pivot="center"))


def test_a_recipe_prunes_as_its_stages_do(toy: Path, tmp_path: Path) -> None:
    from lmms_eval.models import get_model

    stages = [vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.5)]
    vtprune.Recipe.of(stages).save(tmp_path / "recipe.json")
    made = get_model(f"{PREFIX}llava_hf")(
        pretrained=toy, device="cpu", device_map="cpu", recipe=tmp_path / "recipe.json"
    )
    assert made.handle.stages == stages
    assert len(made.handle.last.units[0].idx) == 128, "the first question has been asked"


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, stock: Any, tasks: Path, tmp_path: Path) -> None:
    name, options = FAMILIES[family]
    model = checkpoints.save(family, tmp_path / family)
    expected = [s["filtered_resps"][0] for s in stock(name, model, tasks, "vt_photos", options)]
    made = Benchmarks(str(model), ["vt_photos"], include=tasks, device="cpu", options=options)
    assert [line["answer"] for line in made.answers("vt_photos", WHOLE)] == expected
    lines = list(made.answers("vt_photos", CUT))
    assert [line["answer"] for line in lines] != expected
    for line in lines:
        assert line["visual_tokens"][1] == pytest.approx(KEEP * line["visual_tokens"][0], abs=1)


def test_clips(stock: Any, tasks: Path, tmp_path: Path) -> None:
    model, options = checkpoints.embedded("video", tmp_path / "video"), {"max_pixels": 2304, "min_pixels": 2304}
    options = {**options, "max_num_frames": 8}
    expected = [s["filtered_resps"][0] for s in stock("qwen2_5_vl", model, tasks, "vt_clips", options)]
    made = Benchmarks(str(model), ["vt_clips"], include=tasks, device="cpu", options=options)
    assert [line["answer"] for line in made.answers("vt_clips", WHOLE)] == expected
    for line in made.answers("vt_clips", CUT):
        assert line["visual_tokens"][0] > 100, "several frames"
        assert line["visual_tokens"][1] == KEEP * line["visual_tokens"][0]


def test_importing_vtprune_imports_no_lmms_eval() -> None:
    code = "import sys, vtprune.integrations.lmms_eval; print('lmms_eval' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_names_of_papers_are_known_and_others_have_near_ones() -> None:
    from vtprune.evals.tasks.harness import Harness

    harness = Harness("llava_hf", "chat")
    papers = "gqa,textvqa,pope,mme,mmbench_en_dev,scienceqa_img,vizwiz_vqa,docvqa_val,chartqa,ocrbench,seedbench"
    assert len(harness.named(f"{papers},mvbench,videomme,egoschema,longvideobench".split(","))) == 15
    with pytest.raises(ValueError, match=r"no task 'popee': did you mean .*pope"):
        harness.named(["popee"])


def test_metrics_that_papers_quote_stand_in_the_files_of_lmms_eval() -> None:
    from vtprune.evals.tasks.harness import QUOTED, Harness

    harness = Harness("llava_hf", "chat")
    for task, metrics in QUOTED.items():
        path = Path(harness.manager.task_index[task]["yaml_path"])
        for metric in metrics:
            assert f"metric: {metric}\n" in path.read_text()


def test_the_prompts_of_a_task_are_those_for_the_stock_model() -> None:
    """A task may keep a prompt of its own for `qwen3_vl`, and knows no vtprune_qwen3_vl."""
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.models import get_model

    get_model(f"{PREFIX}llava_hf")
    seen: list[Any] = []

    class Stop(Exception): ...

    class Spy(ConfigurableTask):
        @property
        def model_name(self) -> Any: ...

        @model_name.setter
        def model_name(self, name: Any) -> None:
            seen.append(name)
            raise Stop

    for given in (f"{PREFIX}qwen3_vl", "qwen3_vl", None):
        with pytest.raises(Stop):
            Spy(config={"task": "x", "metadata": [{"version": 0.0}]}, model_name=given)
    assert seen == ["qwen3_vl", "qwen3_vl", None]


def test_a_model_that_lmms_eval_lacks_is_warned_of_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import vtprune.integrations.lmms_eval as ours

    monkeypatch.setitem(ours.MODELS, "of_tomorrow", ("tomorrow",))
    with pytest.warns(UserWarning, match="no model 'of_tomorrow'"):
        names = [manifest.model_id for manifest in ours.manifests()]
    assert len(names) == len(ours.MODELS) - 1


def test_no_model_of_lmms_eval_on_a_class_that_can_be_pruned_is_forgotten() -> None:
    """Read from the sources: what each model of the registry imports from transformers by the name of a class."""
    import ast
    from importlib.util import find_spec

    from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS, AVAILABLE_SIMPLE_MODELS
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    from vtprune.integrations.lmms_eval import MODELS
    from vtprune.model_adapters.family import is_supported

    ours = {cls for model_type, cls in NAMES.items() if is_supported(model_type)}
    found = set()
    for kind, table in (("simple", AVAILABLE_SIMPLE_MODELS), ("chat", AVAILABLE_CHAT_TEMPLATE_MODELS)):
        for name in table:
            spec = find_spec(f"lmms_eval.models.{kind}.{name}")
            tree = ast.parse(Path(spec.origin).read_text()) if spec and spec.origin else ast.Module([], [])
            froms = [
                node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "transformers"
            ]
            if ours & {alias.name for node in froms for alias in node.names}:
                found.add(name)
    assert {"llava_hf", "gemma3"} <= found
    # Films and a CUDA device only; several rounds with a sandbox; draws pictures, and reads them with a second model.
    elsewhere = {"video_llava", "thyme", "qwen_image_edit"}
    assert found - elsewhere <= MODELS.keys(), found


def test_every_checkpoint_type_named_can_be_pruned() -> None:
    from vtprune.integrations.lmms_eval import MODELS, stock_model
    from vtprune.model_adapters.family import is_supported

    assert all(is_supported(one) for model_types in MODELS.values() for one in model_types)
    with pytest.raises(ValueError, match=r"type 'clip'; known types: .*llava"):
        stock_model("clip")
