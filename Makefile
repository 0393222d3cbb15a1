# Two commands do everything: `make demo` and `make test`; `make gpu-check` is for a machine with a
# GPU. All set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint gpu-check train-builtin clean

demo: $(READY)
	mkdir -p .demo
	$(BIN)/vla2 caption examples/ --modality av --output .demo/captions.jsonl --force
	$(BIN)/python examples/show.py .demo/captions.jsonl

test: $(READY) lint
	$(BIN)/python -m pytest -q

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu-check: $(READY)
	$(BIN)/python tests/bench/gpu.py

train-builtin: $(READY)
	$(BIN)/python -m vla2cli.train.builtin

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .demo
