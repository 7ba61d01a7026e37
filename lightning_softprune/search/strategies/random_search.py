"""Random search: the reference any cleverer strategy is measured against."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from lightning_softprune.search.base import SearchStrategy, StopReason
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray
from lightning_softprune.utilities.checks import whole_number

_MISSES = 100  # draws in a row without a new plan on target, after which there are taken to be no more


class RandomSearch(SearchStrategy):
    """Random coefficients, uniform within the bounds, scaled onto the sparsity target.

    Args:
        num_candidates: How many different plans are evaluated; fewer where the network has no more on target.
    """

    first_tries = 8

    def __init__(self, num_candidates: int = 30) -> None:
        self.num_candidates = whole_number("num_candidates", num_candidates)

    def planned_evaluations(self, space: SearchSpace) -> int | None:
        """As many as there are candidates."""
        return self.num_candidates

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """Yields vectors whose plans all differ and are on target."""
        seen: set[tuple[int, ...]] = set()
        misses = 0
        while len(seen) < self.num_candidates and misses < _MISSES:
            misses += 1
            x = space.scale(rng.uniform(space.low, space.high))
            key = space.key(x)
            if key not in seen and space.on_target(x):
                seen.add(key)
                misses = 0
                yield x
        return StopReason.EXHAUSTED if seen else StopReason.OFF_TARGET
