# Each target sets up .venv by itself. Needs Python 3.11 or newer and make; PYTHON=... chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help run test test-all soak check bench env image cluster-test

help:
	@echo "make run       install, then run the digits experiment end to end (minutes on two cores)"
	@echo "make test      install, then the tests a person runs before a commit"
	@echo "make test-all  the same with the slow ones"
	@echo "make soak      a digits run killed 21 times beside an untouched one (some 20 minutes on two cores)"
	@echo "make check     ruff and mypy"
	@echo "make bench     speed and memory beside other systems; ARGS='unet --quick' and the like"
	@echo "make env       draw the secrets of docker-compose.yml into .env"
	@echo "make image     build the image of docker-compose.yml, marked with the commit"
	@echo "make cluster-test  the services of docker-compose.yml on several hosts of their own (root, PostgreSQL; 10 minutes)"

$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (about 6 GB, a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; use make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

run: $(READY)
	@echo "== ddpm run digits"
	@$(BIN)/ddpm run digits

test: $(READY)
	@echo "== tests"
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	@echo "== all tests"
	@$(BIN)/python -m pytest

soak: $(READY)
	@echo "== soak"
	@$(BIN)/python tests/soak.py $(ARGS)

check: $(READY)
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@echo "== benchmarks"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]' -c constraints.txt
	@$(BIN)/python -m benchmarks $(ARGS)

env:
	@$(PYTHON) deploy/make_env.py

# As provenance.find_commit() has it: a '+' where the tree differs from the commit.
image:
	@docker build --tag ddpm:0.1.0 --build-arg COMMIT="$$(git describe --always --exclude='*' --abbrev=40 --dirty=+)" .

cluster-test: $(READY)
	@echo "== several hosts"
	@cd tests/cluster && ../../$(BIN)/python -c 'import sys, hosts; sys.exit(hosts.what_is_missing())'
	@$(BIN)/python -m pytest tests/cluster -rs -s
