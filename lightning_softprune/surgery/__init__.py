"""Surgery: make a plan true on the live model, undo it without a trace, or commit it with its optimizers."""

from lightning_softprune.surgery.apply import Surgery, apply_plan
from lightning_softprune.surgery.following import Judgement, References, Sightings
from lightning_softprune.surgery.optimizers import inner_optimizers, repair_optimizers, weights_without_bias
from lightning_softprune.surgery.probing import (
    Candidates,
    best_reading,
    forget_weights,
    one_can_go,
    probe_groups,
    probe_with_counts,
)
from lightning_softprune.surgery.transaction import Transaction

__all__ = [
    "Candidates",
    "Judgement",
    "References",
    "Sightings",
    "Surgery",
    "Transaction",
    "apply_plan",
    "best_reading",
    "forget_weights",
    "inner_optimizers",
    "one_can_go",
    "probe_groups",
    "probe_with_counts",
    "repair_optimizers",
    "weights_without_bias",
]
