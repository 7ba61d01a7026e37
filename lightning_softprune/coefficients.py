"""From the user's words to the search's numbers: bounds, rounding and the space a strategy searches.

A soft coefficient belongs to one pruning group. Here its bounds are found by name, and the costs of plans are bound
to a target, so that everything below this module is arithmetic.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_softprune.patterns import no_match
from lightning_softprune.plan import Rounding
from lightning_softprune.search import SearchSpace

__all__ = ["build_rounding", "build_space"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Named(Protocol):
    """What this module has to know of a pruning group."""

    @property
    def name(self) -> str: ...
    @property
    def component(self) -> str: ...
    @property
    def num_channels(self) -> int: ...


class Counting(Protocol):
    """What this module has to know of a cost model."""

    def count(self, what: str, counts: IntArray) -> IntArray: ...


def build_rounding(groups: Sequence[Named], bounds: Mapping[str, Sequence[float]] | None, round_to: int) -> Rounding:
    """Find each group's bounds.

    Args:
        groups: The prunable groups.
        bounds: Pattern of group or component names -> ``[low, high]``. Where several match, the later one counts.
        round_to: Kept channels are a multiple of it.

    Raises:
        ValueError: A pattern matches no group and no component.
    """
    low, high = np.zeros(len(groups)), np.ones(len(groups))
    for pattern, (smallest, largest) in (bounds or {}).items():
        hits = [i for i, g in enumerate(groups) if any(fnmatch.fnmatchcase(name, pattern) for name in _names(g))]
        if not hits:
            names = list(dict.fromkeys(name for group in groups for name in _names(group)))
            raise ValueError(no_match("bounds", pattern, names, "prunable group or component"))
        low[hits], high[hits] = smallest, largest
    channels = np.array([group.num_channels for group in groups], dtype=np.int64)
    return Rounding(channels, low, high, round_to)


def _names(group: Named) -> tuple[str, ...]:
    return (group.name, group.component)


def build_space(
    rounding: Rounding,
    costs: Counting,
    *,
    dense: int,
    target: float,
    tolerance: float,
    norms: FloatArray,
    cost: str = "params",
) -> SearchSpace:
    """Bind rounding and costs to a target.

    Args:
        rounding: From coefficients to removed channels.
        costs: From removed channels to costs.
        dense: Cost of the first dense model, before any round.
        target: Sparsity to reach.
        tolerance: How far from it a plan may be.
        norms: Mean weight norm of each group, shape ``(m,)``.
        cost: What sparsity is measured in.
    """

    def sparsity(counts: IntArray) -> FloatArray:
        return 1.0 - costs.count(cost, counts) / dense

    unit = np.full(len(rounding.channels), rounding.round_to, dtype=np.int64)
    return SearchSpace(
        low=rounding.low,
        high=rounding.high,
        channels=rounding.channels,
        realise=rounding.counts,
        sparsity=sparsity,
        target=target,
        tolerance=tolerance,
        norms=norms,
        unit=unit,
    )
