"""What every strategy must do, and what the kit for it finds. A new strategy is one more line in STRATEGIES."""

from __future__ import annotations

import copy
import importlib.util
import math

import numpy as np
import pytest

from lightning_softprune.search import (
    GradientSearch,
    GridSearch,
    NormBaseline,
    OptunaSearch,
    RandomSearch,
    SearchStrategy,
    SensitivitySearch,
    UniformBaseline,
    run_search,
)
from lightning_softprune.testing import StrategyConformance, check_strategy, mlp_space, plan_loss, steep

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


class TestConformance(StrategyConformance):
    """Every strategy of the package, through the kit that users have."""

    @pytest.fixture(autouse=True, params=list(STRATEGIES))
    def _of_the_package(self, request):
        self.strategy, self.within = STRATEGIES[request.param]


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_plan_is_evaluated_twice(name):
    space, plans = mlp_space([64, 48, 64, 32, 10]), []
    loss = plan_loss(space, steep([1.0, 0.5, 2.0]))
    outcome = run_search(
        copy.deepcopy(STRATEGIES[name][0]), space, lambda x: plans.append(space.key(x)) or loss(x), seed=0
    )
    assert len(plans) == len(set(plans)) == outcome.evaluations


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_last_proposal_on_a_single_group_is_on_target(name):
    strategy = copy.deepcopy(STRATEGIES[name][0])
    one = mlp_space([32, 64, 10], target=0.4)
    strategy.start(one, 0)
    asked = []
    while (x := strategy.ask()) is not None:
        asked.append(x)
        strategy.tell(float(x @ x))
    assert any(one.on_target(x) for x in asked) or isinstance(strategy, GridSearch)


# ---------------------------------------------------------------- what the kit finds


class Candidates(SearchStrategy):
    """A well-behaved strategy, for others to spoil."""

    def __init__(self, number=5):
        self.number = number

    def propose(self, space, rng):
        for _ in range(self.number):
            yield space.scale(rng.uniform(space.low, space.high))
        return "exhausted"


class Silent(Candidates):
    def propose(self, space, rng):
        return "exhausted"
        yield


class Outside(Candidates):
    def ask(self):
        x = super().ask()
        return None if x is None else x + 2.0

    def tell(self, loss):
        super().tell(loss)


class Unseeded(Candidates):
    def propose(self, space, rng):
        return (yield from super().propose(space, np.random.default_rng()))


class Forgetful(Candidates):
    def state_dict(self):
        return {**super().state_dict(), "losses": []}


class Finite(Candidates):
    """Remembers losses that are numbers only."""

    def state_dict(self):
        state = super().state_dict()
        return {**state, "losses": [loss for loss in state["losses"] if loss == loss]}


class Wild(Candidates):
    def propose(self, space, rng):
        for _ in range(self.number):
            yield rng.uniform(space.low, space.low + 0.05)
        return "exhausted"


class Hiding(Candidates):
    """Says that it is exhausted when it was ended."""

    stop_reason = property(
        lambda self: "exhausted" if self._ended else "", lambda self, value: setattr(self, "_ended", value)
    )
    _ended = ""


class Nameless(Candidates):
    """Gives up on nan without a word."""

    def propose(self, space, rng):
        loss = yield space.scale(np.ones(space.size))
        if loss != loss:
            self.quiet = True
        return "exhausted"

    def __getattribute__(self, name):
        if name == "stop_reason" and object.__getattribute__(self, "__dict__").get("quiet"):
            return ""
        return object.__getattribute__(self, name)


class Stateful(Candidates):
    """Copies take the running search along."""

    def __getstate__(self):
        return {**super().__getstate__(), "stop_reason": "copied"}


class Sticky(Candidates):
    """Goes on with the network that it saw first."""

    def start(self, space, seed):
        self.first = self.__dict__.get("first", space)
        super().start(self.first, seed)

    def __getstate__(self):
        return {"number": self.number}


class Exposing(Candidates):
    def ask(self):
        super().ask()
        return self._pending


SPOILT = {
    "test_the_budget_is_kept": [Silent, Hiding],
    "test_proposals_stay_within_the_bounds": [Silent, Outside],
    "test_the_same_seed_gives_the_same_proposals": [Unseeded],
    "test_a_search_resumed_in_the_middle_equals_one_that_was_not_interrupted": [Forgetful],
    "test_a_nan_told_before_the_interruption_is_kept": [Finite, Forgetful],
    "test_it_finds_the_known_optimum_of_a_smooth_constrained_function": [Wild],
    "test_nan_losses_are_survived": [Nameless],
    "test_it_can_be_copied_before_and_in_the_middle_of_a_search": [Stateful, Unseeded],
    "test_one_instance_can_serve_another_network_next": [Silent, Sticky],
    "test_asking_twice_gives_the_same_vector_and_does_not_expose_it": [Exposing],
}


def test_a_strategy_that_behaves_passes():
    check_strategy(Candidates())


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in SPOILT.items() for kind in kinds])
def test_each_check_fails_for_a_strategy_that_misbehaves(name, kind):
    kit = StrategyConformance()
    kit.strategy = kind()
    with pytest.raises(AssertionError):
        getattr(kit, name)()


def test_what_is_wrong_is_said_with_the_property():
    expected = r"Unseeded: the same seed gives other proposals \(the same seed gives the same proposals\)$"
    with pytest.raises(AssertionError, match=expected):
        check_strategy(Unseeded())


def test_what_a_strategy_raises_is_said_with_the_property_and_is_the_cause():
    class Broken(Candidates):
        def propose(self, space, rng):
            yield space.high + 1.0

    expected = r"Broken: it raises ValueError: Broken\.propose: .* \(proposals stay within the bounds\)$"
    with pytest.raises(AssertionError, match=expected) as caught:
        check_strategy(Broken())
    assert isinstance(caught.value.__cause__, ValueError)


def test_every_check_of_the_kit_has_a_strategy_that_fails_it_and_is_run(monkeypatch):
    checks = [name for name in dir(StrategyConformance) if name.startswith("test_")]
    assert sorted(checks) == sorted(SPOILT)
    run = []
    for name in checks:
        monkeypatch.setattr(StrategyConformance, name, lambda _, name=name: run.append(name))
    check_strategy(Candidates())
    assert sorted(run) == sorted(checks)


def test_the_bound_on_the_optimum_counts():
    with pytest.raises(AssertionError, match=r"it ends at .*, the best of all is"):
        check_strategy(UniformBaseline(), within=0.001)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_evaluates_no_more_than_it_has_planned(name):
    space = mlp_space([64, 48, 64, 32, 10])
    strategy = copy.deepcopy(STRATEGIES[name][0])
    planned = strategy.planned_evaluations(space)
    outcome = run_search(strategy, space, plan_loss(space, steep([1.0, 0.5, 2.0])), seed=0)
    assert planned is None or outcome.evaluations <= planned
    assert (planned is None) == (name in ("gradient-uniform", "gradient-spsa"))
