# Each target sets up .venv by itself. Needs Python 3.11 or newer and make; PYTHON=... chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The three tiers of tests (CONTRIBUTING.md). Two processes; each file stays in one, all that starts Ray in the same.
QUICK := tests/ddpm tests/pipeline/config tests/pipeline/scores/test_ranking.py $(addprefix tests/pipeline/store/test_,\
	keys.py run.py tars.py checkpoint.py) tests/test_architecture.py tests/test_pages.py
PYTEST := $(BIN)/python -m pytest
TWICE := --numprocesses=2 --dist=loadscope --no-loadscope-reorder

.PHONY: help run quick test device test-all soak fuzz check docs bench env image cluster-test

help:
	@echo "make run       install, then run the digits experiment end to end (minutes on two cores)"
	@echo "make quick     install, then the tests of the science, the architecture and what else is fast (a minute)"
	@echo "make test      the tests a person runs before a commit (minutes)"
	@echo "make device    all networks on fake CUDA tensors (a minute; needs a C compiler, no GPU)"
	@echo "make test-all  the same with the slow ones (an hour)"
	@echo "make soak      a digits run killed 21 times beside an untouched one (some 20 minutes on two cores)"
	@echo "make fuzz      drawn command lines and damages to a finished run; CASES=500 DAMAGES=50 SEED=0"
	@echo "make check     ruff and mypy"
	@echo "make docs      the pages and an API reference as a site: build/site/index.html"
	@echo "make bench     speed and memory beside other systems; ARGS='unet --quick' and the like"
	@echo "make env       draw the secrets of docker-compose.yml into .env"
	@echo "make image     build the image of docker-compose.yml, marked with the commit"
	@echo "make cluster-test  the services of docker-compose.yml on several hosts of their own (root, PostgreSQL; 10 minutes)"

$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (about 6 GB, a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; use make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,imagenet]' -c constraints.txt
	@touch $@

run: $(READY)
	@echo "== ddpm run digits"
	@$(BIN)/ddpm run digits

quick: $(READY)
	@echo "== quick tests"
	@$(PYTEST) $(QUICK) -m "not slow and not ray" $(TWICE) $(ARGS)

test: $(READY)
	@echo "== tests"
	@$(PYTEST) -m "not slow and not device" $(TWICE) $(ARGS)

device: $(READY)
	@echo "== fake CUDA tensors"
	@$(PYTEST) tests/device tests/ddpm/kernels -m device --numprocesses=2 $(ARGS)

test-all: $(READY)
	@echo "== all tests"
	@$(PYTEST) $(ARGS)

soak: $(READY)
	@echo "== soak"
	@$(BIN)/python tests/soak.py $(ARGS)

CASES := 500
DAMAGES := 50
SEED := 0
fuzz: $(READY)
	@echo "== fuzz"
	@$(BIN)/python -u tests/test_fuzz.py $(CASES) $(DAMAGES) $(SEED)

check: $(READY)
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(READY)
	@echo "== build/site/index.html"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@rm -rf build/pages && mkdir -p build/pages && cp -r *.md LICENSE CITATION.cff docs conf examples build/pages
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(READY)
	@echo "== benchmarks"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]' -c constraints.txt
	@$(BIN)/python -m benchmarks $(ARGS)

env:
	@$(PYTHON) deploy/make_env.py

image: $(READY)
	@docker build --tag ddpm:0.1.0 --build-arg COMMIT="$$($(BIN)/python -c 'from pipeline.engine.code import find_commit; print(find_commit() or "")')" .

cluster-test: $(READY)
	@echo "== several hosts"
	@cd tests/cluster && PYTHONPATH=.. ../../$(BIN)/python -c 'import sys, hosts; sys.exit(hosts.what_is_missing())'
	@$(BIN)/python -m pytest tests/cluster -rs -s
