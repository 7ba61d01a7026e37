from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from lightning_softprune.search import (
    GradientSearch,
    GridSearch,
    SensitivityCurve,
    SensitivitySearch,
    StopReason,
    best_combinations,
    modelled_increases,
    run_search,
)
from lightning_softprune.search.strategies import gradient as gradient_module
from lightning_softprune.search.strategies.gradient import constrained_step, diagonal_curvature, least_squares_gradient
from support.networks import AUTOENCODER, CASES, LOSSES, coupled, mlp_space, plan_loss, steep


def best_on_target(space, cache):
    return min(v for plan, v in cache.items() if space.within(space.sparsity(np.array([plan])))[0])


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(LOSSES))
@pytest.mark.parametrize("case", list(CASES))
def test_it_comes_within_one_percent_of_the_grid_with_a_tenth_of_its_evaluations(case, shape):
    widths, weights = CASES[case]
    levels = {3: 41, 4: 13, 5: 8}[len(weights)]
    space = mlp_space(widths)
    loss = plan_loss(space, LOSSES[shape](weights))
    grid, found = {}, {}
    exhaustive = run_search(GridSearch(levels), space, loss, seed=0, cache=grid)
    search = GradientSearch(max_evaluations=exhaustive.evaluations // 10)
    outcome = run_search(search, space, loss, seed=0, cache=found)
    assert outcome.evaluations <= exhaustive.evaluations / 10
    assert best_on_target(space, found) <= 1.01 * min(grid.values())


@pytest.mark.parametrize("difference", ["central", "forward", "spsa"])
def test_every_iterate_and_probe_is_on_target(difference):
    space = mlp_space(AUTOENCODER)
    asked = []
    search = GradientSearch(difference=difference, start="uniform")
    loss = plan_loss(space, steep([1, 1, 3, 1, 1]))
    run_search(search, space, loss, seed=0, on_asked=lambda x, *_: asked.append(x))
    assert len(asked) > 10
    assert all(space.on_target(x) for x in asked)


@pytest.mark.parametrize(("difference", "per_step"), [("central", 10), ("forward", 5), ("spsa", 2)])
def test_a_step_costs_what_its_difference_says(difference, per_step):
    space = mlp_space(AUTOENCODER)
    search = GradientSearch(difference=difference, start="uniform", steps=4)
    outcome = run_search(search, space, plan_loss(space, steep([1, 1, 3, 1, 1])), seed=0)
    trials = 1 if difference == "spsa" else 1 + 3 * 4  # the start; and up to three trials of a step
    assert 4 * per_step - 5 <= outcome.asked <= 4 * per_step + trials + 1


def test_auto_is_spsa_beyond_sixteen_coefficients():
    loss = lambda x: float(x @ x)  # noqa: E731
    for k, evaluations in ((16, range(30, 40)), (17, range(3, 5))):
        space = mlp_space([32] * (k + 2), target=0.5)
        assert run_search(GradientSearch(start="uniform", steps=1), space, loss, seed=0).asked in evaluations


def test_probes_are_never_below_a_channel():
    space = mlp_space([32, 8, 10, 8], target=0.5, tolerance=0.1)
    plans = []
    run_search(GradientSearch(start="uniform", probe=0.001), space, lambda x: float(x @ x), seed=0,
               on_asked=lambda x, *_: plans.append(space.key(x)))  # fmt: skip
    assert len(set(plans)) > 2


def test_patience_ends_a_search_that_does_not_improve():
    space = mlp_space(AUTOENCODER)
    rng = np.random.default_rng(0)
    losses = iter([0.0, *rng.uniform(1, 2, 10_000)])  # the start is never beaten
    search = GradientSearch(start="uniform", patience=2)
    outcome = run_search(search, space, lambda x: next(losses), seed=0)
    assert outcome.stop_reason == "patience"
    assert outcome.evaluations <= 1 + 2 * (10 + 3)


def test_it_moves_on_when_half_of_the_plans_have_no_usable_loss():
    space = mlp_space(AUTOENCODER)
    loss = plan_loss(space, steep([1, 1, 3, 1, 1]))
    cache = {}
    search = GradientSearch(start="uniform")
    run_search(search, space, lambda x: math.nan if x[1] > x[3] else loss(x), seed=0, cache=cache)
    first = next(iter(cache.values()))
    usable = {plan: value for plan, value in cache.items() if np.isfinite(value)}
    assert best_on_target(space, usable) < 0.95 * first


def test_where_the_low_edge_of_the_tolerance_is_unusable_it_starts_at_the_target():
    space = mlp_space(AUTOENCODER)
    loss = plan_loss(space, steep([1, 1, 3, 1, 1]))
    cache = {}

    def evaluate(x):
        return loss(x) if space.sparsity_of(x) >= 0.695 else math.nan

    run_search(GradientSearch(start="uniform"), space, evaluate, seed=0, cache=cache)
    assert np.isfinite(list(cache.values())).sum() > 20


def test_a_search_without_one_usable_loss_says_so():
    space = mlp_space(AUTOENCODER)
    outcome = run_search(GradientSearch(), space, lambda x: math.nan, seed=0)
    assert outcome.stop_reason == "no usable loss"


def test_the_sensitivity_start_takes_at_most_half_of_the_budget():
    space = mlp_space(AUTOENCODER)
    search = GradientSearch(max_evaluations=20)
    asked = []
    run_search(search, space, plan_loss(space, steep([1, 1, 3, 1, 1])), seed=0, on_asked=lambda x, *_: asked.append(x))
    assert 5 < sum(len(curve.losses) - 1 for curve in search.sensitivity) < 10
    assert all(space.on_target(x) for x in asked[10:])


@pytest.mark.parametrize("k", [4, 8, 16, 20])
def test_by_default_steps_take_no_more_evaluations_than_the_start(k):
    space = mlp_space([100, *([64, 128, 96, 48] * (k // 4)), 10])
    outcome = run_search(GradientSearch(), space, plan_loss(space, coupled([1.0] * k)), seed=0)
    assert outcome.evaluations <= 6 * k + 9


def test_steps_end_where_they_gain_little_of_what_the_start_has_lost():
    """A separable loss: the curves find its best combination, and steps can only confirm it."""
    space = mlp_space(AUTOENCODER)
    loss, cache = plan_loss(space, steep([1, 1, 3, 1, 1])), {}
    outcome = run_search(GradientSearch(), space, loss, seed=0, cache=cache)
    assert outcome.stop_reason == StopReason.PAID_OFF
    assert outcome.evaluations <= 3 * space.size + 8 + 3, "exchanges have probed the plan already"


def test_steps_have_probes_of_their_own_where_exchanges_were_still_helping():
    widths, weights = CASES["5 groups"]
    space = mlp_space(widths)
    loss, found, start = plan_loss(space, LOSSES["quadratic"](weights)), {}, {}
    outcome = run_search(GradientSearch(), space, loss, seed=0, cache=found)
    run_search(SensitivitySearch(), space, loss, seed=0, cache=start)
    assert outcome.evaluations > 3 * space.size + 8 + 3
    assert best_on_target(space, found) < 0.99 * best_on_target(space, start)


def test_one_step_alone_follows_where_the_loss_goes_as_expected_errors_do(monkeypatch):
    """Though it pays: without this the same search goes on with probes of its own."""
    weights = np.array([1.0, 4.0, 0.5, 2.0])
    plain = mlp_space([100, *[64] * 4, 10], 0.7)
    space = replace(plain, errors=lambda removed: (removed / plain.channels) ** 2 @ weights)
    pairs = np.outer(weights, weights[::-1])

    def function(r):
        return 0.1 + weights @ r**2 + 3.0 * r @ pairs @ r * (np.count_nonzero(r) > 1)

    def evaluations():
        return run_search(GradientSearch(), space, plan_loss(space, function), seed=0).evaluations

    told = evaluations()
    assert told <= 1 + 3 + 1 + 4 + 1
    monkeypatch.setattr(gradient_module, "follow_errors", lambda curves: False)
    assert evaluations() > told


def test_the_gradient_is_exact_along_the_directions_probed():
    rng = np.random.default_rng(0)
    normal, gradient = rng.uniform(0.5, 1, 4), rng.normal(size=4)
    tangent = np.linalg.qr(np.column_stack((normal, rng.normal(size=(4, 3)))))[0][:, 1:]
    moves = rng.normal(size=(8, 3)) @ tangent.T
    expected = tangent @ tangent.T @ gradient
    np.testing.assert_allclose(least_squares_gradient(moves, moves @ gradient), expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_step_solves_its_quadratic_program(seed):
    rng = np.random.default_rng(seed)
    gradient, curvature, normal = rng.normal(size=4), rng.uniform(0.5, 5, 4), rng.uniform(0, 1, 4)
    low, high = -rng.uniform(0, 0.2, 4), rng.uniform(0, 0.2, 4)
    step = constrained_step(gradient, curvature, normal, low, high)
    oracle = minimize(
        lambda d: gradient @ d + d**2 @ curvature / 2,
        np.zeros(4),
        jac=lambda d: gradient + curvature * d,
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "eq", "fun": lambda d: normal @ d, "jac": lambda d: normal},
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    assert normal @ step == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(step, oracle.x, atol=1e-5)


@pytest.mark.parametrize("shape", list(LOSSES))
def test_sixty_evaluations_from_the_uniform_plan_come_within_one_percent_of_a_long_search(shape):
    space = mlp_space(AUTOENCODER)
    loss = plan_loss(space, LOSSES[shape](CASES["5 groups"][1]))
    short, long = {}, {}
    run_search(GradientSearch(start="uniform", max_evaluations=60), space, loss, seed=0, cache=short)
    run_search(GradientSearch(steps=40), space, loss, seed=0, cache=long)
    assert best_on_target(space, short) <= 1.01 * best_on_target(space, long)


def test_the_curvature_of_a_separable_quadratic_is_found_from_pairs_of_probes():
    rng = np.random.default_rng(0)
    gradient, curvature = rng.normal(size=3), np.array([1.0, 0.0, 4.0])
    moves = rng.normal(size=(6, 3))
    differences = moves @ gradient + moves**2 @ curvature / 2
    np.testing.assert_allclose(diagonal_curvature(moves, differences, gradient), curvature, atol=1e-9)


def test_a_budget_too_small_for_curves_begins_where_errors_say():
    space, asked = mlp_space(AUTOENCODER, 0.7), []
    errors = replace(
        space, errors=lambda removed: (removed / space.channels) ** 2 @ np.array([1.0, 4.0, 9.0, 2.0, 1.0])
    )
    loss = plan_loss(space, coupled([1.0, 0.5, 3.0, 0.6, 1.5]))
    run_search(GradientSearch(max_evaluations=9), errors, loss, seed=0, on_asked=lambda x, *_: asked.append(x))
    unmeasured = [SensitivityCurve(n, (0.0,), (math.nan,), shape) for n, shape in enumerate(errors.shapes)]
    (expected,) = best_combinations(errors, unmeasured, 1, increases=modelled_increases)
    assert space.key(asked[0]) == space.key(expected)
    assert len(asked) > 1  # probes of its own follow
