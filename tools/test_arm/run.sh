#!/bin/sh
# Tests the wheel for Arm on a machine of another kind: by Debian's Python for it under qemu-user,
# which has the products of bfloat16, and torch's wheel for it.
#
#   tools/test_arm/run.sh [arguments of pytest]
#
# PYTHON names the interpreter that builds the wheel, whose environment has the extra `wheels`.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
uv=$(dirname "$python")/uv
for needed in qemu-aarch64 apt-get dpkg-deb; do
  command -v "$needed" > /dev/null || {
    echo "$needed is missing: the tests for Arm need Debian or Ubuntu, and qemu-user" >&2
    exit 1
  }
done
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
build=$PWD/build/test-arm
root=$build/root-$version
mkdir -p "$build"

# Packages are downloaded and unpacked, never installed: this machine could not run them.
if ! [ -e "$root/done" ]; then
  apt=$build/apt
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$root"
  : > "$apt/status"
  apt_for_arm() {
    apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$apt" \
      -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=root "$@"
  }
  apt_for_arm update || true  # of a source without packages for Arm
  apt_for_arm install --download-only --no-install-recommends --yes "python$version" libstdc++6 || {
    echo "This system's sources have no python$version for arm64; name another: make PYTHON=…" >&2
    exit 1
  }
  for package in "$apt"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$root"; done
  [ -e "$root/lib" ] || ln -s usr/lib "$root/lib"
  touch "$root/done"
fi

# Later versions of torch come with CUDA where the tests install it from.
site=$build/site-$version
grep -v '^torch==' constraints.txt > "$build/constraints.txt"
"$uv" pip install --quiet --python-platform aarch64-manylinux_2_28 --python-version "$version" \
  --target "$site" --only-binary :all: --constraints "$build/constraints.txt" \
  torch==2.8.0 diffusers safetensors xxhash rich typer pytest hypothesis

rm -rf "$build/dist"
"$python" tools/build_wheels.py --processor aarch64 --output "$build/dist" "$python"
rm -rf "$site/rbln_vae"
"$python" -m zipfile -e "$build"/dist/rbln_vae-*.whl "$site"

emulated() {
  PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$site OMP_NUM_THREADS=1 \
    qemu-aarch64 -cpu max -L "$root" "$root/usr/bin/python$version" "$@"
}
run() { emulated -m pytest -p no:cacheprovider -q -m "not slow" --durations 5 "$@"; }

if [ $# -gt 0 ]; then
  run "$@"
  exit
fi

# Everything takes fifty times as long as on a processor, so there are two halves, and the largest
# shapes are left out. Models are compiled here.
small="not 130 and not 256"
near="portable or nearest or every_float16 or (winograd_is_what and generic-float32)"
kernels=tests/targets/cpu/test_kernels.py
run "$kernels" -k "$small and not neon and ($near)" > "$build/portable.txt" 2>&1 &
portable=$!
status=0
run "$kernels" -k "$small and neon and (bytes_agree or nearest or winograd_is_what)" || status=$?
rm -rf "$build/models"
mkdir "$build/models"
PYTHONPATH=tests:examples "$python" tools/test_arm/models.py write "$build/models"
emulated tools/test_arm/models.py run "$build/models" || status=$?
wait "$portable" || status=$?
cat "$build/portable.txt"
exit "$status"
