#!/bin/sh
# Tests the engine in builds that users never see: AMX tiles in plain C++, and sanitizers.
#
#   tools/test_engine.sh emulated | address | thread   [arguments of pytest]
#
# PYTHON names the interpreter, whose environment has the package's dependencies.
set -eu
cd "$(dirname "$0")/.."
kind=${1:?"emulated, address or thread"}
shift
PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=$(command -v "$PYTHON")
case $kind in
  emulated) sanitize= library= ;;
  address) sanitize=address,undefined library=libasan.so ;;
  thread) sanitize=thread library=libtsan.so ;;
  *) echo "unknown kind of build: $kind" >&2; exit 2 ;;
esac

# A copy of the package, so that the engine that is installed stays as it is.
build=build/test-engine/$kind
mkdir -p "$build"
cmake -S . -B "$build" -DPython_EXECUTABLE="$PYTHON" -DRBLN_VAE_TEST_ENGINES=ON \
  -DRBLN_VAE_SANITIZE="$sanitize" > /dev/null
cmake --build "$build" --parallel "$(nproc)"
rm -rf "$build/package"
mkdir -p "$build/package"
cp -R src/rbln_vae "$build/package/rbln_vae"
rm -f "$build"/package/rbln_vae/_engine*.so
cp "$build"/engine/_engine*.so "$build/package/rbln_vae/"

if [ -n "$library" ]; then
  # The interpreter isn't built with the sanitizer, so its library must come first; and
  # the interpreter's own leaks are not ours.
  LD_PRELOAD=$("${CXX:-c++}" -print-file-name="$library")
  export LD_PRELOAD
  export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
  export TSAN_OPTIONS="suppressions=$PWD/tools/thread_sanitizer.txt halt_on_error=1"
fi
PYTHONPATH="$build/package:tests" exec "$PYTHON" -m pytest "${@:-tests/targets/cpu}"
