# Everything from a fresh checkout, with python3 >= 3.11 and a C++ compiler. `make help` lists the targets.

PYTHON ?= python3
# CUDA kernels: AUTO (when a CUDA compiler is found), ON or OFF.
CUDA ?= AUTO
# CUDA architectures, such as 90 or "80;90"; empty: the default list of CMakeLists.txt, in the demo this machine's.
CUDA_ARCHS ?=
PYTEST_ARGS ?=
# Where `make bench` puts its results; benchmarks/results is what the tables of the documentation are made from.
RESULTS ?= build/results

VENV := .venv
BIN := $(VENV)/bin
comma := ,
PIP := $(BIN)/python -m pip --disable-pip-version-check
# $(call build_settings,CUDA kernels,CUDA architectures)
build_settings = --config-settings=cmake.define.REGKERNELS_CUDA=$1 \
  $(if $2,"--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$2")
SOURCES := $(shell find csrc regkernels jaxreg jaxreg_cli torchreg -type f -not -path '*/__pycache__/*' -not -name '*.md' -not -name '*.so') \
  CMakeLists.txt pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz sanitize docs bench wheel format lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) CUDA=$(CUDA) CUDA_ARCHS=$(CUDA_ARCHS) PYTEST_ARGS=$(PYTEST_ARGS) RESULTS=$(RESULTS)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a range would take the newest build with all its CUDA packages.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	@echo "Installing both packages with all that they can use, and compiling the kernels: this takes some minutes"
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt $(call build_settings,$(CUDA),$(CUDA_ARCHS)) ".[jax,torch,cli,test,dev,docs]"
	@touch $@ $(VENV)/.installed-demo

# The demo takes kernels for the CUDA devices of this machine alone, and for none without a device or a CUDA compiler.
# When `nvidia-smi` fails it says so in words; only numbers from 8.0 on count.
gpu_archs = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | sed -n 's/^\([89]\|1[0-9]\)\.\([0-9]\)$$/\1\2-real/p' | sort -u | paste -sd ';' -)
demo_archs = $(or $(CUDA_ARCHS),$(gpu_archs))
demo_cuda = $(if $(filter AUTO,$(CUDA)),$(if $(and $(demo_archs),$(or $(CUDACXX),$(shell command -v nvcc))),ON,OFF),$(CUDA))
demo_extras = jax,$(if $(and $(filter ON,$(demo_cuda)),$(gpu_archs)),cuda13$(comma))cli
$(VENV)/.installed-demo: $(BIN)/python $(SOURCES)
	@echo "Installing JAX and what the command line needs, and compiling the kernels for the CPU$(if \
	  $(filter ON,$(demo_cuda)), and CUDA ($(or $(demo_archs),default architectures))): this takes some minutes"
	$(PIP) install -c constraints.txt $(call build_settings,$(demo_cuda),$(demo_archs)) ".[$(demo_extras)]"
	@touch $@

install: $(VENV)/.installed ## both packages with everything they can use, in .venv

demo: $(VENV)/.installed-demo ## register two brains; pictures and volumes in ./jaxreg-demo
	$(BIN)/jaxreg demo

test: lint ## the tests that this machine can run
	$(BIN)/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

fuzz: $(VENV)/.installed ## thousands of random calls, other ones each time
	$(BIN)/pytest tests/ops/test_random_calls.py --hypothesis-profile=fuzz $(PYTEST_ARGS)

# The interpreter is not instrumented: it and the frameworks leak as they please, and the sanitizers' runtime and
# the C++ library, whose exceptions it watches, have to be there first.
SANITIZED := build/sanitize
sanitize: $(VENV)/.installed ## the extension under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PIP) install --quiet -c constraints.txt pybind11 cmake ninja
	$(PIP) install --quiet --no-deps --target build/headers jaxlib==0.8.2
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja \
	  -DREGKERNELS_CUDA=OFF -DREGKERNELS_SANITIZE=address,undefined \
	  -DXLA_FFI_INCLUDE_DIR="$(CURDIR)/build/headers/jaxlib/include" -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build $(SANITIZED)
	rm -rf $(SANITIZED)/site && mkdir $(SANITIZED)/site && cp -r regkernels jaxreg jaxreg_cli torchreg $(SANITIZED)/site
	$(BIN)/cmake --install $(SANITIZED) --prefix $(SANITIZED)/site
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH="$(CURDIR)/$(SANITIZED)/site" $(BIN)/pytest -m "not gpu" \
	  tests/ops/test_random_calls.py tests/ops/test_bad_input.py tests/ops/test_non_finite.py tests/ops/test_threads.py $(PYTEST_ARGS)

docs: $(VENV)/.installed ## these pages and the reference as a site: build/docs/index.html
	$(BIN)/sphinx-build -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

bench: $(VENV)/.installed ## speed and memory beside what one would otherwise use
	for benchmark in warp similarity registration latency; do \
	  $(BIN)/python benchmarks/$$benchmark.py --output $(RESULTS) || exit 1; done

wheel: ## a wheel for PYTHON in wheelhouse/, for CUDA_ARCHS if given
	$(PYTHON) -m pip --disable-pip-version-check wheel . --no-deps --wheel-dir wheelhouse $(call build_settings,$(CUDA),$(CUDA_ARCHS))

format: $(VENV)/.installed ## ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

lint: $(VENV)/.installed ## check format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

clean: ## remove what was built
	rm -rf $(VENV) build dist wheelhouse
