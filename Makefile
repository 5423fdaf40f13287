# What a fresh Linux machine needs: make, Python 3.11 or later, a C++ compiler.
#   make demo [SEED=0] [NAME=demo]   the whole loop on this machine       make test        everything but the slow tests
#   make setup                       the environment alone                make test-slow   the slow ones
#   make experiments [SEEDS="51 52"] the loop and its controls, hours     make test-parity our losses against TRL's
#   make algorithms                  the ways to learn compared, hours    make against-trl DPO and the loop against TRL's
#   make lint                        ruff and mypy                        make bench       what the parts cost, minutes
#   make clean                       all but runs/ as cloned              make help        this

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow parity-environment test-parity against-trl experiments algorithms bench lint clean

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 …` chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)
RUN := .venv/bin/python

help:
	@sed -n '2,/^$$/s/^# *//p' Makefile

setup:
	@if [ -z "$(PYTHON)" ]; then \
		echo "✗ Python 3.11 or later is needed, found $$(python3 --version 2>&1 | tail -n 1): install one, or say make PYTHON=/path/to/python3"; \
		exit 2; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "✗ Python 3.11 or later is needed, $(PYTHON) is $$("$(PYTHON)" --version 2>&1 | tail -n 1): say make PYTHON=/path/to/python3"; \
		exit 2; }
	@"$(PYTHON)" requirements/build_venv.py

demo: setup
	@$(RUN) elenchus.py demo $(if $(SEED),--seed '$(SEED)') $(if $(NAME),--name '$(NAME)')

test: setup
	@$(RUN) -m pytest -m "not slow"

test-slow: setup
	@$(RUN) -m pytest -m slow

# TRL lives in an environment of its own, which sees the packages of .venv.
parity-environment: setup
	@test -x .parity/bin/python || $(RUN) -m venv --without-pip .parity
	@$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.parity/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/elenchus.pth"
	@$(RUN) -m pip --python .parity/bin/python install --quiet --no-deps -r requirements/parity.txt

test-parity: parity-environment
	@.parity/bin/python -m pytest -m parity tests/parity

against-trl: parity-environment
	@$(RUN) -m benchmarks.against_trl
	@$(RUN) -m benchmarks.loop_against_trl

SEEDS ?= 51 52 53 54 55
experiments: setup
	@$(RUN) -m benchmarks.experiments --seeds $(SEEDS)

# The ways to learn from feedback, hours: their learning rates on CHOICE_SEEDS by probe problems, then the report.
CHOICE_SEEDS ?= 0
REPORT_SEEDS ?= 51 52 53 54 55
algorithms: setup
	@$(RUN) -m benchmarks.algorithms choose --seeds $(CHOICE_SEEDS)
	@$(RUN) -m benchmarks.algorithms report --seeds $(REPORT_SEEDS)

bench: setup
	@$(RUN) -m benchmarks.bench

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

# Leaves runs/ alone: they are yours.
clean:
	rm -rf .venv .parity .mypy_cache .pytest_cache .ruff_cache .hypothesis build elenchus.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
