"""What every strategy must do. A new strategy is one more line in STRATEGIES."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import pickle

import numpy as np
import pytest

from lightning_softprune.search import (
    GradientSearch,
    GridSearch,
    NormBaseline,
    OptunaSearch,
    RandomSearch,
    SearchSpace,
    SearchStrategy,
    SensitivitySearch,
    UniformBaseline,
    run_search,
)
from support.networks import coupled, mlp_space, plan_loss, steep

# Each with how far above the best plan of all it may end on a smooth function; baselines need only be on target.
STRATEGIES = {
    "grid": (GridSearch(levels=17), 0.05),
    "gradient": (GradientSearch(), 0.01),
    "gradient-uniform": (GradientSearch(start="uniform"), 0.03),
    "gradient-forward": (GradientSearch(difference="forward"), 0.02),
    "gradient-spsa": (GradientSearch(difference="spsa", start="uniform"), 0.05),
    "sensitivity": (SensitivitySearch(), 0.02),
    "random": (RandomSearch(num_candidates=100), 0.10),
    "uniform": (UniformBaseline(), math.inf),
    "norm": (NormBaseline(), math.inf),
}
if importlib.util.find_spec("optuna"):  # an extra
    STRATEGIES["optuna"] = (OptunaSearch(num_trials=50), 0.02)


@pytest.fixture(params=list(STRATEGIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def strategy(name: str) -> SearchStrategy:
    return copy.deepcopy(STRATEGIES[name][0])


@pytest.fixture
def space() -> SearchSpace:
    return mlp_space([64, 48, 64, 32, 10], low=np.array([0.0, 0.1, 0.0]), high=np.array([0.9, 1.0, 0.8]))


def converse(strategy, loss, count=10_000):
    """Asks and tells until the strategy ends, at most `count` times."""
    asked = []
    while len(asked) < count and (x := strategy.ask()) is not None:
        asked.append(x)
        strategy.tell(loss(x))
    return np.array(asked)


def test_proposals_stay_within_the_bounds(strategy, space):
    loss = plan_loss(space, steep([1.0, 0.5, 2.0]))
    strategy.start(space, 0)
    asked = converse(strategy, loss)
    assert len(asked) > 0
    assert (asked >= space.low).all()
    assert (asked <= space.high).all()


def test_the_same_seed_gives_the_same_proposals(strategy, space):
    loss = plan_loss(space, steep([1.0, 0.5, 2.0]))
    strategy.start(space, 3)
    first = converse(strategy, loss)
    reason = strategy.stop_reason
    strategy.start(space, 3)
    np.testing.assert_array_equal(converse(strategy, loss), first)
    assert strategy.stop_reason == reason != ""


def test_a_search_resumed_in_the_middle_equals_one_that_was_not_interrupted(strategy, space):
    loss = plan_loss(space, coupled([1.0, 0.5, 2.0]))
    strategy.start(space, 5)
    whole = converse(strategy, loss)
    half = len(whole) // 2
    interrupted = copy.deepcopy(strategy)
    interrupted.start(space, 5)
    converse(interrupted, loss, half)
    interrupted.ask()  # asked, but the process died before the loss was known
    saved = json.loads(json.dumps(interrupted.state_dict()))
    resumed = copy.deepcopy(strategy)
    resumed.start(space, 0)
    resumed.load_state_dict(saved)
    np.testing.assert_array_equal(converse(resumed, loss), whole[half:])
    assert resumed.stop_reason == strategy.stop_reason
    assert resumed.sensitivity == strategy.sensitivity


def test_a_nan_told_before_the_interruption_is_kept(strategy, space):
    strategy.start(space, 1)
    whole = converse(strategy, lambda x: math.nan if x[0] > 0.5 else float(x @ x))
    strategy.start(space, 1)
    converse(strategy, lambda x: math.nan if x[0] > 0.5 else float(x @ x), len(whole) - 1)
    saved = json.loads(json.dumps(strategy.state_dict()))
    strategy.start(space, 1)
    strategy.load_state_dict(saved)
    np.testing.assert_array_equal(strategy.ask(), whole[-1])


def test_it_finds_the_known_optimum_of_a_smooth_constrained_function(name, strategy, space):
    loss = plan_loss(space, coupled([1.0, 0.5, 2.0]))
    cache = {}
    run_search(strategy, space, loss, seed=0, cache=cache)
    on_target = [value for plan, value in cache.items() if space.within(space.sparsity(np.array([plan])))[0]]
    assert len(on_target) > 0
    points, sparsities, _ = space.table
    best = min(loss(x) for x in points[space.within(sparsities)])
    assert min(on_target) <= best * (1 + STRATEGIES[name][1])


@pytest.mark.parametrize("limit", [1, 7])
def test_the_budget_is_kept(strategy, space, limit):
    outcome = run_search(strategy, space, lambda x: float(x @ x), seed=0, max_evaluations=limit)
    assert 1 <= outcome.evaluations <= limit
    assert outcome.stop_reason == strategy.stop_reason
    assert outcome.stop_reason == "max_evaluations" or outcome.evaluations <= limit


def test_no_plan_is_evaluated_twice(strategy, space):
    plans = []
    loss = plan_loss(space, steep([1.0, 0.5, 2.0]))

    def evaluate(x):
        plans.append(space.key(x))
        return loss(x)

    outcome = run_search(strategy, space, evaluate, seed=0)
    assert len(plans) == len(set(plans)) == outcome.evaluations


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_nan_losses_are_survived(strategy, space, share):
    rng = np.random.default_rng(0)
    outcome = run_search(strategy, space, lambda x: math.nan if rng.random() < share else float(x @ x), seed=0)
    assert outcome.evaluations >= 1
    assert outcome.stop_reason != ""


def test_it_can_be_copied_before_and_in_the_middle_of_a_search(strategy, space):
    strategy.start(space, 0)
    expected = converse(strategy, lambda x: float(x @ x), 3)
    for twin in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert repr(twin) == repr(strategy)
        assert twin.stop_reason == ""
        twin.start(space, 0)
        np.testing.assert_array_equal(converse(twin, lambda x: float(x @ x), 3), expected)


def test_one_instance_can_serve_another_network_next(strategy, space):
    other = mlp_space([32, 16, 24, 16, 32, 8], target=0.5, tolerance=0.03)
    for one in (space, other, space):
        strategy.start(one, 0)
        assert strategy.sensitivity == ()
        assert converse(strategy, lambda x: float(x @ x)).shape[1] == one.size


def test_the_last_proposal_on_a_single_group_is_on_target(strategy):
    one = mlp_space([32, 64, 10], target=0.4)
    strategy.start(one, 0)
    asked = converse(strategy, lambda x: float(x @ x))
    assert any(one.on_target(x) for x in asked) or isinstance(strategy, GridSearch)


def test_asking_twice_gives_the_same_vector_and_does_not_expose_it(strategy, space):
    strategy.start(space, 0)
    first = strategy.ask()
    kept = first.copy()
    first += 1
    np.testing.assert_array_equal(strategy.ask(), kept)
