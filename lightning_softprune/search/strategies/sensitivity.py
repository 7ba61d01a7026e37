"""One group at a time, then the best combination."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from lightning_softprune.search.base import SearchStrategy, SensitivityCurve, StopReason
from lightning_softprune.search.separable import best_combinations
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray
from lightning_softprune.utilities.checks import whole_number


def sweep(space: SearchSpace, levels: int) -> Generator[FloatArray, float, tuple[SensitivityCurve, ...]]:
    """Yields the vectors of the sensitivity curves: the lowest one, then each coefficient alone at every level.

    Levels are evenly spaced up to the highest coefficient. One whose plan equals the level before is not asked for
    again.

    Args:
        space: What is searched.
        levels: Points per coefficient besides the lowest.

    Returns:
        One curve per coefficient, each with `levels` + 1 points (1 where the bounds leave no room).
    """
    whole = yield space.low.copy()
    curves = []
    for i in range(space.size):
        values = np.unique(np.linspace(space.low[i], space.high[i], levels + 1))
        losses, key = [whole], space.key(space.low)
        for value in values[1:]:
            x = space.low.copy()
            x[i] = value
            same, key = key, space.key(x)
            losses.append(losses[-1] if key == same else (yield x))
        curves.append(SensitivityCurve(i, tuple(values.tolist()), tuple(losses)))
    return tuple(curves)


class SensitivitySearch(SearchStrategy):
    """Measures how the loss rises with each coefficient alone, and combines the curves under the sparsity budget.

    Every coefficient is raised through `levels` values with the others at their lowest. Removing more never helps, so a
    curve is replaced by its running maximum. The sum of the curves' increases is then minimised over all plans on
    target: exactly on networks with few plans, and elsewhere by a knapsack that is linearised again and again around
    its own solution, followed by exchanges of channels between groups under the real cost (`search/separable.py` has
    the formulas). Curves are interpolated, so the combination may remove any number of channels, not only the sweep's
    levels.

    Evaluations are linear in the number of groups: one for the whole model (usually known already), `levels` per
    group, and `refine`.

    Args:
        levels: Points per curve, besides the whole model.
        refine: The best combinations, at least half a level apart, that are really evaluated.
    """

    def __init__(self, levels: int = 10, refine: int = 3) -> None:
        self.levels = whole_number("levels", levels)
        self.refine = whole_number("refine", refine)

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """Yields the vectors of the curves, then the best combinations."""
        self._curves = yield from sweep(space, self.levels)
        points = best_combinations(space, self._curves, self.refine, separation=0.5 / self.levels)
        if not points:  # the combination found none: the nearest plan may still be on target
            points = [x for x in (space.nearest_point(),) if space.on_target(x)]
        for x in points:  # noqa: UP028  a list takes no losses, which `yield from` would send it
            yield x
        return StopReason.EXHAUSTED if points else StopReason.OFF_TARGET
