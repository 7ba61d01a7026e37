"""Names of Lightning that hold for both of its libraries, `lightning.pytorch` and `pytorch_lightning`."""

from __future__ import annotations

from lightning.fabric.utilities import exceptions
from lightning.pytorch.utilities import model_helpers

from lightning_softprune.utilities.libraries import counterpart, of_both_libraries


@of_both_libraries
class MisconfigurationException(exceptions.MisconfigurationException):
    """A wrong configuration for this trainer or module: Lightning's own exception, whichever library catches it."""


def is_overridden(method: str, instance: object) -> bool:
    """Whether a module or data module has a method of its own."""
    return counterpart(model_helpers.is_overridden, instance)(method, instance)
