"""Structured pruning inside Lightning training runs: physically smaller networks that keep their task metric."""

from typing import TYPE_CHECKING

from lightning_softprune.utilities.libraries import lazily
from lightning_softprune.utilities.version import __version__ as __version__

if TYPE_CHECKING:
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
    # Nothing is imported before it is asked for: torch and Lightning take seconds, which `--help` need not wait for.
    _NAMES = {
        "callback": ("SoftPruning",),
        "checkpoint": ("PrunedCheckpointMixin", "load_from_checkpoint", "resize", "resizing"),
        "graph": ("LayerSpec", "PruningGroup", "register_layer"),
        "results": ("Costs", "GroupResult", "PruningResult", "Trial"),
        "search": tuple(name for name in __all__ if name.endswith(("Search", "Baseline", "Strategy"))),
        "standalone": ("find_groups", "prune"),
    }
    _HOMES = {name: place for place, names in _NAMES.items() for name in names}
    _get = lazily(__name__, {**_HOMES, "record": "checkpoint:record_of"})

    def __getattr__(name: str) -> object:
        """A public name; else name what was meant, for class paths in configuration files."""
        if name in __all__:
            return _get(name)
        from lightning_softprune.utilities.checks import near_miss

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{near_miss(name, __all__)}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
