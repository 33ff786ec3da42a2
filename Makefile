# `make demo` and `make test` are complete by themselves: the first run makes .venv and
# installs into it, later ones do so again only if what is installed has changed.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
PYTEST_ARGS ?=
# A process for each core; torch in each keeps to one thread, or they would be in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses auto --dist loadfile

# Build environments that pip makes for itself read this too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

INSTALLED := $(VENV)/.installed

# optimum-rbln pins other versions than ours, so it has an environment of its own. What it
# needs for a VAE is named here; the rest of what it asks for is left out.
OPTIMUM_VENV := .venv-optimum-rbln
OPTIMUM_INSTALLED := $(OPTIMUM_VENV)/.installed
OPTIMUM_PACKAGES := torch diffusers==0.38.0 transformers==5.15.1 tokenizers==0.22.1 accelerate pytest xxhash
OPTIMUM_RBLN := optimum-rbln==0.12.0
TEST_ENGINE := PYTHON=$(RUN)/python tools/test_engine/run.sh
ENGINE := $(shell find engine -type f)
STUB := src/rbln_vae/_engine.pyi
# What Python sees of the engine, as the built module says it.
WRITE_STUB = $(RUN)/python -m nanobind.stubgen --quiet --module rbln_vae._engine --output-file
TIDY_STUB = $(RUN)/ruff format --quiet

.PHONY: help install demo test test-all test-engine test-engine-all test-ray test-optimum-rbln bench \
  bench-memory check format stub clean distclean

help:
	@echo "make demo       compile the shipped checkpoint and reconstruct a photograph"
	@echo "make test       run the tests, but for the slow ones"
	@echo "make test-all   run all tests"
	@echo "make test-engine  test the engine under sanitizers, and with emulated AMX tiles"
	@echo "make test-engine-all  the same over more tests"
	@echo "make test-ray   test what runs on Ray, which this installs"
	@echo "make test-optimum-rbln  run optimum-rbln itself, in an environment of its own"
	@echo "make bench      measure speed and memory against OpenVINO, diffusers and torch.compile"
	@echo "make bench-memory  measure memory and time against the size of the image"
	@echo "make check      lint, formatting, types, symbols of the kernels, and the engine's stub"
	@echo "make format     format the Python sources"
	@echo "make stub       write the types of the engine's module to $(STUB)"
	@echo "make clean      remove what was built; distclean removes $(VENV) too"

install: $(INSTALLED)

demo: $(INSTALLED)
	$(RUN)/python examples/demo.py

test: $(INSTALLED)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# The whole table of kernels and small whole models under AddressSanitizer, which runs the
# emulated tiles too; runs that meet each other under ThreadSanitizer.
test-engine: $(INSTALLED)
	$(TEST_ENGINE) address -q -n auto -m "not slow" \
	  tests/targets/cpu/test_kernels.py tests/targets/cpu/test_runtime.py \
	  tests/targets/cpu/test_stopping.py
	$(TEST_ENGINE) thread -q -m "not slow" tests/targets/cpu/test_runtime.py \
	  tests/targets/cpu/test_threads.py tests/targets/cpu/test_stopping.py \
	  -k "share or threads or test_stopping"
	$(TEST_ENGINE) emulated -q -m "not slow" tests/targets/cpu/test_runtime.py

test-engine-all: $(INSTALLED)
	$(TEST_ENGINE) address -q -n auto -m "not slow" tests/targets/cpu
	$(TEST_ENGINE) thread -q -m "not slow" tests/targets/cpu
	$(TEST_ENGINE) emulated -q tests/targets/cpu

test-all: $(INSTALLED)
	$(PYTEST) $(PYTEST_ARGS)

test-ray: $(INSTALLED)
	$(RUN)/python -m pip install --quiet --editable '.[ray]'
	$(RUN)/python -m pytest tests/datasets/test_ray_data.py tests/serving/test_ray.py $(PYTEST_ARGS)

test-optimum-rbln: $(OPTIMUM_INSTALLED)
	$(OPTIMUM_VENV)/bin/python -m pytest --confcutdir=tests/optimum_rbln tests/optimum_rbln $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(RUN)/python -m pip install --quiet --editable '.[bench]'
	$(RUN)/python -m benchmarks speed

bench-memory: $(INSTALLED)
	$(RUN)/python -m pip install --quiet --editable '.[bench]'
	$(RUN)/python -m benchmarks memory

check: $(INSTALLED)
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy
	$(RUN)/python tools/check_symbols.py build/*/compile_commands.json
	@$(WRITE_STUB) build/_engine.pyi
	@$(TIDY_STUB) build/_engine.pyi
	diff --unified $(STUB) build/_engine.pyi || { \
	  echo "$(STUB) is not what the engine offers; run \`make stub\`" >&2; exit 1; }

format: $(INSTALLED)
	$(RUN)/ruff check --fix
	$(RUN)/ruff format

stub: $(INSTALLED)
	$(WRITE_STUB) $(STUB)
	$(TIDY_STUB) $(STUB)

# Editable: a change of a Python source needs no new install.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(ENGINE) | $(RUN)/pip
	$(RUN)/python -m pip install --editable '.[dev]'
	@touch $@

$(OPTIMUM_INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(ENGINE) Makefile
	$(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install $(OPTIMUM_PACKAGES)
	$(OPTIMUM_VENV)/bin/python -m pip install --no-deps $(OPTIMUM_RBLN) --editable .
	@touch $@

$(RUN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; \
	  open(os.path.join(s.get_path("include"), "Python.h")).close()' 2>/dev/null || { \
	  echo "Python.h is missing; on Debian: apt install python3-dev" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "No virtual environment could be made; on Debian: apt install python3-venv" >&2; \
	  exit 1; }

clean:
	rm -rf build $(INSTALLED) dist demo_output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(OPTIMUM_VENV)
