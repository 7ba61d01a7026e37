from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from lightning_softprune.search import SearchSpace
from support.networks import AUTOENCODER, mlp_space


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
    seconds = []
    for _ in range(5):  # the quickest: a machine may stop for a moment, for a garbage collection or for others
        begin = time.perf_counter()
        values = space.sparsities(points)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.1
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
