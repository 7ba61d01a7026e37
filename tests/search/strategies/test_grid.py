from __future__ import annotations

import itertools

import numpy as np
import pytest

from lightning_softprune.search import GridSearch, run_search
from support.networks import mlp_space, plan_loss, steep


def test_the_grid_is_every_combination_on_target_and_its_best_is_brute_forces():
    space = mlp_space([16, 12, 20, 8, 6], target=0.6)
    loss = plan_loss(space, steep([1.0, 0.5, 2.0]))
    feasible = [x for x in map(np.array, itertools.product(np.linspace(0, 1, 11), repeat=3)) if space.on_target(x)]
    cache = {}
    outcome = run_search(GridSearch(), space, loss, seed=0, cache=cache)
    assert set(cache) == {space.key(x) for x in feasible}
    assert outcome.evaluations == outcome.asked == len(cache) > 20
    assert min(cache.values()) == min(loss(x) for x in feasible)
    assert outcome.stop_reason == "exhausted"


def test_levels_are_spaced_within_the_bounds():
    space = mlp_space([16, 64, 64, 6], target=0.5, tolerance=0.3, low=np.array([0.2, 0.0]), high=np.array([0.6, 0.8]))
    asked = []
    run_search(GridSearch(levels=5), space, lambda x: 0.0, seed=0, on_asked=lambda x, *_: asked.append(x))
    np.testing.assert_allclose(np.unique(np.array(asked)[:, 0].round(9)), np.linspace(0.2, 0.6, 5))
    assert set(np.array(asked)[:, 1].round(9)) <= set(np.linspace(0, 0.8, 5).round(9))


def test_a_grid_with_too_many_combinations_is_refused_before_any_work():
    space = mlp_space([64] * 10)
    evaluated = []
    with pytest.raises(ValueError, match=r"levels=11.*8 coefficients has 214,358,881 combinations.*max_evaluations"):
        run_search(GridSearch(), space, evaluated.append, seed=0)
    assert evaluated == []


def test_a_grid_with_too_many_combinations_on_target_is_refused_before_any_work():
    space = mlp_space([64] * 6, tolerance=0.3)
    with pytest.raises(
        ValueError, match=r"14,641 combinations|levels=17.*83,521 combinations, \d\d,\d\d\d of them on target"
    ):
        GridSearch(levels=17).check(space)
    GridSearch(levels=17, max_evaluations=10).check(space)


def test_max_evaluations_tries_a_random_part_of_a_grid_that_is_too_large():
    space = mlp_space([64] * 10)
    plans = []
    outcome = run_search(GridSearch(max_evaluations=50), space, lambda x: plans.append(x) or 0.0, seed=0)
    assert outcome.evaluations == 50
    assert all(space.on_target(x) for x in plans)
    assert (np.abs(np.array(plans) * 10 - np.rint(np.array(plans) * 10)) < 1e-9).all()


def test_a_grid_that_misses_the_target_says_so():
    space = mlp_space([64, 64, 64], target=0.437, tolerance=0.001)
    outcome = run_search(GridSearch(levels=3), space, lambda x: 0.0, seed=0)
    assert (outcome.evaluations, outcome.stop_reason) == (0, "off target")


def test_a_target_that_no_combination_is_on_is_refused_with_the_nearest():
    space = mlp_space([64, 64, 64], target=0.437, tolerance=0.01)
    sparsities = [space.sparsity_of(np.array([x])) for x in (0, 0.5, 1)]
    nearest = min(sparsities, key=lambda sparsity: abs(sparsity - 0.437))
    with pytest.raises(ValueError, match=rf"levels=3.* within 0.01 of target_sparsity=0.437, .* has {nearest:.4f}\."):
        GridSearch(levels=3).check_target(space)
    GridSearch(levels=500).check_target(space)
    GridSearch().check_target(mlp_space([64] * 10, tolerance=1e-9))  # more than can be gone through
