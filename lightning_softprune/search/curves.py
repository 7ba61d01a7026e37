"""Sensitivity curves of few points: measured where the solution needs them, and what they say between.

A *curve* is the increase g of the loss as one coefficient c rises alone. Where nothing else is known of it, it is flat
near c = 0 and explodes near c = 1, and over most of its way log g is close to a straight line in the log odds
t = log(c / (1 - c)). Where its *shape* is known, the expected error E(c) (`SearchSpace.errors`), log g is closer to a
straight line in t = log E(c), of a slope a little above 1. So few points do: g is taken for piecewise linear in these
coordinates, outside of what was measured with the slope next to it (1.5, or 1.2 over errors, where it is one point)::

    log g(c) = log g(a) + (log g(b) - log g(a)) (t - t_a) / (t_b - t_a),    t_a <= t <= t_b

*Luck*: a score of a few hundred samples that is above the dense network's is so by chance, and shows how large chance
is: s is the root of the mean square of all such differences. Where shapes are known, a measured increase is drawn to
what is usual for its error, p = r E(c) with the median r of all g / E, by as much as it may be chance::

    g' = (g p^2 + p s^2) / (p^2 + s^2)

*Placing*: each coefficient is measured once, where the solution of the expected errors is (but at half of the
coefficient that is the same everywhere at least), or without shapes where the same coefficient everywhere meets the
target; the separable model is solved; whatever the solution asks for and no measured point is near is measured; and so
on until the solution stays among measured points. Levels that no solution comes near are never measured, which is what
makes this cheap: one to three points per coefficient instead of ten.

*Following errors*: the coefficients with the largest expected errors go first. Once three are measured, and each has
added between a third and three times what is usual for its error (give or take two s), the loss goes as errors do, and
the others are not measured: their curves are the expected ones. Where a metric cares for some outputs and not for
others, as the return of an agent may, it does not, and every coefficient is measured; also where the plan that errors
lead to loses more than ten times what these curves *explain*, or less than a third of it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property

import numpy as np

from lightning_softprune.search.base import SensitivityCurve
from lightning_softprune.search.look_ups import ErrorCurve
from lightning_softprune.search.separable import best_combinations, envelope
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray

LUCK = 2.0
"""By so many times their scatter two losses may differ by chance."""

_SLOPE = 1.5  # of log g over log odds, where one point was measured
_SLOPES = (0.5, 3.0)  # within these where two were
_SLOPE_OF_ERRORS = 1.2  # the same over logarithms of errors
_NEAR = 0.35  # in log odds: a point that close to another tells nothing new
_NEAR_ERRORS = 1.0  # the same in logarithms of errors, which tell better what is between points
_LEAST_TRIED = 0.5  # of the coefficient that is the same everywhere
_TELLING = 3  # coefficients that tell whether the loss goes as errors do
_ALIKE = 3.0  # factor between what a coefficient adds to the loss and what is usual for its error
_AMPLIFIED = 10.0  # factor between what a plan loses and what its coefficients lose alone: groups act on each other
_NO_ERROR = 1e-6  # errors below that are none
_ROUNDS = 5  # of solving and measuring, at most
_FLOOR = 1e-3  # of the largest increase: what is less counts as that, noise that falls included
_EDGE = 1e-4  # coefficients are kept that far from 0 and 1, where log odds are infinite


def log_odds(coefficients: FloatArray | Sequence[float]) -> FloatArray:
    """log(c / (1 - c)), finite also at 0 and 1.

    >>> log_odds([0.5, 0.9]).round(3)
    array([0.   , 2.197])
    """
    c = np.clip(np.asarray(coefficients, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(np.log(c / (1 - c)), dtype=np.float64)


def modelled_increases(curves: Sequence[SensitivityCurve], values: Sequence[FloatArray]) -> list[FloatArray]:
    """What each coefficient's values add to the loss, by the formula above.

    Args:
        curves: One per coefficient, in order; the first point of each is the coefficient at its lowest.
        values: Per coefficient, the values asked for.

    Returns:
        Per coefficient, the increase at each value: finite, growing with the value. Values from the first point without
        a usable loss on get a penalty above anything measured. Without one usable point anywhere the increase is the
        coefficient itself, which asks for removing little and evenly.
    """
    heights = [_heights(curve) for curve in curves]
    finite = [part[1:][np.isfinite(part[1:])] for part in heights]
    if not any(len(part) for part in finite) and not all(curve.shape for curve in curves):
        return [np.array(value - curve.coefficients[0]) for curve, value in zip(curves, values, strict=True)]
    scale = max((float(part.max()) for part in finite if len(part)), default=0.0)
    scale = scale if scale > 0 else 1.0
    usual, noise = _usual_ratio(curves, heights, scale), noise_of(curves)
    result = []
    for curve, height, value in zip(curves, heights, values, strict=True):
        points = np.array(curve.coefficients)
        usable = np.isfinite(height)
        usable[0] = False  # an increase of nothing, at log odds of their own
        t, low = _coordinates(curve.shape, value), points[0]
        if usable.any():
            known = _coordinates(curve.shape, points[usable])
            drawn = (
                height[usable] if curve.shape is None else _without_luck(height[usable], usual * np.exp(known), noise)
            )
            logs = np.log(np.maximum(drawn, _FLOOR * scale))
        elif curve.shape is not None and len(points) == 1:  # not measured: as is usual
            known, logs = np.zeros(1), np.log([usual])
        else:  # the first point that was tried is out of the question, and less was not tried
            known, logs = _coordinates(curve.shape, points[-1:]), np.log([scale])
        logs = np.maximum.accumulate(logs)
        before, after = _slopes(known, logs, _SLOPE if curve.shape is None else _SLOPE_OF_ERRORS)
        outside = before * np.minimum(t - known[0], 0.0) + after * np.maximum(t - known[-1], 0.0)
        increase = np.exp(np.minimum(np.interp(t, known, logs) + outside, np.log(scale) + 20.0))
        broken = points[np.flatnonzero(~np.isfinite(height))[:1]]
        beyond = value >= broken[0] - 1e-9 if len(broken) else np.zeros(len(value), dtype=bool)
        penalty = np.where(beyond, 1e3 * scale * (1 + value) + increase[~beyond].max(initial=0.0), 0.0)
        # Nothing is free below the lowest point either; and where a curve is flat, less is removed.
        start = np.where(value <= low + 1e-12, 0.0, increase)
        result.append(np.where(beyond, 0.0, start) + penalty + 1e-7 * scale * (value - low))
    return result


def _coordinates(shape: ErrorCurve | None, values: FloatArray) -> FloatArray:
    """What log g is close to a straight line in: the logarithm of the error, or log odds where none is known."""
    if shape is None:
        return log_odds(values)
    errors = np.interp(values, shape.coefficients, shape.errors)
    return np.asarray(np.log(np.maximum(errors, _NO_ERROR)), dtype=np.float64)


def _without_luck(increases: FloatArray, usual: FloatArray, noise: float) -> FloatArray:
    return np.asarray((increases * usual**2 + usual * noise**2) / (usual**2 + noise**2), dtype=np.float64)


def noise_of(curves: Sequence[SensitivityCurve]) -> float:
    """By how much losses scatter, judged by those below that of the whole model; 0 where there are none, or no shapes.

    Without shapes nothing says that less cannot be better.
    """
    shaped = [curve for curve in curves if curve.shape is not None]
    below = [loss - curve.losses[0] for curve in shaped for loss in curve.losses[1:] if loss < curve.losses[0]]
    return float(np.sqrt(np.mean(np.square(below)))) if below else 0.0


def follow_errors(curves: Sequence[SensitivityCurve]) -> bool:
    """Whether enough was measured to see that the loss goes as expected errors do.

    Args:
        curves: One per coefficient; False where any has no shape.
    """
    if not all(curve.shape for curve in curves) or sum(len(curve.losses) > 1 for curve in curves) < _TELLING:
        return False
    found = [(curve, n) for curve in curves for n in range(1, len(curve.losses))]
    increases = np.array([curve.losses[n] - curve.losses[0] for curve, n in found])
    if not np.isfinite(increases).all():
        return False
    logs = [_coordinates(curve.shape, np.array(curve.coefficients[n : n + 1]))[0] for curve, n in found]
    errors, luck = np.exp(logs), LUCK * noise_of(curves)
    usual = max(float(np.median(increases / errors)), 0.0) * errors
    return bool(((increases <= _ALIKE * usual + luck) & (increases >= usual / _ALIKE - luck)).all())


def explain(curves: Sequence[SensitivityCurve], x: FloatArray, loss: float) -> bool:
    """Whether a plan loses about what curves expect: not less than a third of it, nor more than ten times as much.

    Args:
        curves: One per coefficient.
        x: The coefficients of the plan, shape (k,).
        loss: What it lost.
    """
    expected = float(sum(increase[0] for increase in modelled_increases(curves, list(x[:, None]))))
    increase, luck = loss - curves[0].losses[0], LUCK * noise_of(curves)
    return bool(expected / _ALIKE - luck <= increase <= _AMPLIFIED * expected + luck)


def _usual_ratio(curves: Sequence[SensitivityCurve], heights: Sequence[FloatArray], scale: float) -> float:
    """The median of increase over error, of measured points; 1 where none tells."""
    logs: list[float] = []
    for curve, height in zip(curves, heights, strict=True):
        if curve.shape is not None:
            usable = np.isfinite(height) & (height > _FLOOR * scale)
            usable[0] = False
            t = _coordinates(curve.shape, np.array(curve.coefficients)[usable])
            logs += (np.log(height[usable]) - t).tolist()
    return float(np.exp(np.median(logs))) if logs else 1.0


def _slopes(t: FloatArray, logs: FloatArray, alone: float) -> tuple[float, float]:
    """Of log g before the first point and after the last: as between the two next to it, within reason."""
    if len(t) < 2:
        return alone, alone
    between = np.clip(np.diff(logs) / np.maximum(np.diff(t), 1e-9), *_SLOPES)
    return float(between[0]), float(between[-1])


def _heights(curve: SensitivityCurve) -> FloatArray:
    """The increases at a curve's points: never falling, infinite from the first that is not usable on."""
    losses = np.array(curve.losses, dtype=np.float64)
    if not np.isfinite(losses[0]):  # no loss of the whole model: the first usable point stands in
        usable = losses[np.isfinite(losses)]
        losses[0] = usable[0] if len(usable) else 0.0
    rising = envelope(losses)
    return np.asarray(rising - rising[0], dtype=np.float64)


def carried_over(curves: Sequence[SensitivityCurve], gone: Sequence[float]) -> tuple[SensitivityCurve, ...]:
    """The curves that a network should have after a round, going by those from before it.

    Removing the fraction c of what a round has left of a group is like removing gone + (1 - gone) c of all of it; the
    increase counts from where the round has come to.

    Args:
        curves: One per coefficient, in order.
        gone: The fraction that the round removed, per coefficient.

    >>> before = SensitivityCurve(0, (0.0, 0.5, 0.9), (1.0, 1.1, 2.9))
    >>> after, = carried_over([before], [0.5])
    >>> round(float(np.interp(0.8, after.coefficients, after.losses)), 3)  # of the half that is left: 0.9 in all
    1.8
    """
    values = np.arange(20) / 20
    of_all = [share + (1 - share) * values for share in gone]
    increases = modelled_increases(curves, of_all)
    return tuple(
        SensitivityCurve(n, tuple(values.tolist()), tuple((increase - increase[0]).tolist()))
        for n, increase in enumerate(increases)
    )


class PlacedCurves:
    """Points of curves, taken one by one.

    Args:
        space: What is searched.
        known: Curves that were measured on the same network before; their points cost nothing.
        expected: One curve per coefficient that may be about right; the first points lie where their solution is.
            Expected errors of the space go before.
    """

    def __init__(
        self,
        space: SearchSpace,
        known: Sequence[SensitivityCurve] = (),
        expected: Sequence[SensitivityCurve] = (),
    ) -> None:
        self.space = space
        self._expected = expected
        self._points: list[dict[float, float]] = [{} for _ in range(space.size)]
        for curve in known:
            for value, loss in zip(curve.coefficients[1:], curve.losses[1:], strict=True):
                if space.low[curve.index] < value <= space.high[curve.index]:
                    self._points[curve.index][value] = loss
        self._whole = float("nan")
        self._shapes: Sequence[ErrorCurve | None] = space.shapes or [None] * space.size
        self._is_informed = bool(known or space.shapes)

    def curves(self) -> tuple[SensitivityCurve, ...]:
        """What is known so far."""
        found = []
        for i, points in enumerate(self._points):
            values = sorted(points)
            coefficients = (float(self.space.low[i]), *values)
            losses = (self._whole, *(points[value] for value in values))
            found.append(SensitivityCurve(i, coefficients, losses, self._shapes[i]))
        return tuple(found)

    def measure(self, budget: int, *, every: bool = False) -> Generator[FloatArray, float, int]:
        """Yields the vectors of the points, and receives their losses.

        Args:
            budget: Vectors at most, besides the lowest.
            every: Whether to go on where the loss goes as expected errors do.

        Returns:
            How many vectors were asked for.
        """
        space = self.space
        self._whole = yield space.low.copy()
        wanted = self._first()
        asked, looked_up = 0, self._is_informed
        for _ in range(_ROUNDS):
            fresh = [i for i in self._order(wanted) if not self._is_known(i, float(wanted[i]))]
            for i in fresh[: budget - asked]:
                if not every and follow_errors(self.curves()):
                    return asked
                x = space.low.copy()
                x[i] = wanted[i]
                self._points[i][float(wanted[i])] = yield x
                asked += 1
            if asked >= budget or (not every and follow_errors(self.curves())):
                break
            if not fresh:
                if looked_up:
                    break
                looked_up = True
                wanted = np.array([self._beyond(i) for i in range(space.size)])
                continue
            solutions = best_combinations(space, self.curves(), 1, increases=modelled_increases)
            if not solutions:
                break
            wanted = np.array([self._away_from_broken(i, float(solutions[0][i])) for i in range(space.size)])
        return asked

    @cached_property
    def expected(self) -> FloatArray | None:
        """The solution of the errors, or else of what an earlier round lets expect; None where there is none."""
        space, curves = self.space, self._expected
        if space.shapes:
            bare = enumerate(zip(space.low.tolist(), space.shapes, strict=True))
            curves = [SensitivityCurve(i, (low,), (float("nan"),), shape) for i, (low, shape) in bare]
        found = best_combinations(space, curves, 1, increases=modelled_increases) if curves else []
        return found[0] if found else None

    def _first(self) -> FloatArray:
        """Where to look first."""
        uniform = self.space.scale(np.ones(self.space.size))
        if self.expected is None:
            return uniform
        return np.maximum(self.expected, _LEAST_TRIED * uniform) if self.space.shapes else self.expected

    def _beyond(self, i: int) -> float:
        """A coefficient one step of log odds above what was measured."""
        top = max(self._points[i], default=float(self.space.low[i]))
        return float(np.clip(1 / (1 + np.exp(-(log_odds([top])[0] + 1.0))), self.space.low[i], self.space.high[i]))

    def _away_from_broken(self, i: int, value: float) -> float:
        """The value, or one step of log odds below a point without a loss that is closer to it than any with one."""
        broken = [log_odds([c])[0] for c, loss in self._points[i].items() if not np.isfinite(loss)]
        usable = [log_odds([c])[0] for c, loss in self._points[i].items() if np.isfinite(loss)]
        t = log_odds([value])[0]
        if not broken or any(abs(t - u) <= _NEAR for u in usable) or t < min(broken) - 1.0:
            return value
        return float(np.clip(1 / (1 + np.exp(1.0 - min(broken))), self.space.low[i], self.space.high[i]))

    def _order(self, wanted: FloatArray) -> list[int]:
        """Coefficients, those first whose points are furthest from all measured ones, then those with large errors."""
        far = [self._distance(i, float(wanted[i])) for i in range(self.space.size)]
        shapes = self.space.shapes
        errors = [_coordinates(shapes[i], wanted[i : i + 1])[0] if shapes else 0.0 for i in range(len(far))]
        return sorted(range(len(far)), key=lambda i: (-far[i], -errors[i]))

    def _distance(self, i: int, value: float) -> float:
        """To the nearest measured point, in widths within which a point tells nothing new."""
        known = np.array([c for c, loss in self._points[i].items() if np.isfinite(loss) or value >= c])
        if not len(known):
            return np.inf
        shape = self._shapes[i]
        apart = np.abs(_coordinates(shape, known) - _coordinates(shape, np.array([value])))
        return float(apart.min()) / (_NEAR if shape is None else _NEAR_ERRORS)

    def _is_known(self, i: int, value: float) -> bool:
        """Whether a point would tell nothing: close to a measured one, or the same plan, or nothing removed."""
        space = self.space
        if value <= space.low[i] + 1e-12:
            return True
        at = np.repeat(space.low[None], 2, axis=0)
        at[1, i] = value
        if space.key(at[0]) == space.key(at[1]):
            return True
        for other in self._points[i]:
            at[0, i] = other
            if space.key(at[0]) == space.key(at[1]):
                return True
        return self._distance(i, value) <= 1.0
