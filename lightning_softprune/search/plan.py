"""Plans: which channels of which group are kept, in numbers only.

A group here is nothing but a number of channels and a ranking (the order in which its channels go). A coefficient
becomes a whole number of removed channels (rounding, bounds, ``round_to``, at least one channel stays); the ranking
then says which ones. Plans of the same rankings are nested: a larger coefficient removes a superset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_softprune.utilities.arrays import FloatArray, IntArray

_EPS = 1e-9


@dataclass(frozen=True)
class Plan:
    """The channels that each group loses: ``removed[g]`` holds sorted channel numbers of group ``g``."""

    removed: tuple[tuple[int, ...], ...]

    @classmethod
    def from_counts(cls, counts: Sequence[int], rankings: Sequence[IntArray]) -> Plan:
        """Remove the first ``counts[g]`` channels of each ranking.

        >>> Plan.from_counts([2, 0], [np.array([3, 0, 1, 2]), np.array([0, 1])]).removed
        ((0, 3), ())
        """
        return cls(tuple(tuple(sorted(int(c) for c in r[:n])) for n, r in zip(counts, rankings, strict=True)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of channels removed from each group."""
        return tuple(len(removed) for removed in self.removed)

    def is_empty(self) -> bool:
        """Whether the plan leaves everything as it is."""
        return not any(self.removed)


@dataclass(frozen=True)
class Rounding:
    """From soft coefficients to whole numbers of removed channels.

    Attributes:
        channels: Channels of each group, shape ``(m,)``.
        low: Smallest coefficient of each group, shape ``(m,)``.
        high: Largest coefficient of each group, shape ``(m,)``.
        round_to: Kept channels are a multiple of it, unless the group is left whole.
        stay: How many channels of each group have to stay, shape ``(m,)``; ``None``: one.
        steps: Kept channels are a multiple of this too, shape ``(m,)``; ``None``: of one.
    """

    channels: IntArray
    low: FloatArray
    high: FloatArray
    round_to: int = 1
    stay: IntArray | None = None
    steps: IntArray | None = None

    @property
    def step(self) -> IntArray:
        """What the kept channels of each group are a multiple of, shape ``(m,)``."""
        return np.lcm(self.round_to, np.ones_like(self.channels) if self.steps is None else self.steps)

    def counts(self, coefficients: FloatArray) -> IntArray:
        """Round to removed channels: the nearest allowed number, and never the whole group.

        Args:
            coefficients: Values in [0, 1], shape ``(n, m)`` or ``(m,)``.

        Returns:
            Removed channels, of the same shape.

        >>> rounding = Rounding(np.array([8, 10]), np.zeros(2), np.ones(2), round_to=4)
        >>> rounding.counts(np.array([[0.0, 0.3], [0.45, 1.0]]))
        array([[0, 2],
               [4, 6]])
        """
        n = self.channels
        least = np.ceil(np.minimum(self.low, self.high) * n - _EPS).astype(np.int64)
        most = np.minimum(np.floor(self.high * n + _EPS).astype(np.int64), n - (1 if self.stay is None else self.stay))
        wanted = np.clip(np.floor(np.asarray(coefficients) * n + 0.5).astype(np.int64), 0, n - 1)
        step = self.step
        if (step == 1).all():
            return np.clip(wanted, np.minimum(least, most), most)
        fewest = np.maximum(-(-(n - most) // step), 1) * step  # smallest multiple that the upper bound allows
        largest = np.maximum((n - least) // step * step, fewest)
        kept = np.clip(np.floor((n - wanted) / step + 0.5).astype(np.int64) * step, fewest, largest)
        removed = n - kept
        whole = (removed <= 0) | ((least == 0) & (wanted < np.abs(removed - wanted)))
        return np.where(whole, 0, removed)

    def soft(self, coefficients: FloatArray, counts: IntArray) -> FloatArray:
        """Return the coefficients as they may be reported: at most one channel away from what was removed."""
        return np.clip(coefficients, (counts - 1) / self.channels, (counts + 1) / self.channels).clip(0.0, 1.0)
