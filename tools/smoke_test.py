"""Tries an installed package once, in an environment that has nothing else.

Checks that this build has every kernel that the processor can run, that the command line starts
without torch, that a compiled model agrees with diffusers, and that a picture is reconstructed.

    python tools/smoke_test.py [--no-torch]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image
import PIL.ImageDraw

import rbln_vae
from rbln_vae import _engine

COMMAND = Path(sys.executable).with_name("rbln-vae")


def rbln_vae_command(*arguments: object) -> str:
    """Run the command, and return what it prints."""
    words = [str(each) for each in (COMMAND, *arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def try_engine() -> None:
    """What works where torch is missing, too."""
    if _engine.left_out():
        raise SystemExit(f"this build has no kernels for {', '.join(_engine.left_out())}")
    loaded = [name for name in ("torch", "diffusers") if name in sys.modules]
    if loaded:
        raise SystemExit(f"import rbln_vae imported {', '.join(loaded)}")
    assert rbln_vae.__version__ in rbln_vae_command("--version")
    assert "reconstruct" in rbln_vae_command("--help")


def try_models(directory: Path) -> None:
    """Compile the model of the package, compare it with diffusers, and reconstruct a picture."""
    picture = PIL.Image.radial_gradient("L").convert("RGB")
    PIL.ImageDraw.Draw(picture).rectangle((40, 60, 140, 200), fill=(200, 80, 40))
    picture.save(directory / "picture.png")
    rbln_vae_command("compile", rbln_vae.demo_model(), directory / "vae", "--dtype", "float32")
    print(rbln_vae_command("verify", directory / "vae", rbln_vae.demo_model()))
    print(rbln_vae_command("reconstruct", directory / "picture.png", "--output", directory))
    side_by_side = PIL.Image.open(directory / "picture.reconstruction.png")
    assert side_by_side.width >= 2 * picture.width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-torch", action="store_true", help="only what works without torch")
    options = parser.parse_args()
    try_engine()
    if not options.no_torch:
        print(rbln_vae_command("targets"))
        with tempfile.TemporaryDirectory() as directory:
            try_models(Path(directory))
    print(f"rbln-vae {rbln_vae.__version__} works under Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
