"""One group at a time, then the best combination, then exchanges on the real loss."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np

from lightning_softprune.search.base import SearchStrategy, SensitivityCurve, StopReason
from lightning_softprune.search.curves import (
    LUCK,
    PlacedCurves,
    explain,
    follow_errors,
    log_odds,
    modelled_increases,
    noise_of,
)
from lightning_softprune.search.separable import best_combinations
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray
from lightning_softprune.utilities.checks import optional_whole_number, whole_number

_SEPARATION = 0.03  # between the combinations that are tried

_SHIFT = 0.5  # in log odds: what an exchange changes one coefficient by

_BESIDE_POINTS = 4  # the whole model, and the combinations that are tried

_PAYS = 0.05  # of what a plan loses

_IN_VAIN = 3  # exchanges in a row, where expected errors have told most of it


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


def most_evaluations(space: SearchSpace, *, is_expected: bool = False) -> int:
    """How many vectors a search with placed curves asks for at most: 3 k + 8.

    With the pass over the dense model and that over the pruned one, that makes 3 k + 10 for k coefficients. Where an
    earlier round tells where to look first, 2 k + 8; with expected errors, 1.5 k + 8.

    Args:
        space: What is searched.
        is_expected: Whether an earlier round tells where to look first.
    """
    if space.errors is not None:
        return space.size + _BESIDE_POINTS + _most_exchanges(space)
    return (2 if is_expected else 3) * space.size + 8


def _most_exchanges(space: SearchSpace) -> int:
    """Where expected errors have told most of it."""
    return max(4, space.size // 2)


def paying_gain(curves: Sequence[SensitivityCurve], loss: float) -> float:
    """What a step has to gain to be worth its evaluations: 5 % of what is lost, and more than luck may give.

    Args:
        curves: What was measured.
        loss: Of the best plan.
    """
    return max(_PAYS * (loss - curves[0].losses[0]), LUCK * noise_of(curves))


def exchanges(
    space: SearchSpace, curves: Sequence[SensitivityCurve], best: tuple[FloatArray, float], budget: int
) -> Generator[FloatArray, float, tuple[FloatArray, float]]:
    """Yields exchanges between coefficients around the best plan so far; each that helps is kept.

    An exchange moves one coefficient and puts the others back on the target. Those come first that the curves expect to
    cost least: curves are measured alone, and what they call even is where groups that act on each other decide.

    Args:
        space: What is searched.
        curves: What is expected.
        best: The vector to begin at, and its loss.
        budget: Vectors at most.

    Returns:
        The best vector, and its loss.
    """
    x, least = best
    tried = {space.key(x)}
    while budget > 0 and not least <= curves[0].losses[0]:
        moves = []
        for i in range(space.size):
            for sign in (1.0, -1.0):
                moved = x.copy()
                moved[i] = 1 / (1 + np.exp(-(log_odds(x[i : i + 1])[0] + sign * _SHIFT)))
                point = space.snap(space.project(space.clip(moved), aim=space.floor))
                if space.on_target(point) and space.key(point) not in tried:
                    moves.append(point)
        if not moves:
            break
        columns = np.stack(moves).T
        expected = sum(modelled_increases(curves, list(columns)))
        tries = min(budget, _IN_VAIN) if space.shapes else budget
        for n in np.argsort(expected, kind="stable")[:tries]:
            if space.key(moves[n]) in tried:
                continue
            tried.add(space.key(moves[n]))
            loss = yield moves[n]
            budget -= 1
            if loss < least:
                x, least = moves[n], loss
                break
        else:
            break
    return x, least


def placed_search(
    placed: PlacedCurves,
    refine: int,
    budget: int,
    keep: Callable[[tuple[SensitivityCurve, ...]], None],
) -> Generator[FloatArray, float, tuple[FloatArray | None, float]]:
    """Yields points of curves where the solution needs them, the best combinations, and exchanges.

    Args:
        placed: The curves, with what is known of them.
        refine: Combinations that are tried.
        budget: Vectors at most.
        keep: Is given the curves once they are measured.

    Returns:
        The best vector on target (None: there is none) and its loss.
    """
    space = placed.space
    points_at_most = max(min(space.size if space.shapes else 2 * space.size + 2, budget - refine - 1), 0)
    asked = yield from placed.measure(points_at_most)
    curves, expected = placed.curves(), placed.expected if space.shapes else None
    best, least, can_tell = None, float("inf"), True
    if expected is not None:  # what luck has no part in goes first
        best, loss = expected, (yield expected)
        least = loss if np.isfinite(loss) else least
        if follow_errors(curves):
            can_tell = False  # no more than the errors have told
            if not explain(curves, expected, loss):
                asked += yield from placed.measure(points_at_most - asked, every=True)
                curves = placed.curves()
                # else groups act on each other, and what each loses alone does not say which combination is best
                can_tell = not np.isfinite(loss) or explain(curves, expected, loss)
    keep(curves)
    budget -= 1 + asked + (expected is not None)
    points = best_combinations(space, curves, refine, separation=_SEPARATION, increases=modelled_increases)
    if expected is not None:
        others = [x for x in points if space.key(x) != space.key(expected)]
        points = others[: refine - 1] if can_tell else []
    elif not points:  # the combination found none: the nearest plan may still be on target
        points = [x for x in (space.nearest_point(),) if space.on_target(x)]
    for x in points:
        loss = yield x
        budget -= 1
        if best is None or loss < least:
            best, least = x, loss
    # a plan that has lost nothing cannot be told from better ones: what seems better is so by chance
    if best is not None and np.isfinite(least) and not least <= curves[0].losses[0]:
        most = min(budget, _most_exchanges(space)) if space.shapes else budget
        best, least = yield from exchanges(space, curves, (best, least), most)
    return best, least


class SensitivitySearch(SearchStrategy):
    """Measures how the loss rises with each coefficient alone, and combines the curves under the sparsity budget.

    By default, curves have few points, placed where the solution needs them (`search/curves.py` has the formulas), and
    what evaluations are left go into exchanges between coefficients on the real loss, since groups act on each other.
    Where the space has expected errors, these tell where the first points lie and what is between them. Their solution
    is the first combination that is tried; where three points show that the loss goes as errors do, it is the only one,
    and no more points are measured. Few exchanges follow, until three in a row are in vain.

    With `levels`, every coefficient is raised through so many evenly spaced values with the others at their lowest, and
    there are no exchanges. Removing more never helps, so a curve is replaced by its running maximum. The sum of the
    curves' increases is then minimised over all plans on target: exactly on networks with few plans, and elsewhere by a
    knapsack that is linearised again and again around its own solution, followed by exchanges of channels between
    groups under the real cost (`search/separable.py`). Curves are interpolated, so the combination may remove any
    number of channels, not only those that were measured.

    Evaluations are linear in the number k of coefficients: at most 3 k + 8, or 2 k + 8 in a later round, to which the
    one before has told where to look first. Under ``compensation="least_squares"`` 1.5 k + 8, since there what the
    network's outputs miss with each group alone pruned is known (`compensation/expected_errors.py`). With `levels`: one
    for the whole model (usually known already), `levels` per coefficient, and `refine`.

    Args:
        levels: Points per curve, besides the whole model; None: as few as it takes.
        refine: The best combinations, kept apart, that are really evaluated; where there are expected errors, their
            solution is one of them, or the only one.
    """

    def __init__(self, levels: int | None = None, refine: int = 3) -> None:
        self.levels = optional_whole_number("levels", levels)
        self.refine = whole_number("refine", refine)

    @property
    def wants_errors(self) -> bool:
        """By default; evenly spaced levels need no advice."""
        return self.levels is None

    def planned_evaluations(self, space: SearchSpace) -> int | None:
        """As the class says."""
        if self.levels is None:
            return most_evaluations(space, is_expected=bool(self.expected)) + max(0, self.refine - 3)
        return 1 + self.levels * space.size + self.refine

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """Yields the vectors of the curves, then the best combinations."""
        if self.levels is None:
            budget = self.planned_evaluations(space) or 0
            best, _ = yield from placed_search(
                PlacedCurves(space, self.known, self.expected), self.refine, budget, self.keep_curves
            )
            return StopReason.OFF_TARGET if best is None else StopReason.EXHAUSTED
        self._curves = yield from sweep(space, self.levels)
        points = best_combinations(space, self._curves, self.refine, separation=0.5 / self.levels)
        if not points:  # the combination found none: the nearest plan may still be on target
            points = [x for x in (space.nearest_point(),) if space.on_target(x)]
        for x in points:  # noqa: UP028  a list takes no losses, which `yield from` would send it
            yield x
        return StopReason.EXHAUSTED if points else StopReason.OFF_TARGET
