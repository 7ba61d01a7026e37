"""Other targets from what one search has measured: the separable model, corrected by the plans that were scored.

The curves say what each coefficient costs alone; together coefficients cost more or less than the sum. How much, the
scored plans that prune several groups tell: the ratio of what they have lost to what the curves expect, averaged over
these plans with weights that fall with the distance in sparsity (in logarithms, a Gaussian of width 0.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_softprune.search.base import SensitivityCurve
from lightning_softprune.search.coefficients import Budgets
from lightning_softprune.search.curves import modelled_increases
from lightning_softprune.search.look_ups import SLACK
from lightning_softprune.search.separable import best_combinations
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.search.stored import COSTS, SearchNumbers
from lightning_softprune.utilities.arrays import FloatArray

_WIDTH = 0.1  # in sparsity
_PRIOR = 0.05  # the weight of "as the curves say" among the plans that were scored


@dataclass(frozen=True)
class Known:
    """What a search has measured.

    Attributes:
        curves: One per coefficient.
        points: Vectors that were scored, shape (n, k).
        losses: Of these, shape (n,): lower is better.
        dense: The loss of the model as it was.
    """

    curves: tuple[SensitivityCurve, ...]
    points: FloatArray
    losses: FloatArray
    dense: float

    def within(self, space: SearchSpace) -> Known:
        """The same, with those vectors alone that a space's bounds allow."""
        inside = ((self.points >= space.low - 1e-9) & (self.points <= space.high + 1e-9)).all(axis=1)
        return replace(self, points=self.points[inside], losses=self.losses[inside])


def predicted_losses(space: SearchSpace, known: Known, points: FloatArray) -> FloatArray:
    """The losses that plans are expected to have.

    Args:
        space: With the costs that sparsity is measured in.
        known: What was measured.
        points: Vectors, shape (n, k).

    Returns:
        Shape (n,).
    """
    expected = _increase(known.curves, points)
    several = (known.points > space.low + 1e-9).sum(axis=1) > 1
    lost = known.losses - known.dense
    said = _increase(known.curves, known.points) if len(known.points) else np.zeros(0)
    usable = several & np.isfinite(lost) & (lost > 0) & (said > 0)
    if not usable.any():
        return np.asarray(known.dense + expected, dtype=np.float64)
    logs = np.log(lost[usable] / said[usable])
    apart = space.sparsities(points)[:, None] - space.sparsities(known.points[usable])[None]
    weights = np.exp(-0.5 * (apart / _WIDTH) ** 2)
    ratio = np.exp((weights @ logs) / (weights.sum(axis=1) + _PRIOR))
    return np.asarray(known.dense + ratio * expected, dtype=np.float64)


def _increase(curves: Sequence[SensitivityCurve], points: FloatArray) -> FloatArray:
    return np.asarray(sum(modelled_increases(curves, list(np.asarray(points).T))), dtype=np.float64)


def best_plan(space: SearchSpace, known: Known) -> tuple[FloatArray, float, bool] | None:
    """The best plan that is on the space's target, without a pass.

    Args:
        space: What is asked for.
        known: What was measured.

    Returns:
        The vector, shape (k,), its loss, and whether that was measured (else it is predicted); None where no plan on
        the target was found.
    """
    found = best_combinations(space, known.curves, 1, increases=modelled_increases)
    found += [x for x in known.points if space.on_target(x)]
    if not found and space.on_target(nearest := space.nearest_point()):
        found = [nearest]
    if not found:
        return None
    points = np.stack(found)
    scored: dict[tuple[int, ...], float] = {}
    for x, loss in zip(known.points, known.losses, strict=True):  # the chosen plan may have been scored twice
        scored[space.key(x)] = min(float(loss), scored.get(space.key(x), np.inf))
    measured = np.array([scored.get(space.key(x), np.nan) for x in points])
    losses = np.where(np.isnan(measured), predicted_losses(space, known, points), measured)
    best = int(np.argmin(losses))
    return points[best], float(losses[best]), bool(np.isfinite(measured[best]))


@dataclass(frozen=True)
class Question:
    """What is asked of a stored search.

    Attributes:
        target: Sparsity to reach.
        tolerance: How far above it the plan may lie, or below it where no plan from the target up is found.
        cost: What sparsity is measured in, ``"params"`` or ``"macs"``.
        limits: Cost -> the fraction of the dense model's that may remain.
        bounds: Pattern of group or component names -> ``[low, high]``; None: as they were.
    """

    target: float
    tolerance: float
    cost: str = "params"
    limits: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, Sequence[float]] | None = None


@dataclass(frozen=True)
class Solution:
    """A plan that no pass has scored, or that one has.

    Attributes:
        target_sparsity: What was asked for.
        sparsity: Of the plan.
        score: What it is expected to score, or has scored.
        measured: Whether it has.
        params: Parameters that remain.
        macs: Multiply-accumulates of one sample that remain.
        coefficients: Coefficient's name -> its value.
        channels: Channels that each group keeps, in the order of `PruningResult.groups`.
    """

    target_sparsity: float
    sparsity: float
    score: float
    measured: bool
    params: int
    macs: int
    coefficients: dict[str, float]
    channels: tuple[int, ...]

    def __str__(self) -> str:
        """The plan in one line."""
        how = "measured" if self.measured else "predicted"
        size = f"{self.params:,} parameters, {self.macs:,} MACs"
        below = f", below the target of {self.target_sparsity:g}" if self.is_below else ""
        return f"sparsity {self.sparsity:.3f}{below}: {size}, score {self.score:.4g} ({how})"

    @property
    def is_below(self) -> bool:
        """Whether it removes less than was asked for: no plan from there to the tolerance above it was found."""
        return self.sparsity < self.target_sparsity - SLACK


class OutOfReachError(ValueError):
    """No plan meets the target and the limits."""


def solve(numbers: SearchNumbers, known: Known, question: Question) -> Solution:
    """Answer a question from what one search has measured; `Solution.score` is a loss, lower is better.

    Args:
        numbers: What was searched.
        known: What was measured.
        question: What is asked.

    Raises:
        OutOfReachError: No plan on the target was found; the message has the nearest sparsity.
        ValueError: A pattern of the bounds matches nothing.
    """
    realisation = numbers.realisation(question.bounds)
    budgets = Budgets(numbers.dense, question.target, question.tolerance, question.cost, question.limits)
    space = numbers.space(realisation, budgets).at_least_target()  # as the round's own search is
    found = best_plan(space, known.within(space))
    if found is None:
        raise OutOfReachError(
            f"target_sparsity={question.target}: no plan within {question.tolerance} of it was found"
            f"{' that meets the limits' if question.limits else ''}; the nearest has {space.nearest():.4f}"
        )
    x, loss, measured = found
    counts = realisation.counts_of(x)
    params, macs = (int(numbers.costs.count(what, counts[None])[0]) for what in COSTS)
    return Solution(
        target_sparsity=question.target,
        sparsity=space.sparsity_of(x),
        score=loss,
        measured=measured,
        params=params,
        macs=round(macs / numbers.samples),
        coefficients=dict(zip(numbers.coefficients, x.tolist(), strict=True)),
        channels=tuple(int(n) for n in realisation.rounding.channels - counts),
    )
