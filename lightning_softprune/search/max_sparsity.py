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

On an autoencoder with five groups that took 78 evaluations with ``SensitivitySearch`` (50 of them for the curves), 183
with ``GradientSearch`` and 9 with ``UniformBaseline``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_softprune.search.base import SearchStrategy
from lightning_softprune.search.loop import SearchOutcome, run_search
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray

_SLACK = 1e-9

_CLOSED = 1 / 3  # of the gap to the constraints, that a round of evaluations has to close


def search_max_sparsity(
    strategy: SearchStrategy,
    space: SearchSpace,
    evaluate: Callable[[FloatArray], float],
    *,
    highest_feasible_sparsity: Callable[[], float],
    least_violation_at: Callable[[float], float],
    seed: int,
    cache: dict[tuple[int, ...], float],
    on_target: Callable[[SearchSpace], None] = lambda space: None,
) -> SearchOutcome:
    """Find the highest sparsity at which the constraints hold, to within the space's tolerance.

    Args:
        strategy: Searches each target in turn.
        space: What is searched; its target is not looked at, its limits hold throughout.
        evaluate: The loss of a vector (k,), see `run_search`.
        highest_feasible_sparsity: That of the plans evaluated so far that meet the constraints; -inf while there is
            none.
        least_violation_at: How far the plans evaluated so far that have at least this sparsity are from meeting the
            constraints: the least violation, inf where there is no plan.
        seed: Of the strategy's random numbers.
        cache: Plan to loss; read and added to.
        on_target: Called with the space of each target before it is searched.

    Returns:
        Evaluations and vectors asked in all. The stop reason is ``"highest"``, or ``"max_evaluations"``.
    """
    resolution = max(space.tolerance, 1e-3)
    lowest = replace(space, target=0.0).nearest()
    top = space.sparsity_of(space.high)
    budget = strategy.max_evaluations
    evaluations = asked = 0
    empty = False  # whether the strategy had nothing to offer at the last target, as a coarse grid may

    def attempt(target: float, width: float, *, thorough: bool) -> bool:
        """Search one target; whether a plan at it or beyond it meets the constraints."""
        nonlocal evaluations, asked, empty
        empty = False
        nearest = replace(space, target=target, tolerance=width).nearest()  # plans may lie further apart than `width`
        at = replace(space, target=target, tolerance=max(width, abs(nearest - target) + _SLACK))
        on_target(at)
        gaps: list[float] = []  # after each evaluation on the target
        patience = 2 * space.size + 2 if thorough else strategy.first_tries

        def enough() -> bool:
            if highest_feasible_sparsity() >= at.floor - _SLACK:
                return True
            if len(gaps) < patience or len(gaps) % patience:
                return False
            return not thorough or (len(gaps) > patience and gaps[-1] > (1 - _CLOSED) * gaps[-1 - patience])

        def evaluate_here(x: FloatArray) -> float:
            loss = evaluate(x)
            if at.on_target(x):
                gaps.append(least_violation_at(at.floor - _SLACK))
            return loss

        left = None if budget is None else budget - evaluations
        if not enough() and left != 0:
            outcome = run_search(
                strategy, at, evaluate_here, seed=seed, cache=cache, max_evaluations=left, enough=enough
            )
            evaluations, asked = evaluations + outcome.evaluations, asked + outcome.asked
            empty = not outcome.asked and outcome.stop_reason not in ("enough", "max_evaluations")
        return highest_feasible_sparsity() >= at.floor - _SLACK

    def known() -> float:
        return float(np.clip(highest_feasible_sparsity(), lowest, top))

    low, high = known(), top
    while high - low > resolution:
        middle = (low + high) / 2
        if attempt(middle, min(resolution / 2, (high - low) / 4), thorough=False):
            low = max(middle, known())
        else:
            high = middle
    low = known()
    step = least = resolution  # `least`: the smallest step up that leads to another plan
    while low < top - _SLACK:
        target = min(low + step, top)
        if replace(space, target=target).nearest() <= low + _SLACK and target < top:
            step = least = 2 * step
        elif (
            attempt(target, (target - low if empty else min(resolution, target - low)) / 2, thorough=True)
            and known() > low
        ):
            low = known()
            step, least = 2 * step, resolution
        elif empty and target < top:
            step = least = 2 * step
        elif step > least:
            step = least
        else:
            break
    exhausted = budget is not None and evaluations >= budget
    return SearchOutcome(evaluations, asked, "max_evaluations" if exhausted else "highest")
