from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_softprune.search import (
    SensitivityCurve,
    SensitivitySearch,
    best_combinations,
    carried_over,
    run_search,
)
from lightning_softprune.search import separable as separable_module
from lightning_softprune.search.curves import explain, follow_errors, modelled_increases
from lightning_softprune.search.look_ups import ErrorCurve
from lightning_softprune.search.separable import envelope, increases
from support.networks import CASES, coupled, mlp_space, plan_loss, quadratic, steep


def random_curves(space, rng, levels=5):
    curves = []
    for i in range(space.size):
        losses = 1 + np.concatenate(([0.0], np.cumsum(rng.exponential(size=levels) ** 2)))
        curves.append(SensitivityCurve(i, tuple(np.linspace(0, 1, levels + 1)), tuple(losses)))
    return curves


def model(space, curves, x):
    """The separable objective, written out without the package."""
    return sum(
        np.interp(v, c.coefficients, np.maximum.accumulate(c.losses)) - c.losses[0]
        for v, c in zip(x, curves, strict=True)
    )


def brute_force(space, curves):
    values = [np.arange(c) / c for c in space.channels]
    points = np.array(list(itertools.product(*values)))
    points = points[space.within(space.sparsities(points))]
    return sorted(model(space, curves, x) for x in points)


@pytest.mark.parametrize("seed", range(8))
def test_the_combination_equals_brute_force_on_small_networks(seed):
    rng = np.random.default_rng(seed)
    space = mlp_space([8, 6, 9, 7, 5], target=0.5, tolerance=0.03)
    curves = random_curves(space, rng)
    expected = brute_force(space, curves)
    found = best_combinations(space, curves, 3)
    np.testing.assert_allclose([model(space, curves, x) for x in found], expected[:3], atol=1e-4)
    assert all(space.on_target(x) for x in found)


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_with_exchanges_comes_within_two_percent_of_brute_force(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    space = mlp_space([32, 24, 30, 20, 16], target=0.6, tolerance=0.02)
    curves = random_curves(space, rng)
    expected = brute_force(space, curves)[0]
    monkeypatch.setattr(
        separable_module, "EXACT_COMBINATIONS", 0
    )  # neither the plans nor the sweep's grid gone through
    found = best_combinations(space, curves, 1)[0]
    assert space.on_target(found)
    assert model(space, curves, found) <= 1.02 * expected


def test_further_combinations_are_kept_apart_and_best_first():
    space = mlp_space([32, 24, 30, 20, 16], target=0.6)
    curves = random_curves(space, np.random.default_rng(0))
    found = best_combinations(space, curves, 3, separation=0.05)
    assert len(found) == 3
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(found, 2)) > 0.05
    heights = [model(space, curves, x) for x in found]
    assert heights == sorted(heights)


def test_the_envelope_never_falls_and_is_infinite_from_the_first_nan_on():
    np.testing.assert_array_equal(envelope([1.0, 0.5, 2.0, math.nan, 3.0]), [1.0, 1.0, 2.0, math.inf, math.inf])


def test_values_beyond_the_last_usable_point_cost_more_than_anything_measured():
    broken = SensitivityCurve(0, (0.0, 0.5, 1.0), (1.0, 2.0, math.nan))
    sound = SensitivityCurve(1, (0.0, 0.5, 1.0), (1.0, 5.0, 9.0))
    first, second = increases([broken, sound], [np.array([0.0, 0.5, 0.75, 1.0])] * 2)
    np.testing.assert_allclose(first[:2], [0.0, 1.0], atol=1e-5)
    assert first[2] > 10 * second.max()
    assert (np.diff(first) > 0).all()


def test_nan_points_keep_the_plan_away_from_them():
    space = mlp_space([64, 48, 64, 32, 10])
    loss = plan_loss(space, quadratic([0.1, 2.0, 2.0]))  # the first group is by far the cheapest
    asked = []
    search = SensitivitySearch(levels=10)
    run_search(search, space, lambda x: math.nan if x[0] > 0.55 else loss(x), seed=0,
               on_asked=lambda x, *_: asked.append(x))  # fmt: skip
    for x in asked[-search.refine :]:
        assert space.on_target(x)
        assert x[0] <= 0.5 + 1e-9


def test_without_one_usable_point_it_still_checks_plans_on_target():
    space = mlp_space([64, 48, 64, 32, 10])
    asked = []
    outcome = run_search(SensitivitySearch(), space, lambda x: math.nan, seed=0, on_asked=lambda x, *_: asked.append(x))
    assert outcome.stop_reason == "exhausted"
    assert all(space.on_target(x) for x in asked[-3:])


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_evaluations_grow_linearly_with_the_number_of_groups(k):
    space = mlp_space([100, *([64, 128, 96, 48] * (k // 4)), 10])
    cache = {}
    outcome = run_search(
        SensitivitySearch(levels=10, refine=3), space, plan_loss(space, steep([1.0] * k)), seed=0, cache=cache
    )
    assert outcome.evaluations == 1 + 10 * k + 3
    best = [v for plan, v in list(cache.items())[-3:] if space.within(space.sparsity(np.array([plan])))[0]]
    uniform = plan_loss(space, steep([1.0] * k))(space.scale(np.ones(k)))
    assert min(best) < uniform


def test_a_level_that_removes_no_further_channel_costs_nothing():
    space = mlp_space([32, 4, 32, 8], target=0.5)
    search = SensitivitySearch(levels=10, refine=1)
    outcome = run_search(search, space, plan_loss(space, quadratic([1.0, 1.0])), seed=0)
    assert outcome.asked == 1 + 3 + 10 + 1
    assert [len(curve.losses) for curve in search.sensitivity] == [11, 11]


def test_curves_are_the_losses_of_one_coefficient_at_a_time():
    space = mlp_space([32, 20, 40, 8])
    loss = plan_loss(space, quadratic([1.0, 3.0]))
    search = SensitivitySearch(levels=4)
    run_search(search, space, loss, seed=0)
    first, second = search.sensitivity
    assert (first.index, second.index) == (0, 1)
    assert first.coefficients == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert second.losses == tuple(loss(np.array([0.0, c])) for c in second.coefficients)


def test_the_model_that_is_really_separable_is_solved_to_the_best_of_all_plans():
    space = mlp_space([64, 48, 64, 32, 10])
    loss = plan_loss(space, quadratic([1.0, 0.5, 2.0]))
    cache = {}
    run_search(SensitivitySearch(levels=10), space, loss, seed=0, cache=cache)
    points, sparsities, _ = space.table
    best = min(loss(x) for x in points[space.within(sparsities)])
    assert min(v for plan, v in cache.items() if space.within(space.sparsity(np.array([plan])))[0]) <= 1.01 * best


@pytest.mark.parametrize("k", [5, 8])
def test_no_exchange_of_a_channel_improves_a_combination_on_a_wide_network(k):
    space = mlp_space([100, *([64, 128, 96, 48] * 2)[:k], 10])
    curves = random_curves(space, np.random.default_rng(0))
    found = best_combinations(space, curves, 1)[0]
    assert space.num_plans > separable_module.EXACT_COMBINATIONS
    near = space.neighbours(found)
    near = near[space.within(space.sparsities(near))]
    assert len(near) > 0
    assert min(model(space, curves, x) for x in near) >= model(space, curves, found) - 1e-4


def best_on_target(space, cache):
    return min(v for plan, v in cache.items() if space.within(space.sparsity(np.array([plan])))[0])


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_curves_of_few_points_take_at_most_three_evaluations_per_coefficient_and_eight(k):
    space = mlp_space([100, *([64, 128, 96, 48] * (k // 4)), 10])
    outcome = run_search(SensitivitySearch(), space, plan_loss(space, steep([1.0] * k)), seed=0)
    assert outcome.evaluations <= 3 * k + 8


@pytest.mark.parametrize("target", [0.5, 0.8])
@pytest.mark.parametrize("kind", [steep, coupled, quadratic])
@pytest.mark.parametrize("case", CASES)
def test_curves_of_few_points_find_what_ten_levels_find(case, kind, target):
    widths, weights = CASES[case]
    space, few, many = mlp_space(widths, target), {}, {}
    loss = plan_loss(space, kind(weights))
    run_search(SensitivitySearch(), space, loss, seed=0, cache=few)
    run_search(SensitivitySearch(levels=10), space, loss, seed=0, cache=many)
    dense = loss(space.low)
    assert best_on_target(space, few) - dense <= 1.05 * (best_on_target(space, many) - dense)


def test_what_is_known_of_the_network_is_not_measured_again():
    space = mlp_space([64, 48, 64, 32, 10])
    loss = plan_loss(space, steep([1.0, 0.5, 2.0]))
    first = SensitivitySearch()
    run_search(first, space, loss, seed=0)
    again, asked = SensitivitySearch(), []
    again.known = first.sensitivity
    run_search(again, space, loss, seed=0, on_asked=lambda x, *_: asked.append(x))
    assert all(space.on_target(x) for x in asked[1:])  # the first is the whole model


def test_a_coefficient_whose_first_point_has_no_loss_is_kept_below_it():
    space = mlp_space([64, 48, 64, 32, 10])
    loss, cache = plan_loss(space, steep([0.1, 2.0, 2.0])), {}
    outcome = run_search(SensitivitySearch(), space, lambda x: math.nan if x[0] > 0.3 else loss(x), seed=0, cache=cache)
    usable = {plan: v for plan, v in cache.items() if math.isfinite(v)}
    assert outcome.stop_reason == "exhausted"
    found = best_on_target(space, usable)
    best = min(loss(x) for x in space.table[0] if space.on_target(x) and x[0] <= 0.3)
    assert found <= 1.05 * best


def test_the_model_between_points_is_straight_in_log_odds():
    curve = SensitivityCurve(0, (0.0, 0.2, 0.8), (1.0, 1.1, 1.9))
    (at_half,) = modelled_increases([curve], [np.array([0.5])])
    assert at_half[0] == pytest.approx(math.sqrt(0.1 * 0.9), rel=1e-4)  # log odds of 0.2, 0.5, 0.8 are evenly spaced
    (known,) = modelled_increases([curve], [np.array([0.0, 0.2, 0.8])])
    np.testing.assert_allclose(known, [0.0, 0.1, 0.9], rtol=1e-4, atol=1e-9)


def test_exchanges_go_on_where_curves_measured_alone_know_nothing_of_each_other():
    """Groups that act on each other: the best combination of the curves is not the best plan."""
    widths, weights = CASES["4 groups"]
    space = mlp_space(widths, 0.5)
    loss, asked = plan_loss(space, coupled(weights)), []
    run_search(SensitivitySearch(), space, loss, seed=0, on_asked=lambda x, value, _: asked.append((x, value)))
    on_target = [value for x, value in asked if space.on_target(x)]
    assert len(on_target) > 3
    assert min(on_target[3:]) < min(on_target[:3])


def test_a_plan_that_loses_nothing_ends_the_exchanges():
    space = mlp_space([64, 48, 64, 32, 10], 0.7)
    asked = []
    run_search(SensitivitySearch(), space, lambda x: 1.0, seed=0, on_asked=lambda x, *_: asked.append(x))
    assert sum(space.on_target(x) for x in asked) <= 3


@pytest.mark.parametrize("make", [steep, coupled])
def test_a_later_round_looks_first_where_the_curves_of_the_one_before_lead(make):
    """The second round removes from what the first has left: about as good a plan, found with fewer evaluations."""
    widths, function = [40, 24, 40, 32, 20, 28, 10], make(np.geomspace(0.2, 3.0, 5).tolist())
    first = mlp_space(widths, 0.4)
    before, cache = SensitivitySearch(), {}
    run_search(before, first, plan_loss(first, function), seed=0, cache=cache)
    on_target = {plan: loss for plan, loss in cache.items() if first.within(first.sparsity(np.array([plan])))[0]}
    removed = np.array(min(on_target, key=on_target.get))
    gone = removed / first.channels
    second = mlp_space([40, *(first.channels - removed), 10], 0.5)

    def loss(x):
        return function(gone + (1 - gone) * np.array(second.key(x)) / second.channels)

    def searched(expected):
        search, losses, asked = SensitivitySearch(), [], []
        search.expected = expected

        def keep(x, value, _):
            asked.append(x)
            losses.append(value if second.on_target(x) else np.inf)

        outcome = run_search(search, second, loss, seed=0, on_asked=keep)
        assert outcome.asked <= search.planned_evaluations(second)
        return min(losses) - function(gone), outcome.evaluations, asked

    alone, most, uninformed = searched(())
    told, fewer, informed = searched(carried_over(before.sensitivity, gone))
    assert told <= 1.05 * alone
    assert fewer <= 2 * second.size + 8 < most
    heights = [np.sort(np.concatenate([x[x > 0] for x in asked[1:6]])) for asked in (uninformed, informed)]
    assert np.ptp(heights[0]) < 0.05  # the same coefficient everywhere
    assert np.ptp(heights[1]) > 0.2


def informed(space, function, seed=0, ratio=3.0):
    """The space with expected errors in proportion to what each coefficient alone loses, up to a factor of its own."""
    factors = np.exp(np.random.default_rng(seed).normal(0.0, 0.2, space.size)) / ratio

    def errors(removed):
        shares = removed / space.channels
        alone = [
            [function(np.where(np.arange(space.size) == i, share, 0.0)) for i, share in enumerate(row)]
            for row in shares
        ]
        return (np.array(alone) - function(np.zeros(space.size))) @ factors

    return replace(space, errors=errors)


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_expected_errors_spare_half_of_the_evaluations(k):
    function = steep([1.0] * k)
    space = informed(mlp_space([100, *([64, 128, 96, 48] * (k // 4)), 10]), function)
    search = SensitivitySearch()
    outcome = run_search(search, space, plan_loss(space, function), seed=0)
    assert outcome.evaluations <= search.planned_evaluations(space) <= 1.5 * k + 8


@pytest.mark.parametrize("target", [0.5, 0.8])
@pytest.mark.parametrize("kind", [steep, quadratic])
@pytest.mark.parametrize("case", CASES)
def test_with_expected_errors_it_finds_what_ten_levels_find(case, kind, target):
    widths, weights = CASES[case]
    space, few, many = mlp_space(widths, target), {}, {}
    loss = plan_loss(space, kind(weights))
    outcome = run_search(SensitivitySearch(), informed(space, kind(weights)), loss, seed=0, cache=few)
    run_search(SensitivitySearch(levels=10), space, loss, seed=0, cache=many)
    dense = loss(space.low)
    assert best_on_target(space, few) - dense <= 1.05 * (best_on_target(space, many) - dense)
    assert outcome.evaluations <= 1.5 * space.size + 8


def test_luck_of_a_few_samples_misleads_less_where_errors_are_expected():
    """Losses scatter by as much as some coefficients alone cost: how far from the best what is found really is."""
    widths, weights = CASES["5 groups"]
    function = steep([0.1 * weight for weight in weights])
    plain, cache = mlp_space(widths, 0.6), {}
    loss = plan_loss(plain, function)
    run_search(SensitivitySearch(levels=20), plain, loss, seed=0, cache=cache)

    def excess(space, seed):
        rng, asked = np.random.default_rng(seed), []

        def noisy(x):
            asked.append((loss(x) + 0.02 * rng.normal() * x.any(), tuple(x)))
            return asked[-1][0]

        run_search(SensitivitySearch(), space, noisy, seed=0)
        return loss(min(trial for trial in asked if space.on_target(trial[1]))[1]) - best_on_target(plain, cache)

    told = np.mean([excess(informed(plain, function, seed), seed) for seed in range(10)])
    alone = np.mean([excess(plain, seed) for seed in range(10)])
    assert told < 0.75 * alone  # with half of the evaluations


def test_the_model_between_points_is_straight_in_logarithms_of_errors_where_they_are_known():
    shape = ErrorCurve((0.0, 0.2, 0.5, 0.8), (0.0, 0.01, 0.04, 0.16))
    curve = SensitivityCurve(0, (0.0, 0.2, 0.8), (1.0, 1.1, 1.9), shape)
    (at_half,) = modelled_increases([curve], [np.array([0.5])])
    assert at_half[0] == pytest.approx(math.sqrt(0.1 * 0.9), rel=1e-4)


def test_a_coefficient_that_was_not_measured_costs_what_is_usual_for_its_error():
    shapes = [ErrorCurve((0.0, 0.5), (0.0, 0.1)), ErrorCurve((0.0, 0.5), (0.0, 0.4))]
    curves = [SensitivityCurve(0, (0.0, 0.5), (1.0, 1.3), shapes[0]), SensitivityCurve(1, (0.0,), (1.0,), shapes[1])]
    measured, expected = modelled_increases(curves, [np.array([0.5])] * 2)
    assert measured[0] == pytest.approx(0.3, rel=1e-4)
    assert expected[0] == pytest.approx(3.0 * 0.4**1.2, rel=1e-4)


def test_what_may_be_luck_is_drawn_to_what_is_usual():
    """One group seems better than the whole model by 0.02: an increase of 0.03 where 0.06 is usual may be luck."""
    shapes = [ErrorCurve((0.0, 0.5), (0.0, error)) for error in (0.1, 0.1, 0.05, 0.1)]
    losses = [1.2, 1.3, 1.03, 0.98]
    curves = [
        SensitivityCurve(n, (0.0, 0.5), (1.0, loss), shape)
        for n, (loss, shape) in enumerate(zip(losses, shapes, strict=True))
    ]
    usual = np.median([2.0, 3.0, 0.6])
    found = np.concatenate(modelled_increases(curves, [np.array([0.5])] * 4))
    for loss, shape, increase in zip(losses, shapes, found, strict=True):
        prior, noise = usual * shape.errors[1], 0.02
        measured = max(loss - 1.0, 0.0)
        assert increase == pytest.approx((measured * prior**2 + prior * noise**2) / (prior**2 + noise**2), rel=1e-3)
    without = np.concatenate(
        modelled_increases([replace(curve, shape=None) for curve in curves], [np.array([0.5])] * 4)
    )
    assert without[:3] == pytest.approx([0.2, 0.3, 0.03], rel=1e-3)


def test_where_errors_are_known_few_exchanges_follow():
    widths, weights = CASES["5 groups"]
    function = steep(weights)
    space, asked = informed(mlp_space(widths, 0.7), function), []
    run_search(SensitivitySearch(), space, plan_loss(space, function), seed=0, on_asked=lambda x, v, _: asked.append(v))
    assert len(asked) <= 1 + 5 + 3 + 4  # the whole model, points, combinations, exchanges


def test_the_solution_of_the_expected_errors_alone_is_tried_first_of_all_combinations():
    widths, weights = CASES["5 groups"]
    function = steep(weights)
    space, asked = informed(mlp_space(widths, 0.7), function), []
    rng = np.random.default_rng(0)  # points that say nothing
    run_search(SensitivitySearch(), space, lambda x: 1.0 + rng.random(), seed=0, on_asked=lambda x, *_: asked.append(x))
    unmeasured = [SensitivityCurve(n, (0.0,), (1.0,), shape) for n, shape in enumerate(space.shapes)]
    (expected,) = best_combinations(space, unmeasured, 1, increases=modelled_increases)
    first = next(x for x in asked if space.on_target(x))
    assert space.key(first) == space.key(expected)


def test_where_errors_are_known_points_that_are_spared_are_not_spent_on_exchanges():
    """A search at another target, of the same network, is told what was measured."""
    function = steep([1.0] * 8)
    space = informed(mlp_space([100, 64, 128, 96, 48, 64, 128, 96, 48, 10]), function)
    loss, first, again = plan_loss(space, function), SensitivitySearch(), SensitivitySearch()
    run_search(first, space, loss, seed=0)
    again.known = first.sensitivity
    outcome = run_search(again, space, loss, seed=0)
    assert outcome.evaluations <= 1 + 3 + 4


def alone(space, asked):
    """Which coefficients were raised alone."""
    return [int(np.flatnonzero(x - space.low)[0]) for x in asked if np.count_nonzero(x - space.low) == 1]


def test_where_the_loss_goes_as_errors_do_three_coefficients_tell_it():
    """Those with the largest errors; then the errors' solution alone of all combinations."""
    function = steep([1.0, 8.0, 1.0, 4.0, 0.5, 2.0, 1.0, 1.0])
    space, asked = informed(mlp_space([100, *[64] * 8, 10]), function), []
    search = SensitivitySearch()
    run_search(search, space, plan_loss(space, function), seed=0, on_asked=lambda x, *_: asked.append(x))
    measured = alone(space, asked)
    assert len(measured) == 3
    known = np.array(
        [[curve.coefficients[1], curve.losses[1]] for curve in search.sensitivity if len(curve.losses) > 1]
    )
    assert len(known) == 3
    unmeasured = [SensitivityCurve(n, (0.0,), (1.0,), shape) for n, shape in enumerate(space.shapes)]
    (expected,) = best_combinations(space, unmeasured, 1, increases=modelled_increases)
    first = np.maximum(expected, 0.5 * space.scale(np.ones(8)))
    errors = [np.interp(c, shape.coefficients, shape.errors) for c, shape in zip(first, space.shapes, strict=True)]
    assert measured == sorted(range(8), key=lambda n: -errors[n])[:3]
    on_target = [x for x in asked if space.on_target(x)]
    assert space.key(on_target[0]) == space.key(expected)
    assert (np.abs(on_target[1] - expected) > 0).sum() > 0  # an exchange, and no further combination
    assert len(asked) <= 1 + 3 + 1 + 4


@pytest.mark.parametrize("seed", range(3))
def test_a_metric_that_cares_for_some_outputs_alone_is_measured_everywhere(seed):
    """As the return of an agent may: the errors are even, the loss is that of two of eight coefficients."""
    cares = np.random.default_rng(seed).permutation([30.0, 10.0, *[0.01] * 6])
    function = steep(cares.tolist())
    plain = mlp_space([100, *[64] * 8, 10])
    space, few, many = informed(plain, steep([1.0] * 8)), {}, {}
    loss = plan_loss(plain, function)
    asked = []
    run_search(SensitivitySearch(), space, loss, seed=0, cache=few, on_asked=lambda x, *_: asked.append(x))
    run_search(SensitivitySearch(levels=10), plain, loss, seed=0, cache=many)
    assert set(alone(space, asked)) == set(range(8))
    dense = loss(plain.low)
    assert best_on_target(space, few) - dense <= 1.5 * (best_on_target(space, many) - dense)


def test_it_tells_three_that_scatter_from_three_that_differ():
    shapes = [ErrorCurve((0.0, 0.5), (0.0, 0.1))] * 4
    bare = SensitivityCurve(3, (0.0,), (1.0,), shapes[3])

    def curves(*increases):
        return [SensitivityCurve(n, (0.0, 0.5), (1.0, 1.0 + g), shapes[n]) for n, g in enumerate(increases)]

    assert follow_errors([*curves(0.1, 0.2, 0.25), bare])
    assert not follow_errors([*curves(0.1, 0.2), bare, replace(bare, index=2)]), "two do not tell"
    assert not follow_errors([*curves(0.1, 0.2, 0.7), bare]), "more than three times what is usual"
    assert not follow_errors([*curves(0.03, 0.2, 0.2), bare]), "less than a third of it"
    assert follow_errors([*curves(-0.1, 0.1, 0.45), bare]), "as far off as the one that is better than the whole"
    assert not follow_errors([*curves(-0.01, 0.1, 0.45), bare]), "further off than that"
    assert not follow_errors([*curves(0.1, 0.2, np.nan), bare])
    assert not follow_errors([replace(curve, shape=None) for curve in curves(0.2, 0.2, 0.2)])


def test_a_plan_may_lose_ten_times_what_its_coefficients_lose_alone_and_a_third_of_it_at_least():
    shapes = [ErrorCurve((0.0, 0.5), (0.0, 0.1))] * 3
    curves = [SensitivityCurve(n, (0.0, 0.5), (1.0, 1.1), shape) for n, shape in enumerate(shapes)]
    x = np.full(3, 0.5)  # 0.3 in all
    assert [explain(curves, x, 1.0 + lost) for lost in (0.09, 0.11, 2.9, 3.1)] == [False, True, True, False]
    lucky = [replace(curves[0], losses=(1.0, 0.9)), *curves[1:]]
    assert explain(lucky, x, 0.9), "as much below as one of them was"


def test_where_groups_act_on_each_other_curves_are_not_asked_which_combination_is_best():
    """Together they lose a hundred times what they lose alone: all are measured, and none explains it."""
    single = steep([1.0] * 8)
    plain = mlp_space([100, *[64] * 8, 10])

    def function(removed):
        several = np.count_nonzero(removed) > 1
        return single(removed) * (100.0 if several else 1.0) if np.any(removed) else single(removed)

    space, asked = informed(plain, single), []
    run_search(SensitivitySearch(), space, plan_loss(plain, function), seed=0, on_asked=lambda x, *_: asked.append(x))
    assert set(alone(space, asked)) == set(range(8))
    assert len([x for x in asked if space.on_target(x)]) <= 1 + 4  # the errors' solution, and exchanges


def test_where_the_plan_of_the_errors_has_no_loss_others_are_tried_and_exchanged():
    """As where the user's code does not take its widths."""
    function = steep([1.0, 8.0, 1.0, 4.0, 0.5, 2.0, 1.0, 1.0])
    space, asked = informed(mlp_space([100, *[64] * 8, 10]), function), []
    loss = plan_loss(space, function)
    broken = []

    def first_is_broken(x):
        if space.on_target(x) and not broken:
            broken.append(space.key(x))
        return np.nan if space.key(x) in broken else loss(x)

    run_search(SensitivitySearch(), space, first_is_broken, seed=0, on_asked=lambda x, *_: asked.append(x))
    assert set(alone(space, asked)) == set(range(8))
    on_target = [x for x in asked if space.on_target(x)]
    assert len(on_target) > 3, "the errors' solution, two of the curves', and exchanges of these"


def test_three_exchanges_in_vain_are_enough_where_errors_are_known():
    function = steep([1.0] * 16)
    space, asked = informed(mlp_space([100, *[64] * 16, 10]), function), []
    loss = plan_loss(space, function)
    least = []

    def first_is_best(x):  # of the combinations
        if space.on_target(x):
            least.append(loss(x))
            return least[0] + 0.001 * (len(least) - 1)
        return loss(x)

    run_search(SensitivitySearch(), space, first_is_best, seed=0, on_asked=lambda x, *_: asked.append(x))
    assert len([x for x in asked if space.on_target(x)]) == 1 + 3


def test_expected_errors_go_before_what_an_earlier_round_lets_expect():
    widths, weights = CASES["5 groups"]
    function = steep(weights)
    space = informed(mlp_space(widths, 0.7), function)
    asked = {}
    for name, curves in (("errors", ()), ("both", tuple(random_curves(space, np.random.default_rng(0))))):
        search = SensitivitySearch()
        search.expected, asked[name] = curves, []
        run_search(
            search, space, plan_loss(space, function), seed=0, on_asked=lambda x, *_, to=asked[name]: to.append(x)
        )
    np.testing.assert_array_equal(asked["errors"], asked["both"])
