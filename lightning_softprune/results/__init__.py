"""What a round found: plain frozen dataclasses, and their form for files and checkpoints."""

from lightning_softprune.results.fronts import format_change, pareto_front
from lightning_softprune.results.parts import (
    DRY_RUN,
    Costs,
    GroupResult,
    Healing,
    LayerShapes,
    LeftOut,
    Origin,
    Outcome,
    Sensitivity,
    Trial,
)
from lightning_softprune.results.round_result import PruningResult

__all__ = [
    "DRY_RUN",
    "Costs",
    "GroupResult",
    "Healing",
    "LayerShapes",
    "LeftOut",
    "Origin",
    "Outcome",
    "PruningResult",
    "Sensitivity",
    "Trial",
    "format_change",
    "pareto_front",
]
