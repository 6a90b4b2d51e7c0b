# A fresh machine needs python3 >= 3.11 with venv and make; everything else goes into .venv.
# PIP_FLAGS reaches pip, to name another package index for instance.
PYTHON ?= python3
PIP_FLAGS ?=
BENCH ?= W1 W2
BIN := .venv/bin
PACKAGES := lorayard.shared lorayard.kernels lorayard.worker lorayard.dispatcher lorayard.demo

export PYTHONSAFEPATH = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
.DELETE_ON_ERROR:
.PHONY: demo test check test-gpu bench clean

demo: .venv/runtime  ## start a yard with the demo model, show what it does, stop it
	$(BIN)/lorayard up --demo --show

test: .venv/dev  ## all tests; those that need a GPU skip where there is none
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

check: .venv/dev  ## lint, format, types, import rules
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy --cache-dir=/dev/null $(addprefix -p ,$(PACKAGES))
	$(BIN)/mypy --cache-dir=/dev/null tests
	PYTHONPATH=.import $(BIN)/lint-imports --no-cache --no-logo

test-gpu: .venv/dev  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

bench: .venv/runtime  ## speed of the engine, the queue, the routing and corpora; BENCH= for all that `lorayard bench` has
	$(BIN)/lorayard bench $(BENCH)
	$(BIN)/python tests/bench/jobs.py
	$(BIN)/python tests/bench/routing.py
	$(BIN)/python -m tests.bench.corpus

clean:  ## remove all that make and the tools made
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("python3 is older than 3.11; name a newer one: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# The stamps are touched last, so that an interrupted installation is done again.
.venv/runtime: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[worker,embedded]'
	touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(BIN)/pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[worker,embedded,corpus,dev]'
	touch $@ .venv/runtime
