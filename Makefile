# `make demo` and `make test` are complete by themselves: the first run makes .venv and
# installs into it, later ones do so again only if what is installed has changed.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
PYTEST_ARGS ?=
# A process for each core; torch in each keeps to one thread, or they would be in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses auto --dist loadfile

# Every version that the tests run with. Build environments that pip makes for itself keep to
# it too; newer versions of pip read the second name for them.
CONSTRAINTS := constraints.txt
export PIP_CONSTRAINT := $(abspath $(CONSTRAINTS))
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
# The version that `make constraints` keeps to, since its default build takes gigabytes.
TORCH := torch==2.13.0
COMPILE_CONSTRAINTS = echo $(TORCH) | $(RUN)/uv pip compile --quiet --universal --no-annotate \
  --python-version 3.10 --constraints - --custom-compile-command "make constraints"
export PIP_DISABLE_PIP_VERSION_CHECK := 1

INSTALLED := $(VENV)/.installed
# What an extra asks for, without the package, whose engine pip would build again.
INSTALL_EXTRA = $(RUN)/uv pip install --quiet --python $(RUN)/python --constraints $(CONSTRAINTS) \
  --requirements pyproject.toml --extra

# optimum-rbln pins other versions than ours, so it has an environment of its own. What it
# needs for a VAE is named here; the rest of what it asks for is left out.
OPTIMUM_VENV := .venv-optimum-rbln
OPTIMUM_INSTALLED := $(OPTIMUM_VENV)/.installed
OPTIMUM_PACKAGES := torch diffusers==0.38.0 transformers==5.15.1 tokenizers==0.22.1 accelerate pytest xxhash
OPTIMUM_RBLN := optimum-rbln==0.12.0
OPTIMUM_CONSTRAINTS := constraints-optimum-rbln.txt
# The wheels are for these versions of Python: that of 3.12 serves all later ones.
WHEEL_PYTHONS := python3.10 python3.11 python3.12
TEST_ENGINE := PYTHON=$(RUN)/python tools/test_engine/run.sh
ENGINE := $(shell find engine -type f)
STUB := src/rbln_vae/_engine.pyi
# What Python sees of the engine, as the built module says it.
WRITE_STUB = $(RUN)/python -m nanobind.stubgen --quiet --module rbln_vae._engine --output-file
TIDY_STUB = $(RUN)/ruff format --quiet

.PHONY: help install demo test test-slow test-all test-engine test-engine-all test-arm test-ray \
  test-optimum-rbln bench bench-memory check format stub constraints site wheel test-wheel clean \
  distclean

help:
	@echo "make demo       compile the shipped checkpoint and reconstruct a photograph"
	@echo "make test       run the tests, but for the slow ones"
	@echo "make test-slow  run the slow ones"
	@echo "make test-all   run all tests"
	@echo "make test-engine  test the engine under sanitizers, and with emulated AMX tiles"
	@echo "make test-engine-all  the same over more tests"
	@echo "make test-arm   test the wheel for Arm under emulation, which needs qemu-user"
	@echo "make test-ray   test what runs on Ray, which this installs"
	@echo "make test-optimum-rbln  run optimum-rbln itself, in an environment of its own"
	@echo "make bench      measure speed and memory against OpenVINO, diffusers and torch.compile"
	@echo "make bench-memory  measure memory and time against the size of the image"
	@echo "make check      lint, formatting, types, symbols of the kernels, and the engine's stub"
	@echo "make format     format the Python sources"
	@echo "make stub       write the types of the engine's module to $(STUB)"
	@echo "make constraints  choose the versions that the tests run with, and pin them"
	@echo "make site       build the documents as a site in build/site, and check its links"
	@echo "make wheel      build wheels that need no compiler, and a source distribution, in dist/"
	@echo "make test-wheel  try one of the wheels in an environment that has nothing else"
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

test-arm: $(INSTALLED)
	$(INSTALL_EXTRA) wheels
	PYTHON=$(RUN)/python tools/test_arm/run.sh

test-slow: $(INSTALLED)
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(PYTEST) $(PYTEST_ARGS)

test-ray: $(INSTALLED)
	$(INSTALL_EXTRA) ray
	$(RUN)/python -m pytest tests/datasets/test_ray_data.py tests/serving/test_ray.py $(PYTEST_ARGS)

test-optimum-rbln: $(OPTIMUM_INSTALLED)
	$(OPTIMUM_VENV)/bin/python -m pytest --confcutdir=tests/optimum_rbln tests/optimum_rbln $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(INSTALL_EXTRA) bench
	$(RUN)/python -m benchmarks speed

bench-memory: $(INSTALLED)
	$(INSTALL_EXTRA) bench
	$(RUN)/python -m benchmarks memory

check: $(INSTALLED)
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy
	$(RUN)/mypy --config-file tests/mypy.ini
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

# Keeps the versions that are there as far as pyproject.toml allows; UPGRADE=--upgrade takes new ones.
constraints: $(INSTALLED)
	$(COMPILE_CONSTRAINTS) $(UPGRADE) --all-extras pyproject.toml --output-file constraints.txt
	mkdir -p build
	printf '%s\n' $(OPTIMUM_PACKAGES) > build/optimum-rbln.in
	$(COMPILE_CONSTRAINTS) $(UPGRADE) build/optimum-rbln.in --output-file $(OPTIMUM_CONSTRAINTS)

# Not built by mkdocs 2, of which its theme warns.
site: $(INSTALLED)
	$(INSTALL_EXTRA) docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs --quiet build --site-dir build/site
	$(RUN)/python tools/check_links.py build/site

wheel: $(INSTALLED)
	$(INSTALL_EXTRA) wheels
	$(RUN)/python tools/build_wheels.py $(WHEEL_PYTHONS)

# Where nothing else is installed: no compiler is on the path, and no clone's sources are found.
test-wheel: $(INSTALLED)
	$(INSTALL_EXTRA) wheels
	rm -rf build/wheel
	$(RUN)/python tools/build_wheels.py --processor $$(uname -m) --output build/wheel $(RUN)/python
	$(RUN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --only-binary :all: build/wheel/*.whl
	cd build/wheel && env PATH=/nowhere venv/bin/python ../../tools/smoke_test.py

# Editable: a change of a Python source needs no new install.
$(INSTALLED): pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(ENGINE) | $(RUN)/pip
	$(RUN)/python -m pip install --editable '.[dev]'
	@touch $@

$(OPTIMUM_INSTALLED): pyproject.toml constraints.txt $(OPTIMUM_CONSTRAINTS) CMakeLists.txt $(ENGINE)
	$(PYTHON) -m venv $(OPTIMUM_VENV)
	PIP_CONSTRAINT=$(abspath $(OPTIMUM_CONSTRAINTS)) \
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
