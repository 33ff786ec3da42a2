"""Checks that no code for one instruction set can be taken for another's at link time.

Inline functions and templates are compiled in each file that uses them, and the linker keeps one
copy of each name. If files compiled with different flags share a name, then a machine without
AVX-512 may run a copy that was compiled with it. So functions that kernels use must be inlined
everywhere, belong to one file, or have a name that depends on the instruction set; this reads
from the object files whether that is so.

    python tools/check_symbols.py build/*/compile_commands.json
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SHARED = "WVu"
"""The kinds of symbols, as `nm` names them, of which the linker keeps one copy."""
OTHER = {"-mtls-dialect=gnu2"}
"""Flags of nanobind's files that choose no instructions."""
HARMLESS = "DW.ref."
"""Begins names of addresses that exceptions need: data, and the same in all files."""


def compiled(commands: Path) -> Iterator[tuple[Path, frozenset[str]]]:
    """The object files of a build, and the flags for an instruction set of each."""
    for entry in json.loads(commands.read_text(encoding="utf-8")):
        words = shlex.split(entry["command"])
        name = words[words.index("-o") + 1]
        flags = frozenset(word for word in words if word.startswith("-m") and word not in OTHER)
        yield Path(entry["directory"]) / name, flags


def shared_symbols(file: Path) -> set[str]:
    """The names in an object file of which the linker keeps one copy."""
    command = ["nm", "--defined-only", "--format=posix", str(file)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    symbols = (line.split()[:2] for line in lines)
    return {name for name, kind in symbols if kind in SHARED and not name.startswith(HARMLESS)}


def clashes(objects: Iterator[tuple[Path, frozenset[str]]]) -> dict[str, list[Path]]:
    """The symbols that files with different flags share, and these files."""
    holders: defaultdict[str, list[tuple[Path, frozenset[str]]]] = defaultdict(list)
    for file, flags in objects:
        for name in shared_symbols(file):
            holders[name].append((file, flags))
    return {
        name: [file for file, _ in found]
        for name, found in sorted(holders.items())
        if len({flags for _, flags in found}) > 1
    }


def main() -> int:
    if len(sys.argv) < 2:
        print(f"usage: {sys.argv[0]} compile_commands.json...", file=sys.stderr)
        return 2
    status = 0
    for commands in map(Path, sys.argv[1:]):
        objects = list(compiled(commands))
        sets = {flags for _, flags in objects}
        print(f"{commands}: {len(objects)} object files for {len(sets)} instruction sets")
        for name, files in clashes(iter(objects)).items():
            status = 1
            demangled = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout
            print(f"error: {demangled.strip()} is compiled for several instruction sets, in:")
            print("".join(f"  {file}\n" for file in files), end="")
    if status:
        print("Inline them by force, put them into an anonymous namespace, or give them a template")
        print("parameter that names the instruction set.")
    return status


if __name__ == "__main__":
    sys.exit(main())
