"""The command line: `rbln-vae`, or `python -m rbln_vae`."""

from .app import app, main

__all__ = ["app", "main"]
