# From a fresh clone: `make demo` trains a model and searches with it. `make own TEXT=folder` does the same with a folder
# of Markdown or plain text, added to the built-in data; with ADD= on that text alone. OPTIONS="--batch-size=64 --steps=60"
# are for both of its stages. `make lesson` shows in an afternoon what each stage of the paper brings. `make lab` prepares
# the lab (lab/README.md), with the models of the demo, which it trains where there are none. `make test` runs the tests.
# Each command may be repeated: finished data and training are not done again, and interrupted training continues; scores
# and pictures are made anew. The README has the plain commands.

PYTHON ?= python3
BIN := .venv/bin
ADD ?= out/pydocs

.PHONY: demo own lesson lab test

demo: .venv/installed
	$(BIN)/python data/pydocs.py
	$(BIN)/python mlm.py
	$(BIN)/python contrastive.py
	$(BIN)/python finetune.py --init=out/contrastive --negatives=0
	$(BIN)/python evaluate.py
	$(BIN)/python evaluate.py long
	$(BIN)/python evaluate.py plot
	$(BIN)/python evaluate.py search "how do I read a csv file"

own: .venv/installed
	@test -d "$(TEXT)" || { echo "make own: name a folder of text: make own TEXT=notes"; exit 2; }
	$(if $(filter out/pydocs,$(ADD)),$(BIN)/python data/pydocs.py)
	$(BIN)/python data/folder.py "$(TEXT)" "--add=$(ADD)" --out=out/own/data --show=5
	$(BIN)/python contrastive.py --data=out/own/data --out=out/own/contrastive $(OPTIONS)
	$(BIN)/python finetune.py --data=out/own/data --init=out/own/contrastive --out=out/own/finetune --negatives=0 $(OPTIONS)
	$(BIN)/python evaluate.py --data=out/own/data --out=out/own
	@echo 'now: $(BIN)/python evaluate.py search "your question" --data=out/own/data --out=out/own'

lesson: .venv/installed
	$(BIN)/python data/pydocs.py
	$(BIN)/python bench/experiments.py lesson --seeds=0,1,2
	$(BIN)/python evaluate.py long --model=out/experiments/0/8000-steps-of-stage-1 --out=out/experiments
	$(BIN)/python evaluate.py plot --out=out/experiments

lab: $(if $(wildcard out/finetune/model.safetensors),.venv/installed,demo)
	$(BIN)/python -m pip install --quiet $$(grep '^pytest==' requirements-dev.txt)
	$(BIN)/python lab/lab.py start
	$(BIN)/python lab/lab.py status

test: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/test_readme.py tests/test_docs.py tests/test_processes.py tests/test_runs.py tests

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch .venv/installed

.venv/installed-for-tests: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch .venv/installed-for-tests
