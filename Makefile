# Each target does everything on a fresh machine with Python 3.11 or newer: it makes .venv, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled once, not again by every process that the tests start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: verify test test-slow test-browser faults test-all-threads notebooks bench gate docs lint types imports clean

verify: .venv/installed
	$(BIN)/probattn verify

# Half of the files to each process; the one that ends first takes half of what the other has left. The notebooks run
# with small sizes; nothing is written.
test: .venv/installed
	OMP_NUM_THREADS=1 PROBATTN_SMOKE=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow and not browser" --nbmake tests notebooks

test-slow: .venv/installed
	$(BIN)/pytest -n 2 --dist worksteal -m "slow and not browser"

# The explorer, the report and the site in Chromium; it fails where there is none.
test-browser: .venv/docs
	OMP_NUM_THREADS=1 PROBATTN_REQUIRE_BROWSER=1 $(BIN)/pytest -n 2 --dist worksteal -m browser

# Kills, full disks, flipped bits and malformed inputs, from a seed; docs/reliability.md has the figures.
faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/fault_harness.py --seconds $(SECONDS) --seed $(SEED) --kinds $(KINDS)

SECONDS ?= 3600
SEED ?= 0
KINDS ?= files kernels runs

# The numerical tests again on all threads, in one process; `make test` runs them on one thread.
test-all-threads: .venv/installed
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) $(BIN)/pytest -m "not slow" $(NUMERICAL)

NUMERICAL := tests/probattn/numerics tests/probattn/moments tests/probattn/solve tests/probattn/test_blocks.py \
	tests/probattn/test_attention.py tests/probattn/test_barrier.py tests/probattn/test_penalty.py

# All of them, completely and in place: this writes the outputs that are committed.
notebooks: .venv/installed
	for notebook in notebooks/*.ipynb; do OMP_NUM_THREADS=1 $(BIN)/python -c "$$EXECUTE" $$notebook || exit 1; done

# Without the times of execution and the version of the kernel, which differ from run to run.
define EXECUTE
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
language = dict(notebook.metadata.language_info)
NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True).execute()
notebook.metadata.language_info = language
nbformat.write(notebook, sys.argv[1])
endef
export EXECUTE

# Beside what one would use otherwise; ten minutes on two cores that do nothing else.
bench: .venv/bench
	$(BIN)/probattn bench

# What a change may not undo, as ratios with generous slack.
gate: .venv/installed
	$(BIN)/probattn bench --gate --parts penalty,autograd --rounds 3 --out runs/gate

.venv/bench: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch .venv/bench

# The site, in build/docs; a warning is an error.
docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -n -aE docs build/docs

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch .venv/docs

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --skip 'docs/notebooks,docs/_static/katex,*.json,*.so' probattn models inference tests docs README.md CONTRIBUTING.md CHANGELOG.md

# The checkers read the package as it is installed, with models/ and inference/ inside the one name.
types: .venv/installed build/package
	cd build/package && ../../$(BIN)/mypy --config-file ../../pyproject.toml probattn

imports: .venv/installed build/package
	cd build/package && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml

.PHONY: build/package
build/package:
	rm -rf build/package
	mkdir -p build/package
	cp -r probattn build/package/probattn
	cp -r models inference build/package/probattn/

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/installed

clean:
	rm -rf .venv build dist runs *.egg-info
