#!/bin/sh
# Tests the engine in builds that users never see: with AMX tiles in plain C++, so that every
# processor runs the kernels of AMX, and with sanitizers besides.
#
#   tools/test_engine/run.sh emulated | address | thread   arguments of pytest
#
# PYTHON names the interpreter, whose environment has what the package's tests need.
set -eu
cd "$(dirname "$0")/../.."
kind=${1:?"emulated, address or thread"}
shift
PYTHON=${PYTHON:-.venv/bin/python}
PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH
case $kind in
  emulated) sanitize= library= ;;
  address) sanitize=address,undefined library=libasan.so ;;
  thread) sanitize=thread library=libtsan.so ;;
  *) echo "unknown kind of build: $kind" >&2; exit 2 ;;
esac

build=$PWD/build/test-engine/$kind
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" \
  -DRBLN_VAE_EMULATE_TILES=ON -DRBLN_VAE_SANITIZE="$sanitize" > /dev/null
cmake --build "$build"

# The installed engine stays as it is: sitecustomize.py, beside this file, has the tests find
# this one.
RBLN_VAE_TEST_ENGINE=$(echo "$build"/engine/_engine*.so)
export RBLN_VAE_TEST_ENGINE PYTHONPATH="$PWD/tools/test_engine" OMP_NUM_THREADS=1

if [ -n "$library" ]; then
  # The interpreter isn't built with the sanitizer, so its library must come first, and that
  # of C++, which it asks for what exceptions call. What the interpreter leaks isn't ours.
  # Reports go to files, since pytest keeps what is printed and an abort loses it.
  compiler=${CXX:-c++}
  reports=$build/report
  rm -f "$reports".*
  LD_PRELOAD="$("$compiler" -print-file-name="$library") $("$compiler" -print-file-name=libstdc++.so.6)"
  ASAN_OPTIONS=log_path=$reports:detect_leaks=0:allocator_may_return_null=1
  UBSAN_OPTIONS=log_path=$reports:print_stacktrace=1
  TSAN_OPTIONS="log_path=$reports halt_on_error=1 suppressions=$PWD/tools/test_engine/thread_sanitizer.txt"
  export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS TSAN_OPTIONS
fi

python - << 'END'
import os
from rbln_vae import _engine
if _engine.__file__ != os.environ["RBLN_VAE_TEST_ENGINE"]:
    raise SystemExit(f"the tests would run {_engine.__file__}")
END
status=0
python -m pytest -p no:cacheprovider "$@" || status=$?
if [ -n "$library" ]; then
  for report in "$reports".*; do
    # A test that expects a process to end might hide what the sanitizer said.
    if [ -s "$report" ]; then cat "$report" >&2; status=1; fi
  done
fi
exit "$status"
