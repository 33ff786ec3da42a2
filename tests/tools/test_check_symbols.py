"""What the check of the engine's object files finds, in small ones compiled on the spot."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "tools" / "check_symbols.py"

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set, no clash"),
    pytest.mark.skipif(not (shutil.which("c++") and shutil.which("nm")), reason="needs c++ and nm"),
]


def check(directory: Path, source: str, *flags: str) -> tuple[int, str]:
    """Compile one source once with each flag, and check the objects.

    Without optimisation, so that nothing is inlined that needn't be.
    """
    (directory / "source.cc").write_text(source)
    commands = []
    for number, flag in enumerate(flags):
        command = f"c++ -std=c++20 -O0 -fPIC {flag} -DNAME=main{number} -o {number}.o -c source.cc"
        subprocess.run(command.split(), cwd=directory, check=True)
        commands.append({"directory": str(directory), "command": command, "file": "source.cc"})
    file = directory / "compile_commands.json"
    file.write_text(json.dumps(commands))
    done = subprocess.run([sys.executable, CHECK, file], capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("inline int twice(int x) { return 2 * x; } int NAME() { return twice(3); }", "twice(int)"),
        (
            "template <class T> T twice(T x) { return 2 * x; } int NAME() { return twice(3); }",
            "int twice<int>(int)",
        ),
        (
            "#include <algorithm>\nint NAME(int a, int b) { return std::max(a, b); }",
            "int const& std::max<int>(int const&, int const&)",
        ),
        ("inline int& count() { static int c; return c; } int NAME() { return count(); }", "::c"),
        ("struct A { virtual ~A() {} }; A* NAME() { return new A; }", "vtable for A"),
    ],
)
def test_a_name_that_instruction_sets_share_is_found(tmp_path, source, name):
    status, said = check(tmp_path, source, "-mavx2", "-mavx512f")
    assert status == 1
    assert f"{name} is compiled for several instruction sets" in said
    assert str(tmp_path / "0.o") in said
    assert str(tmp_path / "1.o") in said


def test_a_name_that_a_kernel_shares_with_the_rest_is_found(tmp_path):
    source = "inline int twice(int x) { return 2 * x; } int NAME() { return twice(3); }"
    assert check(tmp_path, source, "", "-mavx2")[0] == 1


def test_files_of_one_instruction_set_may_share_names(tmp_path):
    source = "inline int twice(int x) { return 2 * x; } int NAME() { return twice(3); }"
    assert check(tmp_path, source, "-mavx2 -mfma", "-mfma -mavx2")[0] == 0


@pytest.mark.parametrize(
    "source",
    [
        "static inline int twice(int x) { return 2 * x; } int NAME() { return twice(3); }",
        "namespace { inline int twice(int x) { return 2 * x; } } int NAME() { return twice(3); }",
        "template <class Simd> int twice(int x) { return 2 * x; }"
        " namespace { struct Own {}; } int NAME() { return twice<Own>(3); }",
        "[[gnu::always_inline]] inline int twice(int x) { return 2 * x; }"
        " int NAME() { return twice(3); }",
        # An exception needs an address that both hold, and that is no code.
        "struct A { ~A(); }; void f(); void NAME() { A a; f(); }",
    ],
)
def test_names_of_one_file_are_no_clash(tmp_path, source):
    assert check(tmp_path, source, "-mavx2", "-mavx512f") == (
        0,
        f"{tmp_path / 'compile_commands.json'}: 2 object files for 2 instruction sets\n",
    )
