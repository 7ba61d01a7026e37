"""Gradient descent on the coefficients, along the surface of equal sparsity.

A step at the iterate x, whose plan is on target:

1. Probes: x moved by h along one coefficient, or along all at random (spsa), and put back on the target by
   `SearchSpace.project`. Each is a plan that could be used, and d_j is how far it really is from x, in whole channels.
2. Gradient: the least-squares solution g of  d_j · g = f(x + d_j) - f(x)  with the smallest norm              (1)
   (for spsa the one pair d of d · g = f(x + d+) - f(x + d-), averaged over steps; Spall 1992, eq. 2.2).
3. Curvature, where pairs of probes give it: the non-negative diagonal H of
   d_j · g + d_j · H d_j / 2 = f(x + d_j) - f(x).                                                              (2)
4. Step: minimise  g · d + d · H d / 2  subject to  n · d = 0, bounds, |d_i| <= r                               (3)
   with n the gradient of the sparsity; then project. Without curvature H is |g| / r, the normalised gradient.

Behind the curves and exchanges of `SensitivitySearch`, the exchanges that did not help are the probes of a first step.
Only where that pays and the loss does not go as expected errors do, or, without these, where exchanges were still
helping when they ended, do probes of its own follow.

The radius r starts at `step_size`, grows on success and shrinks on failure. The iterate is always the best plan seen.
Plans are sought at the lower edge of the tolerance: among plans on target those that remove least lose least.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import numpy as np

from lightning_softprune.search.base import SearchStrategy, StopReason
from lightning_softprune.search.curves import PlacedCurves, follow_errors
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.search.strategies.sensitivity import most_evaluations, paying_gain, placed_search
from lightning_softprune.utilities.arrays import FloatArray
from lightning_softprune.utilities.checks import fraction, one_of, optional_whole_number, whole_number

_AUTO_SPSA = 16  # more coefficients than this: spsa

_TINY = 1e-12

_T = TypeVar("_T")

_MOMENTUM = 0.7  # of the spsa gradient: one random pair per step says little


def least_squares_gradient(displacements: FloatArray, differences: FloatArray) -> FloatArray:
    """The smallest g with displacements · g = differences, equation (1).

    Directions in which the displacements are a tenth of the largest or less are left out: they are what rounding to
    channels adds across the surface of equal sparsity.

    Args:
        displacements: Shape (n, k).
        differences: Shape (n,).

    Example:
        >>> least_squares_gradient(np.array([[0.1, -0.1], [-0.1, 0.1]]), np.array([0.2, -0.2]))
        array([ 1., -1.])
    """
    return np.asarray(np.linalg.lstsq(displacements, differences, rcond=0.1)[0], dtype=np.float64)


def diagonal_curvature(moves: FloatArray, differences: FloatArray, gradient: FloatArray) -> FloatArray | None:
    """The non-negative diagonal of equation (2), or None where the probes show none (one-sided probes never do).

    Args:
        moves: Shape (n, k).
        differences: Shape (n,).
        gradient: g, shape (k,).
    """
    from scipy.optimize import nnls  # here, as it takes a second to import and `lightning-softprune` has no use for it

    curvature = np.asarray(nnls(moves**2 / 2, differences - moves @ gradient)[0], dtype=np.float64)
    return curvature if curvature.max() > 0 else None


def constrained_step(
    gradient: FloatArray, curvature: FloatArray, normal: FloatArray, low: FloatArray, high: FloatArray
) -> FloatArray:
    """The d that solves equation (3): convex, separable but for one equality, so bisection on its multiplier.

    Args:
        gradient: g, shape (k,).
        curvature: Diagonal of H, positive, shape (k,).
        normal: n, not negative, shape (k,).
        low: Smallest d, at most 0, shape (k,).
        high: Largest d, at least 0, shape (k,).

    Example:
        >>> constrained_step(np.array([1.0, 0.0]), np.ones(2), np.ones(2), -np.ones(2), np.ones(2)).round(6)
        array([-0.5,  0.5])
    """

    def at(multiplier: float) -> FloatArray:
        return np.asarray(np.clip(-(gradient + multiplier * normal) / curvature, low, high), dtype=np.float64)

    positive = normal > 1e-12
    if not positive.any():
        return at(0.0)
    # Beyond these every coordinate that counts is at its bound, so n · d has both signs between them.
    reach = (np.abs(gradient) + curvature * np.maximum(high, -low))[positive] / normal[positive]
    least, most = -float(reach.max()), float(reach.max())
    for _ in range(100):
        middle = (least + most) / 2
        if normal @ at(middle) > 0:  # falls with the multiplier
            least = middle
        else:
            most = middle
    return at((least + most) / 2)


def _noting(
    proposals: Generator[FloatArray, float, _T], notes: list[tuple[FloatArray, float]]
) -> Generator[FloatArray, float, _T]:
    """The proposals, each noted with the loss that it was answered with."""
    loss = None
    while True:
        try:
            x = next(proposals) if loss is None else proposals.send(loss)
        except StopIteration as end:
            return cast("_T", end.value)
        loss = yield x
        notes.append((x, loss))


def _around(
    space: SearchSpace, x: FloatArray, notes: list[tuple[FloatArray, float]], distance: float
) -> tuple[FloatArray, FloatArray] | None:
    """Moves from `x`, shape (n, k), to the plans on target no further away, and their losses, shape (n,).

    None where the search that has noted them ended while it was getting on: where fewer than half as many plans as
    there are coefficients were tried after `x`.
    """
    last = max((n for n, (other, _) in enumerate(notes) if space.key(other) == space.key(x)), default=len(notes))
    if len(notes) - 1 - last < space.size / 2:
        return None
    near = [
        (other - x, loss)
        for other, loss in notes
        if np.isfinite(loss) and 0 < np.abs(other - x).max() <= distance and space.on_target(other)
    ]
    return (np.stack([move for move, _ in near]), np.array([loss for _, loss in near])) if near else None


@dataclass(frozen=True)
class _Model:
    """What a step's probes say of the loss near the iterate.

    Attributes:
        gradient: g of equation (1), shape (k,).
        curvature: The diagonal of equation (2), shape (k,), or None where the probes show none (one-sided ones never
            do).
    """

    gradient: FloatArray
    curvature: FloatArray | None

    @classmethod
    def of(cls, moves: FloatArray, differences: FloatArray) -> _Model:
        """Fit it to what moves, shape (n, k), have changed, shape (n,)."""
        gradient = least_squares_gradient(moves, differences)
        return cls(gradient, diagonal_curvature(moves, differences, gradient))

    def bend(self, radius: float) -> FloatArray:
        """H of equation (3), shape (k,)."""
        if self.curvature is None:
            return np.full(len(self.gradient), max(float(np.abs(self.gradient).max()), _TINY) / radius)
        return np.asarray(np.maximum(self.curvature, 1e-3 * self.curvature.max()), dtype=np.float64)

    def change(self, moves: FloatArray) -> FloatArray:
        """What moves, shape (n, k), are expected to change, shape (n,)."""
        bent = 0.0 if self.curvature is None else moves**2 @ self.curvature / 2
        return np.asarray(moves @ self.gradient + bent, dtype=np.float64)


def _at_most(proposals: Generator[FloatArray, float, str], limit: int) -> Generator[FloatArray, float, str]:
    """The proposals, but no more than so many."""
    loss = None
    for _ in range(limit):
        try:
            x = next(proposals) if loss is None else proposals.send(loss)
        except StopIteration as end:
            return str(end.value)
        loss = yield x
    return StopReason.PAID_OFF


class GradientSearch(SearchStrategy):
    """Constrained gradient descent with a numerically estimated gradient. Every iterate is on the sparsity target.

    Args:
        steps: Gradient estimates at most.
        step_size: How far, in coefficients, the first step moves at most; it adapts from there.
        probe: How far a coefficient is moved to estimate the gradient; never less than its smallest removable step.
        difference: ``"central"`` (two evaluations per coefficient and step), ``"forward"`` (one), ``"spsa"`` (two per
            step however many coefficients) or ``"auto"``: central up to 16 coefficients, else spsa.
        start: ``"sensitivity"``: what `SensitivitySearch` finds in at most 3 k + 8 evaluations for k coefficients,
            fewer where they would take more than half of `max_evaluations` (and where that leaves none for curves, what
            is expected without evaluations); the first step takes its gradient from these, and steps end as soon as one
            gains less than 5 % of what that plan loses, or than luck may. With expected errors, 1.5 k + 8, and one step
            alone where the loss goes as they do. ``"uniform"``: the same coefficient everywhere.
        patience: Stop after this many steps without improvement.
        max_evaluations: Stop after this many evaluations. None: with ``start="sensitivity"`` 6 k + 9, as many for steps
            as for the start, or 3 k + 9 with expected errors; else no limit.
    """

    def __init__(
        self,
        steps: int = 20,
        step_size: float = 0.1,
        probe: float = 0.05,
        difference: Literal["auto", "central", "forward", "spsa"] = "auto",
        start: Literal["sensitivity", "uniform"] = "sensitivity",
        patience: int = 5,
        max_evaluations: int | None = None,
    ) -> None:
        self.steps = whole_number("steps", steps)
        self.step_size = fraction("step_size", step_size)
        self.probe = fraction("probe", probe)
        self.difference = one_of("difference", difference, ("auto", "central", "forward", "spsa"))
        self._start = one_of("start", start, ("sensitivity", "uniform"))
        self.patience = whole_number("patience", patience)
        self.max_evaluations = optional_whole_number("max_evaluations", max_evaluations)

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """Yields starting points, then probes and steps, all on target but for the curves of the start."""
        proposals = self._propose(space, rng)
        planned = self.planned_evaluations(space)
        if self.max_evaluations is not None or planned is None:  # a limit of the user's is the loop's business
            return (yield from proposals)
        return (yield from _at_most(proposals, planned))

    @property
    def wants_errors(self) -> bool:
        """Where it begins with curves."""
        return bool(self._start == "sensitivity")

    def planned_evaluations(self, space: SearchSpace) -> int | None:
        """As the class says."""
        if self.max_evaluations is None and self._start == "sensitivity":
            return most_evaluations(space, is_expected=bool(self.expected)) + most_evaluations(space) - 7
        return self.max_evaluations

    def _propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        starts: list[tuple[FloatArray, float]] = []  # each with the sparsity to stay at from there
        noted: list[tuple[FloatArray, float]] = []
        dense = np.nan  # the loss of the whole model
        if self._start == "sensitivity":
            budget = most_evaluations(space, is_expected=bool(self.expected))
            if self.max_evaluations is not None:
                budget = min(budget, self.max_evaluations // 2)
            if budget > space.size + 2:
                found = placed_search(PlacedCurves(space, self.known, self.expected), 3, budget, self.keep_curves)
                best, _ = yield from _noting(found, noted)
                starts = [] if best is None else [(best, space.floor)]
                dense = self._curves[0].losses[0]
            elif (expected := PlacedCurves(space, (), self.expected).expected) is not None:
                starts = [(expected, space.floor)]
        uniform = space.scale(np.ones(space.size))
        aims = (space.floor, space.target, space.target + space.tolerance)
        starts += [(space.project(uniform, aim=aim), aim) for aim in aims]
        starts += [(space.scale(rng.uniform(space.low, space.high)), space.target) for _ in range(5)]
        starts = [(space.snap(x), aim) for x, aim in starts if space.on_target(x)]
        if not starts:
            return StopReason.OFF_TARGET
        for x, aim in starts:
            f = yield x
            if np.isfinite(f):
                if space.shapes and f <= dense:  # nothing is lost that could be won
                    return StopReason.PAID_OFF
                pays = paying_gain(self._curves, f) if np.isfinite(dense) else 0.0
                if (near := _around(space, x, noted, 2 * self.step_size)) is not None:
                    model, before = _Model.of(near[0], near[1] - f), f
                    x, f, _ = yield from self._move(space, (x, f), (x, f), model, self.step_size, aim)
                    if before - f < pays or follow_errors(self._curves):
                        return StopReason.PAID_OFF
                elif space.shapes and np.isfinite(dense):  # errors and exchanges have told what there is to win
                    return StopReason.PAID_OFF
                spsa = self.difference == "spsa" or (self.difference == "auto" and space.size > _AUTO_SPSA)
                if spsa:
                    return (yield from self._descend_spsa(space, x, f, aim, rng))
                return (yield from self._descend(space, x, f, aim, pays))
        return StopReason.NO_USABLE_LOSS

    def _descend(
        self, space: SearchSpace, x: FloatArray, f: float, aim: float, pays: float
    ) -> Generator[FloatArray, float, str]:
        """Steps from `x` with loss `f`, until one gains less than `pays` (0: until patience ends)."""
        radius, reach, idle = self.step_size, np.maximum(self.probe, space.step), 0
        for _ in range(self.steps):
            points, losses = yield from self._probe(space, x, reach, aim)
            if not points:
                return StopReason.CONVERGED
            before, usable = f, np.isfinite(losses)
            if usable.any():
                moves, values = np.stack(points)[usable] - x, np.array(losses)[usable]
                model = _Model.of(moves, values - f)
                origin, best = (x, f), int(np.argmin(values))
                if values[best] < f:
                    x, f = x + moves[best], float(values[best])
                x, f, radius = yield from self._move(space, origin, (x, f), model, radius, aim)
                if f == before and (reach <= space.step).all() and radius < space.step.min():
                    x, f = yield from self._swap(space, x, f, model)
                    if f == before:
                        return StopReason.CONVERGED
            if before - f < pays:
                return StopReason.PAID_OFF
            if f < before:
                idle = 0
                continue
            idle += 1
            if idle >= self.patience:
                return StopReason.PATIENCE
            reach, radius = np.maximum(reach / 2, space.step), max(radius, float(space.step.min()))
        return StopReason.STEPS

    def _probe(
        self, space: SearchSpace, x: FloatArray, reach: FloatArray, aim: float
    ) -> Generator[FloatArray, float, tuple[list[FloatArray], list[float]]]:
        """One or two probes per coefficient, and their losses."""
        points, losses = [], []
        for i in range(space.size):
            signs: tuple[float, ...] = (1.0, -1.0)
            if self.difference == "forward":
                signs = (1.0,) if x[i] + reach[i] <= space.high[i] else (-1.0,)
            for sign in signs:
                moved = x.copy()
                moved[i] += sign * reach[i]
                point = self._retract(space, moved, aim)
                if point is not None and space.key(point) != space.key(x):
                    points.append(point)
                    losses.append((yield point))
        return points, losses

    def _move(
        self,
        space: SearchSpace,
        origin: tuple[FloatArray, float],
        best: tuple[FloatArray, float],
        model: _Model,
        radius: float,
        aim: float,
    ) -> Generator[FloatArray, float, tuple[FloatArray, float, float]]:
        """Up to three steps (3) from the origin of the probes: the best plan, its loss, and the next radius.

        One alone where expected errors have told most of what there is to win.
        """
        (base, start), (x, f) = origin, best
        normal = space.slope(base)
        for _ in range(1 if space.shapes else 3):
            low, high = np.maximum(space.low - base, -radius), np.minimum(space.high - base, radius)
            step = constrained_step(model.gradient, model.bend(radius), normal, low, high)
            length = float(np.abs(step).max())
            point = self._retract(space, base + step, aim)
            if point is None or space.key(point) in (space.key(base), space.key(x)):
                return x, f, min(radius, max(length, _TINY)) if point is not None else 0.4 * radius
            loss = yield point
            if loss < f:
                x, f = point, loss
                if length <= 0.9 * radius:
                    break
                radius = min(2 * radius, 1.0)  # the model still holds at its edge: look further
            elif loss < start:
                break
            else:
                radius = 0.4 * min(radius, length)
        return x, f, radius

    @staticmethod
    def _swap(
        space: SearchSpace, x: FloatArray, f: float, model: _Model
    ) -> Generator[FloatArray, float, tuple[FloatArray, float]]:
        """When steps are finer than a channel: the exchanges of channels that promise most, or that remove least."""
        near = space.around(x, 0.1)
        moves = near - x
        promise = model.change(moves)
        # The model is blind across the surface of equal sparsity, where single channels of narrow layers still matter.
        likely = np.argsort(promise, kind="stable")[: space.size]
        light = np.argsort(space.sparsities(near), kind="stable")[: space.size]
        for point in near[np.concatenate((likely, np.setdiff1d(light, likely)))]:
            loss = yield point
            if loss < f:
                return point, loss
        return x, f

    def _descend_spsa(
        self, space: SearchSpace, x: FloatArray, f: float, aim: float, rng: np.random.Generator
    ) -> Generator[FloatArray, float, str]:
        radius, idle = self.step_size, 0
        reach = np.maximum(self.probe, space.step)
        gradient = np.zeros(space.size)
        best, least = x, f
        for _ in range(self.steps):
            before = least
            signs = rng.choice((-1.0, 1.0), space.size)
            points, losses = [], []
            for sign in (1.0, -1.0):
                point = self._retract(space, x + sign * reach * signs, aim)
                if point is not None:
                    points.append(point)
                    losses.append((yield point))
            for point, loss in zip(points, losses, strict=True):
                if loss < least:
                    best, least = point, loss
            if len(points) == 2 and np.isfinite(losses).all():
                fresh = least_squares_gradient((points[0] - points[1])[None], np.array([losses[0] - losses[1]]))
                gradient = _MOMENTUM * gradient + (1 - _MOMENTUM) * fresh
                # The pair's mean stands for the iterate between them, which is not evaluated itself.
                if np.mean(losses) > least + np.abs(losses[0] - losses[1]):
                    x, radius = best, 0.7 * radius
            else:
                x, radius = best, 0.7 * radius
            if (size := float(np.abs(gradient).max())) > 0:
                low, high = np.maximum(space.low - x, -radius), np.minimum(space.high - x, radius)
                step = constrained_step(gradient, np.full(space.size, size / radius), space.slope(x), low, high)
                point = self._retract(space, x + step, aim)
                x = best if point is None else point
            idle = 0 if least < before else idle + 1
            if idle >= self.patience:
                return StopReason.PATIENCE
        if space.key(x) != space.key(best):
            yield x
        return StopReason.STEPS

    @staticmethod
    def _retract(space: SearchSpace, x: FloatArray, aim: float) -> FloatArray | None:
        """The point on target nearest to `x`, in whole channels; None where there is none."""
        point = space.snap(space.project(x, aim=aim))
        return point if space.on_target(point) else None
