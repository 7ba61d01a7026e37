"""`python -m lightning_softprune`."""

import sys

from lightning_softprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
