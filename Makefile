# Every command here works in a fresh clone: the virtual environment is made when it is missing or out of date.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GPU    ?= .venv-gpu
DEMO   ?= demo
export PYTHONPATH :=

.DEFAULT_GOAL := help
.PHONY: help demo test lint types fast coverage bench lock clean
.PHONY: test-slow test-gpu proof-gpu test-docker bench-export bench-benchmark bench-engine bench-precision bench-crop bench-serve bench-verdict

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# What the demo needs, then what the tests need too. Compiled by pip, as Python itself keeps no bytecode where
# PYTHONDONTWRITEBYTECODE is set, and would compile torch anew in every process.
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e
$(BIN)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[export,cpu,rtx,report,serve]'
	@touch $@

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/.demo
	$(INSTALL) '.[dev]'
	@touch $@

install: $(BIN)/.installed  ## make the virtual environment
.PHONY: install

# ONNX Runtime with CUDA and the one without cannot share an environment. TensorRT's index may not be reachable: its tests
# then skip, saying so.
$(GPU)/bin/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(GPU)
	$(GPU)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev-gpu]'
	-$(GPU)/bin/pip install --quiet --disable-pip-version-check 'tensorrt>=10.13'
	@touch $@

install-gpu: $(GPU)/bin/.installed  ## make the virtual environment of the tests that need a GPU
.PHONY: install-gpu

# One thread: networks so small gain little by two, which on a busy machine wait for each other by spinning.
TRAIN = OMP_NUM_THREADS=1 $(BIN)/python -m gmconv.train --arch resnet8 --force
$(DEMO)/digits.pt: $(BIN)/.demo
	@mkdir -p $(DEMO)
	$(TRAIN) --epochs 6 -o $@

# Kernels of 7x7 taps whose sigmas training shrinks: what a crop is for.
$(DEMO)/wide.pt: $(BIN)/.demo
	@mkdir -p $(DEMO)
	$(TRAIN) --kernel-size 7 --sigma 1.5 --sigma-lr 0.1 --sigma-penalty 1 --epochs 10 --input-shape 1,16,16 -q -o $@

demo: $(BIN)/.demo  ## train on the digits, bake, export with proof, crop, report; OPEN=1 opens it
	@echo 'two networks are trained side by side: two minutes on two quiet cores'
	@$(MAKE) --no-print-directory -j2 $(DEMO)/digits.pt $(DEMO)/wide.pt
	$(BIN)/python -m export.onnx $(DEMO)/digits.pt -o $(DEMO)/digits.onnx --report $(DEMO)/proof.html
	$(BIN)/python -m export.tensorrt $(DEMO)/digits.onnx --flavor rtx --min 1 --opt 8 --max 32 -o $(DEMO)/digits.plan
	$(BIN)/python -m export.onnx $(DEMO)/wide.pt -o $(DEMO)/cropped.onnx --crop 1e-3 -q
	OMP_NUM_THREADS=1 $(BIN)/python -m runtime.benchmark $(DEMO)/wide.pt $(DEMO)/cropped.onnx@threads=1 --twin --duration 1 \
	  --report $(DEMO)/cropping.html
	$(BIN)/python -m tests.demo $(DEMO) $(if $(OPEN),--open)

lint: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(BIN)/.installed
	$(BIN)/mypy

fast: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# Apart: the tracer costs the exporter two fifths more time.
coverage:  ## the default tests with the lines that they do not reach
	$(MAKE) fast ARGS='--cov --cov-report=term:skip-covered $(ARGS)'

test: lint types fast  ## lint, types and the default tests (no GPU, no Docker)

test-slow: $(BIN)/.installed  ## minutes and gigabytes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(GPU)/bin/.installed  ## on a machine with an NVIDIA card
	$(GPU)/bin/python -m pytest -m gpu $(ARGS)

proof-gpu: $(GPU)/bin/.installed  ## minutes on a card: what is right and how fast, into proof/ (tests/gpu/README.md)
	$(GPU)/bin/python -m tests.gpu.proof $(ARGS)

test-docker: $(BIN)/.installed  ## build and run the serving image (root, Debian)
	$(BIN)/python -m pytest -m docker $(ARGS)

bench: bench-export bench-benchmark bench-engine bench-precision bench-crop bench-serve bench-verdict  ## every ratio of the README

bench-export bench-benchmark bench-engine bench-precision bench-crop bench-serve bench-verdict: $(BIN)/.installed
	$(BIN)/python -m tests.bench.write $(subst bench-,,$@)

lock: $(BIN)/.installed  ## write constraints.txt from what is installed
	$(BIN)/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+cpu$$/\1/' > constraints.txt

lock-image: $(BIN)/.installed  ## write the image's hash-locked requirements
	docker/lock.sh $(BIN)/python
.PHONY: lock-image

clean:  ## remove what the targets above made
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
