# Every target sets up .venv when needed: in a fresh clone, run any of them first.
#   make train PRESET=offline                  without network: prepare, train for five minutes, print val_bpb
#   make prepare PRESET=tinystories VOCAB=1024 | FILES='text/*.jsonl' VAL_FILES='val.jsonl' | SEQ=512
#   make train MINUTES=0.2                     a short test run
#   make train Q=1                             print only the result; V=1 prints more (prepare, train and agent)
#   make sample PROMPT='The dog' TOKENS=100    write text with the latest model

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# BACKEND=cpu or cuda. By default what was set up before, else cuda where the NVIDIA driver is new enough for CUDA 13.
DRIVER = $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/\..*//p')
FOUND = $(shell [ "$$(uname -s)" = Linux ] && [ "0$(DRIVER)" -ge 580 ] && echo cuda || echo cpu)
BACKEND ?= $(if $(wildcard $(VENV)/.ready-cuda),cuda,$(if $(wildcard $(VENV)/.ready),cpu,$(FOUND)))
override BACKEND := $(BACKEND)
$(if $(filter cpu cuda,$(BACKEND)),,$(error BACKEND must be cpu or cuda, not $(BACKEND)))
LOCK := requirements$(if $(filter cuda,$(BACKEND)),-cuda).txt
READY := $(VENV)/.ready$(if $(filter cuda,$(BACKEND)),-cuda)
OTHER := $(VENV)/.ready$(if $(filter cpu,$(BACKEND)),-cuda)
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
	$(if $(BASE_URL),--base-url $(call quote,$(BASE_URL))) \
	$(if $(TAG),--tag $(call quote,$(TAG))) $(if $(EXPERIMENTS),--max-experiments $(EXPERIMENTS)) \
	$(if $(UNTIL),--until $(call quote,$(UNTIL))) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(LLM_SHARE),--llm-share $(call quote,$(LLM_SHARE))) \
	$(if $(COMMAND),--command $(call quote,$(COMMAND))) $(if $(SANDBOX),--sandbox $(call quote,$(SANDBOX))) $(if $(RIGOR),--rigor $(call quote,$(RIGOR))) \
	$(if $(filter 0,$(FUTILITY)),--no-futility)

COMPILE := uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	--no-annotate --extra dev

.PHONY: help setup prepare fit train agent suggest skip confirm status report score sample doctor evidence clean-cache clean-runs test fuzz bench torture soak lint format lock clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | expand -t 12
	@sed -n '2,6s/^#/ /p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## create .venv from the hashes in requirements.txt (BACKEND=cpu or cuda; an NVIDIA GPU is found by itself)

$(READY): $(LOCK)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; choose a newer one: make setup PYTHON=python3.12"; exit 1; }
	@if [ -e $(OTHER) ]; then rm -rf $(VENV); fi  # both backends install the same files of MLX
	@echo "setting up $(VENV) for $(BACKEND): one to two minutes, less with uv" >&2
	@if command -v uv >/dev/null; then \
		{ [ -d $(VENV) ] || uv venv -q --python "$$(command -v $(PYTHON))" $(VENV); } && \
		uv pip install -q --python $(PY) --require-hashes -r $(LOCK); \
	else \
		{ [ -x $(PY) ] || $(PYTHON) -m venv $(VENV); } && \
		$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r $(LOCK); \
	fi
	@touch $@

prepare: $(READY)  ## prepare text and tokenizer (PRESET= VOCAB= SEQ= FILES= VAL_FILES= NO_FIT=)
	@$(PREPARE)

fit: $(READY)  ## measure again what fits this machine, for the data prepared last (or PRESET= and the variables of prepare)
	@$(PREPARE) --fit

train: $(READY)  ## train for five minutes, then print val_bpb (PRESET= prepares first; MINUTES= STEPS= SEED= RUN_DIR= HOSTS=)
	@$(if $(PRESET)$(FILES)$(VOCAB)$(SEQ),,[ -f "$(CURRENT)" ] ||) $(PREPARE)
	@$(if $(HOSTS),$(VENV)/bin/mlx.launch --backend ring --hostfile $(call quote,$(HOSTS)) -- )$(PY) train.py $(TRAIN_FLAGS)

agent: $(READY)  ## run a night of experiments, or resume it (PRESET= AGENT= MODEL= BASE_URL= COMMAND= TAG= EXPERIMENTS= UNTIL= MINUTES= LLM_SHARE= SANDBOX= RIGOR= FUTILITY=)
	@$(if $(PRESET),:,[ -f "$(CURRENT)" ] || $(PREPARE))
	@$(PY) agent_loop.py run $(AGENT_FLAGS)

confirm: $(READY)  ## run the winner of the latest night, or TAG=, against its baseline with new seeds (UNTIL=)
	@$(PY) agent_loop.py confirm $(VERBOSITY) $(if $(TAG),--tag $(call quote,$(TAG))) $(if $(UNTIL),--until $(call quote,$(UNTIL)))

status: $(READY)  ## show the results of the latest night, or TAG=
	@$(PY) agent_loop.py status $(if $(TAG),--tag $(call quote,$(TAG)))

suggest: $(READY)  ## suggest the next experiment of a night: constants, a patch, a train.py or words (TEXT= TAG=)
	@$(PY) agent_loop.py suggest $(if $(TAG),--tag $(call quote,$(TAG))) -- $(call quote,$(TEXT))

skip: $(READY)  ## end the experiment at hand of a night (WHY= TAG=)
	@$(PY) agent_loop.py skip $(if $(TAG),--tag $(call quote,$(TAG))) $(if $(WHY),-m $(call quote,$(WHY)))

report: $(READY)  ## write report.html and progress.png for the latest night, or TAG= (WATCH=1 serves a live page)
	@$(PY) agent_loop.py report $(if $(TAG),--tag $(call quote,$(TAG))) $(if $(WATCH),--watch)

score: $(READY)  ## score a run again (RUN=runs/...)
	@$(PY) prepare.py score $(call quote,$(or $(RUN),runs/latest))

sample: $(READY)  ## write text with a trained model (RUN= or TAG=; AGAINST= CHAT=1 EXPORT= PROMPT= TOKENS= TEMPERATURE= TOP_K= SEED= COUNT=)
	@$(PY) prepare.py sample $(SAMPLE_FLAGS)

doctor: $(READY)  ## check that this machine is ready for a night
	@$(PY) prepare.py doctor

evidence: $(READY)  ## run everything once and write evidence.tar.gz without personal data (PRESET= MINUTES= CHECK=file)
	@$(if $(CHECK),:,$(if $(PRESET),,[ -f "$(CURRENT)" ] ||) $(PREPARE))
	@$(PY) prepare.py evidence $(if $(CHECK),--check $(call quote,$(CHECK))) $(if $(MINUTES),--minutes $(MINUTES))

clean-cache: $(READY)  ## list prepared data; NAMES='...' removes these, ALL=1 all that is not in use
	@$(PY) prepare.py clean $(NAMES) $(if $(ALL),--all)

clean-runs: $(READY)  ## list checkpoints; NAMES='...' removes these, ALL=1 all that are not kept
	@$(PY) prepare.py clean --runs $(NAMES) $(if $(ALL),--yes)

test: $(READY)  ## run the tests, 11 to 14 minutes on two cores (ARGS='tests/scoring/test_score.py -x')
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

fuzz: $(READY)  ## feed random input to everything that reads files or answers (ARGS='-k preset')
	@$(PY) -m pytest -n 2 --dist loadfile tests/fuzz --hypothesis-profile=long $(ARGS)

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

lock:  ## update requirements.txt and requirements-cuda.txt (needs uv)
	$(COMPILE) --extra cpu pyproject.toml -o requirements.txt
	$(COMPILE) --extra cuda pyproject.toml -o requirements-cuda.txt

clean:  ## remove .venv and tool caches; keep runs/ and prepared data
	rm -rf $(VENV) .pytest_cache .ruff_cache
