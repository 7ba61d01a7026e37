"""The highest sparsity that meets a constraint, against brute force over every plan."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lightning_softprune.search import (
    GradientSearch,
    GridSearch,
    MaxSparsitySearch,
    RandomSearch,
    SensitivitySearch,
    UniformBaseline,
)
from support.networks import LOSSES, limited, mlp_space

WIDTHS = [16, 24, 32, 24, 10]
STRATEGIES = {
    "sensitivity": (SensitivitySearch(), 0.02),
    "gradient": (GradientSearch(), 0.02),
    "random": (RandomSearch(num_candidates=20), 0.12),
}


class Record:
    """Evaluates a loss that must not exceed a bound, and keeps what a round would keep."""

    def __init__(self, space, loss, bound):
        self.space, self.loss, self.bound, self.seen = space, loss, bound, []

    def __call__(self, x):
        removed = self.space.realise(x[None])
        loss = self.loss(removed[0] / self.space.channels)
        within = self.space.overrun(removed)[0] == 0
        self.seen.append((float(self.space.sparsity(removed)[0]), loss, bool(within)))
        return loss

    def highest_feasible_sparsity(self):
        return max((s for s, loss, within in self.seen if within and loss <= self.bound), default=-math.inf)

    def least_violation_at(self, sparsity):
        return min((max(loss - self.bound, 0) for s, loss, within in self.seen if within and s >= sparsity), default=9)

    def begin(self, space):
        pass

    def run(self, strategy):
        return MaxSparsitySearch(strategy, self.space, self, self, seed=0, cache={}).run()


def brute_force(space, loss, bound):
    plans = np.array(list(itertools.product(*(range(n) for n in space.channels))))
    plans = plans[space.overrun(plans) == 0]
    good = np.array([loss(plan) <= bound for plan in plans / space.channels])
    return float(space.sparsity(plans[good]).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["steep", "coupled", "quadratic"])
@pytest.mark.parametrize("bound", [0.2, 0.5, 1.5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_it_comes_within_the_tolerance_of_the_highest_sparsity(name, kind, bound):
    space, loss = mlp_space(WIDTHS), LOSSES[kind]([1.0, 0.5, 2.0])
    record = Record(space, loss, bound)
    strategy, short = STRATEGIES[name]
    outcome = record.run(strategy)
    assert outcome.evaluations == len(record.seen)
    assert outcome.stop_reason == "highest"
    assert brute_force(space, loss, bound) - record.highest_feasible_sparsity() <= short


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_gaps_of_a_coarse_grid_are_crossed(levels):
    space = mlp_space([16, 24, 10])
    record = Record(space, lambda removed: 0.0, 1.0)
    record.run(GridSearch(levels=levels))
    assert record.highest_feasible_sparsity() == space.sparsity_of(space.high)


def test_within_a_limit():
    space, loss = limited(0.4), LOSSES["steep"]([1.0, 0.5, 2.0])
    record = Record(space, loss, 1.5)
    record.run(SensitivitySearch())
    assert brute_force(space, loss, 1.5) - record.highest_feasible_sparsity() <= 0.03


def test_evaluations_are_few():
    for strategy, most in ((UniformBaseline(), 12), (SensitivitySearch(), 31 + 25), (GradientSearch(), 31 + 50)):
        record = Record(mlp_space(WIDTHS), LOSSES["coupled"]([1.0, 0.5, 2.0]), 0.5)
        assert record.run(strategy).evaluations <= most, strategy


def test_nothing_meets_the_constraint():
    record = Record(mlp_space(WIDTHS), LOSSES["steep"]([1.0, 0.5, 2.0]), -1.0)
    outcome = record.run(SensitivitySearch())
    assert record.highest_feasible_sparsity() == -math.inf
    assert outcome.evaluations <= 60


def test_everything_meets_the_constraint():
    space = mlp_space(WIDTHS)
    record = Record(space, lambda r: float(r.sum()), 99.0)
    record.run(SensitivitySearch())
    assert record.highest_feasible_sparsity() == pytest.approx(space.sparsity_of(space.high), abs=0.02)


@pytest.mark.parametrize("limit", [1, 10, 30, 35])
def test_the_budget_is_kept(limit):
    record = Record(mlp_space(WIDTHS), LOSSES["steep"]([1.0, 0.5, 2.0]), 0.5)
    outcome = record.run(GradientSearch(max_evaluations=limit))
    assert outcome.evaluations == len(record.seen) == limit
    assert outcome.stop_reason == "max_evaluations"


def test_plans_that_lie_far_apart():
    space = mlp_space([4, 3, 2, 4])
    loss = LOSSES["quadratic"]([1.0, 0.5])
    for bound in np.linspace(0.1, 0.9, 9):
        record = Record(space, loss, bound)
        record.run(SensitivitySearch())
        assert record.highest_feasible_sparsity() == pytest.approx(brute_force(space, loss, bound))
