"""When a round runs and what it aims at: the Trainer's callback. :mod:`.round` does the work."""

from lightning_softprune.callback.soft_pruning import SoftPruning

__all__ = ["SoftPruning"]
