# Two commands do everything on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
# Wheels are kept here, so that a second installation needs no network.
WHEELS ?= $(HOME)/.cache/heliosim/wheels
BIN := $(VENV)/bin
EXTRAS := live,app,dev

.PHONY: demo test install lint wheel-test validate bench clean

demo: install
	$(BIN)/heliosim demo

test: install lint
	scripts/browser
	$(BIN)/python -m pytest
	scripts/wheel_test $(BIN)/python $(WHEELS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check heliosim calibrate app traces tests
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt scripts/install
	scripts/install $(PYTHON) $(VENV) $(WHEELS) $(EXTRAS)
	touch $@

validate: install
	$(BIN)/heliosim validate

bench: install
	$(BIN)/python scripts/bench.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
