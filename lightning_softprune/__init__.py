"""Structured pruning inside Lightning training runs: physically smaller networks that keep their task metric."""

from typing import TYPE_CHECKING

from lightning_softprune.callback import SoftPruning
from lightning_softprune.checkpoint import PrunedCheckpointMixin, load_from_checkpoint, resize, resizing
from lightning_softprune.checkpoint import record_of as record
from lightning_softprune.graph import LayerSpec, PruningGroup, register_layer
from lightning_softprune.results import Costs, GroupResult, PruningResult, Trial
from lightning_softprune.search import (
    GradientSearch,
    GridSearch,
    NormBaseline,
    OptunaSearch,
    RandomSearch,
    SearchStrategy,
    SensitivitySearch,
    UniformBaseline,
)
from lightning_softprune.standalone import find_groups, prune
from lightning_softprune.utilities.version import __version__ as __version__

__all__ = [
    "Costs",
    "GradientSearch",
    "GridSearch",
    "GroupResult",
    "LayerSpec",
    "NormBaseline",
    "OptunaSearch",
    "PrunedCheckpointMixin",
    "PruningGroup",
    "PruningResult",
    "RandomSearch",
    "SearchStrategy",
    "SensitivitySearch",
    "SoftPruning",
    "Trial",
    "UniformBaseline",
    "find_groups",
    "load_from_checkpoint",
    "prune",
    "record",
    "register_layer",
    "resize",
    "resizing",
]

if not TYPE_CHECKING:  # to a type checker it would say that every name is there

    def __getattr__(name: str) -> object:
        """Name what was meant, for class paths in configuration files: the parser shows them only this message."""
        from difflib import get_close_matches

        near = get_close_matches(name, __all__, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
