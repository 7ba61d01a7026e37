"""The base class: who calls what, and what a subclass may do."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_softprune.search import (
    GradientSearch,
    GridSearch,
    RandomSearch,
    SearchStrategy,
    SensitivitySearch,
    UniformBaseline,
    run_search,
)
from support.networks import mlp_space
from support.strategies import Listed


@pytest.fixture
def space():
    return mlp_space([8, 8, 8, 4])


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
    with pytest.raises(ValueError, match=r"Listed\.propose: .* is not a vector of shape \(2,\) within the bounds"):
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
    with pytest.raises(ValueError, match="state: 'NormBaseline' is not this strategy, 'UniformBaseline'"):
        strategy.load_state_dict({"strategy": "NormBaseline", "seed": 0, "losses": []})
    with pytest.raises(
        ValueError, match=r"state: 2 losses are more than UniformBaseline\(\) asks for on this space, 1"
    ):
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
