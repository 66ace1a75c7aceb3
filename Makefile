# Everything a newcomer needs; `make` lists it. A fresh Debian with git, make and Python 3.11 or later with venv will do.

PYTHON ?= python3
PYTEST_ARGS ?=
IMAGE ?= stampworker

venv := .venv
bin := $(venv)/bin
bench := $(venv)/bench
oldest := $(venv)/oldest

# Tests run in two processes, but for those that start servers of their own. `make PYTEST_ARGS="-n 0 --pdb" ...` debugs.
# With PYTEST_ARGS one of two runs may find no test, which is pytest's exit code 5.
parallel := -n 2
unit := -m "not broker and not server"
fast := -m "not broker and not server and not slow"
servers := -m "broker or server"
pytest = $(1)/bin/python -m pytest $(2) $(PYTEST_ARGS) $(if $(PYTEST_ARGS),|| test $$? = 5)
sources := pyproject.toml constraints.txt $(wildcard setup.py stampworker/*/*.c stampworker/*/*/*.[ch])
install = $(1)/bin/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-unit test-fast test-oldest lint bench image clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=python3.12, PYTEST_ARGS="-k frames -x", IMAGE=name:tag'

demo: $(venv)/.viewer ## install, and run a small simulated survey night through the real worker (no Docker)
	$(bin)/stampworker demo

test: lint ## environment, ruff, mypy and every test, with a real Kafka broker in a container, real servers of frames
	tests/servers/frame_servers.sh
	deploy/engine.sh
	tests/servers/kafka/image.sh
	$(call pytest,$(venv),$(parallel) $(unit))
	$(call pytest,$(venv),$(servers))

test-unit: $(venv)/.test ## the tests that need no Docker and no other servers
	$(call pytest,$(venv),$(parallel) $(unit))

test-fast: $(venv)/.test ## of these, the quick ones, for an edit cycle: a minute
	$(call pytest,$(venv),$(parallel) $(fast))

# What those versions need in turn is new, and warns of what they do with it.
test-oldest: $(oldest)/.oldest ## the same with the oldest versions that pyproject.toml allows (Python 3.11 or 3.12)
	$(call pytest,$(oldest),$(parallel) $(unit) -W default::DeprecationWarning)

lint: $(venv)/.test ## ruff and mypy
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy

bench: $(bench)/.bench ## speed against the same chain written with STDPipe, in an environment of its own (large)
	@set -e; for file in tests/benchmarks/*.py; do echo "$$file"; $(bench)/bin/python "$$file"; done

image: | $(bin)/python ## the Docker image (deploy/README.md)
	PYTHON=$(bin)/python deploy/image.sh $(IMAGE)

clean: ## remove what the other targets made here (Docker's images stay)
	rm -rf $(venv) build dist demo .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. A stamp file is as new as the installation that it marks, so that a second run installs nothing.

$(venv)/.viewer: $(sources) | $(bin)/python
	@echo 'Installing stampworker and what it needs into $(venv)'
	$(call install,$(venv)) -e '.[viewer]'
	@touch $@

$(venv)/.test: $(sources) | $(bin)/python
	@echo 'Installing stampworker, what it needs and the tools of its tests into $(venv)'
	$(call install,$(venv)) -e '.[viewer,test,lint]'
	@touch $@ $(venv)/.viewer

$(bench)/.bench: $(sources) | $(bench)/bin/python
	@echo 'Installing stampworker and STDPipe, to compare with, into $(bench)'
	$(call install,$(bench)) -e '.[bench]'
	@touch $@

$(oldest)/.oldest: $(sources) tests/oldest.py | $(oldest)/bin/python
	@echo 'Installing stampworker and the oldest versions of what it needs into $(oldest)'
	$(oldest)/bin/python tests/oldest.py viewer test >$(oldest)/constraints.txt
	$(oldest)/bin/python -m pip install --disable-pip-version-check -c $(oldest)/constraints.txt -e '.[viewer,test]'
	@touch $@

$(bin)/python $(bench)/bin/python $(oldest)/bin/python:
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo 'stampworker needs Python 3.11 or later with venv, and "$(PYTHON)" is not that ($(shell $(PYTHON) --version 2>&1)).' >&2; \
	    echo 'Debian, Ubuntu: apt-get install python3-venv. Another Python: make PYTHON=python3.12 ...' >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)
