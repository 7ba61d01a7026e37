"""Putting vectors of coefficients on the sparsity target and within the limits.

Sparsity is a step function of the coefficients and is not separable over groups (a layer's parameters are a product of
two widths), so that takes a search of its own: along a line to where the sparsity passes the target, then over single
channels and exchanges of channels between two groups; on networks with few plans, over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_softprune.search.look_ups import SLACK, PlanLookUps
from lightning_softprune.utilities.arrays import FloatArray, IntArray

_CORRECTIONS = 60  # steps towards all budgets together


def slope(space: PlanLookUps, x: FloatArray) -> FloatArray:
    """The gradient (k,) of the sparsity at `x`, by differences wide enough to see past single channels."""
    return np.asarray(slopes_of(space, x, lambda removed: space.sparsity(removed)[:, None])[0], dtype=np.float64)


def slopes_of(space: PlanLookUps, x: FloatArray, values: Callable[[IntArray], FloatArray]) -> FloatArray:
    """The gradients (l, k) at `x` of functions of plans, (n, m) to (n, l)."""
    reach = np.maximum(0.05, 2 * space.step)
    up, down = np.minimum(x + reach, space.high), np.maximum(x - reach, space.low)
    points = np.repeat(np.asarray(x, dtype=np.float64)[None], 2 * space.size, axis=0)
    rows = np.arange(space.size)
    points[rows, rows], points[rows + space.size, rows] = up, down
    found = values(space.realise(points))
    rise = (found[: space.size] - found[space.size :]).T
    return np.asarray(rise / np.maximum(up - down, SLACK), dtype=np.float64)


def project(
    space: PlanLookUps, x: FloatArray, direction: FloatArray | None = None, *, aim: float | None = None
) -> FloatArray:
    """The vector near `x` that is on the sparsity target and within the limits; `SearchSpace.project` says how.

    Raises:
        ValueError: If `direction` has negative entries or is all zeros.
    """
    x = space.clip(x)
    if direction is None:
        direction = slope(space, x)
        if not direction.any():
            direction = np.ones(space.size)
    elif (direction < 0).any() or not direction.any():
        raise ValueError(f"direction: {direction} has negative entries, or no positive one")
    direction = direction / direction.max()
    moving = direction > 1e-9
    longest = float(((space.high - x)[moving] / direction[moving]).max())
    shortest = float(((space.low - x)[moving] / direction[moving]).min())
    aim = space.target if aim is None else aim
    found = crossing(space, lambda t: space.clip(x + t[:, None] * direction), shortest, longest, aim)
    if space.limits and not space.on_target(found):
        found = corrected(space, found)
    return found if space.on_target(found) else repaired(space, found)


def corrected(space: PlanLookUps, x: FloatArray) -> FloatArray:
    """The vector near `x` that meets the target and the limits, or the nearest to that on the way."""
    if space.shares is None:
        raise RuntimeError("limits without shares")
    shares = space.shares

    def all_values(removed: IntArray) -> FloatArray:  # columns: sparsity, then what is gone of each limited cost
        return np.concatenate((space.sparsity(removed)[:, None], 1.0 - shares(removed)), axis=1)

    least = np.array([space.floor, *(1.0 - limit for limit in space.limits)])
    most = np.array([space.target + space.tolerance, *(math.inf for _ in space.limits)])
    best, nearest = x, math.inf
    for _ in range(_CORRECTIONS):
        values = all_values(space.realise(x[None]))[0]
        lacking = np.maximum(least - values, 0.0) - np.maximum(values - most, 0.0)
        miss = float(np.abs(lacking).sum())
        if miss < nearest:
            best, nearest = x, miss
        if miss <= SLACK:
            break
        slopes = slopes_of(space, x, all_values)
        for gap, slope in zip(lacking, slopes, strict=True):
            free = (x < space.high) if gap > 0 else (x > space.low)
            direction = np.where(free, slope, 0.0)
            length = float(direction @ direction)
            if abs(gap) > SLACK and length > 0:
                x = space.clip(x + 1.2 * gap / length * direction)
    return best


def scale(space: PlanLookUps, x: FloatArray) -> FloatArray:
    """The multiple of `x`, clipped to the bounds, that is on the target; `SearchSpace.scale` says more."""
    x = np.maximum(np.asarray(x, dtype=np.float64), 0.0)
    x = x / x.max() if x.max() > 0 else np.ones(space.size)
    x = np.where(x > 0, np.maximum(x, 1e-6), 0.0)
    longest = 1.0 / float(x[x > 0].min())
    found = crossing(space, lambda t: space.clip(t[:, None] * x), 0.0, longest, space.target)
    return found if space.on_target(found) else project(space, found)


def nearest_point(space: PlanLookUps) -> FloatArray:
    """The vector (k,) within the limits whose sparsity is nearest to the target."""
    (lowest, highest), overrun = space.measure(np.stack((space.low, space.high)))
    if lowest >= space.target and overrun[0] == 0:
        return np.array(space.low, dtype=np.float64)
    if highest <= space.target:
        return np.array(space.high, dtype=np.float64)
    if space.table is not None:
        points, values, over = space.table
        return np.array(points[np.lexsort((space.misses(values), over))[0]], dtype=np.float64)
    rng = np.random.default_rng(0)
    starts = [space.low, space.high, *rng.uniform(space.low, space.high, (16, space.size))]
    best, least = space.high, (math.inf, math.inf)
    for start in [scale(space, np.ones(space.size)), *starts]:
        near = project(space, start)
        for point in (near, polished(space, near, tolerance=0.0), within_limits(space, start)):
            sparsities, over = space.measure(point[None])
            gap = (float(over[0]), float(space.misses(sparsities)[0]))
            if gap < least:
                best, least = point, gap
        if least < (0.0, 1e-4):  # finer than any tolerance in use
            break
    return best


def within_limits(space: PlanLookUps, x: FloatArray) -> FloatArray:
    """A plan within the limits, whatever its sparsity, as near to the target as a straight way down leads."""
    if not space.limits:
        return x
    whole = replace(space, tolerance=1.0)
    start = project(whole, x)
    if not whole.on_target(start):
        return start
    # From there towards the target, as long as the limits hold.
    end = project(space, start)
    path = start + np.linspace(0, 1, 257)[:, None] * (end - start)
    held = np.flatnonzero(space.overrun(space.realise(path)) == 0)
    return np.array(path[held[-1]], dtype=np.float64)


def reaches_target(space: PlanLookUps) -> bool:
    """Whether a plan on the target was found; exact up to `EXACT_PLANS` plans."""
    if space.table is not None:
        _, values, overrun = space.table
        return bool((space.within(values) & (overrun == 0)).any())
    rng = np.random.default_rng(0)
    starts = [
        scale(space, np.ones(space.size)),
        space.low,
        space.high,
        *rng.uniform(space.low, space.high, (4, space.size)),
    ]
    return any(space.on_target(project(space, start)) for start in starts)


def nearest(space: PlanLookUps) -> float:
    """The reachable sparsity nearest to the target (see `nearest_point`)."""
    return space.sparsity_of(nearest_point(space))


def least_share(space: PlanLookUps, number: int) -> float:
    """The smallest value of one limit with which a plan meets the target and the other limits; inf for none.

    Exact up to `EXACT_PLANS` plans, else the smallest that was found.
    """

    def relaxed(limit: float) -> PlanLookUps:
        limits = (*space.limits[:number], limit, *space.limits[number + 1 :])
        return replace(space, limits=limits)

    if space.shares is None:
        raise ValueError(f"number: {number} is not that of a limit; there are none")
    if space.table is not None:
        points = space.table[0][relaxed(math.inf).feasible(space.table[0])]
        return float(space.shares(space.realise(points))[:, number].min()) if len(points) else math.inf
    found, least, most = math.inf, 0.0, 1.0
    starts = [np.full(space.size, 0.5), space.low, space.high]
    for _ in range(10):
        at = relaxed(most if math.isinf(found) else (least + most) / 2)
        points = np.stack([project(at, start) for start in starts])
        points = points[at.feasible(points)]
        if len(points):
            starts = [*starts[:3], points[0]]
            found = most = float(space.shares(space.realise(points))[:, number].min())
        elif math.isinf(found):
            break
        else:
            least = at.limits[number]
    return found


def crossing(
    space: PlanLookUps, path: Callable[[FloatArray], FloatArray], begin: float, end: float, aim: float
) -> FloatArray:
    """Where the sparsity along a monotone path passes `aim`: the better of the two sides of the step."""
    sides = np.array([begin, end])
    finest = float(space.step.min()) / 64
    for _ in range(6):  # 64 intervals each
        places = np.linspace(sides[0], sides[1], 65)
        above = int(np.searchsorted(space.sparsities(path(places)), aim - SLACK))
        sides = places[[max(above - 1, 0), min(above, 64)]]
        ends = path(sides)
        if above in (0, 65) or np.abs(ends[1] - ends[0]).max() < finest:
            break
    points = path(sides)
    values = space.sparsities(points)
    order = np.lexsort((np.abs(values - aim), ~space.within(values)))
    return np.array(points[order[0]], dtype=np.float64)


def repaired(space: PlanLookUps, x: FloatArray) -> FloatArray:
    """A plan near `x` that is on target, else the nearest found."""
    near = polished(space, x, space.tolerance)
    if space.on_target(near):
        return near
    if space.table is not None:
        points, values, overrun = space.table
    else:
        rng = np.random.default_rng(0)  # a fixed neighbourhood: projection is a function
        offsets = rng.integers(-3, 4, (4096, space.size)) * (rng.random((4096, space.size)) < 4 / space.size)
        points = np.concatenate((near[None], space.at(np.maximum(space.indices(x) + offsets, 0))))
        values, overrun = space.measure(points)
    excess = space.excess(values, overrun, space.tolerance)
    nearest = np.lexsort((((points - x) ** 2).sum(axis=1), excess))[0]
    return np.array(points[nearest], dtype=np.float64)


def polished(space: PlanLookUps, x: FloatArray, tolerance: float) -> FloatArray:
    """Single channels and exchanges between two groups, as long as they bring the plan nearer to the target."""
    current, gap = x, float(space.excess(*space.measure(x[None]), tolerance)[0])
    for _ in range(64):
        if gap == 0:
            break
        points = space.neighbours(current)
        gaps = space.excess(*space.measure(points), tolerance)
        best = int(np.lexsort((((points - x) ** 2).sum(axis=1), gaps))[0])
        if gaps[best] >= gap - SLACK:
            break
        current, gap = points[best], float(gaps[best])
    return np.array(current, dtype=np.float64)


def settle(space: PlanLookUps, x: FloatArray) -> IntArray:
    """Indices into `levels` of a plan near `x`, on target wherever one is found."""
    point = space.at(space.indices(x)[None])[0]
    return space.indices(point if space.on_target(point) else repaired(space, point))
