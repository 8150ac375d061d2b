# Everything from a fresh clone: `make demo` trains a model and searches with it, `make test` runs the tests.
# The README has the same steps as plain commands.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/python data/pydocs.py
	$(BIN)/python mlm.py
	$(BIN)/python contrastive.py --init=out/mlm
	$(BIN)/python finetune.py --init=out/contrastive
	$(BIN)/python evaluate.py
	$(BIN)/python evaluate.py plot
	$(BIN)/python evaluate.py search "how do I read a csv file"

test: .venv/installed .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests

.venv/installed: requirements.txt requirements-extra.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-extra.txt
	touch .venv/installed

.venv/installed-for-tests: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	touch .venv/installed-for-tests

clean:
	rm -rf out .venv
