"""On how much data plans are told apart, and the race of the best: against scores of all samples, which are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from lightning_softprune import GradientSearch, SensitivitySearch, UniformBaseline
from lightning_softprune.round.decision import Verdict, decide
from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.round.journal import Journal
from lightning_softprune.round.racing import choose_part, least_share, race
from lightning_softprune.round.trials import WHOLE, Trials
from lightning_softprune.search import MaxSparsitySearch, Objective, Plan, SearchLoop, parse_constraint
from lightning_softprune.testing import mlp_space

WIDTHS = [8, 16, 16, 16, 4]
BATCH = 50


class Samples:
    """A network that is only numbers: what each plan loses on each sample. It is runner, problem and surgery in one."""

    identity = "network"

    def __init__(self, seed, batches=120, drop=1.0, sort=False):
        rng = np.random.default_rng(seed)
        self.sums = {}
        self.space = mlp_space(WIDTHS, target=0.6, tolerance=0.02).at_least_target()  # as a round does
        self.batches, groups = batches, len(WIDTHS) - 2
        self.base = rng.gamma(2.0, 0.2, BATCH * batches)
        if sort:
            self.base.sort()
        weights = rng.uniform(0.2, 2.0, groups)
        self.weights = weights * (rng.gamma(1.0, 1.0, (BATCH * batches, groups)) - 1.0 + drop)
        self.module, self.removed, self.passes = None, (0,) * groups, 0.0
        self.realisation = SimpleNamespace(reported=tuple, coefficients=SimpleNamespace(names=list("abc")))

    def emptied(self, plan):
        """No layer is."""
        return ()

    def losses(self, removed):
        """One per sample."""
        return self.base + self.weights @ (np.array(removed) / 16) ** 2

    def metrics(self, part=WHOLE.part):
        which = part.of(self.batches)
        self.passes += len(which) / self.batches
        loss = self.losses(self.removed)[which.start * BATCH : which.stop * BATCH]
        return {"loss": float(loss.mean()), "good": float((loss < 1.0).mean()), "total": float(loss.sum())}

    def plan_of(self, x):
        return Plan(tuple(tuple(range(int(n))) for n in self.space.realise(x[None])[0]))

    def unpruned_plan(self):
        return Plan(((),) * len(self.removed))

    def prune(self, module, plan):
        self.removed = plan.counts
        return self

    def undo(self):
        self.removed = (0,) * len(self.removed)

    def share_of(self, part, loader=None):
        return len(part.of(self.batches)) / self.batches

    def sizes(self):
        return [[BATCH] * self.batches]

    def broadcast(self, value):
        return value

    def all_agree(self, flag):
        return flag

    def costs_of(self, plan):
        return SimpleNamespace(macs=1000 - sum(plan.counts))


def settings_of(search=None, **given):
    values = {"search_batches": None, "monitor": "loss", "constraints": (), "verbose": False, "limits": None}
    values.update(search=search or SensitivitySearch(levels=4), on_violation="skip", **given)
    return SimpleNamespace(**values)


def searched(samples, settings):
    """A round's search and decision: what is decided, and the evaluator."""
    before = samples.metrics()
    samples.passes = 0.0
    objective = Objective("loss", "min", settings.constraints, scale=before["loss"])
    evaluator = Evaluator(samples, samples, Journal(None, {}), Trials(objective, samples.space, 0.6))
    evaluator.on = choose_part(evaluator, settings, before)

    def evaluate(x):
        return objective.loss(evaluator.score(x).judged)

    dense = samples.space.key(np.zeros(samples.space.size))
    SearchLoop(evaluate, 0, {dense: objective.loss(before)}).run(settings.search, samples.space)
    race(evaluator, settings)
    return decide(samples, settings, samples, evaluator.trials, {}, None), evaluator


def best_of_all(evaluator, samples):
    """By brute force: of all plans tried on target and no smaller, the one of the lowest loss on all samples."""
    tried = {scored.plan for scored in evaluator.trials.done if scored.budget_gap == 0}
    tried = {plan for plan in tried if samples.space.sparsity(np.array([plan.counts]))[0] >= 0.6 - 1e-9}
    return min(tried, key=lambda plan: samples.losses(plan.counts).mean())


@pytest.mark.slow
def test_racing_finds_what_all_data_find_at_a_fraction_of_the_passes():
    same, shares = 0, []
    for seed in range(20):
        samples = Samples(seed)
        decision, evaluator = searched(samples, settings_of(GradientSearch(max_evaluations=60)))
        assert decision.verdict is Verdict.FEASIBLE
        assert decision.plan.trial.share == 1.0
        assert decision.plan.trial.score == pytest.approx(samples.losses(decision.plan.plan.counts).mean())
        assert evaluator.passes == pytest.approx(samples.passes)
        same += decision.plan.plan == best_of_all(evaluator, samples)
        plans = len(evaluator.trials.done) - evaluator.trials.rescored
        shares.append(samples.passes / plans)
        on = evaluator.on
        assert 1000 <= on.share * BATCH * samples.batches <= 0.5 * BATCH * samples.batches
    assert same >= 19
    assert np.mean(shares) < 0.5


@pytest.mark.slow
def test_the_noise_is_what_differences_scatter_by():
    """Of the module as it is and the uniform plan, on the part and on all: over many draws of the samples."""
    ratios = []
    for seed in range(40):
        samples = Samples(seed)
        _, evaluator = searched(samples, settings_of(SensitivitySearch(levels=2, refine=1)))
        on = evaluator.on
        plan = samples.plan_of(samples.space.scale(np.ones(3)))
        difference = samples.losses(plan.counts) - samples.losses((0, 0, 0))
        part = difference[: round(on.share * len(difference))]
        assert on.noise <= 0.11 * difference.mean() * 1.5
        ratios.append((part.mean() - difference.mean()) / on.noise)
    assert 0.6 < np.std(ratios) < 1.6


@pytest.mark.parametrize(
    ("samples", "settings"),
    [
        (Samples(0, batches=20), settings_of()),  # a thousand samples
        (Samples(0, batches=30), settings_of()),  # of which more than half would be needed
        (Samples(0), settings_of(UniformBaseline())),
        (Samples(0), settings_of(GradientSearch(max_evaluations=12))),
    ],
    ids=["few", "more than half", "one plan", "few plans"],
)
def test_where_a_part_cannot_pay_all_data_are_used_without_a_pass_more(samples, settings):
    decision, evaluator = searched(samples, settings)
    assert evaluator.on is WHOLE
    assert samples.passes == len(evaluator.trials.done) == evaluator.passes
    assert {scored.trial.share for scored in evaluator.trials.done} == {1.0}
    assert decision.plan is evaluator.trials.best


@pytest.mark.parametrize("samples", [Samples(1, sort=True), Samples(1, drop=0.02)], ids=["sorted", "noisy"])
def test_where_a_part_says_little_of_all_data_these_are_used(samples):
    _, evaluator = searched(samples, settings_of())
    assert evaluator.on is WHOLE
    assert samples.passes > len(evaluator.trials.done)


def test_search_batches_is_the_part_and_finalists_are_scored_on_all():
    samples = Samples(3)
    decision, evaluator = searched(samples, settings_of(search_batches=10))
    trials = evaluator.trials.done
    finals = [scored for scored in trials if scored.trial.share == 1.0]
    assert {scored.trial.share for scored in trials} == {10 / 120, 1.0}
    for scored in trials:
        count = round(scored.trial.share * len(samples.base))
        assert scored.trial.score == pytest.approx(samples.losses(scored.plan.counts)[:count].mean())
    assert trials[-len(finals) :] == finals
    assert 1 <= len(finals) <= 5
    assert decision.plan is min(finals, key=lambda scored: scored.trial.score)
    assert samples.passes == pytest.approx((len(trials) - len(finals) + 1) * 10 / 120 + len(finals))


def test_as_many_search_batches_as_there_are_are_all():
    _, evaluator = searched(Samples(3), settings_of(search_batches=500))
    assert evaluator.on is WHOLE


@pytest.mark.slow
def test_a_constraint_is_judged_on_all_data_and_the_list_is_gone_down():
    """The bound lies where the part lets plans pass that all data do not."""
    outcomes = set()
    for seed in range(12):
        samples = Samples(seed)
        _, evaluator = searched(samples, settings_of(search_batches=20))
        onto = sorted(samples_good(samples, scored) for scored in evaluator.trials.done if scored.budget_gap == 0)
        bound = onto[-2]
        constraint = parse_constraint(f"good >= {bound}", "constraints[0]")
        decision, evaluator = searched(samples, settings_of(search_batches=20, constraints=(constraint,)))
        if decision.verdict is Verdict.FEASIBLE:
            assert samples_good(samples, decision.plan) >= bound - 1e-12
            rejected = [s for s in evaluator.trials.done if s.trial.share == 1.0 and s.violation]
            outcomes.add(bool(rejected))
        else:
            assert decision.verdict is Verdict.UNMET_CONSTRAINTS
    assert outcomes == {True, False}


def samples_good(samples, scored):
    return float((samples.losses(scored.plan.counts) < 1.0).mean())


def highest(samples, settings):
    """A round's search for the highest sparsity, and its decision."""
    before = samples.metrics()
    samples.passes = 0.0
    objective = Objective("loss", "min", settings.constraints, scale=before["loss"])
    trials = Trials(objective, samples.space, None)
    evaluator = Evaluator(samples, samples, Journal(None, {}), trials)
    evaluator.on = choose_part(evaluator, settings, before)

    def evaluate(x):
        return objective.loss(evaluator.score(x).judged)

    progress = SimpleNamespace(
        begin=lambda space: None,
        highest_feasible_sparsity=trials.highest_feasible_sparsity(trials.unpruned(samples.unpruned_plan(), before)),
        least_violation_at=trials.least_violation_at,
    )
    MaxSparsitySearch(settings.search, samples.space, evaluate, progress, 0, {(0, 0, 0): before["loss"]}).run()
    race(evaluator, settings)
    return decide(samples, settings, samples, trials, {}, None).plan


@pytest.mark.slow
def test_the_highest_sparsity_on_a_part_meets_its_constraint_on_all_data():
    gaps, passes = [], []
    for seed in range(8):
        dense = Samples(seed).metrics()["loss"]
        constraint = (parse_constraint(f"loss <= {dense + 0.3}", "constraints[0]"),)
        found = {}
        for batches in (None, 10_000):
            samples = Samples(seed)
            plan = highest(samples, settings_of(search_batches=batches, constraints=constraint))
            assert plan.trial.share == 1.0
            assert samples.losses(plan.plan.counts).mean() <= dense + 0.3
            found[batches] = plan.trial.sparsity, samples.passes
        gaps.append(found[10_000][0] - found[None][0])
        passes.append(found[None][1] / found[10_000][1])
    assert max(gaps) < 0.05
    assert np.mean(passes) < 0.7


@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ([[64] * 100], 16 / 100),  # 1,000 samples are 15.6 batches; the blocks are of whole batches
        ([[1000] * 100], 8 / 100),
        ([[64] * 100, [64] * 50], 16 / 100),  # 16 and 8 batches
        ([[64] * 15], 1.0),
        ([[5000] * 7], 1.0),
        ([], 1.0),
    ],
)
def test_a_part_has_eight_batches_and_a_thousand_samples_at_least(sizes, share):
    assert least_share(sizes) == share


def test_what_a_part_says_is_shifted_by_what_the_dense_model_has_on_all_data_and_not_on_the_part():
    samples = Samples(2)
    _, evaluator = searched(samples, settings_of())
    samples.undo()
    offset = samples.metrics()["loss"] - samples.metrics(evaluator.on.part)["loss"]
    part = [scored for scored in evaluator.trials.done if scored.trial.share < 1.0]
    assert part
    assert abs(offset) > 1e-3
    for scored in part:
        assert scored.judged["loss"] == pytest.approx(scored.trial.score + offset)
        assert scored.loss == scored.judged["loss"]


def test_a_sum_is_judged_as_one_over_all_data():
    samples = Samples(2)
    samples.sums = {"total": None}
    constraint = parse_constraint("total <= 1e9", "constraints[0]")
    _, evaluator = searched(samples, settings_of(search_batches=20, constraints=(constraint,)))
    part = [scored for scored in evaluator.trials.done if scored.trial.share < 1.0]
    assert part
    for scored in part:
        assert scored.trial.metrics["total"] == pytest.approx(scored.trial.score * 20 * BATCH)
        assert scored.judged["total"] == pytest.approx(scored.judged["loss"] * 120 * BATCH)


def test_where_a_sum_counts_plans_are_told_apart_on_all_data_at_once():
    """No part is tried out, whose noise could not be compared with a difference between sums over all data."""
    constraint = parse_constraint("total <= 1e9", "constraints[0]")
    for constraints, whole in (((constraint,), True), ((), False)):
        samples = Samples(2)
        samples.sums = {"total": None}
        _, evaluator = searched(samples, settings_of(constraints=constraints))
        assert (evaluator.on is WHOLE) == whole
        assert (samples.passes == pytest.approx(len(evaluator.trials.done))) == whole
