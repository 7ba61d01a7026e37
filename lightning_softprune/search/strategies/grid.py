"""Exhaustive search on a grid of coefficients."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator

import numpy as np

from lightning_softprune.search.base import SearchStrategy, StopReason
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray
from lightning_softprune.utilities.checks import optional_whole_number, whole_number

MAX_COMBINATIONS = 2_000_000
"""Combinations whose sparsity is looked at."""

MAX_FEASIBLE = 20_000
"""Combinations on target that are evaluated without a `max_evaluations`."""

_CHUNK = 65_536


class GridSearch(SearchStrategy):
    """Every combination of evenly spaced coefficients that is on the sparsity target.

    Which combinations are on target is decided on costs, without evaluating any. Combinations that realise as the
    same plan count once. They are evaluated in random order, so that what `max_evaluations` leaves is a fair sample.

    Args:
        levels: Coefficients per group, evenly spaced from its lowest to its highest: 0, 0.1, ..., 1 by default.
        max_evaluations: Evaluate at most this many; needed where the grid has too many.
    """

    first_tries = 8

    def __init__(self, levels: int = 11, max_evaluations: int | None = None) -> None:
        self.levels = whole_number("levels", levels, least=2)
        self.max_evaluations = optional_whole_number("max_evaluations", max_evaluations)

    def check(self, space: SearchSpace) -> None:
        """Raises ValueError when the grid is too large."""
        if self.max_evaluations is not None:
            return
        total = self._size(space)
        if total > MAX_COMBINATIONS:
            self._refuse(space, f"{total:,} combinations, more than {MAX_COMBINATIONS:,}")
        feasible = sum(int(space.feasible(points).sum()) for points in self._chunks(space))
        if feasible > MAX_FEASIBLE:
            self._refuse(space, f"{total:,} combinations, {feasible:,} of them on target, more than {MAX_FEASIBLE:,}")

    def check_target(self, space: SearchSpace) -> None:
        """Raises ValueError when the grid can be gone through and no combination is on the target."""
        if self._size(space) > MAX_COMBINATIONS:
            return
        found: list[float] = []  # the nearest of each chunk
        for points in self._chunks(space):
            sparsities, overrun = space.measure(points)
            allowed = sparsities[overrun == 0]
            if space.within(allowed).any():
                return
            found += allowed[np.argsort(abs(allowed - space.target))[:1]].tolist()
        nearest = f", the nearest has {min(found, key=lambda one: abs(one - space.target)):.4f}" if found else ""
        raise ValueError(
            f"GridSearch(levels={self.levels}) has no combination within {space.tolerance:g} of "
            f"target_sparsity={space.target:g}{' that meets the limits' if space.limits else ''}{nearest}. Use more "
            "levels, a larger tolerance, or another strategy such as GradientSearch or SensitivitySearch."
        )

    def planned_evaluations(self, space: SearchSpace) -> int | None:
        """The combinations on target, and no more than `max_evaluations`; some of them may be the same plan."""
        if self._size(space) > MAX_COMBINATIONS:
            return self.max_evaluations
        feasible = sum(int(space.feasible(points).sum()) for points in self._chunks(space))
        return feasible if self.max_evaluations is None else min(feasible, self.max_evaluations)

    def propose(self, space: SearchSpace, rng: np.random.Generator) -> Generator[FloatArray, float, str]:
        """Yields vectors whose plans all differ and are on target, in random order."""
        whole = self._size(space) <= MAX_COMBINATIONS
        wanted = None if whole else self.max_evaluations
        found: list[FloatArray] = []
        seen: set[bytes] = set()
        for points in self._chunks(space) if whole else self._draws(space, rng):
            points = points[space.feasible(points)]
            if not len(points):
                continue
            for point, plan in zip(points, space.realise(points), strict=True):
                if (key := plan.tobytes()) not in seen:
                    seen.add(key)
                    found.append(point)
            if wanted is not None and len(found) >= wanted:
                break
        for i in rng.permutation(len(found)):
            yield found[i]
        return StopReason.EXHAUSTED if found else StopReason.OFF_TARGET

    def _axes(self, space: SearchSpace) -> list[FloatArray]:
        return [np.unique(np.linspace(a, b, self.levels)) for a, b in zip(space.low, space.high, strict=True)]

    def _size(self, space: SearchSpace) -> int:
        size = 1
        for axis in self._axes(space):
            size *= len(axis)
        return size

    def _chunks(self, space: SearchSpace) -> Iterator[FloatArray]:
        """The whole grid, in order."""
        axes = self._axes(space)
        shape = tuple(len(axis) for axis in axes)
        size = self._size(space)
        for begin in range(0, size, _CHUNK):
            places = np.unravel_index(np.arange(begin, min(begin + _CHUNK, size)), shape)
            yield np.stack([axis[place] for axis, place in zip(axes, places, strict=True)], axis=1)

    def _draws(self, space: SearchSpace, rng: np.random.Generator) -> Iterator[FloatArray]:
        """Random points of a grid that is too large to go through."""
        axes = self._axes(space)
        for _ in itertools.repeat(None, MAX_COMBINATIONS // _CHUNK):
            yield np.stack([axis[rng.integers(len(axis), size=_CHUNK)] for axis in axes], axis=1)

    def _refuse(self, space: SearchSpace, why: str) -> None:
        raise ValueError(
            f"GridSearch(levels={self.levels}) on {space.size} coefficients has {why}. Use fewer levels, fewer groups "
            "(ignore, or one coefficient per component), max_evaluations to try a random part of the grid, or another "
            "strategy such as GradientSearch or SensitivitySearch."
        )
