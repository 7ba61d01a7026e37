from __future__ import annotations

import numpy as np
import pytest

from lightning_softprune.search import (
    GradientSearch,
    GridSearch,
    NormBaseline,
    RandomSearch,
    SearchStrategy,
    SensitivitySearch,
    UniformBaseline,
    run_search,
)
from support.networks import mlp_space


class Listed(SearchStrategy):
    """Asks for the vectors it was given."""

    def __init__(self, *vectors, max_evaluations=None):
        self.vectors = vectors
        self.max_evaluations = max_evaluations

    def propose(self, space, rng):
        self.losses = []
        for x in self.vectors:
            self.losses.append((yield np.array(x)))
        return "done"


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


def test_a_subclass_without_propose_is_told_both_ways_to_write_one(space):
    class Empty(SearchStrategy):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define propose.*override ask\(\) and tell\(\)"):
        Empty().start(space, 0)


def test_a_subclass_may_override_ask_and_tell_instead(space):
    class Two(SearchStrategy):
        def start(self, space, seed):
            self.left = [np.full(space.size, 0.25), np.full(space.size, 0.5)]

        def ask(self):
            if not self.left:
                self.stop_reason = "two"
                return None
            return self.left.pop()

        def tell(self, loss):
            pass

    outcome = run_search(Two(), space, lambda x: 0.0, seed=0)
    assert (outcome.evaluations, outcome.stop_reason) == (2, "two")


def test_a_vector_out_of_bounds_names_the_strategy_and_the_bounds(space):
    strategy = Listed([0.5, 1.5])
    strategy.start(space, 0)
    with pytest.raises(ValueError, match=r"Listed\.propose must yield vectors of shape \(2,\) within the bounds"):
        strategy.ask()


def test_asking_and_telling_out_of_turn_are_errors(space):
    strategy = UniformBaseline()
    with pytest.raises(RuntimeError, match="needs start"):
        strategy.ask()
    with pytest.raises(RuntimeError, match="needs start"):
        strategy.load_state_dict({"strategy": "UniformBaseline", "seed": 0, "losses": []})
    strategy.start(space, 0)
    with pytest.raises(RuntimeError, match="ask\\(\\) first"):
        strategy.tell(1.0)


def test_a_state_of_another_strategy_or_network_is_refused(space):
    strategy = UniformBaseline()
    strategy.start(space, 0)
    with pytest.raises(ValueError, match="of strategy NormBaseline, this is UniformBaseline"):
        strategy.load_state_dict({"strategy": "NormBaseline", "seed": 0, "losses": []})
    with pytest.raises(ValueError, match=r"has 2 losses, but UniformBaseline\(\) ends after 1"):
        strategy.load_state_dict({"strategy": "UniformBaseline", "seed": 0, "losses": [1.0, 2.0]})


def test_the_repr_is_the_call_that_makes_the_strategy():
    for strategy in (
        GradientSearch(start="uniform", steps=3),
        GridSearch(5, 100),
        SensitivitySearch(),
        RandomSearch(2),
    ):
        assert repr(eval(repr(strategy))) == repr(strategy)
    assert repr(GradientSearch(start="uniform")) == (
        "GradientSearch(steps=20, step_size=0.1, probe=0.05, difference='auto', start='uniform', patience=5, "
        "max_evaluations=None)"
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GradientSearch(steps=0), ValueError, "steps: 0 is less than 1"),
        (lambda: GradientSearch(steps=2.5), TypeError, "steps: 2.5 is not a whole number"),
        (lambda: GradientSearch(step_size=0.0), ValueError, r"step_size: 0.0 is not a fraction in \(0, 1\]"),
        (lambda: GradientSearch(probe="wide"), TypeError, "probe: 'wide' is not a number"),
        (
            lambda: GradientSearch(difference="both"),
            ValueError,
            "difference: 'both' is not one of 'auto', 'central', 'forward', 'spsa'",
        ),
        (lambda: GradientSearch(start="norm"), ValueError, "start: 'norm' is not one of 'sensitivity', 'uniform'"),
        (lambda: GradientSearch(patience=-1), ValueError, "patience: -1 is less than 1"),
        (lambda: GradientSearch(max_evaluations=0), ValueError, "max_evaluations: 0 is less than 1"),
        (lambda: GridSearch(levels=1), ValueError, "levels: 1 is less than 2"),
        (lambda: SensitivitySearch(levels=True), TypeError, "levels: True is not a whole number"),
        (lambda: SensitivitySearch(refine=0), ValueError, "refine: 0 is less than 1"),
        (lambda: RandomSearch(num_candidates=0), ValueError, "num_candidates: 0 is less than 1"),
    ],
)
def test_an_argument_that_cannot_work_is_named_with_what_is_allowed(make, error, message):
    with pytest.raises(error, match=message):
        make()


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
