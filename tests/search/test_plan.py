"""Rounding against brute force."""

import itertools

import numpy as np
import pytest

from lightning_softprune.search.plan import Plan, Rounding

GRID = np.linspace(0.0, 1.0, 201)
BOUNDS = [(0.0, 1.0), (0.0, 0.5), (0.3, 1.0), (0.25, 0.6), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.11, 0.13)]
CASES = list(itertools.product(range(1, 13), (1, 2, 3, 4, 8), BOUNDS))


def rounding(n, round_to=1, low=0.0, high=1.0):
    return Rounding(np.array([n]), np.array([low]), np.array([high]), round_to)


def allowed(n, round_to, low, high):
    """Numbers of removed channels within the bounds: whole multiples are kept, at least one, or the group is whole."""
    removed = [k for k in range(n) if low * n - 1e-6 <= k <= high * n + 1e-6]
    return [k for k in removed if k == 0 or (n - k) % round_to == 0]


@pytest.mark.parametrize("n", range(1, 13))
@pytest.mark.parametrize("round_to", [1, 2, 3, 4, 8])
def test_counts_are_the_nearest_allowed_ones(n, round_to):
    for low, high in BOUNDS:
        counts = rounding(n, round_to, low, high).counts(GRID[:, None])[:, 0]
        choices = allowed(n, round_to, low, high)
        for coefficient, count in zip(GRID, counts, strict=True):
            wanted = int(np.floor(coefficient * n + 0.5))
            if choices:
                assert count in choices, (low, high, coefficient)
                assert abs(count - wanted) == min(abs(choice - wanted) for choice in choices), (low, high, coefficient)
            else:  # nothing lies within the bounds: the nearest multiple, or the group is left whole
                assert count == 0 or (n - count) % round_to == 0
                assert 0 <= count < n


@pytest.mark.parametrize(("n", "round_to", "bounds"), CASES[::3])
def test_counts_grow_with_the_coefficient_and_at_least_one_channel_stays(n, round_to, bounds):
    counts = rounding(n, round_to, *bounds).counts(GRID[:, None])[:, 0]
    assert (np.diff(counts) >= 0).all()
    assert (counts >= 0).all()
    assert (counts < n).all()


def test_without_bounds_every_count_can_be_reached():
    for n in range(1, 13):
        assert set(rounding(n).counts(GRID[:, None])[:, 0]) == set(range(n))


def test_bounds_hold_exactly_where_they_are_whole_channels():
    n = 10
    for low, high in itertools.combinations(range(10), 2):
        counts = rounding(n, 1, low / n, high / n).counts(GRID[:, None])
        assert (counts.min(), counts.max()) == (low, high)


def test_values_outside_of_zero_and_one_are_clipped():
    assert rounding(8).counts(np.array([[-3.0], [7.0]])).tolist() == [[0], [7]]


def test_a_vector_and_a_matrix_of_coefficients_agree():
    both = Rounding(np.array([7, 12]), np.array([0.1, 0.0]), np.array([0.9, 0.5]), 2)
    values = np.random.default_rng(0).random((20, 2))
    assert [both.counts(row).tolist() for row in values] == both.counts(values).tolist()


def test_a_group_may_have_a_step_of_its_own():
    three = Rounding(np.array([24, 24, 24]), np.zeros(3), np.ones(3), 2, steps=np.array([1, 4, 3]))
    alone = [rounding(24, step).counts(GRID[:, None]) for step in (2, 4, 6)]
    assert np.array_equal(three.counts(np.repeat(GRID[:, None], 3, axis=1)), np.concatenate(alone, axis=1))
    assert three.step.tolist() == [2, 4, 6]


@pytest.mark.parametrize("round_to", [1, 3, 4])
def test_reported_coefficients_are_at_most_one_channel_away(round_to):
    r = Rounding(np.array([5, 16]), np.array([0.0, 0.2]), np.array([1.0, 0.7]), round_to)
    values = np.random.default_rng(0).random((200, 2))
    counts = r.counts(values)
    soft = r.soft(values, counts)
    assert (np.abs(soft * r.channels - counts) <= 1 + 1e-9).all()
    assert (soft >= 0).all()
    assert (soft <= 1).all()
    near = np.abs(values * r.channels - counts) <= 1
    assert np.array_equal(soft[near], values[near])


def test_coefficients_are_not_written_to():
    values = np.full((3, 1), 1.5)
    rounding(8).counts(values)
    assert (values == 1.5).all()


def test_a_plan_removes_the_head_of_each_ranking_and_nests():
    rng = np.random.default_rng(0)
    rankings = [rng.permutation(5), rng.permutation(3)]
    plans = [Plan.from_counts([a, b], rankings) for a, b in ((0, 0), (1, 0), (3, 2))]
    assert plans[0].is_empty()
    assert not plans[1].is_empty()
    assert plans[2].counts == (3, 2)
    assert set(plans[2].removed[0]) == set(rankings[0][:3].tolist())
    for smaller, larger in itertools.pairwise(plans):
        assert all(set(s) <= set(t) for s, t in zip(smaller.removed, larger.removed, strict=True))
    assert all(list(r) == sorted(r) for plan in plans for r in plan.removed)


def test_a_plan_with_the_wrong_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="zip"):
        Plan.from_counts([1], [np.arange(2), np.arange(3)])
