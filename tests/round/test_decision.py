"""What the trials of a round come to: the verdict as data, the sentence for people."""

from __future__ import annotations

import math
import re

import pytest

from lightning_softprune.round.decision import Verdict, decide, plans_to_be_healed
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.round.trials import Trials
from lightning_softprune.search import Objective, Plan, UniformBaseline, parse_constraint
from lightning_softprune.testing import mlp_space

PLANS = (Plan((tuple(range(6)), tuple(range(8)))), Plan((tuple(range(7)), tuple(range(7)))))


class Alone:
    """One process: it agrees with itself."""

    def broadcast(self, value):
        return value

    def all_agree(self, flag):
        return flag


class Timed:
    """Plans take the same share of the dense model's time, whatever they remove."""

    def share_of_dense(self, plan, runs, seconds):
        return 0.9


class Counted:
    def costs_of(self, plan):
        self.macs = 1000 - sum(plan.counts)
        return self


def asked(**options):
    return RoundSettings(
        "acc", "max", 0.1, UniformBaseline(), None, (), None, None, "random", "none", 1, None, 1, 0, False, **options
    )


def decided(*scores, before=0.9, on_violation="skip", constraints=(), limits=None, tolerance=0.1):
    parsed = tuple(parse_constraint(text, "constraints") for text in constraints)
    trials = Trials(Objective("acc", "max", parsed), mlp_space([8, 10, 12, 4], target=0.7, tolerance=tolerance), 0.7)
    for plan, score in zip(PLANS, scores, strict=False):
        trials.add(plan, (0.6, 0.6), {"acc": score}, 0.0)
    settings = asked(limits=limits, constraints=parsed, on_violation=on_violation)
    return decide(Alone(), settings, Counted(), trials, {"acc": before}, Timed()), trials


def test_the_best_feasible_plan_is_chosen():
    decision, trials = decided(0.8, 0.9)
    assert all(scored.trial.feasible for scored in trials.done)
    assert (decision.plan, decision.verdict, decision.sentence) == (trials.done[1], Verdict.FEASIBLE, "")


@pytest.mark.parametrize(
    ("scores", "options", "verdict", "sentence"),
    [
        ((), {}, Verdict.NOTHING_SCORED, "there was no plan to score"),
        ((math.nan, math.nan), {}, Verdict.NOT_A_NUMBER, "acc is nan for each of the 2 scored plans$"),
        ((math.nan,), {"before": math.nan}, Verdict.NOT_A_NUMBER, "the 1 scored plans, and was so before anything was"),
        ((math.nan, -math.inf), {}, Verdict.NOT_A_NUMBER, "none of the 2 scored plans has a finite acc at 70.0%"),
        ((0.8, 0.7), {"constraints": ["acc >= 0.95"]}, Verdict.UNMET_CONSTRAINTS, r"misses acc >= 0.95 \(it is 0.8\)"),
        ((0.8, 0.7), {"limits": {"latency": 0.5}}, Verdict.TOO_SLOW, "limits\\['latency'\\]=0.5: the fastest of"),
    ],
)
@pytest.mark.parametrize("on_violation", ["skip", "prune"])
def test_where_no_plan_is_feasible_the_verdict_says_why(scores, options, verdict, sentence, on_violation):
    decision, trials = decided(*scores, on_violation=on_violation, **options)
    assert decision.verdict is verdict
    assert re.search(sentence, decision.sentence)
    nearest = (trials.ranked() or [trials.least_violating()])[0]
    assert decision.plan is (nearest if on_violation == "prune" else None)


@pytest.mark.parametrize("scores", [(0.8,), (0.8, math.nan)])
def test_plans_that_miss_the_target_are_not_said_to_have_no_score(scores):
    decision, trials = decided(*scores, tolerance=0.01)
    assert decision.verdict is Verdict.MISSED_BUDGETS
    nearest = min((scored.trial.sparsity for scored in trials.done), key=lambda sparsity: abs(sparsity - 0.7))
    assert f"within 0.01 of a sparsity of 0.7; the nearest has {nearest:.4f}" in decision.sentence


@pytest.mark.parametrize("healing", [0, 8])
def test_a_plan_that_misses_constraints_alone_may_be_healed_where_anything_is(healing):
    texts = ["acc >= 0.95"]
    _, trials = decided(0.8, 0.9, constraints=texts)
    settings = asked(healing=healing, constraints=tuple(parse_constraint(text, "constraints") for text in texts))
    found = plans_to_be_healed(trials, settings, None, lambda *_: pytest.fail("with a target, none is tried"))
    assert found == ([trials.done[1]] if healing else [])
