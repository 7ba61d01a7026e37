"""The best combination of one-at-a-time curves under a sparsity that is not separable.

The model: the loss of a vector is the sum over coefficients of the increase its own curve gives::

    minimise  sum_i g_i(x_i)   subject to   target - tolerance <= sparsity(x) <= target + tolerance          (1)

and within the limits on further costs, where there are any.

Each g_i is known at every state of its groups (every channel), by linear interpolation of the envelope of the measured
curve. The objective is separable, the constraint is not: parameters are products of widths. Two ways through:

- Few enough plans: all of them, in the order of the objective, until enough satisfy the real constraint. Exact.
- More: the same on the curves' own coefficients where these are few enough, and a multiple-choice knapsack around a
point,

      minimise  sum_i g_i(x_i)   subject to   sum_i [s(x0 with x_i) - s(x0)] >= target - tolerance - s(x0)     (2)

  solved by dynamic programming. The sparsity is linearised over coefficients but not within one: each bracket is the
  real sparsity. Its solution, put back on the real constraint, is the next x0 (sequential linearisation). Limits enter
  as prices on what remains of their costs, at several weights. What both
  ways find is then improved on the real constraint by removing less in one group, or less in one for more in another,
  in steps of 1, 2, 4, ... channels, until no such step helps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lightning_softprune.search.base import SensitivityCurve
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray, IntArray

EXACT_COMBINATIONS = 200_000
"""Up to this many combinations are gone through in the order of the objective."""

_CHUNK = 4096
_BINS = 384
_WIDTH = 40  # values per coefficient in the knapsack; the exchange afterwards goes down to single channels
_POOL = 512
_IMPROVED = 3  # starting points that are improved by exchanges
_MOVES = 40_000
_WEIGHTS = (0.1, 0.3, 1.0, 3.0)  # of a limited cost's price, relative to what all curves rise by


def envelope(losses: Sequence[float] | FloatArray) -> FloatArray:
    """The running maximum: removing more never helps; not finite means infinite from there on.

    Example:
        >>> envelope([1.0, 0.5, 2.0, float("nan"), 3.0])
        array([ 1.,  1.,  2., inf, inf])
    """
    values = np.array(losses, dtype=np.float64)
    values[~np.isfinite(values)] = np.inf
    return np.asarray(np.maximum.accumulate(values), dtype=np.float64)


def increases(curves: Sequence[SensitivityCurve], values: Sequence[FloatArray]) -> list[FloatArray]:
    """The objective of (1): what each coefficient's values add to the loss.

    Args:
        curves: One per coefficient, in order.
        values: Per coefficient, the values asked for.

    Returns:
        Per coefficient, the increase at each value: finite, growing with the value. A value beyond a curve's last
        usable point gets a penalty above anything measured. Without one usable point anywhere the increase is the
        coefficient itself, which asks for removing little and evenly.
    """
    if not any(np.isfinite(curve.losses[1:]).any() for curve in curves):
        return [np.array(value - curve.coefficients[0]) for curve, value in zip(curves, values, strict=True)]
    known = []
    for curve in curves:
        points, losses = np.array(curve.coefficients), np.array(curve.losses)
        if not np.isfinite(losses[0]):  # no loss of the whole model: the first usable point stands in
            finite = losses[np.isfinite(losses)]
            losses[0] = finite[0] if len(finite) else 0.0
        heights = envelope(losses)
        usable = np.isfinite(heights)
        known.append((points[usable], heights[usable] - heights[0]))
    scale = max(float(heights[-1]) for _, heights in known) or 1.0
    result = []
    for (points, heights), value in zip(known, values, strict=True):
        beyond = np.maximum(value - points[-1], 0.0)
        penalty = np.where(beyond > 1e-9, 1e3 * scale * (1 + beyond), 0.0)
        # Where a curve is flat, less is removed: a tie-break too small to matter otherwise.
        result.append(np.interp(value, points, heights) + penalty + 1e-7 * scale * (value - points[0]))
    return result


Increases = Callable[[Sequence[SensitivityCurve], Sequence[FloatArray]], list[FloatArray]]
"""From curves and values to what these add to the loss."""


def best_combinations(
    space: SearchSpace,
    curves: Sequence[SensitivityCurve],
    count: int,
    separation: float = 0.0,
    increases: Increases = increases,
) -> list[FloatArray]:
    """The vectors with the least sum of increases that are on the sparsity target, best first.

    Args:
        space: What is searched.
        curves: One per coefficient, in order.
        count: How many, with different plans.
        separation: Vectors closer than this to a better one (largest difference of a coefficient) are passed over, as
            long as others are found: a plan one channel away is not a second opinion.
        increases: How curves are read between their points.

    Returns:
        At most `count` vectors; none if no plan on target was found. The first is the exact minimiser of (1) where the
        network has at most `EXACT_COMBINATIONS` plans.
    """
    costs = increases(curves, space.levels)
    if space.num_plans <= EXACT_COMBINATIONS:
        pool = _enumerate(space, costs, [np.arange(len(cost)) for cost in costs])
    else:
        pool = sorted(_starts(space, curves, costs), key=lambda indices: float(_objective(costs, indices[None])[0]))
        pool += [step for start in pool[:_IMPROVED] for step in _exchange(space, costs, start)]
    ranked: dict[tuple[int, ...], tuple[float, FloatArray]] = {}
    for indices in pool:
        x = space.at(indices[None])[0]
        ranked[tuple(int(i) for i in indices)] = (_objective(costs, indices[None])[0], x)
    points = [x for _, x in sorted(ranked.values(), key=lambda pair: pair[0])]
    chosen: list[FloatArray] = []
    for far in (separation, 0.0):
        for x in points:
            if len(chosen) < count and all(np.abs(x - other).max() > far for other in chosen):
                chosen.append(x)
    return chosen


def _objective(costs: Sequence[FloatArray], indices: IntArray) -> FloatArray:
    return np.asarray(sum(cost[indices[:, i]] for i, cost in enumerate(costs)), dtype=np.float64)


def _enumerate(space: SearchSpace, costs: Sequence[FloatArray], axes: Sequence[IntArray]) -> list[IntArray]:
    """The on-target combinations of the axes' levels, least objective first, at most `_POOL` of them."""
    objective = np.zeros(1)
    for cost, axis in zip(costs, axes, strict=True):
        objective = (objective[:, None] + cost[axis]).ravel()
    order = np.argsort(objective, kind="stable")
    shape = tuple(len(axis) for axis in axes)
    found: list[IntArray] = []
    for begin in range(0, len(order), _CHUNK):
        places = np.unravel_index(order[begin : begin + _CHUNK], shape)
        indices = np.stack([axis[place] for axis, place in zip(axes, places, strict=True)], axis=1)
        found += list(indices[space.feasible(space.at(indices))])
        if len(found) >= _POOL:
            break
    return found[:_POOL]


def _starts(space: SearchSpace, curves: Sequence[SensitivityCurve], costs: Sequence[FloatArray]) -> Iterator[IntArray]:
    """On-target vectors worth improving: the best of the curves' own grid, and the knapsacks'."""
    axes = [
        np.unique([space.indices(np.full(space.size, v))[i] for v in curve.coefficients])
        for i, curve in enumerate(curves)
    ]
    if math.prod(len(axis) for axis in axes) <= EXACT_COMBINATIONS:
        yield from _enumerate(space, costs, axes)[:4]
    seen = set()
    origins = (space.scale(np.ones(space.size)), space.low, space.high)
    for priced, origin in itertools.product(_priced(space, costs), origins):
        x = origin
        for _ in range(6):
            x = space.at(_knapsack(space, priced, x)[None])[0]
            x = space.project(x, aim=space.floor)
            indices = space.settle(x)
            if (key := tuple(indices)) in seen:
                break
            seen.add(key)
            if space.on_target(space.at(indices[None])[0]):
                yield indices


def _priced(space: SearchSpace, costs: Sequence[FloatArray]) -> Iterator[Sequence[FloatArray]]:
    """The costs, then with a price on what remains of each limited cost (Lagrange multipliers of the limits)."""
    yield costs
    if space.shares is None:
        return
    x0 = space.scale(np.ones(space.size))
    spread = sum(float(cost[-1] - cost[0]) for cost in costs)
    for n in range(len(space.limits)):
        prices = []
        for i, values in enumerate(space.levels):
            rows = np.repeat(x0[None], len(values), axis=0)
            rows[:, i] = values
            prices.append(space.shares(space.realise(rows))[:, n])
        fall = sum(float(price[0] - price[-1]) for price in prices)
        for weight in _WEIGHTS if fall > 0 else ():
            yield [cost + weight * spread / fall * price for cost, price in zip(costs, prices, strict=True)]


def _knapsack(space: SearchSpace, costs: Sequence[FloatArray], x0: FloatArray) -> IntArray:
    """The minimiser of (2) around `x0`, as indices into the levels."""
    axes = [np.unique(np.linspace(0, len(cost) - 1, _WIDTH).round().astype(np.int64)) for cost in costs]
    sizes = [len(axis) for axis in axes]
    rows = np.repeat(x0[None], sum(sizes), axis=0)
    begins = np.cumsum([0, *sizes])
    for i, axis in enumerate(axes):
        rows[begins[i] : begins[i + 1], i] = space.levels[i][axis]
    gains = space.sparsities(rows) - space.sparsity_of(x0)
    parts = [gains[begins[i] : begins[i + 1]] for i in range(len(axes))]
    needed = space.floor - space.sparsity_of(x0) - sum(part[0] for part in parts)
    if needed <= 0:
        return np.array([axis[0] for axis in axes])
    # least[b]: the objective of reaching b bins of the needed gain. Gains are rounded down, so that b bins are really
    # there.
    least = np.where(np.arange(_BINS + 1) == 0, 0.0, np.inf)
    choices = []
    for i, (part, axis) in enumerate(zip(parts, axes, strict=True)):
        bins = np.minimum((part - part[0]) / needed * _BINS, _BINS).astype(np.int64)
        before = np.maximum(np.arange(_BINS + 1)[None] - bins[:, None], 0)
        table = least[before] + costs[i][axis][:, None]
        choice = table.argmin(axis=0)
        least = table[choice, np.arange(_BINS + 1)]
        choices.append((choice, before))
    if not np.isfinite(least[_BINS]):
        return np.array([axis[-1] for axis in axes])
    picked = np.zeros(len(axes), dtype=np.int64)
    b = _BINS
    for i in reversed(range(len(axes))):
        choice, before = choices[i]
        picked[i] = axes[i][choice[b]]
        b = before[choice[b], b]
    return picked


def _exchange(space: SearchSpace, costs: Sequence[FloatArray], start: IntArray) -> Iterator[IntArray]:
    """`start` and its improvements, each on target: fewer channels in one group, or also more in another."""
    tops = np.array([len(cost) - 1 for cost in costs])
    k = len(costs)
    sizes = 2 ** np.arange(max(1, int(tops.max()).bit_length() - 2))
    while len(sizes) > 2 and (k * len(sizes)) ** 2 > _MOVES:
        sizes = sizes[[0, *range(2, len(sizes), 2)]]
    # All moves (i: s channels fewer, j: t channels more), t = 0 for none; the same for every start, so built once.
    i, s, j, t = (axis.ravel() for axis in np.meshgrid(np.arange(k), sizes, np.arange(k), sizes, indexing="ij"))
    keep = i != j
    i, s, j, t = (np.concatenate((a[keep], b)) for a, b in zip((i, s, j, t), _singles(k, sizes), strict=True))
    current = start
    yield current
    for _ in range(100):
        possible = (current[i] - s >= 0) & (current[j] + t <= tops[j])
        # One coefficient at a time: what each step does to objective and sparsity.
        steps = np.concatenate((-sizes, [0], sizes))
        moved = np.clip(current[:, None] + steps, 0, tops[:, None])
        deltas = np.stack([costs[n][moved[n]] - costs[n][current[n]] for n in range(k)])
        rows = np.repeat(current[None], k * len(steps), axis=0)
        rows[np.arange(len(rows)), np.repeat(np.arange(k), len(steps))] = moved.ravel()
        sparsities = space.sparsities(space.at(rows)).reshape(k, len(steps))
        middle = len(sizes)
        here = sparsities[0, middle]
        column_s = np.searchsorted(sizes, s)
        column_t = middle + np.where(t > 0, 1 + np.searchsorted(sizes, t), 0)
        change = deltas[i, column_s] + deltas[j, column_t]
        less, more = sparsities[i, column_s] - here, sparsities[j, column_t] - here
        # Linearised, with room for what the product of two widths adds: spares most of the real checks.
        likely = here + less + more >= space.floor - 0.25 * (np.abs(less) + np.abs(more)) - 1e-12
        candidates = np.flatnonzero(possible & likely & (change < -1e-12))
        candidates = candidates[np.argsort(change[candidates], kind="stable")]
        for begin in range(0, min(len(candidates), 4 * _CHUNK), _CHUNK):
            some = candidates[begin : begin + _CHUNK]
            trials = np.repeat(current[None], len(some), axis=0)
            n = np.arange(len(some))
            trials[n, i[some]] -= s[some]
            trials[n, j[some]] += t[some]
            good = np.flatnonzero(space.feasible(space.at(trials)))
            if len(good):
                current = trials[good[0]]
                break
        else:
            return
        yield current


def _singles(k: int, sizes: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """The moves of one coefficient alone, as (i, s, j, t) with t = 0."""
    i, s = (axis.ravel() for axis in np.meshgrid(np.arange(k), sizes, indexing="ij"))
    return i, s, i, np.zeros_like(s)
