# Each target does everything on a fresh machine with Python 3.11 or newer: it makes .venv, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: verify test test-slow bench gate lint types imports clean

verify: .venv/installed
	$(BIN)/probattn verify

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow"

test-slow: .venv/installed
	$(BIN)/pytest -m slow

# Beside what one would use otherwise; half an hour on two cores that do nothing else.
bench: .venv/bench
	$(BIN)/probattn bench

# What a change may not undo, as ratios with generous slack.
gate: .venv/installed
	$(BIN)/probattn bench --gate --parts penalty,autograd --rounds 3 --out runs/gate

.venv/bench: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch .venv/bench

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell probattn models inference tests README.md CONTRIBUTING.md CHANGELOG.md

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
