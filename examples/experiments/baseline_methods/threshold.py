"""FastNAS's rule (of NVIDIA's Model-Optimizer) as a search strategy.

Every width of every layer is scored alone, all other layers at their full width. A threshold on these scores then says
how far each layer goes: to its smallest width that does not lose more. The threshold that meets the budget is found by
bisection, and nothing is scored again.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from lightning_softprune import SearchStrategy
from lightning_softprune.search import SearchSpace, SensitivityCurve

BISECTIONS = 60


class ThresholdSearch(SearchStrategy):
    """Scores widths one by one, and takes from every group what costs no more than the same threshold.

    Args:
        levels: Widths of each group that are scored, evenly spaced; one channel apart where it has no more.
        curves: Scores from an earlier search of the same network, since they depend on no target.
    """

    def __init__(self, levels: int = 8, curves: Sequence[SensitivityCurve] = ()) -> None:
        self.levels, self.curves = levels, tuple(curves)

    def planned_evaluations(self, space: SearchSpace) -> int | None:
        """One for each width, and the plan."""
        return (0 if self.curves else 1 + self.levels * space.size) + 1

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[np.ndarray, float, str]:
        """Yields the widths alone, then the plan."""
        curves = self.curves or (yield from self._scored(space))
        self.keep_curves(curves)
        rises = [loss - curve.losses[0] for curve in curves for loss in curve.losses if np.isfinite(loss)]
        low, high = 0.0, max(rises, default=0.0)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if space.sparsity_of(self._within(space, curves, middle)) < space.floor:
                low = middle
            else:
                high = middle
        x = self._within(space, curves, high)
        if not space.on_target(x):
            x = space.scale(x)
        yield x
        return "threshold"

    def _scored(self, space: SearchSpace) -> Generator[np.ndarray, float, tuple[SensitivityCurve, ...]]:
        whole = yield space.low.copy()
        curves = []
        for i in range(space.size):
            values = np.unique(np.linspace(space.low[i], space.high[i], self.levels + 1))
            losses = [whole]
            for value in values[1:]:
                x = space.low.copy()
                x[i] = value
                losses.append((yield x))
            curves.append(SensitivityCurve(i, tuple(values.tolist()), tuple(losses)))
        return tuple(curves)

    @staticmethod
    def _within(space: SearchSpace, curves: Sequence[SensitivityCurve], threshold: float) -> np.ndarray:
        """Of every curve the largest coefficient up to which no point loses more, between points by interpolation."""
        x = space.low.copy()
        for curve in curves:
            rise = np.array(curve.losses) - curve.losses[0]
            rise[0] = 0.0
            rise = np.maximum.accumulate(np.nan_to_num(rise, nan=np.inf))
            inside = int(np.flatnonzero(rise <= threshold)[-1])
            x[curve.index] = curve.coefficients[inside]
            if inside + 1 < len(rise) and np.isfinite(rise[inside + 1]):
                share = (threshold - rise[inside]) / (rise[inside + 1] - rise[inside])
                x[curve.index] += share * (curve.coefficients[inside + 1] - curve.coefficients[inside])
        return space.clip(x)
