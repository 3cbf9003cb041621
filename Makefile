# The two commands of the README are `make demo` and `make test`. Everything goes into .venv, demo/ and build/,
# but for the C library, kernels/cpu/libcovo.so, and .venv-npu of `make test-npu`; `make clean` removes all of it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

PYTHON ?= python3
# Which PyTorch, in pip's words. The default is the build without CUDA, which brings gigabytes; to test with CUDA:
#   make test TORCH="torch==2.13.0"
TORCH ?= torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu --retries 0
# Which checkpoint `make demo` makes up: tiny, small or full
PRESET ?= small

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
LIBRARY := kernels/cpu/libcovo.so
QUESTION := tests/data/audio/question_en_48k_24bit.wav

.PHONY: demo test coverage test-npu test-isa test-install test-real fuzz soak mutants lint format clean

demo: $(READY) $(LIBRARY)
	@rm -rf demo
	echo "== A checkpoint with random weights, in the layout of the published one"
	$(BIN)/covo-synth --preset $(PRESET) --seed 0 demo/source
	echo "== Converted, once"
	$(BIN)/covo-convert --src demo/source --dst demo/npu_ckpt
	echo "== Asked a spoken question"
	$(BIN)/covo-run --ckpt demo/npu_ckpt --max-new-tokens 64 --output demo/replies $(QUESTION)
	echo "== Start to ready and to the first token, next to the stock path"
	$(BIN)/covo-bench load --src demo/source --ckpt demo/npu_ckpt --runs 1
	echo
	echo "The reply is in demo/replies/01-$(notdir $(QUESTION)). The weights are random: expect noise."

# TESTS_AT_ONCE: how many run side by side; with more than one give each its cores by OMP_NUM_THREADS.
TESTS_AT_ONCE ?= 0
AT_ONCE := --numprocesses $(TESTS_AT_ONCE) --dist worksteal
test: $(READY) $(LIBRARY)
	$(BIN)/pytest $(AT_ONCE)

# The same, and the lines of convert/, runtime/, kernels/ and serve/ that it runs; fails below the share in pyproject.toml.
# Apart, because counting them takes a third of the time of what engine and conversion are tested by.
coverage: $(READY) $(LIBRARY)
	$(BIN)/pytest $(AT_ONCE) --cov --cov-report=term:skip-covered

# Mutated files for FUZZ_SECONDS each, with another SEED other ones; what fails is kept in build/fuzz.
FUZZ_SECONDS ?= 300
SEED ?= 0
fuzz: $(READY)
	mkdir -p build/fuzz
	test -d build/fuzz/ckpt || $(BIN)/covo-convert --src tests/data/covo-tiny --dst build/fuzz/ckpt --dtype float32
	for target in audio tokenizer stages batch header source values arrival manifest; do
		$(BIN)/python tests/fuzz/fuzz.py $$target --source tests/data/covo-tiny --ckpt build/fuzz/ckpt \
			--seconds $(FUZZ_SECONDS) --seed $(SEED) --keep build/fuzz/kept 2>build/fuzz/$$target.log
	done

# A crowd at a server for SOAK_SECONDS: CLIENTS ask, hear and leave at random moments; every place has to come back, and
# memory to stay flat. The server's log is build/soak.log.
SOAK_SECONDS ?= 1800
CLIENTS ?= 1000
soak: $(READY) $(LIBRARY)
	mkdir -p build/soak
	test -d build/soak/ckpt || $(BIN)/covo-convert --src tests/data/covo-tiny --dst build/soak/ckpt --dtype float32
	PYTHONPATH=tests $(BIN)/python tests/serve/crowd.py --ckpt build/soak/ckpt --seconds $(SOAK_SECONDS) \
		--clients $(CLIENTS) --seed $(SEED)

# Wrong programs that the tests must refuse. `make test` runs them too.
mutants: $(READY)
	$(BIN)/python tests/mutants/mutants.py

test-npu: $(READY) $(LIBRARY)
	tests/npu/run.sh $(AT_ONCE)

# The numeric tests as a processor with AVX2 runs them, and with one thread; the C kernels of Arm in an emulator if it is
# installed. Says what ran and what did not.
test-isa: $(READY) $(LIBRARY)
	tests/isa.sh

# What deploy/Dockerfile.cpu installs, installed and asked; brings PyTorch into an environment of its own.
test-install: $(READY) $(LIBRARY)
	$(BIN)/pytest -m install tests/deploy

# Arithmetic on a small language model with real weights; fetches it, into an environment of its own: docs/real-weights.md
test-real: $(READY) $(LIBRARY)
	tests/real/run.sh

# The C kernels, built again when their sources change. Without a compiler PyTorch's serve.
$(LIBRARY): $(READY) $(wildcard kernels/cpu/csrc/*)
	@$(BIN)/python setup.py --quiet build_ext --inplace

lint: $(READY) typed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py -k direction

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy finds the import package covo_npu through links: an editable install is invisible to it.
.PHONY: typed
typed:
	@mkdir -p build/typed/covo_npu
	for folder in convert runtime kernels serve tools; do ln -sfn ../../../$$folder build/typed/covo_npu/$$folder; done

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "covo-npu needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	echo "Installing PyTorch and the rest into $(VENV) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[convert,dev]'
	touch $@

clean:
	@rm -rf build demo dist *.egg-info $(LIBRARY) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage $(VENV) .venv-npu
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
