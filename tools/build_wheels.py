"""Builds a source distribution, and wheels of it that need no compiler where they are installed.

The compiler is zig, which brings its own C++ library and links against an old version of glibc,
for any processor. Each interpreter builds a wheel for its own version, of which that of 3.12
serves all later ones, too.

    python tools/build_wheels.py --processor x86_64 python3.10 python3.11 python3.12
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ziglang

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent
"""Where the commands are that are installed with this interpreter."""
GLIBC = "2.28"
"""As torch's wheels."""
PROCESSORS = ("x86_64", "aarch64")


def run(*command: object, **environment: str) -> None:
    """Run a command that is installed beside this interpreter."""
    path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [str(each) for each in command],
        check=True,
        env={**os.environ, "PATH": path, **environment},
    )


def uv_build(*arguments: object, **environment: str) -> None:
    """Build with the versions of the build's packages that the tests run with."""
    run("uv", "build", "--build-constraints", ROOT / "constraints.txt", *arguments, **environment)


def script(path: Path, command: str) -> Path:
    """An executable that runs a command with the arguments that it is given."""
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def environment(directory: Path, python: str, processor: str) -> dict[str, str]:
    """What makes a build for a processor out of one for this machine.

    Args:
        directory: Where the commands are put that the build calls.
        python: The interpreter that builds.
        processor: As Linux names it.
    """
    zig = Path(ziglang.__file__).with_name("zig")
    compiler = script(directory / "c++", f"{zig} c++ -target {processor}-linux-gnu.{GLIBC}")
    definitions = {
        "CMAKE_SYSTEM_NAME": "Linux",  # or CMake would take the processor of this machine
        "CMAKE_SYSTEM_PROCESSOR": processor,
        "CMAKE_AR": script(directory / "ar", f"{zig} ar"),
        "CMAKE_RANLIB": script(directory / "ranlib", f"{zig} ranlib"),
        "RBLN_VAE_LEAVE_OUT": "OFF",
    }
    ask = [python, "-c", "import sys; print('%d%d' % sys.version_info[:2], end='')"]
    try:
        version = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{python} doesn't run ({error}); name interpreters that do") from None
    return {
        "CXX": str(compiler),
        "CMAKE_ARGS": " ".join(f"-D{name}={value}" for name, value in definitions.items()),
        # By these, the build learns for which processor it is.
        "_PYTHON_HOST_PLATFORM": f"linux-{processor}",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version}-{processor}-linux-gnu.so",
    }


def build(source: Path, python: str, processor: str, output: Path) -> None:
    """Build a wheel, and check that it runs on processors and systems as old as promised."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        variables = environment(directory, python, processor)
        objects = f"--config-setting=build-dir={directory}/objects"
        uv_build(
            "--wheel", "--python", python, "--out-dir", directory, objects, source, **variables
        )
        run("python", ROOT / "tools/check_symbols.py", directory / "objects/compile_commands.json")
        (wheel,) = directory.glob("*.whl")
        # It knows the platforms of other processors, but doesn't take their names.
        run("auditwheel", "repair", "--plat", "auto", "--wheel-dir", directory / "checked", wheel)
        (checked,) = directory.glob("checked/*.whl")
        needed = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", checked.name)]
        if not needed or min(needed) > int(GLIBC.removeprefix("2.")):
            raise SystemExit(f"{checked.name} needs a newer glibc than {GLIBC}")
        shutil.move(checked, output / checked.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="an interpreter to build with")
    parser.add_argument("--processor", action="append", choices=PROCESSORS, help="by default, all")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="by default, dist/")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    uv_build("--sdist", "--out-dir", options.output, ROOT)
    (source,) = options.output.glob("*.tar.gz")
    for processor in options.processor or PROCESSORS:
        for python in options.pythons:
            build(source, python, processor, options.output)


if __name__ == "__main__":
    main()
