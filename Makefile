# `make train` and `make test` set everything up and are safe to run twice. `make` alone lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= data/demo
# A change to any of these installs anew, which also compiles the kernels and the JPEG decoder.
CHECKOUT_FILES := pyproject.toml CMakeLists.txt constraints.txt $(wildcard kernels/csrc/* pipelines/csrc/*)

.PHONY: help setup train test bench lint clean
help:
	@echo "make setup   virtual environment in $(VENV), with the versions of constraints.txt"
	@echo "make train   setup, demo images, then: deepspeed fastmim/train.py --method cmae (minutes on a CPU)"
	@echo "make test    setup with the dev extra, then pytest"
	@echo "make bench   setup with the dev extra, then pytest bench"
	@echo "make lint    ruff"
	@echo "make clean   removes the virtual environment and build files; keeps data and runs"

setup: $(VENV)/.installed

$(VENV)/.python:
	@echo "== virtual environment in $(VENV)"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: sudo apt-get install -y python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "venv is missing: sudo apt-get install -y python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone: whatever needs it later finds it there and leaves it.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "== torch (pinned in constraints.txt)"
	@$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(CHECKOUT_FILES)
	@echo "== fastmim and what it needs"
	@command -v c++ >/dev/null || echo "   no C++ compiler: torch and Pillow will do the work of the native kernels and" \
		"decoder, in about twice the time. For those: sudo apt-get install -y g++, then touch CMakeLists.txt && make setup"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "== test tools"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(VENV)/.installed
	@echo "== demo images in $(DEMO)"
	@$(BIN)/fastmim demo-data $(DEMO)
	@echo "== deepspeed fastmim/train.py --method cmae --preset demo --data $(DEMO)"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed fastmim/train.py --method cmae --preset demo --data $(DEMO)

# The tests' own time limit is a signal that Python hears, and what waits in C does not. After this one, which is longer than
# any test's own, all stacks are printed and the process ends; one more takes its place.
HUNG := -o faulthandler_timeout=1000 -o faulthandler_exit_on_timeout=true --max-worker-restart 1

test: $(VENV)/.dev
	@echo "== pytest"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -q -n logical --dist loadfile $(HUNG)

bench: $(VENV)/.dev
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest bench -q -s

lint: $(VENV)/.dev
	@$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
