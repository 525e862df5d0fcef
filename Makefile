# `make help` lists the targets. Nothing has to be installed by hand: each target sets up what it needs in .venv, once.
# A stamp there records this until one of the files that the set-up depends on changes.
#
#   make demo PYTHON=python3.12      another interpreter (3.11 or later)
#   make test ARGS="-k ring -x"      arguments for pytest
#   make test JOBS="-n 0"            one test after another

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

RECIPE := tools/bootstrap.py tools/llama_cpp.cmake constraints.txt setup.cfg setup.py pyproject.toml $(wildcard bin/* aiosd/llm/native/* aiosd/sandbox/native/*)

.PHONY: help demo test check lint conformance man nano peers chroma frameworks models embedder install again clean distclean mcp-servers
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

demo: $(VENV)/.base ## boots the system, runs three agents, shows and kills one, shuts down
	@$(BIN)/python demo/demo.py

#: How many tests run at a time: one for each processor, four at most. Those of a file stay together and share its
#: systems; the order of files is that of tests/conftest.py. Tests about time run alone (tests/alone.py).
JOBS ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev ## all tests
	$(BIN)/python -m pytest $(JOBS) $(ARGS)

#: The tests that find most mistakes in the least time: the pure parts, and one real system.
CHECK := house packaging explain books budget proc pids ledger journal ring channel stream timers heartbeat supervisor \
         agentlog restart service hostile aio llm_policy llm_prefix llm_text llm_sampling llm_core processes

check: $(VENV)/.dev ## a quick selection of the tests
	$(BIN)/python -m pytest -q $(JOBS) $(CHECK:%=tests/test_%.py) $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/python -m ruff check . $(wildcard bin/*)
	$(BIN)/python -m mypy

conformance: $(VENV)/.dev ## other projects' tests of OpenAI's API, against the gateway
	@$(BIN)/python tools/conformance.py $(VENV) $(ARGS)

man: $(VENV)/.base ## manual pages of all commands, from their help, in build/man
	@$(BIN)/python tools/manpages.py

nano: $(VENV)/.nano ## trains the embedded model again from its seeds
	$(BIN)/python -m aiosd.nano.train $(ARGS)

peers: $(VENV)/.bench ## llama-server and its benchmarks, natively built, for benchmarks/ to compare with
	@$(PYTHON) tools/peers.py $(VENV)

frameworks: $(VENV)/.dev ## runs frameworks for agents, each in an environment of its own, as agents (ARGS="openai autogen": some)
	@$(BIN)/python -m tools.frameworks $(ARGS)

#: chromadb has an environment of its own, because its packages differ from ours.
CHROMA := build/peers/chroma

chroma: $(CHROMA)/.installed ## chromadb, for benchmarks/store.py and search.py to compare with, 500 MB

$(CHROMA)/.installed:
	$(PYTHON) -m venv $(CHROMA)
	$(CHROMA)/bin/python -m pip install -q --disable-pip-version-check chromadb==1.5.9
	@touch $@

models: $(VENV)/.base ## real models for tests and benchmarks, 350 MB (ARGS=smollm2: one of them)
	@$(BIN)/python -m tools.models $(ARGS)

embedder: $(VENV)/.base ## the model for search by meaning, 46 MB (ARGS=--static: a table, 8 MB)
	@$(BIN)/aiosd get-embedder $(ARGS)

mcp-servers: $(VENV)/.base ## real MCP servers for the tests, 300 MB (ARGS=time: one of them; three need npm)
	@$(BIN)/python tools/mcpservers.py $(ARGS)

install: $(VENV)/.base ## only the set-up: .venv with the package and its commands

STAGES := $(VENV)/.base $(VENV)/.dev $(VENV)/.nano $(VENV)/.bench

# Build llama.cpp again if CMAKE_ARGS differs from that of .venv: CMAKE_ARGS=-DGGML_CUDA=on make install
ifdef CMAKE_ARGS
ifneq ($(strip $(CMAKE_ARGS)),$(shell cat $(VENV)/.cmake_args 2>/dev/null))
$(STAGES): again
endif
endif

# Each stage includes .base, and marks it as done, too. bootstrap.py takes a lock, so that `make -j` may build several
# stages at a time.
$(STAGES): $(VENV)/.%: $(RECIPE)
	@$(PYTHON) tools/bootstrap.py $(VENV) $*

clean: ## removes what builds and tests left, keeps .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find aiosd libaios tests benchmarks demo tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and removes .venv too
	rm -rf $(VENV)
