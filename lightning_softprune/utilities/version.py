"""The version, which is said here alone, and those of what it runs on."""

import platform
from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Library -> version."""
    import torch  # here, so that what needs no torch need not load it

    return {
        "lightning_softprune": __version__,
        "lightning": metadata.version("lightning"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
