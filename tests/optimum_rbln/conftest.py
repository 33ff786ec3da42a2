"""Run by `make test-optimum-rbln`, in an environment where optimum-rbln is installed."""

from __future__ import annotations

import importlib.util

collect_ignore_glob: list[str] = []

if importlib.util.find_spec("optimum") is None:
    collect_ignore_glob.append("test_*.py")
else:
    import rbln_vae.rebel

    rbln_vae.rebel.install(devices=2, trust_files=True)
