"""The numbers of a search in plain types, so that a stored result can be asked again.

What decides which plans are possible and what they cost is arithmetic on channel counts: `StoredCosts` counts plans, as
exactly as in the round, and `SearchNumbers` builds the space that a strategy has searched, for any other target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_softprune.search.coefficients import Budgets, Coefficients, Realisation, build_space
from lightning_softprune.search.plan import Rounding
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class StoredTerm:
    """``constant`` times the sizes of slots (a slot may appear twice).

    Attributes:
        constant: The factor.
        slots: Numbers of the slots.
        once_smaller: Number of a slot: the term counts only where this one has lost something; -1: always.
    """

    constant: float
    slots: tuple[int, ...]
    once_smaller: int = -1


@dataclass(frozen=True)
class StoredSlot:
    """One side of a layer.

    Attributes:
        size: Of the dense model.
        groups: Numbers of the groups that touch it.
        removed: For each of these, the indices it takes from the slot when it loses 0, 1, ... channels; one number
            where every channel takes as many.
    """

    size: int
    groups: tuple[int, ...]
    removed: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class StoredCosts:
    """Counts parameters and MACs of plans of fixed rankings.

    Attributes:
        slots: All slots that groups touch.
        params: Terms of the parameter count.
        macs: Terms of the MAC count.
    """

    slots: tuple[StoredSlot, ...]
    params: tuple[StoredTerm, ...]
    macs: tuple[StoredTerm, ...]

    @cached_property
    def _tables(self) -> list[list[tuple[int, int | IntArray]]]:
        return [
            [
                (group, table[0] if len(table) == 1 else np.array(table, dtype=np.int64))
                for group, table in zip(slot.groups, slot.removed, strict=True)
            ]
            for slot in self.slots
        ]

    def count(self, what: str, counts: IntArray) -> IntArray:
        """Count plans.

        Args:
            what: ``"params"`` or ``"macs"``.
            counts: Channels removed from each group, shape ``(n, m)``.

        Returns:
            Exact counts, shape ``(n,)``.
        """
        counts = np.atleast_2d(np.asarray(counts, dtype=np.int64))
        kept: list[FloatArray] = []
        for slot, tables in zip(self.slots, self._tables, strict=True):
            left = np.full(len(counts), float(slot.size))
            for group, table in tables:
                left -= counts[:, group] * table if isinstance(table, int) else table[counts[:, group]]
            kept.append(left)
        total = np.zeros(len(counts))
        for term in self.params if what == "params" else self.macs:
            product = np.full(len(counts), term.constant)
            for n in term.slots:
                product *= kept[n]
            if term.once_smaller >= 0:
                product[kept[term.once_smaller] >= self.slots[term.once_smaller].size] = 0.0
            total += product
        return np.rint(total).astype(np.int64)


def compressed(table: IntArray) -> tuple[int, ...]:
    """A table of removed indices, as one number where every channel takes as many.

    >>> compressed(np.array([0, 9, 18])), compressed(np.array([0, 1, 1]))
    ((9,), (0, 1, 1))
    """
    steps = np.diff(table)
    even = len(steps) > 0 and bool((steps == steps[0]).all())
    return (int(steps[0]),) if even else tuple(int(n) for n in table)


@dataclass(frozen=True)
class SearchNumbers:
    """What a round has searched.

    Attributes:
        costs: Counts plans.
        coefficients: Names of the coefficients: a group's, or that of the component whose groups share it.
        owners: The coefficient that each group follows.
        channels: Of each group.
        low: Smallest coefficient of each group.
        high: Largest coefficient of each group.
        round_to: Kept channels are a multiple of it.
        dense: What the first dense model costs as counted: ``params`` and ``macs``.
        samples: Samples of the batch that MACs were counted on.
    """

    costs: StoredCosts
    coefficients: tuple[str, ...]
    owners: tuple[int, ...]
    channels: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    round_to: int
    dense: dict[str, float]
    samples: int = 1

    def space(
        self, target: float, tolerance: float, cost: str, limits: Mapping[str, float]
    ) -> tuple[SearchSpace, Realisation]:
        """The space of another search.

        Args:
            target: Sparsity to reach.
            tolerance: How far from it a plan may be.
            cost: What sparsity is measured in.
            limits: Cost -> the fraction of the dense model's that may remain.

        Returns:
            The space, and how its vectors become plans.
        """
        rounding = Rounding(np.array(self.channels), np.array(self.low), np.array(self.high), self.round_to)
        realisation = Realisation(Coefficients(self.coefficients, np.array(self.owners)), rounding, ())
        budgets = Budgets(self.dense, target, tolerance, cost, limits)
        return build_space(realisation, self.costs, budgets, np.ones(len(self.low))), realisation
