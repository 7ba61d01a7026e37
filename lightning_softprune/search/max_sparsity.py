"""The highest sparsity at which constraints hold: a search over targets around any strategy.

The score is taken to fall as the sparsity rises (removing more never helps), so the target is bisected. Which targets
can be met, only evaluations tell; what makes this cheap is that all targets share one cache and that a strategy is
stopped as soon as it has met its target:

1. Bisection. Each target gets the first plan that the strategy proposes on it: after a sensitivity sweep, which is paid
   for once, that is the best combination of the curves. One evaluation per target, about log2(1 / tolerance) targets.
   Strategies that propose at random get a few plans (`SearchStrategy.first_tries`).
2. Ascent. From the highest sparsity reached the strategy runs on at targets one tolerance further up, and further as
   long as it succeeds, until it fails one tolerance above what it has reached. It is given up where a round of
   evaluations on the target, two per coefficient, closes less than a third of the gap to the constraints.

With five groups that took 39 evaluations with ``SensitivitySearch``, whose curves all targets share, 49
with ``GradientSearch`` and 7 with ``UniformBaseline``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lightning_softprune.search.base import SearchStrategy, StopReason
from lightning_softprune.search.loop import SearchLoop, SearchOutcome
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray

_SLACK = 1e-9

_CLOSED = 1 / 3  # of the gap to the constraints, that a round of evaluations has to close


class ConstraintProgress(Protocol):
    """What a search over targets has to be told of the plans evaluated so far."""

    def begin(self, space: SearchSpace) -> None:
        """Called with the space of each target before it is searched."""

    def highest_feasible_sparsity(self) -> float:
        """That of the plans that meet the constraints; -inf while there is none."""

    def least_violation_at(self, sparsity: float) -> float:
        """How far plans that have at least this sparsity are from meeting the constraints; inf where there is none."""


@dataclass
class MaxSparsitySearch:
    """Finds the highest sparsity at which the constraints hold, to within the space's tolerance.

    Attributes:
        strategy: Searches each target in turn.
        space: What is searched; its target is not looked at, its limits hold throughout.
        evaluate: The loss of a vector (k,), see `run_search`.
        progress: Tells which plans meet the constraints.
        seed: Of the strategy's random numbers.
        cache: Plan to loss; read and added to.
        evaluations: Calls of `evaluate` so far.
        asked: Vectors the strategy has asked for so far.
    """

    strategy: SearchStrategy
    space: SearchSpace
    evaluate: Callable[[FloatArray], float]
    progress: ConstraintProgress
    seed: int
    cache: dict[tuple[int, ...], float]
    evaluations: int = 0
    asked: int = 0
    _empty: bool = False  # whether the strategy had nothing to offer at the last target, as a coarse grid may

    def run(self) -> SearchOutcome:
        """Search, and say how it went; the stop reason is ``"highest"``, or ``"max_evaluations"``."""
        self._lowest = replace(self.space, target=0.0).nearest()
        self._top = self.space.sparsity_of(self.space.high)
        resolution = max(self.space.tolerance, 1e-3)
        self._bisect(resolution)
        self._ascend(resolution)
        budget = self.strategy.max_evaluations
        exhausted = budget is not None and self.evaluations >= budget
        reason = StopReason.MAX_EVALUATIONS if exhausted else StopReason.HIGHEST
        return SearchOutcome(self.evaluations, self.asked, str(reason))

    def _known(self) -> float:
        return float(np.clip(self.progress.highest_feasible_sparsity(), self._lowest, self._top))

    def _bisect(self, resolution: float) -> None:
        low, high = self._known(), self._top
        while high - low > resolution:
            middle = (low + high) / 2
            if self._attempt(middle, min(resolution / 2, (high - low) / 4), thorough=False):
                low = max(middle, self._known())
            else:
                high = middle

    def _ascend(self, resolution: float) -> None:
        low = self._known()
        step = least = resolution  # `least`: the smallest step up that leads to another plan
        while low < self._top - _SLACK:
            target = min(low + step, self._top)
            last = target >= self._top
            if replace(self.space, target=target).nearest() <= low + _SLACK and not last:
                step = least = 2 * step
            elif self._attempt(target, self._width(target - low, resolution), thorough=True) and self._known() > low:
                low = self._known()
                step, least = 2 * step, resolution
            elif self._empty and not last:
                step = least = 2 * step
            elif step > least:
                step = least
            else:
                break

    def _width(self, gap: float, resolution: float) -> float:
        return (gap if self._empty else min(resolution, gap)) / 2

    def _attempt(self, target: float, width: float, *, thorough: bool) -> bool:
        """Search one target; whether a plan at it or beyond it meets the constraints."""
        self._empty = False
        nearest = replace(self.space, target=target, tolerance=width).nearest()  # plans may be further apart than that
        at = replace(self.space, target=target, tolerance=max(width, abs(nearest - target) + _SLACK))
        self.progress.begin(at)
        gaps: list[float] = []  # after each evaluation on the target
        patience = 2 * self.space.size + 2 if thorough else self.strategy.first_tries

        def enough() -> bool:
            if self.progress.highest_feasible_sparsity() >= at.floor - _SLACK:
                return True
            if len(gaps) < patience or len(gaps) % patience:
                return False
            return not thorough or (len(gaps) > patience and gaps[-1] > (1 - _CLOSED) * gaps[-1 - patience])

        def evaluate_here(x: FloatArray) -> float:
            loss = self.evaluate(x)
            if at.on_target(x):
                gaps.append(self.progress.least_violation_at(at.floor - _SLACK))
            return loss

        budget = self.strategy.max_evaluations
        left = None if budget is None else budget - self.evaluations
        if not enough() and left != 0:
            self.strategy.known = self.strategy.sensitivity or self.strategy.known
            outcome = SearchLoop(evaluate_here, self.seed, self.cache, left, enough).run(self.strategy, at)
            self.evaluations, self.asked = self.evaluations + outcome.evaluations, self.asked + outcome.asked
            self._empty = not outcome.asked and outcome.stop_reason not in (
                StopReason.ENOUGH,
                StopReason.MAX_EVALUATIONS,
            )
        return self.progress.highest_feasible_sparsity() >= at.floor - _SLACK
