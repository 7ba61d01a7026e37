"""What a search strategy may know of a network: numbers.

A *coefficient* in [0, 1] is the fraction of a group's channels to remove. A vector of them *realises* as a plan: a
whole number of removed channels per group. A plan has a *sparsity*, and a vector is *on target* when its plan's
sparsity is within the tolerance of the target and further budgets, if there are any, hold too. Sparsity is a step
function of the coefficients and is not separable over groups (a layer's parameters are a product of two widths), so
putting a vector on the target takes a search of its own: this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_softprune.utilities.arrays import FloatArray, IntArray

EXACT_PLANS = 300_000
"""Networks with at most this many plans are enumerated, which makes `nearest` and `project` exact."""

_SLACK = 1e-12  # sparsities are quotients of integers: equal ones may differ in the last bits

_SAMPLES = 8192  # per coefficient, when its values that realise differently are looked for

_PAIRS = 64  # beyond this many coefficients single steps are fine enough, and pairs too many

_CORRECTIONS = 60  # steps towards all budgets together


@dataclass(frozen=True, eq=False)
class SearchSpace:
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

    low: FloatArray
    high: FloatArray
    channels: IntArray
    realise: Callable[[FloatArray], IntArray]
    sparsity: Callable[[IntArray], FloatArray]
    target: float
    tolerance: float
    norms: FloatArray
    unit: IntArray | None = None
    limits: tuple[float, ...] = ()
    shares: Callable[[IntArray], FloatArray] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: ArrayLike, dtype: type[Any]) -> NDArray[Any]:
            array = np.array(value, dtype=dtype)
            if array.ndim != 1 or len(array) == 0 or array.shape != np.shape(self.low):
                raise ValueError(
                    f"{name} must have one entry per coefficient, shape {np.shape(self.low)}, got shape {array.shape}."
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)
            return array

        low, high = put("low", self.low, np.float64), put("high", self.high, np.float64)
        if not ((low >= 0) & (low <= high) & (high <= 1)).all():
            raise ValueError(f"low and high must satisfy 0 <= low <= high <= 1, got low={low} and high={high}.")
        channels = put("channels", self.channels, np.int64)
        unit = put("unit", np.ones_like(channels) if self.unit is None else self.unit, np.int64)
        for name, counts in (("channels", channels), ("unit", unit)):
            if (counts < 1).any():
                raise ValueError(f"{name} must be positive whole numbers, got {counts}.")
        put("norms", self.norms, np.float64)
        if not 0 <= self.target <= 1:
            raise ValueError(f"target must lie in [0, 1], got {self.target}.")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance}.")
        if self.limits and self.shares is None:
            raise ValueError(f"limits={self.limits} need shares, the function that says what remains.")

    # ------------------------------------------------------------------------------------------------ looking things up

    @property
    def size(self) -> int:
        """The number of coefficients, k."""
        return len(self.low)

    @property
    def step(self) -> FloatArray:
        """The smallest change of each coefficient that may remove a channel more, shape (k,)."""
        unit = np.ones_like(self.channels) if self.unit is None else self.unit
        return np.minimum(unit / self.channels, 1.0)

    @property
    def floor(self) -> float:
        """The smallest sparsity that is on target."""
        return self.target - self.tolerance

    def key(self, x: FloatArray) -> tuple[int, ...]:
        """The plan a vector (k,) realises as; equal keys are the same network."""
        return tuple(int(count) for count in self.realise(np.asarray(x, dtype=np.float64)[None])[0])

    def sparsities(self, points: FloatArray) -> FloatArray:
        """The sparsity of every row of (n, k) coefficients, shape (n,)."""
        return np.asarray(self.sparsity(self.realise(points)), dtype=np.float64)

    def sparsity_of(self, x: FloatArray) -> float:
        """The sparsity of the plan one vector (k,) realises as."""
        return float(self.sparsities(np.asarray(x, dtype=np.float64)[None])[0])

    def within(self, sparsities: FloatArray) -> NDArray[np.bool_]:
        """Which sparsities are within the tolerance of the target."""
        return np.asarray(np.abs(sparsities - self.target) <= self.tolerance + _SLACK)

    def overrun(self, removed: IntArray) -> FloatArray:
        """By how much plans (n, m) exceed the limits, summed over these, shape (n,); 0 where all of them hold."""
        if self.shares is None or not self.limits:
            return np.zeros(len(removed))
        over = np.maximum(self.shares(removed) - np.array(self.limits), 0.0)
        return np.asarray(np.where(over <= _SLACK, 0.0, over).sum(axis=1), dtype=np.float64)

    def measure(self, points: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The sparsity of every row of (n, k) coefficients, and by how much its plan exceeds the limits: (n,) each."""
        removed = self.realise(points)
        return np.asarray(self.sparsity(removed), dtype=np.float64), self.overrun(removed)

    def feasible(self, points: FloatArray) -> NDArray[np.bool_]:
        """Which rows of (n, k) coefficients have plans within the tolerance of the target and within the limits."""
        sparsities, overrun = self.measure(points)
        return np.asarray(self.within(sparsities) & (overrun == 0))

    def on_target(self, x: FloatArray) -> bool:
        """Whether the plan of one vector (k,) is within the tolerance of the target and within the limits."""
        return bool(self.feasible(np.asarray(x, dtype=np.float64)[None])[0])

    def clip(self, x: FloatArray) -> FloatArray:
        """The vector(s) moved into the bounds."""
        return np.asarray(np.clip(x, self.low, self.high), dtype=np.float64)

    @cached_property
    def _states(self) -> tuple[tuple[FloatArray, FloatArray], ...]:
        """Per coefficient: where each state (its groups' removed counts) begins, and the value that stands for it."""
        states = []
        for i in range(self.size):
            count = int(self.channels[i])
            # Rounding rules switch at whole, half or quarter channels; the very wide are sampled.
            parts = 4 * count if 4 * count <= _SAMPLES else count if count <= _SAMPLES else _SAMPLES
            ticks = np.arange(parts + 1) / parts
            ticks = np.concatenate((ticks, ticks + 1e-7 / count))  # a tie may belong to either side
            ticks = ticks[(ticks > self.low[i]) & (ticks < self.high[i])]
            ticks = np.unique(np.concatenate(([self.low[i]], ticks, [self.high[i]])))
            points = np.repeat(self.low[None], len(ticks), axis=0)
            points[:, i] = ticks
            removed = self.realise(points)
            begins = np.flatnonzero(np.concatenate(([True], (np.diff(removed, axis=0) != 0).any(axis=1))))
            ends = np.append(begins[1:], len(ticks))
            natural = np.abs(ticks / self.step[i] - np.rint(ticks / self.step[i])) < 1e-9  # whole removable steps
            stands = [
                next((j for j in range(a, b) if natural[j]), (a + b) // 2) for a, b in zip(begins, ends, strict=True)
            ]
            states.append((ticks[begins], ticks[stands]))
        return tuple(states)

    @property
    def levels(self) -> tuple[FloatArray, ...]:
        """Per coefficient, one value for every state its groups can be in, ascending."""
        return tuple(values for _, values in self._states)

    def indices(self, x: FloatArray) -> IntArray:
        """The index into `levels` of each coefficient of one vector (k,)."""
        places = [
            np.searchsorted(begins, x[i] + _SLACK, side="right") - 1 for i, (begins, _) in enumerate(self._states)
        ]
        return np.maximum(np.array(places, dtype=np.int64), 0)

    def at(self, indices: IntArray) -> FloatArray:
        """The vectors (n, k) at rows of indices into `levels`; indices beyond an end are moved onto it."""
        columns = [np.take(values, indices[:, i], mode="clip") for i, values in enumerate(self.levels)]
        return np.stack(columns, axis=1)

    def snap(self, x: FloatArray) -> FloatArray:
        """The vector that stands for the plan of `x`: whole channels, so that differences of vectors are real ones."""
        snapped = self.at(self.indices(x)[None])[0]
        return snapped if self.key(snapped) == self.key(x) else np.array(x, dtype=np.float64)

    def settle(self, x: FloatArray) -> IntArray:
        """Indices into `levels` of a plan near `x`, on target wherever one is found."""
        point = self.at(self.indices(x)[None])[0]
        return self.indices(point if self.on_target(point) else self._repair(point))

    @property
    def num_plans(self) -> int:
        """How many plans the bounds allow."""
        return math.prod(len(values) for values in self.levels)

    @cached_property
    def _table(self) -> tuple[FloatArray, FloatArray, FloatArray] | None:
        """Every plan's vector (n, k), sparsity and overrun (n,), or None where there are too many."""
        if self.num_plans > EXACT_PLANS:
            return None
        points = np.stack([axis.ravel() for axis in np.meshgrid(*self.levels, indexing="ij")], axis=1)
        return points, *self.measure(points)

    # ---------------------------------------------------------------------------------------------- reaching the target

    def slope(self, x: FloatArray) -> FloatArray:
        """The gradient (k,) of the sparsity at `x`, by differences wide enough to see past single channels."""
        return np.asarray(self._slopes(x, lambda removed: self.sparsity(removed)[:, None])[0], dtype=np.float64)

    def _slopes(self, x: FloatArray, values: Callable[[IntArray], FloatArray]) -> FloatArray:
        """The gradients (l, k) at `x` of functions of plans, (n, m) to (n, l)."""
        reach = np.maximum(0.05, 2 * self.step)
        up, down = np.minimum(x + reach, self.high), np.maximum(x - reach, self.low)
        points = np.repeat(np.asarray(x, dtype=np.float64)[None], 2 * self.size, axis=0)
        rows = np.arange(self.size)
        points[rows, rows], points[rows + self.size, rows] = up, down
        found = values(self.realise(points))
        rise = (found[: self.size] - found[self.size :]).T
        return np.asarray(rise / np.maximum(up - down, _SLACK), dtype=np.float64)

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
        x = self.clip(x)
        if direction is None:
            direction = self.slope(x)
            if not direction.any():
                direction = np.ones(self.size)
        elif (direction < 0).any() or not direction.any():
            raise ValueError(f"direction must have no negative and some positive entries, got {direction}.")
        direction = direction / direction.max()
        moving = direction > 1e-9
        longest = float(((self.high - x)[moving] / direction[moving]).max())
        shortest = float(((self.low - x)[moving] / direction[moving]).min())
        aim = self.target if aim is None else aim
        found = self._cross(lambda t: self.clip(x + t[:, None] * direction), shortest, longest, aim)
        if self.limits and not self.on_target(found):
            found = self._correct(found)
        return found if self.on_target(found) else self._repair(found)

    def _correct(self, x: FloatArray) -> FloatArray:
        """The vector near `x` that meets the target and the limits, or the nearest to that on the way."""
        if self.shares is None:
            raise RuntimeError("limits without shares")
        shares = self.shares

        def all_values(removed: IntArray) -> FloatArray:  # columns: sparsity, then what is gone of each limited cost
            return np.concatenate((self.sparsity(removed)[:, None], 1.0 - shares(removed)), axis=1)

        least = np.array([self.target - self.tolerance, *(1.0 - limit for limit in self.limits)])
        most = np.array([self.target + self.tolerance, *(math.inf for _ in self.limits)])
        best, nearest = x, math.inf
        for _ in range(_CORRECTIONS):
            values = all_values(self.realise(x[None]))[0]
            lacking = np.maximum(least - values, 0.0) - np.maximum(values - most, 0.0)
            miss = float(np.abs(lacking).sum())
            if miss < nearest:
                best, nearest = x, miss
            if miss <= _SLACK:
                break
            slopes = self._slopes(x, all_values)
            for gap, slope in zip(lacking, slopes, strict=True):
                free = (x < self.high) if gap > 0 else (x > self.low)
                direction = np.where(free, slope, 0.0)
                length = float(direction @ direction)
                if abs(gap) > _SLACK and length > 0:
                    x = self.clip(x + 1.2 * gap / length * direction)
        return best

    def scale(self, x: FloatArray) -> FloatArray:
        """The multiple of `x`, clipped to the bounds, that is on the sparsity target.

        Proportions between coefficients are kept, except where a bound is met or where no multiple is within the
        tolerance: then the nearest plan that is (see `project`).

        Args:
            x: Coefficients, shape (k,), not negative; all zeros count as all equal.

        Returns:
            Coefficients, shape (k,), within the bounds.
        """
        x = np.maximum(np.asarray(x, dtype=np.float64), 0.0)
        x = x / x.max() if x.max() > 0 else np.ones(self.size)
        x = np.where(x > 0, np.maximum(x, 1e-6), 0.0)
        longest = 1.0 / float(x[x > 0].min())
        found = self._cross(lambda t: self.clip(t[:, None] * x), 0.0, longest, self.target)
        return found if self.on_target(found) else self.project(found)

    def nearest_point(self) -> FloatArray:
        """The vector (k,) within the limits whose sparsity is nearest to the target.

        Exact up to `EXACT_PLANS` plans, else best effort. Where no plan is within the limits, the one that exceeds them
        least.
        """
        (lowest, highest), overrun = self.measure(np.stack((self.low, self.high)))
        if lowest >= self.target and overrun[0] == 0:
            return np.array(self.low, dtype=np.float64)
        if highest <= self.target:
            return np.array(self.high, dtype=np.float64)
        if self._table is not None:
            points, values, over = self._table
            return np.array(points[np.lexsort((np.abs(values - self.target), over))[0]], dtype=np.float64)
        rng = np.random.default_rng(0)
        starts = [self.low, self.high, *rng.uniform(self.low, self.high, (16, self.size))]
        best, least = self.high, (math.inf, math.inf)
        for start in [self.scale(np.ones(self.size)), *starts]:
            for point in (self._polish(self.project(start), tolerance=0.0), self._within_limits(start)):
                sparsities, over = self.measure(point[None])
                gap = (float(over[0]), abs(float(sparsities[0]) - self.target))
                if gap < least:
                    best, least = point, gap
            if least < (0.0, 1e-4):  # finer than any tolerance in use
                break
        return best

    def _within_limits(self, x: FloatArray) -> FloatArray:
        """A plan within the limits, whatever its sparsity, as near to the target as a straight way down leads."""
        if not self.limits:
            return x
        whole = replace(self, tolerance=1.0)
        start = whole.project(x)
        if not whole.on_target(start):
            return start
        # From there towards the target, as long as the limits hold.
        end = self.project(start)
        path = start + np.linspace(0, 1, 257)[:, None] * (end - start)
        held = np.flatnonzero(self.overrun(self.realise(path)) == 0)
        return np.array(path[held[-1]], dtype=np.float64)

    def nearest(self) -> float:
        """The reachable sparsity nearest to the target (see `nearest_point`)."""
        return self.sparsity_of(self.nearest_point())

    def least_share(self, number: int) -> float:
        """The smallest value of one limit with which a plan meets the target and the other limits; inf for none.

        Exact up to `EXACT_PLANS` plans, else the smallest that was found.
        """

        def relaxed(limit: float) -> SearchSpace:
            limits = (*self.limits[:number], limit, *self.limits[number + 1 :])
            return replace(self, limits=limits)

        if self.shares is None:
            raise ValueError("There are no limits.")
        if self._table is not None:
            points = self._table[0][relaxed(math.inf).feasible(self._table[0])]
            return float(self.shares(self.realise(points))[:, number].min()) if len(points) else math.inf
        found, least, most = math.inf, 0.0, 1.0
        starts = [np.full(self.size, 0.5), self.low, self.high]
        for _ in range(10):
            at = relaxed(most if math.isinf(found) else (least + most) / 2)
            points = np.stack([at.project(start) for start in starts])
            points = points[at.feasible(points)]
            if len(points):
                starts = [*starts[:3], points[0]]
                found = most = float(self.shares(self.realise(points))[:, number].min())
            elif math.isinf(found):
                break
            else:
                least = at.limits[number]
        return found

    def _cross(self, path: Callable[[FloatArray], FloatArray], begin: float, end: float, aim: float) -> FloatArray:
        """Where the sparsity along a monotone path passes `aim`: the better of the two sides of the step."""
        sides = np.array([begin, end])
        finest = float(self.step.min()) / 64
        for _ in range(6):  # 64 intervals each
            places = np.linspace(sides[0], sides[1], 65)
            above = int(np.searchsorted(self.sparsities(path(places)), aim - _SLACK))
            sides = places[[max(above - 1, 0), min(above, 64)]]
            ends = path(sides)
            if above in (0, 65) or np.abs(ends[1] - ends[0]).max() < finest:
                break
        points = path(sides)
        values = self.sparsities(points)
        order = np.lexsort((np.abs(values - aim), ~self.within(values)))
        return np.array(points[order[0]], dtype=np.float64)

    def _repair(self, x: FloatArray) -> FloatArray:
        """A plan near `x` that is on target, else the nearest found."""
        near = self._polish(x, self.tolerance)
        if self.on_target(near):
            return near
        if self._table is not None:
            points, values, overrun = self._table
        else:
            rng = np.random.default_rng(0)  # a fixed neighbourhood: projection is a function
            offsets = rng.integers(-3, 4, (4096, self.size)) * (rng.random((4096, self.size)) < 4 / self.size)
            points = np.concatenate((near[None], self.at(np.maximum(self.indices(x) + offsets, 0))))
            values, overrun = self.measure(points)
        excess = self._excess(values, overrun, self.tolerance)
        nearest = np.lexsort((((points - x) ** 2).sum(axis=1), excess))[0]
        return np.array(points[nearest], dtype=np.float64)

    @cached_property
    def _moves(self) -> IntArray:
        eye = np.eye(self.size, dtype=np.int64)
        moves = [eye, -eye, 2 * eye, -2 * eye]
        if self.size <= _PAIRS:
            moves += [eye[i][None] - np.delete(eye, i, axis=0) for i in range(self.size)]
        return np.concatenate(moves)

    def neighbours(self, x: FloatArray) -> FloatArray:
        """The plans one or two steps of one coefficient, or an exchange between two, away from `x`, shape (n, k)."""
        return self.at(np.maximum(self.indices(x) + self._moves, 0))

    def around(self, x: FloatArray, reach: float) -> FloatArray:
        """Other plans on target near `x`, shape (n, k): with few plans all within `reach`, else `neighbours`."""
        if self._table is None:
            points = self.neighbours(x)
            values, overrun = self.measure(points)
        else:
            points, values, overrun = self._table
        keep = self.within(values) & (overrun == 0) & (points != x).any(axis=1)
        if self._table is not None:
            keep &= (np.abs(points - x) <= np.maximum(reach, 2 * self.step)).all(axis=1)
        return np.array(points[keep], dtype=np.float64)

    def _excess(self, sparsities: FloatArray, overrun: FloatArray, tolerance: float) -> FloatArray:
        """How far plans are from meeting target and limits; 0 where they do."""
        off = np.maximum(np.abs(sparsities - self.target) - tolerance, 0.0)
        return np.asarray(np.where(off <= _SLACK, 0.0, off) + overrun, dtype=np.float64)

    def _polish(self, x: FloatArray, tolerance: float) -> FloatArray:
        """Single channels and exchanges between two groups, as long as they bring the plan nearer to the target."""
        current, gap = x, float(self._excess(*self.measure(x[None]), tolerance)[0])
        for _ in range(64):
            if gap == 0:
                break
            points = self.neighbours(current)
            gaps = self._excess(*self.measure(points), tolerance)
            best = int(np.lexsort((((points - x) ** 2).sum(axis=1), gaps))[0])
            if gaps[best] >= gap - _SLACK:
                break
            current, gap = points[best], float(gaps[best])
        return np.array(current, dtype=np.float64)
