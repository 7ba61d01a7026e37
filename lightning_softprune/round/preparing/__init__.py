"""Preparing: from a module to what a search has to know of it."""

from lightning_softprune.round.preparing.prepare import prepare_problem, sketch_problem
from lightning_softprune.round.preparing.problem import PruningProblem
from lightning_softprune.round.preparing.tracing import StepsToTrace, leave_yardsticks_alone, prepare_groups

__all__ = [
    "PruningProblem",
    "StepsToTrace",
    "leave_yardsticks_alone",
    "prepare_groups",
    "prepare_problem",
    "sketch_problem",
]
