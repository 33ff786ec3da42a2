"""What the build of the engine leaves out, and what it says of that."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = Path(sys.executable).with_name("cmake")

pytestmark = [
    pytest.mark.skipif(not (shutil.which("c++") and CMAKE.exists()), reason="needs c++ and cmake"),
]


def configure(directory: Path, *refused: str) -> tuple[set[str], str]:
    """Prepare a build with a compiler that refuses flags.

    Returns:
        The sources of instruction sets that the build compiles, and what it said.
    """
    compiler = directory / "c++"
    tests = " ".join(f'case " $* " in *" {flag} "*) exit 1;; esac;' for flag in refused)
    compiler.write_text(f'#!/bin/sh\n{tests} exec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    build = directory / "build"
    command = [CMAKE, "-S", ROOT, "-B", build, f"-DCMAKE_CXX_COMPILER={compiler}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = json.loads((build / "compile_commands.json").read_text())
    table = next(each["command"] for each in commands if each["file"].endswith("/sets.cc"))
    sources = {Path(each["file"]).stem for each in commands if "/sets/" in each["file"]}
    # What is compiled is in the table of kernels, and nothing else is.
    for name in sources - {"generic"}:
        assert f"-DRBLN_VAE_BUILDS_{name.upper()} " in table
    assert table.count("-DRBLN_VAE_BUILDS_") == len(sources - {"generic"})
    return sources, " ".join(done.stderr.split())


def test_a_compiler_that_knows_all_flags_builds_all_kernels_of_its_processor(tmp_path):
    built, said = configure(tmp_path)
    known = {source.stem for source in (ROOT / "engine/kernels/sets").glob("*.cc")}
    of_arm = {name for name in known if name.startswith("neon")}
    of_x86 = known - of_arm - {"generic"}
    expected = {"x86_64": of_x86, "aarch64": of_arm, "arm64": of_arm}
    assert built == {"generic"} | expected.get(platform.machine(), set())
    assert "kernels" not in said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="portable kernels need no flags")
def test_kernels_whose_flags_the_compiler_refuses_are_left_out_alone_and_named(tmp_path):
    built, said = configure(tmp_path, "-mavx512bf16")
    assert {"generic", "avx2", "avx512"} <= built
    assert not {"avx512_bf16", "amx_bf16"} & built
    assert "refuses the flags of avx512_bf16, amx_bf16" in said
