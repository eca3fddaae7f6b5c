# Every target makes its own environment when it is missing or out of date.
VENV ?= .venv
PY := $(VENV)/bin/python
# the oldest and the newest TorchRec minor that are claimed, over the same torch and fbgemm
COMPAT ?= 1.6.1 1.9.2

.PHONY: run test test-compat check format bench env clean

env:
	@VENV=$(VENV) ./setup_env.sh

run: env  ## the main job: pre-train, compress, compare, report (no download)
	$(PY) -m torchrec_compress compare configs/demo.yaml

test: env  ## the whole CPU suite
	$(PY) -m pytest

test-compat: env  ## everything that touches TorchRec's internals, on its oldest and newest minor
	for version in $(COMPAT); do \
	  $(PY) -m pip install -q --no-deps --upgrade --target .compat/$$version torchrec==$$version || exit 1; \
	  PYTHONPATH=.compat/$$version $(PY) -m pytest -p no:cacheprovider tests/modules tests/sharding tests/planner || exit 1; \
	done

check: env  ## formatter, linter, type checker, spelling
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright
	$(PY) -m codespell_lib .

format: env
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: env  ## time to fit codes, beside faiss
	$(PY) -m pip install -q 'faiss-cpu>=1.8'
	$(PY) benchmarks/fit_time.py

clean:
	rm -rf $(VENV) .compat build dist *.egg-info
