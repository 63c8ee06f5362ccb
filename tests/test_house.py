"""What contributors rely on: types that are checked across folders, profiles that lose no test, pages that are true."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples" / "guides").glob("*.md"))
CARDS = [f"evals/toys/{name}/README.md" for name in ("image", "video", "mid")]
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *GUIDES, *CARDS]


def run(*command: str, status: int = 0, **environment: str) -> str:
    import os

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_lint_tries_wrong_calls_across_folders() -> None:
    """On four top-level names, mypy took each import from one folder to another for `Any` and let anything pass."""
    makefile = (ROOT / "Makefile").read_text()
    assert "$(MYPY) -p vtprune\n" in makefile
    wrong = " ".join(re.findall(r"^WRONG [:+]= (.*)$", makefile, re.M))
    assert {"kernels", "registry", "evals", "model_adapters"} <= set(re.findall(r"\w+", wrong))
    assert "$(MYPY) -c '$(WRONG)' | grep -c ': error:')\" = 4" in makefile


def collected(profile: str) -> Counter[str]:
    told = run(
        sys.executable, "-m", "pytest", "-q", "--collect-only", "--matrix", profile, "-p", "no:cacheprovider",
        "tests/hf/test_conformance.py", "tests/core/test_registry.py", TRITON_INTERPRET="1",
    )  # fmt: skip
    return Counter(line for line in told.splitlines() if "::" in line)


def test_the_profiles_of_the_matrix_together_are_all_tests() -> None:
    default, rest, whole = map(collected, ("default", "rest", "whole"))
    assert default + rest == whole
    assert rest
    assert not any("test_registry" in name for name in rest), "only tests with the mark are ever left out"
    for name in ("divprune", "sparsevlm", "tome"):  # of three of the kinds, on a family that is not of the three
        assert any(f"gemma3-{name}" in case or f"{name}-gemma3" in case for case in default)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!http)([^)#\s]*)(#[\w-]+)?\)", text)
    for path, anchor in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert anchor[1:] in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


def test_every_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([\w-]+)", (ROOT / page).read_text(), re.M))
        assert named <= targets, page


def test_the_snippet_of_an_engine_runs_without_transformers() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    told = run(sys.executable, "-c", f"{code}\nimport sys; print('transformers' in sys.modules)", OMP_NUM_THREADS="1")
    assert told.splitlines() == ["torch.Size([144]) torch.Size([144, 1024])", "False"]


def test_every_file_of_a_run_is_named_by_the_page() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    kept = [p for p in (ROOT / "benchmarks").rglob("*") if p.is_file() and p.name != "README.md"]
    assert kept
    for path in kept:
        assert path.relative_to(ROOT / "benchmarks").as_posix() in text, path.name


def forms() -> list[Path]:
    return sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"])


@pytest.mark.parametrize("path", forms(), ids=lambda p: p.name)
def test_forms_are_yaml(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_workflow_runs_what_contributors_run() -> None:
    yaml = pytest.importorskip("yaml")
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = flow["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    targets = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.M)
    assert targets == ["test", "docs", "test-whole", "test-oldest", "test-lmms", "test-vllm"], "and nothing less"
    assert "make test COVERAGE=1\n" in (ROOT / ".ci" / "run").read_text(), "the share that tests reach is reported"
    last = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert last == "tail -n 1 out/pytest.txt", "pytest's summary comes last"


def test_issue_forms_hold_what_github_asks_for() -> None:
    yaml = pytest.importorskip("yaml")
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        assert form["name"]
        assert form["description"]
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids))
        for part in form["body"]:
            assert part["type"] in {"input", "textarea", "dropdown", "checkboxes"}
            assert part["attributes"]["label"]


def test_the_citation_names_this_version_and_licence() -> None:
    yaml = pytest.importorskip("yaml")
    tomllib = pytest.importorskip("tomllib")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert (cited["title"], cited["version"], cited["license"]) == tuple(
        project[k] for k in ("name", "version", "license")
    )


def test_the_floor_of_coverage_stands_in_one_place() -> None:
    tomllib = pytest.importorskip("tomllib")
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tool["coverage"]["run"]["source"] == ["vtprune", "model_adapters", "kernels", "evals"]
    assert 0 < tool["coverage"]["report"]["fail_under"] <= 100
    for path in ("Makefile", ".ci/run", ".github/workflows/ci.yml", "CONTRIBUTING.md"):
        assert "fail-under" not in (ROOT / path).read_text()
