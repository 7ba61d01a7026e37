"""Look-ups: what vectors of coefficients realise as, and which plans there are.

A *coefficient* in [0, 1] is the fraction of a group's channels to remove. A vector of them *realises* as a plan: a
whole number of removed channels per group. A plan has a *sparsity*, and a vector is *on target* when its plan's
sparsity is within the tolerance of the target and further budgets, if there are any, hold too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_softprune.utilities.arrays import FloatArray, IntArray

EXACT_PLANS = 300_000
"""Networks with at most this many plans are enumerated, which makes `nearest` and `project` exact."""

SLACK = 1e-12
"""Sparsities are quotients of integers: equal ones may differ in the last bits."""


def reaches(sparsity: float, target: float | None) -> bool:
    """Whether at least what was asked for is removed; without a target, any sparsity will do."""
    return target is None or sparsity >= target - SLACK


_SAMPLES = 8192  # per coefficient, when its values that realise differently are looked for
_PAIRS = 64  # beyond this many coefficients single steps are fine enough, and pairs too many


@dataclass(frozen=True)
class ErrorCurve:
    """The expected error as one coefficient rises: what is known of its effect before any evaluation.

    Attributes:
        coefficients: Its values, ascending; the first is its lowest.
        errors: The expected error at each: what the network's outputs miss of their variance, as a fraction.
    """

    coefficients: tuple[float, ...]
    errors: tuple[float, ...]

    def counted_from(self, at: int) -> ErrorCurve:
        """The same with errors that are 0 at one of its values, by number, and up to it.

        >>> ErrorCurve((0.0, 0.5, 1.0), (0.0, 1.0, 4.0)).counted_from(1)
        ErrorCurve(coefficients=(0.0, 0.5, 1.0), errors=(0.0, 0.0, 3.0))
        """
        return ErrorCurve(self.coefficients, tuple(max(error - self.errors[at], 0.0) for error in self.errors))


@dataclass(frozen=True, eq=False)
class PlanLookUps:
    """The numbers of a network, and what can be read off them; `SearchSpace` explains the fields."""

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
    from_target: bool = False
    errors: Callable[[IntArray], FloatArray] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: ArrayLike, dtype: type[Any]) -> NDArray[Any]:
            array = np.array(value, dtype=dtype)
            if array.ndim != 1 or array.shape != np.shape(self.low):
                raise ValueError(f"{name}: shape {array.shape} is not one entry per coefficient, {np.shape(self.low)}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
            return array

        low, high = put("low", self.low, np.float64), put("high", self.high, np.float64)
        if not ((low >= 0) & (low <= high) & (high <= 1)).all():
            raise ValueError(f"low and high: {low} and {high} are not 0 <= low <= high <= 1")
        channels = put("channels", self.channels, np.int64)
        unit = put("unit", np.ones_like(channels) if self.unit is None else self.unit, np.int64)
        for name, counts in (("channels", channels), ("unit", unit)):
            if (counts < 1).any():
                raise ValueError(f"{name}: {counts} are not positive whole numbers")
        put("norms", self.norms, np.float64)
        if not 0 <= self.target <= 1:
            raise ValueError(f"target: {self.target} is not in [0, 1]")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance: {self.tolerance} is negative")
        if self.limits and self.shares is None:
            raise ValueError(f"limits: {self.limits} without shares, the function that says what remains")

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
        return self.target if self.from_target else self.target - self.tolerance

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
        """Which sparsities are within the tolerance of the target, and not below it where they may not be."""
        return np.asarray((sparsities >= self.floor - SLACK) & (sparsities <= self.target + self.tolerance + SLACK))

    def overrun(self, removed: IntArray) -> FloatArray:
        """By how much plans (n, m) exceed the limits, summed over these, shape (n,); 0 where all of them hold."""
        if self.shares is None or not self.limits:
            return np.zeros(len(removed))
        over = np.maximum(self.shares(removed) - np.array(self.limits), 0.0)
        return np.asarray(np.where(over <= SLACK, 0.0, over).sum(axis=1), dtype=np.float64)

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
    def states(self) -> tuple[tuple[FloatArray, FloatArray], ...]:
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
        return tuple(values for _, values in self.states)

    @cached_property
    def shapes(self) -> tuple[ErrorCurve, ...]:
        """Per coefficient, the expected errors as it alone rises; empty where none are known."""
        if self.errors is None:
            return ()
        shapes = []
        for i, values in enumerate(self.levels):
            points = np.repeat(self.low[None], len(values), axis=0)
            points[:, i] = values
            errors = np.asarray(self.errors(self.realise(points)), dtype=np.float64)
            shapes.append(ErrorCurve(tuple(values.tolist()), tuple((errors - errors[0]).tolist())))
        return tuple(shapes)

    def indices(self, x: FloatArray) -> IntArray:
        """The index into `levels` of each coefficient of one vector (k,)."""
        places = [np.searchsorted(begins, x[i] + SLACK, side="right") - 1 for i, (begins, _) in enumerate(self.states)]
        return np.maximum(np.array(places, dtype=np.int64), 0)

    def at(self, indices: IntArray) -> FloatArray:
        """The vectors (n, k) at rows of indices into `levels`; indices beyond an end are moved onto it."""
        columns = [np.take(values, indices[:, i], mode="clip") for i, values in enumerate(self.levels)]
        return np.stack(columns, axis=1)

    def snap(self, x: FloatArray) -> FloatArray:
        """The vector that stands for the plan of `x`: whole channels, so that differences of vectors are real ones."""
        snapped = self.at(self.indices(x)[None])[0]
        return snapped if self.key(snapped) == self.key(x) else np.array(x, dtype=np.float64)

    @property
    def num_plans(self) -> int:
        """How many plans the bounds allow."""
        return math.prod(len(values) for values in self.levels)

    @cached_property
    def table(self) -> tuple[FloatArray, FloatArray, FloatArray] | None:
        """Every plan's vector (n, k), sparsity and overrun (n,), or None where there are too many."""
        if self.num_plans > EXACT_PLANS:
            return None
        points = np.stack([axis.ravel() for axis in np.meshgrid(*self.levels, indexing="ij")], axis=1)
        return points, *self.measure(points)

    @cached_property
    def moves(self) -> IntArray:
        """Differences of indices into `levels`: one or two steps of a coefficient, or an exchange between two."""
        eye = np.eye(self.size, dtype=np.int64)
        moves = [eye, -eye, 2 * eye, -2 * eye]
        if self.size <= _PAIRS:
            moves += [eye[i][None] - np.delete(eye, i, axis=0) for i in range(self.size)]
        return np.concatenate(moves)

    def neighbours(self, x: FloatArray) -> FloatArray:
        """The plans one or two steps of one coefficient, or an exchange between two, away from `x`, shape (n, k)."""
        return self.at(np.maximum(self.indices(x) + self.moves, 0))

    def around(self, x: FloatArray, reach: float) -> FloatArray:
        """Other plans on target near `x`, shape (n, k): with few plans all within `reach`, else `neighbours`."""
        if self.table is None:
            points = self.neighbours(x)
            values, overrun = self.measure(points)
        else:
            points, values, overrun = self.table
        keep = self.within(values) & (overrun == 0) & (points != x).any(axis=1)
        if self.table is not None:
            keep &= (np.abs(points - x) <= np.maximum(reach, 2 * self.step)).all(axis=1)
        return np.array(points[keep], dtype=np.float64)

    def misses(self, sparsities: FloatArray) -> FloatArray:
        """How far sparsities are from the target; below it counts as further than above, where they may not be."""
        below = self.from_target & (sparsities < self.target - SLACK)
        return np.asarray(np.abs(sparsities - self.target) + below, dtype=np.float64)

    def excess(self, sparsities: FloatArray, overrun: FloatArray, tolerance: float) -> FloatArray:
        """How far plans are from meeting target and limits; 0 where they do."""
        floor = self.target if self.from_target else self.target - tolerance
        off = np.maximum(np.maximum(floor - sparsities, sparsities - self.target - tolerance), 0.0)
        return np.asarray(np.where(off <= SLACK, 0.0, off) + overrun, dtype=np.float64)
