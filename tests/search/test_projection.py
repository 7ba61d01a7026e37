"""Vectors are put on the target."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from support.networks import AUTOENCODER, mlp_space


def all_plans(space):
    """Every plan of a small network with its sparsity, by brute force over removed channels."""
    plans = np.array(list(itertools.product(*(range(c) for c in space.channels))))
    return plans, space.sparsity(plans)


@pytest.mark.parametrize("rounding", ["nearest", "down"])
@pytest.mark.parametrize("seed", range(20))
def test_projection_meets_the_tolerance_on_coarse_networks_whenever_a_plan_can(seed, rounding):
    rng = np.random.default_rng(seed)
    widths = [int(w) for w in rng.integers(4, 9, 5)]
    space = mlp_space(widths, target=float(rng.uniform(0.2, 0.7)), tolerance=0.01, rounding=rounding)
    _, sparsities = all_plans(space)
    reachable = (np.abs(sparsities - space.target) <= space.tolerance).any()
    for x in rng.uniform(0, 1, (10, 3)):
        point = space.project(x)
        assert space.on_target(point) == reachable
        assert ((point >= space.low) & (point <= space.high)).all()


def test_projection_stays_near_and_is_on_target_on_a_wide_network():
    space = mlp_space(AUTOENCODER, tolerance=0.002)
    rng = np.random.default_rng(0)
    for x in rng.uniform(0.3, 0.7, (20, 5)):
        x = space.scale(x)
        moved = np.clip(x + rng.uniform(-0.03, 0.03, 5), 0, 1)
        point = space.project(moved)
        assert space.on_target(point)
        assert np.abs(point - moved).max() < 0.05


def test_projection_moves_along_the_direction_given():
    space = mlp_space(AUTOENCODER)
    x = np.full(5, 0.4)
    point = space.project(x, np.array([1.0, 0.0, 0.0, 0.0, 1.0]))
    assert space.on_target(point)
    np.testing.assert_array_equal(point[1:4], x[1:4])
    assert point[0] == pytest.approx(point[4])
    assert point[0] > 0.4


@pytest.mark.parametrize("direction", [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
def test_a_direction_the_sparsity_does_not_rise_along_is_refused(direction):
    with pytest.raises(ValueError, match=r"direction: .* has negative entries, or no positive one"):
        mlp_space([8, 8, 8, 8, 8]).project(np.zeros(3), np.array(direction))


def test_projection_comes_to_rest_at_the_sparsity_aimed_at():
    space = mlp_space(AUTOENCODER)
    for aim in (space.floor, 0.7, 0.72):
        assert space.sparsity_of(space.project(np.full(5, 0.3), aim=aim)) == pytest.approx(aim, abs=2e-3)
        assert space.on_target(space.project(np.full(5, 0.3), aim=aim))


def test_scaling_keeps_proportions_until_a_bound_is_met():
    space = mlp_space(AUTOENCODER, high=np.array([1.0, 0.3, 1.0, 1.0, 1.0]))
    x = np.array([1.0, 2.0, 1.5, 0.5, 1.0])
    scaled = space.scale(x)
    assert space.on_target(scaled)
    free = [0, 3, 4]
    np.testing.assert_allclose(scaled[free] / scaled[0], x[free] / x[0])
    assert scaled[1] == 0.3


def test_scaling_copes_with_zeros_and_with_nothing_but_zeros():
    space = mlp_space(AUTOENCODER)
    assert space.on_target(space.scale(np.zeros(5)))
    assert space.on_target(space.scale(np.array([0.0, 0.0, 1.0, 0.0, 0.0])))  # the bottleneck alone cannot reach it


@pytest.mark.parametrize("seed", range(10))
def test_the_nearest_reachable_sparsity_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    widths = [int(w) for w in rng.integers(3, 9, 5)]
    space = mlp_space(widths, target=float(rng.uniform(0, 1)), tolerance=0.0)
    _, sparsities = all_plans(space)
    best = np.abs(sparsities - space.target).min()
    assert abs(space.nearest() - space.target) == pytest.approx(best, abs=1e-12)
    assert space.sparsity_of(space.nearest_point()) == space.nearest()


def test_the_nearest_sparsity_of_a_target_out_of_reach_is_the_end_of_the_range():
    space = mlp_space(AUTOENCODER, target=0.9, high=np.full(5, 0.5))
    assert space.nearest() == space.sparsity_of(space.high) < 0.9
    space = mlp_space(AUTOENCODER, target=0.1, low=np.full(5, 0.5))
    assert space.nearest() == space.sparsity_of(space.low) > 0.1


def test_the_nearest_sparsity_of_a_network_too_wide_to_enumerate_is_close():
    space = mlp_space(AUTOENCODER, tolerance=1e-6)
    assert space.nearest() == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_from_the_target_up_only_plans_that_reach_it_are_on_it(seed):
    rng = np.random.default_rng(seed)
    widths = [int(w) for w in rng.integers(4, 9, 5)]
    space = mlp_space(widths, target=float(rng.uniform(0.2, 0.7)), tolerance=0.02)
    _, sparsities = all_plans(space)
    reachable = ((sparsities >= space.target) & (sparsities <= space.target + space.tolerance)).any()
    upper = space.at_least_target()
    assert upper.from_target == reachable
    for x in rng.uniform(0, 1, (5, 3)) if reachable else ():
        for point in (upper.project(x), upper.scale(x), upper.nearest_point()):
            assert space.target <= space.sparsity_of(point) <= space.target + space.tolerance
