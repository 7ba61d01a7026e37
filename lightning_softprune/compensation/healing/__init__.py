"""Healing: the dense network teaches the pruned one on training batches, without labels."""

from lightning_softprune.compensation.healing.dense import DenseNetwork, changeable
from lightning_softprune.compensation.healing.lessons import (
    layers_in_eval_mode,
    learning_in,
    teach,
    teaching_bytes,
)
from lightning_softprune.compensation.healing.points import Place, errors_at, watch_outputs
from lightning_softprune.compensation.healing.teacher import Teacher

__all__ = [
    "DenseNetwork",
    "Place",
    "Teacher",
    "changeable",
    "errors_at",
    "layers_in_eval_mode",
    "learning_in",
    "teach",
    "teaching_bytes",
    "watch_outputs",
]
