"""Healing: the dense network teaches the pruned one on training batches, without labels."""

from lightning_softprune.compensation.healing.dense import DenseNetwork, changeable
from lightning_softprune.compensation.healing.lessons import resting_in, teach, teaching_bytes
from lightning_softprune.compensation.healing.teacher import Teacher

__all__ = ["DenseNetwork", "Teacher", "changeable", "resting_in", "teach", "teaching_bytes"]
