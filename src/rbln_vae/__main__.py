"""`python -m rbln_vae` is `rbln-vae`."""

from .cli import main

if __name__ == "__main__":
    main()
