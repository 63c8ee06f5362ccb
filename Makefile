# make demo | make test | make test-oldest | make gpu | make lint: each works in a fresh clone.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
BIN := .venv/bin
OLDEST := .venv-oldest/bin

.PHONY: demo test test-oldest gpu lint clean
.DELETE_ON_ERROR:

demo: .venv/.evals
	$(BIN)/vtprune demo --out out/

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vtprune kernels evals model_adapters

test: lint
	@mkdir -p out
	$(BIN)/pytest -n 2 2>&1 | tee out/pytest.txt

# The seam on the oldest supported transformers; torch and the test tools are those of .venv.
test-oldest: .venv-oldest/.ready
	@mkdir -p out
	$(OLDEST)/python -m pytest -n 2 tests/test_contract.py tests/test_conformance.py tests/test_seam_calls.py \
		2>&1 | tee out/pytest-oldest.txt

# A GPU machine brings its own torch: nothing is installed there, the checkout is put on the path as it is.
GPU := PYTHONPATH=$(CURDIR)/out/site $(PYTHON)
BENCH := $(GPU) -m vtprune.cli bench --commit "$(COMMIT)" --out benchmarks
gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu: torch sees no CUDA device here")'
	mkdir -p out/site/vtprune
	ln -sfn $(CURDIR)/vtprune/* $(CURDIR)/kernels $(CURDIR)/evals $(CURDIR)/model_adapters out/site/vtprune/
	$(GPU) -m pytest -m gpu tests
	$(BENCH) --geometry llava-1.5-7b
	$(BENCH) --geometry llava-1.5-7b --hooks
	$(BENCH) --geometry llava-next-7b
	$(BENCH) --geometry llava-onevision-7b-video
	$(BENCH) --geometry qwen2.5-vl-7b

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.evals: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check torchvision -e '.[evals]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@ .venv/.evals

# Its own packages come first on the path; addsitedir appends those of .venv, torch and this checkout among them.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-oldest/.ready: .venv/.dev
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install -q --disable-pip-version-check 'transformers==5.17.*'
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$($(OLDEST)/python $(PURELIB))/zz_shared.pth"
	touch $@

clean:
	rm -rf .venv .venv-oldest out build *.egg-info
