# `make demo` and `make test` work on a fresh machine that has Python 3.11 or newer and make, each alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: demo test bases claims bench lint clean

demo: $(VENV)/.demo
	@$(BIN)/temper compare recipes/demo.yaml --methods select.full,select.half,adapters.lora --out runs/demo

test: $(VENV)/.test
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal

bases: $(VENV)/.test
	$(BIN)/python -m temperament.bases.train_policy
	$(BIN)/python -m temperament.bases.train_diffusion unet
	$(BIN)/python -m temperament.bases.train_diffusion flow
	$(BIN)/python -m temperament.bases.train_diffusion flow --go-on --minutes 14 --rate 8e-4
	$(BIN)/python -m temperament.bases.train_consistency
	for base in vit cnn clip clip-b; do $(BIN)/python -m temperament.bases.train_vision $$base || exit 1; done
	$(BIN)/python -m temperament.bases.train_lm tokenizer
	for base in lm lm-small lm-instruct lm-large; do \
	  $(BIN)/python -m temperament.bases.train_lm $$base --work runs/bases --resume && \
	  $(BIN)/python -m temperament.bases.install_lm $$base --work runs/bases \
	    $$([ $$base = lm ] && echo --version early=early --version half=half) || exit 1; done

claims: $(VENV)/.test
	for id in $$(ls claims | grep -o "^[0-9]*"); do $(BIN)/temper claim $$id || exit 1; done

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks
	$(BIN)/python -m pytest -q tests/interop

lint: $(VENV)/.test
	$(BIN)/python -m ruff check src tests claims benchmarks recipes

clean:
	rm -rf $(VENV) .venv-mergekit runs

# One environment; each target adds what it needs. The stamp depends on pyproject, so a changed dependency installs again.
$(BIN)/python:
	@echo "making the environment (once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 demo"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints-cpu.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e .
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints-cpu.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[test,dev]"
	@touch $@

$(VENV)/.bench: $(BIN)/python pyproject.toml constraints-cpu.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[bench,test]"
	@touch $@
