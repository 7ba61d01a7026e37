"""The numbers of a search in plain types, so that a stored result can be asked again.

What decides which plans are possible and what they cost is arithmetic on channel counts: `StoredCosts` counts plans, as
exactly as in the round, and `SearchNumbers` builds the space that a strategy has searched, for any other target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lightning_softprune.search.coefficients import (
    Budgets,
    Coefficients,
    ExpectedErrors,
    Named,
    Realisation,
    build_rounding,
    build_space,
)
from lightning_softprune.search.look_ups import ErrorCurve
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray, IntArray

COSTS = ("params", "macs")
"""What is counted."""


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
class StoredGroup:
    """A group, as a search sees it.

    Attributes:
        name: Its unique name.
        component: The component it lies in.
        kind: ``intra`` or ``inter``.
        num_channels: Channels before the round.
        least: How many of them have to stay.
        low: Its smallest coefficient.
        high: Its largest one.
        owner: Number of the coefficient that it follows.
        step: What those that stay are a multiple of.
    """

    name: str
    component: str
    kind: str
    num_channels: int
    least: int
    low: float
    high: float
    owner: int
    step: int = 1


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"numbers: {what} do not fit the rest of what was searched")


@dataclass(frozen=True)
class SearchNumbers:
    """What a round has searched.

    Attributes:
        costs: Counts plans.
        groups: The groups.
        coefficients: Names of the coefficients: a group's, or that of the component whose groups share it.
        round_to: Kept channels are a multiple of it.
        dense: What the first dense model costs as counted: ``params`` and ``macs``.
        samples: Samples of the batch that MACs were counted on.
        errors: What was known of plans before any was scored.

    Raises:
        ValueError: The parts do not fit together; files may come from anybody.
    """

    costs: StoredCosts
    groups: tuple[StoredGroup, ...]
    coefficients: tuple[str, ...]
    round_to: int
    dense: dict[str, float]
    samples: int = 1
    errors: ExpectedErrors | None = None

    def __post_init__(self) -> None:
        number = len(self.groups)
        _require({group.owner for group in self.groups} == set(range(len(self.coefficients))), "owners of the groups")
        for group in self.groups:
            fits = 0 <= group.least <= group.num_channels and 0.0 <= group.low <= group.high <= 1.0 and group.step >= 1
            _require(fits, f"least, low, high and step of group {group.name!r}")
        for place, slot in enumerate(self.costs.slots):
            fits = len(slot.groups) == len(slot.removed) and set(slot.groups) <= set(range(number))
            _require(
                fits and all(map(self._is_table, slot.groups, slot.removed)), f"groups and removed of slot {place}"
            )
        slots = range(len(self.costs.slots))
        for term in (*self.costs.params, *self.costs.macs):
            _require({*term.slots, term.once_smaller} <= {-1, *slots} and -1 not in term.slots, "slots of the terms")
        _require(all(self.dense.get(name, -1.0) >= 0.0 for name in COSTS), "params and macs of dense")
        _require(self.round_to >= 1 and self.samples >= 1, "round_to and samples")
        if self.errors is not None:
            sizes = [[len(row) for row in table] for table in (self.errors.counts, self.errors.errors)]
            _require(sizes[0] == sizes[1] and len(sizes[0]) == number and 0 not in sizes[0], "counts and errors")

    def _is_table(self, group: int, removed: tuple[int, ...]) -> bool:
        """Whether a table says what every plan takes from a slot, as one number or as one for each count."""
        own = self.groups[group]
        return len(removed) == 1 or len(removed) > own.num_channels - own.least

    @classmethod
    def of(cls, realisation: Realisation, groups: Sequence[Named], costs: StoredCosts, **more: Any) -> SearchNumbers:
        """What a realisation and its groups say; `more` are `dense`, `samples` and `errors`."""
        rounding, coefficients = realisation.rounding, realisation.coefficients
        stored = (
            StoredGroup(
                group.name, group.component, group.kind, group.num_channels, group.least, low, high, owner, group.step
            )
            for group, low, high, owner in zip(
                groups, rounding.low.tolist(), rounding.high.tolist(), coefficients.owners.tolist(), strict=True
            )
        )
        return cls(costs, tuple(stored), coefficients.names, rounding.round_to, **more)

    def realisation(self, bounds: Mapping[str, Sequence[float]] | None = None) -> Realisation:
        """How vectors become plans, without the rankings.

        Args:
            bounds: Pattern of group or component names -> ``[low, high]``; None: as they were.

        Raises:
            ValueError: A pattern matches nothing.
        """
        rounding = build_rounding(self.groups, bounds, self.round_to)
        if bounds is None:
            low, high = (np.array([getattr(group, name) for group in self.groups]) for name in ("low", "high"))
            rounding = replace(rounding, low=low, high=high)
        owners = np.array([group.owner for group in self.groups])
        return Realisation(Coefficients(self.coefficients, owners), rounding, ())

    def space(self, realisation: Realisation, budgets: Budgets) -> SearchSpace:
        """The space of another search."""
        return build_space(realisation, self.costs, budgets, np.ones(len(self.groups)), self.errors)

    def shapes(self) -> tuple[ErrorCurve | None, ...]:
        """What is known of each coefficient before any evaluation, up to 1, counted from the lowest searched."""
        budgets = Budgets(self.dense, 1.0, 0.0)
        searched, free = self.space(self.realisation(), budgets), self.space(self.realisation({}), budgets)
        if not free.shapes:
            return (None,) * free.size
        return tuple(
            shape.counted_from(at) for shape, at in zip(free.shapes, free.indices(searched.low).tolist(), strict=True)
        )
