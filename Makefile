# The same commands as in the README and in CI.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PEERS  := .bench-venv
BUILD  := pyproject.toml setup.py $(wildcard models/native/*.[ch])  # what an installation is made of

# Test modules that run at a time; each takes a core and a few GB.
JOBS   ?= 2

BENCHES := texts known embeddings one_embedding backfill_texts backfill backfill_killed fairness overload argmin registry flips

.PHONY: serve test check bench churn chaos ordeal clean

serve: $(VENV)/.serve         ## install and start the service on 127.0.0.1:8000
	@exec $(BIN)/semid serve

test: $(VENV)/.test           ## install what the tests need and run them all
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: $(VENV)/.check         ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCHES:%=bench-%)   ## every figure of docs/benchmarks.md, each beside its peers; then the page
	$(PEERS)/bin/python -P benchmarks/report.py

bench-%: $(PEERS)/.installed   ## one of them: make bench-texts ARGS='--rounds 3 --threads 1'
	$(PEERS)/bin/python -P benchmarks/$*.py $(ARGS)

churn: $(VENV)/.test          ## follow an hour of churn (SID_CHURN_S): the trie is that of a fresh snapshot
	SID_CHURN_S=$${SID_CHURN_S:-3600} $(BIN)/python -m pytest tests/service/test_follower.py -k churn $(ARGS)

chaos: $(VENV)/.test          ## break everything for 5 minutes, then check every promise (ARGS='--seconds 60 --seed 7')
	$(BIN)/python -m tests.chaos $(ARGS)

ordeal: $(VENV)/.test         ## 100,000 items through the clients while the service is killed, restarted, overloaded, cut off
	SID_ORDEAL_ITEMS=$${SID_ORDEAL_ITEMS:-100000} $(BIN)/python -m pytest tests/end_to_end/test_ordeal.py $(ARGS)

clean:                        ## remove the environment; the data directory stays
	rm -rf $(VENV) $(PEERS) .bench-infinity

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "semid needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)

# torch is pinned in pyproject.toml: a CPU build where one is at hand, else the CUDA build of the registry.
$(VENV)/.serve: $(BUILD) | $(BIN)/pip
	@echo 'installing into $(VENV): a few minutes the first time'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: $(BUILD) | $(BIN)/pip
	@echo 'installing what the tests need into $(VENV): a few minutes the first time'
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.check: $(BUILD) | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(PEERS)/.installed: $(BUILD) benchmarks/requirements.txt benchmarks/requirements-infinity.txt
	@echo 'installing the service and its peers into $(PEERS): a few minutes the first time'
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --editable . -r benchmarks/requirements.txt
	$(PYTHON) -m venv .bench-infinity
	$(PEERS)/bin/pip --python .bench-infinity/bin/python install --quiet --disable-pip-version-check \
		-r benchmarks/requirements-infinity.txt || echo 'infinity-emb does not install here: it will be skipped'
	@touch $@
