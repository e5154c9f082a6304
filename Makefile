# `make` lists the commands. POSIX make and sh. Only the command line sets these, so that a DATA in someone's
# environment does not choose what is trained on.
RECIPE =
MODEL =
DATA =
ONLY =
ARGS =
PYTHON ?= python3

# What make's variables become on a script's command line, "$@" in the shell.
FLAGS = set --; \
	if [ -n '$(RECIPE)' ]; then set -- "$$@" --recipe '$(RECIPE)'; fi; \
	if [ -n '$(MODEL)' ]; then set -- "$$@" --model '$(MODEL)'; fi; \
	if [ -n '$(DATA)' ]; then set -- "$$@" --data '$(DATA)'; fi; \
	set -- "$$@" $(ARGS)
PIP_INSTALL = .venv/bin/python -m pip install -q --disable-pip-version-check

.PHONY: help sft rm compare bench test clean

help:
	@echo "make sft                 tune the model in data/ on the instructions in data/; leaves runs/sft/"
	@echo "make sft RECIPE=course   the course's own run: facebook/opt-350m on CodeAlpaca-20k, from the hub"
	@echo "make sft MODEL=… DATA=… ARGS=\"--lr 1e-4\"   anything else; ARGS takes every flag of train_sft.py"
	@echo "make sft ARGS=--help     lists these flags"
	@echo "make rm                  a reward model from the pairs in data/; leaves runs/rm/; RECIPE, MODEL, DATA, ARGS alike"
	@echo "make compare             minift beside trl, transformers, peft and sacreBLEU: what agrees, and how far;"
	@echo "                         leaves runs/compare/. ONLY=bleu,sft for some sections; MODEL=… DATA=… for your own;"
	@echo "                         ARGS=--faults plants ten faults, each of which must be noticed"
	@echo "make bench               minift and what it replaces, timed in turn; ARGS=\"--shape 125m\" for a larger model"
	@echo "make test                check the style, run the tests"
	@echo "make clean               remove .venv and the caches; runs/ stays"
	@echo "PYTHON=python3.12 after make chooses the Python that .venv is made with"

sft: .venv/installed
	@$(FLAGS); printf '%s\n' ".venv/bin/python train_sft.py $$*"; exec .venv/bin/python train_sft.py "$$@"

# The course's pairs are a parquet file on the hub.
rm: .venv/installed
	@if [ '$(RECIPE)' = course ]; then $(PIP_INSTALL) -e '.[parquet]'; fi
	@$(FLAGS); printf '%s\n' ".venv/bin/python train_rm.py $$*"; exec .venv/bin/python train_rm.py "$$@"

compare: .venv/installed-for-tests
	@$(FLAGS); if [ -n '$(ONLY)' ]; then set -- "$$@" --only '$(ONLY)'; fi; \
		printf '%s\n' ".venv/bin/python -m tests.compare $$*"; exec .venv/bin/python -m tests.compare "$$@"

bench: .venv/installed-for-tests
	@printf '%s\n' ".venv/bin/python -m tests.bench $(ARGS)"; exec .venv/bin/python -m tests.bench $(ARGS)

test: .venv/installed-for-tests
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pytest -q

clean:
	rm -rf .venv minift.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last, so that an installation that failed is tried again.
.venv/installed: pyproject.toml
	@command -v '$(PYTHON)' >/dev/null || { echo "error: no $(PYTHON) here: install Python 3.11 or newer" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: name a newer one, make PYTHON=…" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv: install it (the package python3-venv on Debian and Ubuntu)" >&2; exit 1; }
	@echo "installing what pyproject.toml names into .venv: once, some minutes"
	@'$(PYTHON)' -m venv .venv
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/installed-for-tests: .venv/installed
	@echo "installing what the tests need into .venv: once"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@
