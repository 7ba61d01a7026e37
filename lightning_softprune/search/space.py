"""What a search strategy may know of a network: numbers.

A *coefficient* in [0, 1] is the fraction of a group's channels to remove. A vector of them *realises* as a plan: a
whole number of removed channels per group. A plan has a *sparsity*, and a vector is *on target* when its plan's
sparsity is within the tolerance of the target and further budgets, if there are any, hold too. Sparsity is a step
function of the coefficients and is not separable over groups (a layer's parameters are a product of two widths), so
putting a vector on the target takes a search of its own: `projection.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_softprune.search import projection
from lightning_softprune.search.look_ups import PlanLookUps
from lightning_softprune.utilities.arrays import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class SearchSpace(PlanLookUps):
    """The coefficients of a network, what they realise as, and the sparsity asked for.

    Attributes:
        low: Smallest coefficient allowed, shape (k,).
        high: Largest coefficient allowed, shape (k,).
        channels: Channels behind each coefficient, shape (k,): a change below ``1 / channels`` may change nothing.
        realise: Coefficients (n, k) to removed channels per group (n, m), monotone in each coefficient; each group
            follows one coefficient, one coefficient may drive several groups.
        sparsity: Removed channels (n, m) to sparsity (n,), monotone.
        target: The sparsity asked for.
        tolerance: How far from it a plan may lie.
        norms: Mean weight norm of the groups behind each coefficient, shape (k,).
        unit: Channels per smallest removable step, shape (k,). Default: one.
        limits: Largest share of each further cost that may remain, shape (l,). Default: no further budgets.
        shares: Removed channels (n, m) to the shares (n, l) of those costs that remain, antitone.
        errors: Removed channels (n, m) to the sum of the groups' expected errors (n,): the fraction of their variance
            that the network's outputs miss. Known without an evaluation. Default: nothing is known.
        from_target: Whether only sparsities from the target up are on it, and none below.

    Raises:
        ValueError: If shapes disagree or a number is out of its range; the message names it.

    Example:
        >>> import numpy as np
        >>> space = SearchSpace(
        ...     low=np.zeros(2), high=np.ones(2), channels=np.array([8, 4]), norms=np.ones(2),
        ...     target=0.5, tolerance=0.02,
        ...     realise=lambda x: np.minimum(np.rint(x * [8, 4]), [7, 3]).astype(np.int64),
        ...     sparsity=lambda removed: 1 - (8 - removed[:, 0]) * (4 - removed[:, 1]) / 32,
        ... )
        >>> space.key(np.array([0.5, 0.0]))
        (4, 0)
        >>> space.sparsity_of(np.array([0.5, 0.5]))
        0.75
        >>> space.on_target(space.project(np.array([0.1, 0.1])))
        True
    """

    def halfway(self) -> SearchSpace:
        """The space whose target is half of the highest sparsity: what is aimed at where no target was asked for."""
        return replace(self, target=self.sparsity_of(self.high) / 2)

    def at_least_target(self) -> SearchSpace:
        """The space in which only plans from the target up are on it; this one where no such plan was found."""
        upper = replace(self, from_target=True)
        kept = ("states", "shapes", "table", "moves")
        vars(upper).update({name: vars(self)[name] for name in kept if name in vars(self)})
        return upper if projection.reaches_target(upper) else self

    def slope(self, x: FloatArray) -> FloatArray:
        """The gradient (k,) of the sparsity at `x`, by differences wide enough to see past single channels."""
        return projection.slope(self, x)

    def project(self, x: FloatArray, direction: FloatArray | None = None, *, aim: float | None = None) -> FloatArray:
        """The vector near `x` that is on the sparsity target and within the limits.

        `x` is shifted along `direction` and clipped to the bounds, by bisection on the length of the shift (the
        sparsity is monotone along it). The default direction is the gradient of the sparsity: to first order the
        shortest way to the target. Where that exceeds a limit, steps along the gradients of whatever budget is not met
        follow (cyclic projections onto linearised half-spaces, Bregman 1965): they take more from groups that cost much
        of the limited cost and give back to the others. Where the step the sparsity takes jumps over the tolerance, the
        plan near by that is within it is looked for: single channels and exchanges of channels between two groups,
        then, on networks with at most `EXACT_PLANS` plans, all of them, so that there a feasible plan is always found
        if one exists.

        Args:
            x: Coefficients, shape (k,).
            direction: No negative entries, shape (k,). Default: the gradient of the sparsity at `x`.
            aim: The sparsity to come to rest at. Default: the target.

        Returns:
            Coefficients, shape (k,), within the bounds. Off target only where no plan within the tolerance was found:
            then the nearest found.

        Raises:
            ValueError: If `direction` has negative entries or is all zeros.
        """
        return projection.project(self, x, direction, aim=aim)

    def scale(self, x: FloatArray) -> FloatArray:
        """The multiple of `x`, clipped to the bounds, that is on the sparsity target.

        Proportions between coefficients are kept, except where a bound is met or where no multiple is within the
        tolerance: then the nearest plan that is (see `project`).

        Args:
            x: Coefficients, shape (k,), not negative; all zeros count as all equal.

        Returns:
            Coefficients, shape (k,), within the bounds.
        """
        return projection.scale(self, x)

    def nearest_point(self) -> FloatArray:
        """The vector (k,) within the limits whose sparsity is nearest to the target.

        Exact up to `EXACT_PLANS` plans, else best effort. Where no plan is within the limits, the one that exceeds them
        least.
        """
        return projection.nearest_point(self)

    def nearest(self) -> float:
        """The reachable sparsity nearest to the target (see `nearest_point`)."""
        return projection.nearest(self)

    def least_share(self, number: int) -> float:
        """The smallest value of one limit with which a plan meets the target and the other limits; inf for none.

        Exact up to `EXACT_PLANS` plans, else the smallest that was found.
        """
        return projection.least_share(self, number)

    def settle(self, x: FloatArray) -> IntArray:
        """Indices into `levels` of a plan near `x`, on target wherever one is found."""
        return projection.settle(self, x)
