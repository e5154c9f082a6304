# `make` lists the targets. Needs POSIX make and sh only. These variables come from the command line only: a variable
# DATA in the environment must not choose the training data.
RECIPE =
MODEL =
DATA =
PAIRS =
TOKENIZER =
ONLY =
ARGS =
PYTHON ?= python3

# A misspelt variable, or one that the goal does not read (make sft LR=1e-4), must not be ignored.
READ_sft = RECIPE MODEL DATA ARGS
READ_rm = $(READ_sft)
READ_compare = $(READ_sft) ONLY
READ_improve = ARGS
READ_tour = ARGS
READ_bench = DATA PAIRS TOKENIZER ARGS
READ_experiments = ONLY ARGS
READ = PYTHON SHELL MAKEFLAGS $(foreach goal,$(MAKECMDGOALS),$(READ_$(goal)))
GIVEN = $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
UNREAD = $(filter-out $(READ),$(GIVEN))
ifneq ($(strip $(UNREAD)),)
$(error $(strip $(UNREAD)): not read by make $(or $(MAKECMDGOALS),help), which reads $(filter-out SHELL MAKEFLAGS,$(READ)); \
	flags of a script go in ARGS: make sft ARGS="--lr 1e-4")
endif

# Sets the shell's "$@" to the script's command line.
FLAGS = set --; \
	if [ -n '$(RECIPE)' ]; then set -- "$$@" --recipe '$(RECIPE)'; fi; \
	if [ -n '$(MODEL)' ]; then set -- "$$@" --model '$(MODEL)'; fi; \
	if [ -n '$(DATA)' ]; then set -- "$$@" --data '$(DATA)'; fi; \
	set -- "$$@" $(ARGS)
PIP_INSTALL = .venv/bin/python -m pip install -q --disable-pip-version-check
PATH_FILES = $(patsubst %,minift/%.py,prompts encode batching rows model losses optim trainer)
HEART_FILES = $(PATH_FILES) $(patsubst %,minift/%.py,generate cache replay prepacked processors beam bleu pairs scoring lora)

.PHONY: help tour sft rm improve experiments compare bench test test-pages lines clean

help:
	@echo "make tour                see a row become an answer, and two answers rewards, in ten stops; seconds;"
	@echo "                         ARGS=\"--stop 5\" shows one of them, ARGS=--pause waits between two"
	@echo "make sft                 tune the model in data/ on the instructions in data/; writes runs/sft/"
	@echo "make sft RECIPE=course   the course's run: facebook/opt-350m on CodeAlpaca-20k, from the hub"
	@echo "make sft MODEL=… DATA=… ARGS=\"--lr 1e-4\"   your own run; ARGS takes every flag of train_sft.py"
	@echo "make sft ARGS=--help     list these flags"
	@echo "make rm                  train a reward model on the pairs in data/; writes runs/rm/; takes RECIPE, MODEL, DATA, ARGS"
	@echo "make improve             let runs/rm choose among answers of runs/sft, train runs/sft on its favourites;"
	@echo "                         writes runs/improved/; ARGS takes flags of train_sft.py"
	@echo "make experiments         change one thing, train with three seeds, compare: label mask, LoRA, beams, …; an hour or"
	@echo "                         more; ONLY=mask,end runs some; ARGS=\"--steps 200\" makes it shorter"
	@echo "make compare             compare minift with trl, transformers, peft and sacreBLEU; writes runs/compare/;"
	@echo "                         ONLY=bleu,sft runs some sections; MODEL=… DATA=… take your own;"
	@echo "                         ARGS=--faults plants ten faults and checks that each is noticed"
	@echo "make bench               time minift and the packages it replaces, and measure their memory; ARGS=\"--shape 125m\""
	@echo "                         takes a larger model; DATA=… PAIRS=… TOKENIZER=… take your own; ARGS=--help lists flags"
	@echo "make test                check style and types, run the tests"
	@echo "make test-pages          look at the HTML pages in Chromium, if there is one; leaves pictures in runs/pages/"
	@echo "make lines               count the lines of code"
	@echo "make clean               remove .venv and the caches; runs/ stays"
	@echo "make PYTHON=python3.12 … create .venv with this Python"

tour: .venv/installed
	@exec .venv/bin/python -m minift tour $(ARGS)

sft: .venv/installed
	@$(FLAGS); printf '%s\n' ".venv/bin/python train_sft.py $$*"; exec .venv/bin/python train_sft.py "$$@"

# The course's pairs are a parquet file on the hub.
rm: .venv/installed
	@if [ '$(RECIPE)' = course ]; then $(PIP_INSTALL) -e '.[parquet]'; fi
	@$(FLAGS); printf '%s\n' ".venv/bin/python train_rm.py $$*"; exec .venv/bin/python train_rm.py "$$@"

# Best-of-n distillation, or rejection-sampling fine-tuning: sample answers to training prompts, let the judge's vote
# choose one of each, train on these; train_sft.py prints the pass rate of held-out prompts before and after.
improve: .venv/installed
	@for run in sft rm; do test -f runs/$$run/config.json || \
		{ echo "error: make improve starts from runs/sft and runs/rm: run make sft and make rm first" >&2; exit 2; }; done
	.venv/bin/python -m minift best-of --model runs/sft --judge runs/rm --vote --prompts data/instructions.jsonl \
		--limit 1000 --samples 8 --out runs/best-of-training.jsonl --rows runs/favourites.jsonl
	.venv/bin/python train_sft.py --recipe tiny --model runs/sft --template runs/sft/template.json \
		--data runs/favourites.jsonl --eval-data data/heldout.jsonl --run-checks --lr 1e-4 --max-steps 60 \
		--batch-size 16 --eval-every 20 --out runs/improved $(ARGS)

experiments: .venv/installed-for-tests
	@printf '%s\n' ".venv/bin/python -m tests.experiments $(ONLY) $(ARGS)"; \
		exec .venv/bin/python -m tests.experiments $(ONLY) $(ARGS)

compare: .venv/installed-for-tests
	@$(FLAGS); if [ -n '$(ONLY)' ]; then set -- "$$@" --only '$(ONLY)'; fi; \
		printf '%s\n' ".venv/bin/python -m tests.compare $$*"; exec .venv/bin/python -m tests.compare "$$@"

bench: .venv/installed-for-tests
	@$(FLAGS); if [ -n '$(PAIRS)' ]; then set -- "$$@" --pairs '$(PAIRS)'; fi; \
		if [ -n '$(TOKENIZER)' ]; then set -- "$$@" --tokenizer '$(TOKENIZER)'; fi; \
		printf '%s\n' ".venv/bin/python -m tests.bench $$*"; exec .venv/bin/python -m tests.bench "$$@"

# Two processes with a thread each share whole files of tests, whose fixtures train models, in alphabetical order:
# the fewest tests, which would come last otherwise, take longest.
test: .venv/installed-for-tests
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# These tests are among those of `make test`, which does not keep the pictures.
test-pages: .venv/installed-for-tests
	@mkdir -p runs
	.venv/bin/python -m pytest -q -rs tests/test_pages.py --basetemp runs/pages

lines:
	@count() { printf '%6d  %s\n' "$$(shift; cat "$$@" | wc -l)" "$$1"; }; \
		count "the heart, files 1 to 13" $(HEART_FILES); \
		count "instruction tuning: files 1 to 7 and train_sft.py" $(PATH_FILES) train_sft.py; \
		count "the heart with its support: all of minift/*.py" minift/*.py; \
		count "all of minift/" $$(find minift -name '*.py'); \
		count "train_sft.py" train_sft.py; \
		count "train_rm.py" train_rm.py

clean:
	rm -rf .venv minift.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last, so that a failed installation is repeated.
.venv/installed: pyproject.toml
	@command -v '$(PYTHON)' >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11 or newer" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: choose a newer one, make PYTHON=…" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv: install it (the package python3-venv on Debian and Ubuntu)" >&2; exit 1; }
	@echo "installing the packages of pyproject.toml into .venv (only once, takes some minutes)"
	@'$(PYTHON)' -m venv .venv
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/installed-for-tests: .venv/installed
	@echo "installing the packages of the tests into .venv (only once)"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@
