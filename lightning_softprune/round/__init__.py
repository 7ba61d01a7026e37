"""One round: from a trained module to a smaller one with its score, or to the module as it was."""

from lightning_softprune.round.feasibility import check_ahead
from lightning_softprune.round.holders import look_outside
from lightning_softprune.round.preparing import StepsToTrace, prepare_groups
from lightning_softprune.round.run import run_round
from lightning_softprune.round.settings import (
    Goal,
    RoundSettings,
    checked_bounds,
    checked_epochs,
    checked_limits,
    checked_patterns,
    checked_targets,
    limits_on_the_way,
)

__all__ = [
    "Goal",
    "RoundSettings",
    "StepsToTrace",
    "check_ahead",
    "checked_bounds",
    "checked_epochs",
    "checked_limits",
    "checked_patterns",
    "checked_targets",
    "limits_on_the_way",
    "look_outside",
    "prepare_groups",
    "run_round",
]
