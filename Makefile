# make demo      everything: environment, a short collection, critics, policies, score table (about ten minutes on two cores)
# make install   the environment alone, in .venv
# make check     lint, types, layers and unit tests: under a minute on two cores
# make test      check, every test, recipes, docs, a short end-to-end run: a quarter of an hour on two cores
# make learn     tests of minutes: every method compiled, formats fuzzed (about an hour)
# make soak      crash points, power loss and state machines at length (hours)
# make slurm     the SLURM engine on a SLURM of one node (apt-get install slurm-wlm munge): ten minutes
# make gpu       on a machine with a GPU: whether all works there and how fast it is, in ten minutes, into build/gpu
# make bench     measured comparisons with peers, into docs/performance.md (about 40 minutes; leave the machine alone)

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13,$(if $(shell command -v $(p) 2>/dev/null),$(p))))
VENV ?= .venv
BIN := $(VENV)/bin
# processes that test, each of which computes on one thread
WORKERS ?= 2
# what is quick: equations, index maths, recipes, tables, layers, files
UNIT := tests/test_layers.py tests/test_files.py tests/recipes tests/learn/test_losses.py tests/learn/test_readouts.py \
  tests/data/test_samplers.py tests/score/test_scores.py tests/score/test_report.py tests/play/test_policies.py
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal
# The default torch wheels bring gigabytes of CUDA. For the CPU ones: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# whose other interpreters run NEWER too, where they have what it takes; nothing is installed for them
OTHERS := python3.12 python3.13
NEWER := tests/learn/test_losses.py tests/data/test_samplers.py tests/learn/test_graphs.py tests/learn/test_programs.py

.PHONY: demo install check test pythons lint smoke learn soak slurm gpu bench clean

demo: install
	$(BIN)/cvlctl run recipes/quickstart.yaml

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11, 3.12 or 3.13 found; apt-get install python3.11 python3.11-venv"; exit 2; }
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { echo "error: $(PYTHON) has no venv; apt-get install $(notdir $(PYTHON))-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

check: lint
	$(PYTEST) $(UNIT)

test: lint
	$(PYTEST)
	$(BIN)/cvlctl recipes validate
	$(BIN)/python docs/generate_cli.py --check
	$(MAKE) --no-print-directory pythons
	$(MAKE) --no-print-directory smoke

# Unit tests of training, samplers and losses under other Pythons, a minute each at most
pythons:
	@for python in $(OTHERS); do \
	  if ! $$python -c "import torch, numpy, scipy, zarr, pydantic, pytest, typer, rich, safetensors" 2>/dev/null; then \
	    echo "$$python: skipped, it is not here with all that the unit tests need"; continue; fi; \
	  PYTHONPATH=. timeout 60 $$python -m pytest -q -p no:cacheprovider $(NEWER); code=$$?; \
	  if [ $$code = 124 ]; then echo "$$python: stopped after a minute"; elif [ $$code != 0 ]; then exit $$code; fi; \
	done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy cvlctl

# The quickstart in small: does all of it run? Nothing is learned in so few updates.
smoke: install
	rm -rf build/smoke
	$(BIN)/cvlctl run recipes/quickstart.yaml out=build/smoke stages.data.source.steps=1500 \
	  stages.pretrain.steps=200 stages.finetune.steps=200 stages.cloning.steps=200 stages.scores.episodes=2

learn: install
	$(PYTEST) -m slow --timeout 3600

soak: install
	$(PYTEST) -m soak --timeout 7200

slurm: install
	@command -v slurmctld >/dev/null || { echo "error: no SLURM here; apt-get install slurm-wlm munge"; exit 2; }
	$(BIN)/pytest -m "slurm or slow and slurm" tests/slurm

gpu: install
	$(BIN)/python benchmarks/gpu.py

bench: install
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache
