# Every target makes its own environment when it is missing or out of date.
VENV ?= .venv
PY := $(VENV)/bin/python
# the oldest and the newest TorchRec minor that are claimed, over the same torch and fbgemm
COMPAT ?= 1.6.1 1.9.2

# processes of the tests; those that start clusters and jobs of their own stay in one of them
WORKERS ?= 2
# TorchX between releases, beside the stable one of the environment
TORCHX_NIGHTLY ?= 2026.10.26
SLURM := slurmctld slurmd slurm-client munge iproute2
ARM := g++-aarch64-linux-gnu qemu-user

.PHONY: run test test-compat test-torchx test-asan check-arm slurm check format bench env clean

env:
	@VENV=$(VENV) ./setup_env.sh

run: env  ## the main job: pre-train, compress, compare, report (no download)
	$(PY) -m torchrec_compress compare configs/demo.yaml

test: env slurm  ## the whole CPU suite
	$(PY) -m pytest -n $(WORKERS)

test-compat: env  ## everything that touches TorchRec's internals, on its oldest and newest minor
	for version in $(COMPAT); do \
	  $(PY) -m pip install -q --no-deps --upgrade --target .compat/$$version torchrec==$$version || exit 1; \
	  PYTHONPATH=.compat/$$version $(PY) -m pytest -p no:cacheprovider tests/modules tests/sharding tests/planner || exit 1; \
	done

test-torchx: env  ## the launcher with TorchX's nightly
	$(PY) -m pip install -q --no-deps --upgrade --target .compat/torchx-nightly torchx-nightly==$(TORCHX_NIGHTLY)
	PYTHONPATH=.compat/torchx-nightly $(PY) -m pytest -p no:cacheprovider -m "not slow" tests/launch launch

slurm:  ## what the tests of the launcher start a cluster with; without it they are skipped and say so
	@PATH=$$PATH:/usr/sbin:/sbin; command -v slurmctld >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  install="apt-get install -y --no-install-recommends $(SLURM)"; \
	  ($$install || (apt-get update && $$install)) >/dev/null 2>&1 && exit 0; \
	fi; \
	echo "no Slurm on this machine; its tests will be skipped (apt-get install $(SLURM))"

test-asan: export TORCHREC_COMPRESS_CACHE = $(CURDIR)/.asan
test-asan: export CXX = g++ -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
test-asan: env  ## the C++ kernels' tests with the address and undefined-behaviour sanitizers of GCC
	$(PY) -c 'from torchrec_compress.ops.cpp import build; build.compile_library()'
	LD_PRELOAD=$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libstdc++.so.6) ASAN_OPTIONS=detect_leaks=0 \
	$(PY) -m pytest -s -p no:cacheprovider tests/ops/cpp/test_kernels.py tests/ops/test_codebook_bags.py \
	  tests/ops/test_hot_rows.py tests/ops/test_layouts.py tests/ops/test_checks.py \
	  tests/ops/test_trained.py tests/ops/test_trained_adam.py tests/ops/test_trained_bags.py tests/ops/test_trained_refusals.py tests/ops/test_nearest.py tests/ops/test_coded_ids.py \
	  -k 'not compile and not exports and not graphs'

check-arm: env  ## the C++ kernels compiled for aarch64, the base kernels run in emulation
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null && exit 0; \
	install="apt-get install -y --no-install-recommends $(ARM)"; \
	($$install || (apt-get update && $$install)) >/dev/null 2>&1 && exit 0; \
	echo "no compiler or emulator for aarch64 on this machine (apt-get install $(ARM))"; exit 1
	$(PY) -m pytest -p no:cacheprovider tests/ops/cpp/test_arm.py

check: env  ## formatter, linter, type checker, spelling
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright
	$(PY) -m codespell_lib .

format: env
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: env  ## time to fit codes, beside faiss, and of the kernels, beside FBGEMM
	$(PY) -m pip install -q 'faiss-cpu>=1.8'
	$(PY) benchmarks/fit_time.py
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 $(PY) benchmarks/kernels.py

clean:
	rm -rf $(VENV) .compat .asan build dist *.egg-info
