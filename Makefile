# Every target sets up by itself when needed: a fresh clone needs no other command first.
#   make train PRESET=offline                  the main job with no network: prepare, train five minutes, val_bpb
#   make prepare PRESET=tinystories VOCAB=1024 | FILES='text/*.jsonl' VAL_FILES='val.jsonl' | SEQ=512
#   make train MINUTES=0.2                     a smoke run
#   make train Q=1                             only the result; V=1: more than usual (prepare, train and agent)
#   make sample PROMPT='The dog' TOKENS=100    text from the last checkpoint

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHONHASHSEED PYTHONOPTIMIZE

quote = '$(subst ','\'',$(1))'
VERBOSITY := $(if $(Q),--quiet) $(if $(V),--verbose)
PREPARE_FLAGS := $(VERBOSITY) $(if $(VOCAB),--vocab $(VOCAB)) $(if $(SEQ),--seq $(SEQ)) \
	$(if $(FILES),--files $(call quote,$(FILES))) $(if $(VAL_FILES),--val-files $(call quote,$(VAL_FILES))) \
	$(if $(NO_FIT)$(MINUTES)$(STEPS),--no-fit)
PREPARE = $(PY) prepare.py $(if $(PRESET),--preset $(call quote,$(PRESET))) $(PREPARE_FLAGS)
CURRENT := $(or $(AUTORESEARCH_CACHE),$(HOME)/.cache/autoresearch)/current.json
TRAIN_FLAGS := $(VERBOSITY) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED)) \
	$(if $(RUN_DIR),--run-dir $(call quote,$(RUN_DIR)))
SAMPLE_FLAGS := $(if $(RUN),$(call quote,$(RUN))) $(if $(AGAINST),$(call quote,$(AGAINST))) \
	$(if $(TAG),--tag $(call quote,$(TAG))) $(if $(CHAT),--chat) $(if $(EXPORT),--export $(call quote,$(EXPORT))) $(if $(PROMPT),--prompt $(call quote,$(PROMPT))) $(if $(TOKENS),--tokens $(TOKENS)) \
	$(if $(TEMPERATURE),--temperature $(TEMPERATURE)) $(if $(TOP_K),--top-k $(TOP_K)) \
	$(if $(SEED),--seed $(SEED)) $(if $(COUNT),--count $(COUNT))

AGENT_FLAGS := $(VERBOSITY) $(if $(PRESET),--preset $(call quote,$(PRESET))) $(if $(AGENT),--agent $(call quote,$(AGENT))) $(if $(MODEL),--model $(call quote,$(MODEL))) \
	$(if $(TAG),--tag $(call quote,$(TAG))) $(if $(EXPERIMENTS),--max-experiments $(EXPERIMENTS)) \
	$(if $(UNTIL),--until $(call quote,$(UNTIL))) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(LLM_SHARE),--llm-share $(call quote,$(LLM_SHARE))) \
	$(if $(COMMAND),--command $(call quote,$(COMMAND))) $(if $(SANDBOX),--sandbox $(call quote,$(SANDBOX))) $(if $(RIGOR),--rigor $(call quote,$(RIGOR)))

.PHONY: help setup prepare fit train agent status report score sample doctor clean-cache clean-runs test bench lint format lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | expand -t 12
	@sed -n '2,6s/^#/ /p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## the environment in .venv, from the hashes in requirements.txt

$(READY): requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; name a newer one: make setup PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV), once: one to two minutes, less with uv" >&2
	@if command -v uv >/dev/null; then \
		{ [ -d $(VENV) ] || uv venv -q --python "$$(command -v $(PYTHON))" $(VENV); } && \
		uv pip install -q --python $(PY) --require-hashes -r requirements.txt; \
	else \
		{ [ -x $(PY) ] || $(PYTHON) -m venv $(VENV); } && \
		$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements.txt; \
	fi
	@touch $@

prepare: $(READY)  ## text and tokenizer (PRESET= VOCAB= SEQ= FILES= VAL_FILES= NO_FIT=)
	@$(PREPARE)

fit: $(READY)  ## measure anew what fits this machine, for what was prepared last (or PRESET= and what prepare takes)
	@$(PREPARE) --fit

train: $(READY)  ## five minutes, then val_bpb (with PRESET=: prepares first; MINUTES= STEPS= SEED= RUN_DIR= HOSTS=)
	@$(if $(PRESET)$(FILES)$(VOCAB)$(SEQ),,[ -f "$(CURRENT)" ] ||) $(PREPARE)
	@$(if $(HOSTS),$(VENV)/bin/mlx.launch --backend ring --hostfile $(call quote,$(HOSTS)) -- )$(PY) train.py $(TRAIN_FLAGS)

agent: $(READY)  ## the night (PRESET= AGENT= MODEL= COMMAND= TAG= EXPERIMENTS= UNTIL= MINUTES= LLM_SHARE= SANDBOX= RIGOR=)
	@$(if $(PRESET),:,[ -f "$(CURRENT)" ] || $(PREPARE))
	@$(PY) agent_loop.py run $(AGENT_FLAGS)

status: $(READY)  ## what the latest night, or TAG=, has found
	@$(PY) agent_loop.py status $(if $(TAG),--tag $(call quote,$(TAG)))

report: $(READY)  ## report.html and progress.png of the latest night, or TAG= (WATCH=1 serves it as it goes)
	@$(PY) agent_loop.py report $(if $(TAG),--tag $(call quote,$(TAG))) $(if $(WATCH),--watch)

score: $(READY)  ## rescore a run (RUN=runs/...)
	@$(PY) prepare.py score $(call quote,$(or $(RUN),runs/latest))

sample: $(READY)  ## text from a checkpoint (RUN= or TAG=; AGAINST= CHAT=1 EXPORT= PROMPT= TOKENS= TEMPERATURE= TOP_K= SEED= COUNT=)
	@$(PY) prepare.py sample $(SAMPLE_FLAGS)

doctor: $(READY)  ## what of this machine serves a night and what does not
	@$(PY) prepare.py doctor

clean-cache: $(READY)  ## prepared data with sizes; NAMES='...' removes these, ALL=1 all that is not in use
	@$(PY) prepare.py clean $(NAMES) $(if $(ALL),--all)

clean-runs: $(READY)  ## checkpoints of runs and nights with sizes; NAMES='...' removes these, ALL=1 all that are not kept
	@$(PY) prepare.py clean --runs $(NAMES) $(if $(ALL),--yes)

test: $(READY)  ## the tests, about ten minutes (ARGS='tests/scoring/test_score.py -x')
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

bench: $(READY)  ## what a step, data, scoring and a night cost here; benchmarks/out/bench.json (ARGS='step --rounds 9')
	@$(PY) benchmarks/bench.py $(ARGS)

lint: $(READY)  ## style, format and the order of imports; nothing is changed
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(VENV)/bin/lint-imports --no-logo

format: $(READY)
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

lock:  ## renew requirements.txt (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--no-annotate --extra dev pyproject.toml -o requirements.txt

clean:  ## remove the environment and caches of tools; runs/ and prepared data stay
	rm -rf $(VENV) .pytest_cache .ruff_cache
