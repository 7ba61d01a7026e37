"""From the user's words to the search's numbers: bounds, rounding and the space a strategy searches.

A soft coefficient belongs to one pruning group, or to all groups inside one component. Here its bounds are found by
name, and the costs of plans are bound to a target and to limits, so that everything below this module is arithmetic.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lightning_softprune.search.plan import Plan, Rounding
from lightning_softprune.search.space import SearchSpace
from lightning_softprune.utilities.arrays import FloatArray, IntArray
from lightning_softprune.utilities.names import no_match


class Named(Protocol):
    """What this module has to know of a pruning group."""

    @property
    def name(self) -> str:
        """Its unique name."""
        ...

    @property
    def component(self) -> str:
        """The component it lies in."""
        ...

    @property
    def kind(self) -> str:
        """``intra`` or ``inter``."""
        ...

    @property
    def num_channels(self) -> int:
        """Channels that can be removed."""
        ...

    @property
    def least(self) -> int:
        """How many of them have to stay."""
        ...

    @property
    def step(self) -> int:
        """What those that stay are a multiple of."""
        ...


class Counting(Protocol):
    """What this module has to know of a cost model."""

    def count(self, what: str, counts: IntArray) -> IntArray:
        """Costs, shape (n,), of the plans that remove so many channels, shape (n, m)."""
        ...


def build_rounding(groups: Sequence[Named], bounds: Mapping[str, Sequence[float]] | None, round_to: int) -> Rounding:
    """Find each group's bounds.

    Args:
        groups: The prunable groups.
        bounds: Pattern of group or component names -> ``[low, high]``. Where several match, the later one counts.
        round_to: Kept channels are a multiple of it.

    Raises:
        ValueError: A pattern matches no group and no component.
    """
    low, high = np.zeros(len(groups)), np.ones(len(groups))
    for pattern, (smallest, largest) in (bounds or {}).items():
        hits = [i for i, g in enumerate(groups) if any(fnmatch.fnmatchcase(name, pattern) for name in _names(g))]
        if not hits:
            names = list(dict.fromkeys(name for group in groups for name in _names(group)))
            raise ValueError(no_match("bounds", pattern, names, "prunable group or component"))
        low[hits], high[hits] = smallest, largest
    channels = np.array([group.num_channels for group in groups], dtype=np.int64)
    least, steps = (np.array([getattr(g, name) for g in groups], dtype=np.int64) for name in ("least", "step"))
    return Rounding(channels, low, high, round_to, least, steps)


def _names(group: Named) -> tuple[str, ...]:
    return (group.name, group.component)


@dataclass(frozen=True)
class Coefficients:
    """Which groups follow which coefficient.

    Attributes:
        names: Of the coefficients: a group's, or that of the component whose groups share it.
        owners: The coefficient that each group follows, shape ``(m,)``.
    """

    names: tuple[str, ...]
    owners: IntArray

    @classmethod
    def of(cls, groups: Sequence[Named], granularity: str) -> Coefficients:
        """Give one coefficient to each group, or to all intra groups of a component together.

        Args:
            groups: The prunable groups.
            granularity: ``"group"`` or ``"component"``; inter groups keep their own coefficient either way.
        """
        shared = granularity == "component"
        keys = [(g.component, "") if shared and g.kind == "intra" else (g.component, g.name) for g in groups]
        distinct = list(dict.fromkeys(keys))
        names = tuple(group or component for component, group in distinct)
        return cls(names, np.array([distinct.index(key) for key in keys], dtype=np.int64))

    def per_group(self, coefficients: FloatArray) -> FloatArray:
        """Each group's coefficient, shape (..., m), from the coefficients' own, shape (..., k)."""
        return np.asarray(coefficients, dtype=np.float64)[..., self.owners]


@dataclass(frozen=True)
class Realisation:
    """The one way from a vector of soft coefficients to the plan that it stands for.

    Attributes:
        coefficients: Which groups follow which coefficient.
        rounding: From the groups' coefficients to removed channels.
        rankings: The order in which each group's channels go.
    """

    coefficients: Coefficients
    rounding: Rounding
    rankings: tuple[IntArray, ...]

    def counts_of(self, x: FloatArray) -> IntArray:
        """Channels removed from each group, shape (..., m), by vectors of shape (..., k)."""
        return self.rounding.counts(self.coefficients.per_group(x))

    def plan_of(self, x: FloatArray) -> Plan:
        """The plan that one vector, shape (k,), stands for."""
        return self.plan_that_removes(self.counts_of(x))

    def plan_that_removes(self, counts: Iterable[int]) -> Plan:
        """The plan that removes so many channels from each group: those that go first."""
        return Plan.from_counts([int(count) for count in counts], self.rankings)

    def reported(self, x: FloatArray) -> tuple[float, ...]:
        """The groups' soft coefficients as they may be reported: at most one channel away from what is removed."""
        soft = self.rounding.soft(self.coefficients.per_group(x), self.counts_of(x))
        return tuple(float(coefficient) for coefficient in soft)


@dataclass(frozen=True)
class Budgets:
    """What a plan may cost.

    Attributes:
        dense: Costs of the first dense model, before any round, by name.
        target: Sparsity to reach.
        tolerance: How far from it a plan may be.
        cost: What sparsity is measured in.
        limits: Cost -> the fraction of the dense model's that may remain.
    """

    dense: Mapping[str, float]
    target: float
    tolerance: float
    cost: str = "params"
    limits: Mapping[str, float] = field(default_factory=dict)


_KEPT = 65
"""Numbers of a group's table of errors that are kept: evenly spaced ones, with straight lines between them."""


@dataclass(frozen=True)
class ExpectedErrors:
    """What the network's outputs are expected to miss, by how many channels of each group are gone.

    Attributes:
        counts: Per group, ascending numbers of removed channels, from 0 to all of them.
        errors: Per group, the fraction of the outputs' variance that is missed with each.
    """

    counts: tuple[tuple[int, ...], ...]
    errors: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, tables: Sequence[FloatArray | None], channels: IntArray, most: IntArray) -> ExpectedErrors | None:
        """Keep some of the numbers of each group; one of which nothing is known is taken to be as the others are.

        Args:
            tables: Per group, the error when 0, 1, ... of its channels are gone, or None.
            channels: Of each group.
            most: How many of them may go.

        Returns:
            None where nothing is known of more than half of the groups that may lose any.
        """
        known = [table for table in tables if table is not None]
        if 2 * len(known) < max(int(np.count_nonzero(most)), 1):
            return None
        shares = np.linspace(0.0, 1.0, _KEPT)
        usual = np.median([np.interp(shares, np.linspace(0, 1, len(table)), table) for table in known], axis=0)
        counts, errors = [], []
        for table, number in zip(tables, channels.tolist(), strict=True):
            at = np.unique((shares * number).round().astype(np.int64))
            kept = np.interp(at / number, shares, usual) if table is None else np.maximum.accumulate(table)[at]
            counts.append(tuple(at.tolist()))
            errors.append(tuple(float(f"{error:.4g}") for error in kept))
        return cls(tuple(counts), tuple(errors))

    def __call__(self, removed: IntArray) -> FloatArray:
        """The sum over the groups, shape ``(n,)``, for removed channels of shape ``(n, m)``."""
        columns = zip(np.asarray(removed).T, self.counts, self.errors, strict=True)
        return np.asarray(sum(np.interp(column, at, errors) for column, at, errors in columns), dtype=np.float64)


def build_space(
    realisation: Realisation, costs: Counting, budgets: Budgets, norms: FloatArray, errors: ExpectedErrors | None = None
) -> SearchSpace:
    """Bind the costs of plans to budgets.

    Args:
        realisation: From vectors to plans.
        costs: From removed channels to costs.
        budgets: What a plan may cost.
        norms: Mean weight norm of each group, shape ``(m,)``.
        errors: What is known of plans before any is scored.
    """
    rounding, coefficients = realisation.rounding, realisation.coefficients
    members = [np.flatnonzero(coefficients.owners == i) for i in range(len(coefficients.names))]

    def sparsity(counts: IntArray) -> FloatArray:
        return 1.0 - costs.count(budgets.cost, counts) / budgets.dense[budgets.cost]

    def shares(counts: IntArray) -> FloatArray:
        return np.stack([costs.count(name, counts) / budgets.dense[name] for name in budgets.limits], axis=1)

    return SearchSpace(
        low=np.array([rounding.low[groups].min() for groups in members]),
        high=np.array([rounding.high[groups].max() for groups in members]),
        channels=np.array([rounding.channels[groups].max() for groups in members]),
        realise=realisation.counts_of,
        sparsity=sparsity,
        target=budgets.target,
        tolerance=budgets.tolerance,
        norms=np.array([norms[groups].mean() for groups in members]),
        unit=np.array([rounding.step[groups].max() for groups in members], dtype=np.int64),
        limits=tuple(budgets.limits.values()),
        shares=shares if budgets.limits else None,
        errors=errors,
    )
