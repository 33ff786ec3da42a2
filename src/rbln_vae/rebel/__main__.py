"""`python -m rbln_vae.rebel SCRIPT`: runs a script that imports `rebel` on the stand-in."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from rbln_vae import rebel

TRUST = "--trust-files"
USAGE = (
    f"usage: python -m rbln_vae.rebel [{TRUST}] SCRIPT [ARGUMENT...]\n"
    "       … -m MODULE [ARGUMENT...]"
)


def main() -> None:
    """Install the stand-in, then run a script or a module like `python` does."""
    trust = sys.argv[1:2] == [TRUST]
    arguments = sys.argv[1 + trust :]
    if not arguments or arguments in (["-h"], ["--help"], ["-m"]):
        sys.exit(USAGE)
    rebel.install(trust_files=trust)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
