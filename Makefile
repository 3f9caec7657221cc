# make quickstart   from nothing to a trained, streaming recogniser
# make test         format, lint, import floors, types, tests
# make chaos        kills a training at 20 random moments; minutes, no part of test
# PYTHON=python3.12 takes another interpreter (with an environment of its own)

PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup quickstart test chaos format clean

setup: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt
	@echo "== setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11 to 3.13 is needed; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $(STAMP)

# On Linux, huge pages: a step allocates and frees hundreds of megabytes, and
# page faults would take a seventh of its time.
quickstart: setup
	GLIBC_TUNABLES=$${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} \
	  $(BIN)/python -m experiments.quickstart --workdir=$(WORKDIR)

test: setup
	@echo "== format";  $(BIN)/ruff format --check .
	@echo "== lint";    $(BIN)/ruff check .
	@echo "== floors";  $(BIN)/lint-imports --no-cache
	@echo "== types";   $(BIN)/mypy
	@echo "== tests";   $(BIN)/python -m pytest -n 2 --dist worksteal

chaos: setup
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.chaos --kills=20

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
