# make demo: a student learns from a teacher on real images.   make test: lint, docs, tests.   Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
SOURCES := $(CPP) CMakeLists.txt setup.py pyproject.toml
CTEST_BUILD := build/ctest

.PHONY: setup demo test test-quick test-thorough test-lowest test-triton test-wheel coverage lint ctest docs wheels gpu clean

setup: $(VENV)/.installed

# The tools of the build come first: the extension is compiled against the very PyTorch that will load it.
$(VENV)/.tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "torch>=2.8" numpy "cmake>=3.24" ninja "pybind11>=2.12"
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

TASK ?= classification

# make demo TASK=detection, or generation. Interrupted, it continues.
demo: setup
	$(BIN)/vkd distill $(TASK) --output runs/demo-$(TASK) $(if $(wildcard runs/demo-$(TASK)/config.yaml),--resume)

# Two processes of one thread each: most of the time goes into Python, not into matrix products.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: setup
	$(MAKE) --jobs=2 lint ctest docs
	$(PYTEST) --dist loadfile --no-loadscope-reorder

# Every combination, where `make test` lets some stand for all (the mark `thorough`).
test-thorough: setup
	$(PYTEST) --dist loadfile --no-loadscope-reorder --thorough

# For the loop of a developer: without what is slow (tests/conftest.py says which files, and the mark `slow`).
test-quick: setup
	$(PYTEST) -q --quick

# The tests that need no recipes' packages, in environments of their own: with the oldest PyTorch and Triton that are
# supported, and with the pure-Python wheel on the newest.
CORE_TESTS := tests/ops tests/modules tests/distributed
CORE_TOOLS := "pytest>=9" hypothesis psutil safetensors scipy "setuptools>=77" wheel

test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet "torch==2.8.*" "triton==3.4.*" "numpy<2.4" $(CORE_TOOLS)
	.venv-lowest/bin/python -m benchmarks.lowest_versions $(CORE_TESTS)

# The kernels as the oldest supported Triton compiles and launches them, with the PyTorch that brought it; `make test`
# does the same with the newest.
test-triton:
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet "torch==2.11.*" "triton==3.6.*" "numpy<2.4" $(CORE_TOOLS)
	.venv-triton/bin/python -m pytest -q tests/ops/test_ortho_proj_loss_aot.py tests/ops/test_host_time.py

PIP_INDEX ?=
test-wheel:
	test -x .venv-wheel/bin/python || $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet torch $(if $(PIP_INDEX),--index-url $(PIP_INDEX))
	.venv-wheel/bin/python -m pip install --quiet $(CORE_TOOLS) numpy
	VKD_KERNELS_BUILD=0 .venv-wheel/bin/python -m pip wheel --quiet --no-deps -w build/wheel .
	.venv-wheel/bin/python -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	rm -rf build/wheel/tree && mkdir build/wheel/tree && cp -r pyproject.toml docs tests build/wheel/tree
	cd build/wheel/tree && ../../../.venv-wheel/bin/python -m pytest -q -m "not slow" $(CORE_TESTS)

# tests/ once more, with coverage of the package's Python: worker processes, ranks and commands included.
coverage: setup
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --show-missing

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

ctest: setup
	$(BIN)/cmake -S . -B $(CTEST_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DVKD_BUILD_EXTENSION=OFF -DVKD_BUILD_TESTS=ON
	MAKEFLAGS= $(BIN)/cmake --build $(CTEST_BUILD)  # ninja can't share make's job server
	$(BIN)/ctest --test-dir $(CTEST_BUILD) --output-on-failure

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

# The sdist, the pure-Python wheel, and the wheel with the extension for this machine's PyTorch.
wheels: setup
	$(BIN)/python -c "import setuptools.build_meta as backend; backend.build_sdist('dist')"
	VKD_KERNELS_BUILD=0 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .

# On a machine with an NVIDIA GPU: builds, measures, tests and sanitizes with the Python and PyTorch that are there. It
# takes up to 980 s: where a command may take less, run the three calls of `python -m benchmarks.gpu --help` one by one.
gpu:
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf build dist .venv-lowest .venv-triton .venv-wheel *.egg-info vkd_kernels/*.so vkd_kernels/_build.json
