# `make demo` and `make test` do all their own set-up: they make .venv from requirements.lock if it is not there yet.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SYNTH := from volseg.box import Box; from volseg.evaluation.synthetic import synth; synth(Box.from_shape((1, 64, 64)), seed=0)

.PHONY: help demo test chaos docs lint lock clean

help:
	@echo "make demo    segment a small synthetic volume with the shipped model"
	@echo "make test    check style, types and import layers; run the test suite and all examples in docstrings"
	@echo "make chaos   disturb commands for five minutes, and compare what they give with undisturbed ones"
	@echo "make docs    make the site of the documentation in site/; a broken link fails"
	@echo "make lint    check style and types"
	@echo "make lock    bring requirements.lock up to pyproject.toml; with UPGRADE=--upgrade, to the newest versions"
	@echo "make clean   remove what demo and test made (not $(VENV))"

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "volseg needs Python 3.11 or newer; set PYTHON=python3.11 or later")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (several GB with CUDA libraries; minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(READY)
	@mkdir -p demo
	@$(BIN)/volseg synth demo/em.zarr --shape 96,384,384 --seed 12 --overwrite
	@$(BIN)/volseg infer demo/em.zarr --config configs/touching.toml --overwrite
	@$(BIN)/volseg evaluate demo/em.volseg.zarr demo/em.zarr/labels/truth

test: $(READY)  # loops are compiled once, beside lint: else each process of the tests would compile them
	@{ $(BIN)/python -m volseg compile && $(BIN)/python -c "$(SYNTH)"; } > /dev/null & compiler=$$!; $(MAKE) --no-print-directory lint && wait $$compiler
	@$(BIN)/python -m pytest -n 3 --dist worksteal

chaos: $(READY)
	@$(BIN)/python -m benchmarks chaos --minutes 5 --out chaos.json

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html; for a server that shows changes at once: $(BIN)/python -m mkdocs serve"

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lock:  # UPGRADE=--upgrade takes the newest of all; without, what stands there stays and only what is new is added
	@$(PYTHON) -m venv $(VENV)-lock
	@$(VENV)-lock/bin/python -m pip install --quiet uv
	@$(VENV)-lock/bin/uv pip compile pyproject.toml --extra test --universal --python-version 3.11 \
	    --no-emit-index-url --custom-compile-command "make lock" $(UPGRADE) --quiet --output-file requirements.lock
	@rm -rf $(VENV)-lock

clean:
	@rm -rf demo site .pytest_cache .ruff_cache .mypy_cache .hypothesis
