"""Further budgets: a second cost that is limited, against brute force over every plan."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lightning_softprune.search import (
    GradientSearch,
    GridSearch,
    NormBaseline,
    RandomSearch,
    SensitivitySearch,
    UniformBaseline,
    run_search,
)
from support.networks import LOSSES, limited, mlp_space, plan_loss

WIDTHS = [16, 24, 32, 24, 10]
STRATEGIES = {
    "grid": GridSearch(levels=17),
    "gradient": GradientSearch(),
    "gradient-uniform": GradientSearch(start="uniform"),
    "gradient-spsa": GradientSearch(difference="spsa", start="uniform"),
    "sensitivity": SensitivitySearch(),
    "random": RandomSearch(num_candidates=30),
    "uniform": UniformBaseline(),
    "norm": NormBaseline(),
}


def all_plans(space):
    return np.array(list(itertools.product(*(range(n) for n in space.channels))))


def brute_force(space, loss):
    """The best loss of all plans that meet target and limit."""
    plans = all_plans(space)
    good = space.within(space.sparsity(plans)) & (space.shares(plans)[:, 0] <= space.limits[0])
    return min(map(loss, plans[good] / space.channels))


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("limit", [0.3, 0.4, 0.6])
def test_what_a_strategy_finds_meets_the_limit(name, limit):
    space = limited(limit)
    shares = {}

    def evaluate(x):
        removed = space.realise(x[None])
        share, sparsity = space.shares(removed)[0, 0], space.sparsity(removed)[0]
        shares[space.key(x)] = share <= limit + 1e-9 and abs(sparsity - 0.5) <= 0.02 + 1e-9
        return plan_loss(space, LOSSES["steep"]([1.0, 0.5, 2.0]))(x)

    run_search(STRATEGIES[name], space, evaluate, seed=0)
    assert any(shares.values())
    if "sensitivity" not in name and name != "gradient":  # those sweep one coefficient at a time
        assert all(shares.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "worse"), [("grid", 0.25), ("gradient", 0.02), ("sensitivity", 0.03), ("random", 0.4)]
)
@pytest.mark.parametrize("kind", ["steep", "coupled"])
@pytest.mark.parametrize("limit", [0.3, 0.45])
def test_the_best_plan_within_the_limit_is_found(name, worse, kind, limit):
    space = limited(limit)
    loss = LOSSES[kind]([1.0, 0.5, 2.0])
    found = []

    def evaluate(x):
        value = plan_loss(space, loss)(x)
        if space.on_target(x):
            found.append(value)
        return value

    run_search(STRATEGIES[name], space, evaluate, seed=0)
    assert min(found) <= brute_force(space, loss) * (1 + worse)


def test_a_limit_changes_the_answer():
    free, tight = limited(1.0), limited(0.3)
    loss = LOSSES["steep"]([1.0, 0.5, 2.0])
    assert brute_force(tight, loss) > brute_force(free, loss) * 1.05


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("widths", [WIDTHS, [64, 96, 128, 128, 64, 96, 128, 10]])
def test_projection_meets_target_and_limit_together(seed, widths):
    rng = np.random.default_rng(seed)
    space = limited(0.35, 0.5, widths)
    x = rng.uniform(0, 1, space.size)
    for found in (space.project(x), space.scale(x), space.nearest_point()):
        assert abs(space.sparsity_of(found) - 0.5) <= 0.02 + 1e-9
        assert space.shares(space.realise(found[None]))[0, 0] <= 0.35 + 1e-9


def test_a_limit_that_does_not_bind_changes_nothing():
    bare = mlp_space(WIDTHS, 0.5)
    for seed in range(10):
        x = np.random.default_rng(seed).uniform(0, 1, 3)
        np.testing.assert_array_equal(limited(1.0).project(x), bare.project(x))
        np.testing.assert_array_equal(limited(1.0).nearest_point(), bare.nearest_point())


def test_the_nearest_feasible_point_of_each_budget_is_that_of_brute_force():
    space = limited(0.1)
    plans = all_plans(space)
    sparsities, shares = space.sparsity(plans), space.shares(plans)[:, 0]
    assert not space.on_target(space.nearest_point())
    within = np.abs(sparsities - 0.5)[shares <= 0.1].min()
    assert abs(space.nearest() - 0.5) == pytest.approx(within)
    assert space.least_share(0) == pytest.approx(shares[space.within(sparsities)].min())


@pytest.mark.slow
def test_the_nearest_feasible_point_of_a_large_network_is_near_that_of_random_plans():
    widths = [64, 96, 128, 128, 64, 96, 128, 10]
    space = limited(0.12, 0.5, widths)
    assert space.num_plans > 10**9
    assert not space.on_target(space.nearest_point())
    rng = np.random.default_rng(0)
    plans = (rng.uniform(0, 1, (50_000, space.size)) ** rng.uniform(0.2, 3, (50_000, 1)) * space.channels).astype(int)
    sparsities, shares = space.sparsity(plans), space.shares(plans)[:, 0]
    assert abs(space.nearest() - 0.5) <= np.abs(sparsities - 0.5)[shares <= 0.12].min() + 0.002
    assert space.shares(space.realise(space.nearest_point()[None]))[0, 0] <= 0.12 + 1e-9
    assert space.least_share(0) <= shares[space.within(sparsities)].min() + 0.005


def test_two_limits():
    one = limited(0.4)
    space = replace(
        one,
        limits=(0.4, 0.7),
        shares=lambda removed: np.column_stack((one.shares(removed)[:, 0], 1 - removed[:, 2] / one.channels[2])),
    )
    found = space.project(np.array([0.5, 0.5, 0.0]))
    assert space.on_target(found)
    assert (space.shares(space.realise(found[None]))[0] <= [0.4, 0.7]).all()


def test_limits_without_shares_are_refused():
    with pytest.raises(ValueError, match="shares"):
        replace(mlp_space(WIDTHS), limits=(0.5,))
