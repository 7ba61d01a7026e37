"""The one loop: budget, cache, repetition."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_softprune.search import (
    GradientSearch,
    SearchStrategy,
    UniformBaseline,
    run_search,
)
from support.networks import mlp_space
from support.strategies import Listed


class Forever(SearchStrategy):
    def propose(self, space, rng):
        while True:
            yield np.full(space.size, 0.5)


@pytest.fixture
def space():
    return mlp_space([8, 8, 8, 4])


def test_a_cached_plan_is_told_at_once_and_costs_nothing(space):
    strategy = Listed([0.5, 0.5], [0.25, 0.5], [0.51, 0.49])  # the last realises as the first
    cache = {(2, 4): 7.0}
    asked = []
    outcome = run_search(
        strategy, space, lambda x: float(x.sum()), seed=0, cache=cache, on_asked=lambda *a: asked.append(a[1:])
    )
    assert strategy.losses == [1.0, 7.0, 1.0]
    assert asked == [(1.0, True), (7.0, False), (1.0, False)]
    assert (outcome.evaluations, outcome.asked, outcome.stop_reason) == (1, 3, "done")
    assert cache == {(2, 4): 7.0, (4, 4): 1.0}


def test_the_smaller_of_the_two_budgets_counts(space):
    vectors = [[i / 8, 0.5] for i in range(7)]
    for own, given in ((2, 5), (5, 2), (2, None), (None, 2)):
        strategy = Listed(*vectors, max_evaluations=own)
        outcome = run_search(strategy, space, lambda x: 0.0, seed=0, max_evaluations=given)
        assert (outcome.evaluations, outcome.stop_reason) == (2, "max_evaluations")
        assert strategy.stop_reason == "max_evaluations"


def test_plans_in_the_cache_may_still_be_asked_when_the_budget_is_used_up(space):
    outcome = run_search(Listed([0.5, 0.5], [0.5, 0.5], [0.25, 0.5]), space, lambda x: 0.0, seed=0, max_evaluations=1)
    assert (outcome.evaluations, outcome.asked) == (1, 2)


def test_a_strategy_that_repeats_itself_for_ever_is_ended(space):
    outcome = run_search(Forever(), space, lambda x: 0.0, seed=0)
    assert (outcome.evaluations, outcome.stop_reason) == (1, "repeating")


def test_running_again_with_the_cache_of_an_interrupted_search_measures_only_the_rest():
    space = mlp_space([64, 48, 64, 32, 10])

    def loss(x):
        return float((np.array(space.key(x)) / space.channels) @ np.array([1.0, 0.5, 2.0]))

    whole, cache = {}, {}
    full = run_search(GradientSearch(), space, loss, seed=0, cache=whole)
    first = run_search(GradientSearch(), space, loss, seed=0, cache=cache, max_evaluations=20)
    rest = run_search(GradientSearch(), space, loss, seed=0, cache=cache)
    assert first.evaluations + rest.evaluations == full.evaluations
    assert cache == whole


def test_an_exception_of_the_evaluation_reaches_the_caller(space):
    error = RuntimeError("out of memory")

    def evaluate(x):
        raise error

    with pytest.raises(RuntimeError) as caught:
        run_search(UniformBaseline(), space, evaluate, seed=0)
    assert caught.value is error
