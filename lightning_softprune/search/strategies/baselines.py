"""The plans that need no search: what any strategy has to beat."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from lightning_softprune.search.base import SearchStrategy, StopReason
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray


class UniformBaseline(SearchStrategy):
    """The same coefficient everywhere, within the bounds. One evaluation."""

    def planned_evaluations(self, space: SearchSpace) -> int | None:
        """One."""
        return 1

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """Yields one vector."""
        yield space.scale(np.ones(space.size))
        return StopReason.EXHAUSTED


class NormBaseline(SearchStrategy):
    """Coefficients inversely proportional to the groups' mean weight norms, as norm-based heuristics choose them.

    A group with smaller weights loses a larger fraction of its channels. One evaluation.
    """

    def planned_evaluations(self, space: SearchSpace) -> int | None:
        """One."""
        return 1

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """Yields one vector."""
        norms = np.where(np.isfinite(space.norms), np.abs(space.norms), 0.0)
        floor = 1e-3 * norms.max()  # dead groups: a large coefficient, not an infinite one
        yield space.scale(1 / np.maximum(norms, floor) if floor > 0 else np.ones(space.size))
        return StopReason.EXHAUSTED
