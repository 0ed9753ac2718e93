# Every target sets up .venv first; nothing is installed outside of it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The environment is rebuilt when what it is made from changes, and only then.
INPUTS := pyproject.toml setup.py constraints.txt
READY := $(VENV)/ready-$(shell cat $(INPUTS) | cksum | cut -d' ' -f1)
PYTEST := $(BIN)/python -m pytest
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-full play test test-gpu lint types tree pages docs accept bench dump gpu-day figures sizes clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## create .venv with the tested versions (all targets do this by themselves)

$(READY): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lipass needs Python >= 3.11, got " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@rm -f $(VENV)/ready-* && touch $@

demo: $(READY) ## the main job: roll out TinyWorld dense and accelerated, write demo/report.html
	$(BIN)/lipass demo $(ARGS)

demo-full: $(READY) ## all trajectories, regimes and presets
	$(BIN)/lipass demo --full $(ARGS)

play: $(READY) ## a trained world in a browser, walked in while it is made, dense and accelerated
	$(BIN)/lipass play $(ARGS)

test: $(READY) ## tests that need no GPU, a process a core
	$(PYTEST) -m 'not needs_gpu' --numprocesses auto --dist loadfile $(ARGS)

test-gpu: $(READY) ## tests that need a GPU
	$(PYTEST) -m needs_gpu $(ARGS)

lint: $(READY) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) tree ## mypy, on a tree where the folders stand under their import names
	cd build/tree && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p lipass

tree:
	@rm -rf build/tree && mkdir -p build/tree/lipass
	@ln -s $(CURDIR)/lipass/* $(CURDIR)/passes $(CURDIR)/kernels $(CURDIR)/examples build/tree/lipass/

pages: $(READY) ## README's tables and the generated pages of docs, from code and recorded results
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m docs.make.generated

docs: $(READY) tree ## the site, in build/site, without a warning or a dead link
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

accept: $(READY) ## rewrite the golden graphs; review the diff like code
	EXPECTTEST_ACCEPT=1 $(PYTEST) -m 'not needs_gpu' tests/passes tests/examples $(ARGS)

bench: $(READY) ## kernels against dense attention, after their tests (OP=block_sparse)
	$(BIN)/python -m benchmarks.run $(or $(OP),block_sparse) $(ARGS)

dump: $(READY) ## numbered graphs and diffs of a script in build/dump (EX=examples/x.py)
	@test -n "$(EX)" || { echo "make dump needs a script, got none; run make dump EX=examples/x.py"; exit 2; }
	LIPASS_DUMP=build/dump $(BIN)/python $(EX)

gpu-day: ## what only a GPU can answer, in 9 minutes; needs torch and Triton, installs nothing
	$(PYTHON) -m benchmarks.gpu $(ARGS)

figures: $(READY) ## every figure of README, docs and DESIGN made again, some hours (ONLY=steering)
	$(BIN)/python -m benchmarks.figures --only '$(ONLY)' $(ARGS)

sizes: ## lines per file, longest first
	@git ls-files '*.py' | xargs wc -l | sort -rn | head -n 30

clean: ## remove .venv, demo and what packaging built
	rm -rf $(VENV) build/tree dist demo *.egg-info
