"""Healing: the dense network teaches the pruned one on training batches, without labels."""

from lightning_softprune.compensation.healing.dense import DenseNetwork, changeable
from lightning_softprune.compensation.healing.lessons import healing_bytes, teach

__all__ = ["DenseNetwork", "changeable", "healing_bytes", "teach"]
