"""The baselines and random search."""

from __future__ import annotations

import numpy as np

from lightning_softprune.search import (
    NormBaseline,
    RandomSearch,
    UniformBaseline,
    run_search,
)
from support.networks import mlp_space


def test_the_uniform_baseline_is_one_coefficient_within_the_bounds():
    space = mlp_space([64, 64, 64, 64, 10], target=0.6, high=np.array([1.0, 0.2, 1.0]))
    strategy = UniformBaseline()
    strategy.start(space, 0)
    x = strategy.ask()
    assert x[1] == 0.2
    assert x[0] == x[2] > 0.2
    assert space.on_target(x)


def test_the_norm_baseline_removes_more_where_weights_are_smaller():
    space = mlp_space([256, 128, 128, 128, 10])  # norms 1, 1.5, 2
    strategy = NormBaseline()
    strategy.start(space, 0)
    x = strategy.ask()
    np.testing.assert_allclose(x[0] / x, [1.0, 1.5, 2.0])
    assert space.on_target(x)


def test_random_candidates_are_different_plans_on_target():
    space = mlp_space([64, 48, 64, 32, 10])
    asked = []
    run_search(RandomSearch(30), space, lambda x: 0.0, seed=0, on_asked=lambda x, *_: asked.append(x))
    assert len({space.key(x) for x in asked}) == len(asked) == 30
    assert all(space.on_target(x) for x in asked)
