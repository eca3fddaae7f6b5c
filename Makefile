# Every target makes its own environment when it is missing or out of date.
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: run test check format bench env clean

env:
	@VENV=$(VENV) ./setup_env.sh

run: env  ## the main job: pre-train, compress, compare, report (no download)
	$(PY) -m torchrec_compress compare configs/demo.yaml

test: env  ## the whole CPU suite
	$(PY) -m pytest

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
	rm -rf $(VENV) build dist *.egg-info
