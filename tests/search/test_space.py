from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from lightning_softprune.search import SearchSpace
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


def test_levels_are_one_value_per_plan_and_stand_for_whole_steps():
    space = mlp_space([8, 5, 3, 8])
    np.testing.assert_allclose(space.levels[0], np.arange(5) / 5)
    np.testing.assert_allclose(space.levels[1], np.arange(3) / 3)
    assert space.num_plans == 15
    assert {space.key(x) for x in space.table[0]} == set(itertools.product(range(5), range(3)))


def test_levels_follow_the_smallest_removable_step():
    hidden = np.array([16, 16])
    space = SearchSpace(
        low=np.zeros(2),
        high=np.ones(2),
        channels=hidden,
        realise=lambda x: np.minimum(4 * np.rint(x * hidden / 4), 12).astype(np.int64),
        sparsity=lambda removed: 1 - ((hidden - removed) / hidden).prod(axis=1),
        target=0.4,
        tolerance=0.05,
        norms=np.ones(2),
        unit=np.array([4, 4]),
    )
    np.testing.assert_allclose(space.levels[0], [0.0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(space.step, 0.25)
    assert space.key(space.project(np.array([0.3, 0.3]))) in {(4, 4)}


def test_one_coefficient_may_drive_several_groups():
    widths = np.array([12, 7, 16])
    owner = [0, 0, 1]
    space = SearchSpace(
        low=np.zeros(2),
        high=np.ones(2),
        channels=np.array([19, 16]),
        realise=lambda x: np.minimum(np.rint(x[:, owner] * widths), widths - 1).astype(np.int64),
        sparsity=lambda removed: 1 - ((widths - removed) / widths).prod(axis=1),
        target=0.6,
        tolerance=0.01,
        norms=np.ones(2),
    )
    assert len(space.key(np.array([0.5, 0.5]))) == 3
    assert space.on_target(space.project(np.array([0.2, 0.1])))
    x = np.array([0.42, 0.3])
    assert space.key(space.snap(x)) == space.key(x)


@pytest.mark.parametrize("rounding", ["nearest", "down"])
def test_snapping_keeps_the_plan_and_moves_less_than_a_channel(rounding):
    space = mlp_space([64, 48, 7, 33, 10], rounding=rounding)
    for x in np.random.default_rng(0).uniform(0, 1, (200, 3)):
        snapped = space.snap(x)
        assert space.key(snapped) == space.key(x)
        assert (np.abs(snapped - x) <= space.step + 1e-9).all()
        np.testing.assert_allclose(snapped, np.array(space.key(x)) / space.channels)


def test_thousands_of_points_cost_milliseconds():
    space = mlp_space(AUTOENCODER)
    points = np.random.default_rng(0).uniform(0, 1, (5000, 5))
    space.sparsities(points)
    begin = time.perf_counter()
    values = space.sparsities(points)
    assert time.perf_counter() - begin < 0.1
    assert values.shape == (5000,)
    assert values[7] == space.sparsity_of(points[7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": np.array([0.5, 0.6])}, "are not 0 <= low <= high <= 1"),
        ({"channels": np.array([8])}, r"channels: shape \(1,\) is not one entry per coefficient, \(2,\)"),
        ({"channels": np.array([8, 0])}, r"channels: \[8 0\] are not positive"),
        ({"unit": np.array([1, 0])}, r"unit: \[1 0\] are not positive"),
        ({"target": 1.5}, r"target: 1.5 is not in \[0, 1\]"),
        ({"tolerance": -0.1}, "tolerance: -0.1 is negative"),
    ],
)
def test_numbers_that_make_no_space_are_named(change, message):
    arguments = {
        "low": np.zeros(2),
        "high": np.full(2, 0.55),
        "channels": np.array([8, 8]),
        "realise": lambda x: x,
        "sparsity": lambda x: x,
        "target": 0.5,
        "tolerance": 0.02,
        "norms": np.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        SearchSpace(**(arguments | change))
