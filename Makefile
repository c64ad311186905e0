# Every target sets up .venv when needed: in a fresh clone, run any of them first.
#   make train PRESET=offline                  without network: prepare, train for five minutes, print val_bpb
#   make prepare PRESET=tinystories VOCAB=1024 | FILES='text/*.jsonl' VAL_FILES='val.jsonl' | SEQ=512
#   make train MINUTES=0.2                     a short test run
#   make train Q=1                             print only the result; V=1 prints more (prepare, train and agent)
#   make sample PROMPT='The dog' TOKENS=100    write text with the latest model

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
CURRENT := $(or $(patsubst ~/%,$(HOME)/%,$(AUTORESEARCH_CACHE)),$(HOME)/.cache/autoresearch)/current.json
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

.PHONY: help setup prepare fit train agent status report score sample doctor clean-cache clean-runs test bench torture soak lint format lock clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | expand -t 12
	@sed -n '2,6s/^#/ /p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## create .venv from the hashes in requirements.txt

$(READY): requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; choose a newer one: make setup PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV): one to two minutes, less with uv" >&2
	@if command -v uv >/dev/null; then \
		{ [ -d $(VENV) ] || uv venv -q --python "$$(command -v $(PYTHON))" $(VENV); } && \
		uv pip install -q --python $(PY) --require-hashes -r requirements.txt; \
	else \
		{ [ -x $(PY) ] || $(PYTHON) -m venv $(VENV); } && \
		$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements.txt; \
	fi
	@touch $@

prepare: $(READY)  ## prepare text and tokenizer (PRESET= VOCAB= SEQ= FILES= VAL_FILES= NO_FIT=)
	@$(PREPARE)

fit: $(READY)  ## measure again what fits this machine, for the data prepared last (or PRESET= and the variables of prepare)
	@$(PREPARE) --fit

train: $(READY)  ## train for five minutes, then print val_bpb (PRESET= prepares first; MINUTES= STEPS= SEED= RUN_DIR= HOSTS=)
	@$(if $(PRESET)$(FILES)$(VOCAB)$(SEQ),,[ -f "$(CURRENT)" ] ||) $(PREPARE)
	@$(if $(HOSTS),$(VENV)/bin/mlx.launch --backend ring --hostfile $(call quote,$(HOSTS)) -- )$(PY) train.py $(TRAIN_FLAGS)

agent: $(READY)  ## run a night of experiments, or resume it (PRESET= AGENT= MODEL= COMMAND= TAG= EXPERIMENTS= UNTIL= MINUTES= LLM_SHARE= SANDBOX= RIGOR=)
	@$(if $(PRESET),:,[ -f "$(CURRENT)" ] || $(PREPARE))
	@$(PY) agent_loop.py run $(AGENT_FLAGS)

status: $(READY)  ## show the results of the latest night, or TAG=
	@$(PY) agent_loop.py status $(if $(TAG),--tag $(call quote,$(TAG)))

report: $(READY)  ## write report.html and progress.png for the latest night, or TAG= (WATCH=1 serves a live page)
	@$(PY) agent_loop.py report $(if $(TAG),--tag $(call quote,$(TAG))) $(if $(WATCH),--watch)

score: $(READY)  ## score a run again (RUN=runs/...)
	@$(PY) prepare.py score $(call quote,$(or $(RUN),runs/latest))

sample: $(READY)  ## write text with a trained model (RUN= or TAG=; AGAINST= CHAT=1 EXPORT= PROMPT= TOKENS= TEMPERATURE= TOP_K= SEED= COUNT=)
	@$(PY) prepare.py sample $(SAMPLE_FLAGS)

doctor: $(READY)  ## check that this machine is ready for a night
	@$(PY) prepare.py doctor

clean-cache: $(READY)  ## list prepared data; NAMES='...' removes these, ALL=1 all that is not in use
	@$(PY) prepare.py clean $(NAMES) $(if $(ALL),--all)

clean-runs: $(READY)  ## list checkpoints; NAMES='...' removes these, ALL=1 all that are not kept
	@$(PY) prepare.py clean --runs $(NAMES) $(if $(ALL),--yes)

test: $(READY)  ## run the tests, about ten minutes (ARGS='tests/scoring/test_score.py -x')
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

bench: $(READY)  ## measure a step, data, scoring and a night; writes benchmarks/out/bench.json (ARGS='step --rounds 9')
	@$(PY) benchmarks/bench.py $(ARGS)

torture: $(READY)  ## inject 300 faults into prepare, train, score and nights; nothing may be lost (ARGS='--faults 20 --only disk')
	@$(PY) benchmarks/torture.py $(ARGS)

soak: $(READY)  ## run a simulated night of 1,000 experiments; memory, open files and time must not grow
	@$(PY) benchmarks/soak.py $(ARGS)

lint: $(READY)  ## check style, format and import order
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(VENV)/bin/lint-imports --no-logo

format: $(READY)
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

lock:  ## update requirements.txt (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--no-annotate --extra dev pyproject.toml -o requirements.txt

clean:  ## remove .venv and tool caches; keep runs/ and prepared data
	rm -rf $(VENV) .pytest_cache .ruff_cache
