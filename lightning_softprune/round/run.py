"""One round: from a trained module to a smaller one with its score, or to the module as it was.

A round traces the module, ranks the channels of every group, searches the coefficients and commits the best feasible
plan: the one with the best score on the sparsity target, or, where there is no target, the one with the highest
sparsity. It knows nothing of epochs, schedules and files; those are the callback's. Whatever fails before the commit,
or in it, the module and its optimizers are rolled back and the user's own exception goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.checkpoint import ModelShapes
from lightning_softprune.graph import record_usage
from lightning_softprune.report import Phases
from lightning_softprune.results import DRY_RUN, Costs, Outcome, PruningResult
from lightning_softprune.round.commit import commit
from lightning_softprune.round.decision import Decision, Verdict, decide, plans_to_be_healed, pruned_already
from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.round.feasibility import check_prunable, objective_of
from lightning_softprune.round.holders import all_optimizers
from lightning_softprune.round.journal import BASELINE, Journal, open_journal
from lightning_softprune.round.latency import Stopwatch
from lightning_softprune.round.preparing import leave_yardsticks_alone, prepare_problem
from lightning_softprune.round.racing import choose_part, race
from lightning_softprune.round.rehearsal import Rehearsed, rehearse_plan
from lightning_softprune.round.searching import search, try_one_plan
from lightning_softprune.round.settings import Goal, RoundSettings
from lightning_softprune.round.trials import ScoredPlan, Trials
from lightning_softprune.search import COSTS, SearchOutcome, SearchStrategy
from lightning_softprune.surgery import Transaction
from lightning_softprune.trainer import (
    MisconfigurationException,
    ModuleRunner,
    averaged_copies,
    isolated_rng,
    seed_from,
    watched,
)


def run_round(trainer: pl.Trainer, module: pl.LightningModule, settings: RoundSettings, goal: Goal) -> PruningResult:
    """Search, and prune the module in place.

    Args:
        trainer: The trainer in charge; its validation data score the trials.
        module: Its module.
        settings: What the user asked for.
        goal: What this round aims at.

    Returns:
        What was found; ``applied`` says whether the module was pruned.

    Raises:
        MisconfigurationException: A metric is not logged, nothing is prunable, a budget is out of reach, or no plan
            meets the constraints and that is to be an error.
        Exception: The user's own, with everything rolled back.
    """
    started, settings = time.monotonic(), goal.asked(settings)
    phases = Phases("auto" if settings.verbose else "none", trainer)
    _refuse_made_in_inference_mode(module)
    seed = seed_from(settings.seed, goal.epoch)
    copies, form = averaged_copies(trainer), ModelShapes.of(module)
    with (
        isolated_rng(seed),
        watched(phases.tick),
        torch.inference_mode(False),
        Transaction(module, *copies, optimizers=all_optimizers(trainer, module)) as transaction,
        _runner(trainer, module, settings, seed) as runner,
        _journal(runner, settings, goal) as journal,
    ):
        leave_yardsticks_alone(runner, settings)
        with record_usage(module, runner.left_alone) as judged, phases("baseline"):
            journal.confirm(BASELINE, runner.metrics)
            before, baseline_seconds = journal.scored(BASELINE, runner.metrics)
        objective = objective_of(settings, before, runner.directions)
        settings = replace(settings, mode=objective.mode)
        problem = prepare_problem(runner, settings, np.random.default_rng(seed), judged.parameters, phases)
        check_prunable(problem, goal)
        dense = goal.dense or problem.costs_of(problem.unpruned_plan())
        space = problem.space(settings, dense, goal.target)
        stopwatch = Stopwatch(runner, problem, goal.dense_latency_ratio, settings.latency_batch)
        while True:
            evaluator = Evaluator(runner, problem, journal, Trials(objective, space, goal.target))
            evaluator.before, evaluator.baseline_seconds = before, baseline_seconds
            strategy, outcome, decision = _search(evaluator, settings, goal, stopwatch, phases)
            if evaluator.confirm(decision.plan or evaluator.trials.least_violating()):
                break  # else the journal was wrong, and is set aside
        committing = _Committing(evaluator, transaction, copies, judged.parameters, phases, stopwatch)
        decision, rehearsed = _carry_out(committing, settings, goal, decision)
        best = decision.plan if rehearsed is None else rehearsed.plan
        if goal.commit and rehearsed is not None:
            commit(runner, copies, transaction, rehearsed.surgery, form, goal.judged)
        found = _Found(before, dense, strategy, outcome, decision, best, rehearsed)
        result = _result(settings, goal, evaluator, stopwatch, found)
    _hand_over(goal, rehearsed)
    return replace(result, seconds=time.monotonic() - started, phases=phases.seconds)


def _refuse_made_in_inference_mode(module: nn.Module) -> None:
    """Raise where parameters are nothing that can be trained: lazy ones that `Trainer.validate` has made."""
    made = [name for name, one in module.named_parameters() if not is_lazy(one) and one.is_inference()]
    if made:
        raise MisconfigurationException(
            f"{', '.join(made)}: made in inference mode, by a lazy layer that `Trainer.validate` was the first to run;"
            " neither training nor pruning can use them. Run the module once before, or give the Trainer"
            " inference_mode=False"
        )


@dataclass(frozen=True)
class _Committing:
    """What it takes to make the module what a plan says: to time the plan, and to rehearse its commit."""

    evaluator: Evaluator
    transaction: Transaction
    copies: Sequence[nn.Module]
    judged: Set[str]
    phases: Phases
    stopwatch: Stopwatch

    def compare(self, scored: ScoredPlan) -> None:
        """Time a plan beside the dense module."""
        self.transaction.rollback()  # also what the user's hooks may have done to parameter values meanwhile
        with self.phases("timing"):
            self.stopwatch.compare(scored.plan)

    def rehearse(self, scored: ScoredPlan, asked: RoundSettings) -> Rehearsed:
        """Make the module what a plan says."""
        self.transaction.rollback()
        return rehearse_plan(self.evaluator, asked, self.copies, scored, self.judged, self.phases)


def _carry_out(
    committing: _Committing, settings: RoundSettings, goal: Goal, decision: Decision
) -> tuple[Decision, Rehearsed | None]:
    """Make the module what was decided, or smaller where it meets the constraints because it is healed."""
    if goal.commit and decision.verdict in (Verdict.FEASIBLE, Verdict.UNMET_CONSTRAINTS):
        chosen = decision.plan if decision.verdict is Verdict.FEASIBLE else None
        for scored in plans_to_be_healed(committing.evaluator.trials, settings, chosen, committing.rehearse):
            committing.compare(scored)
            rehearsed = committing.rehearse(scored, settings)
            if rehearsed.plan.violation == 0.0:
                return Decision(rehearsed.plan, Verdict.FEASIBLE), rehearsed
    _tell(decision, settings, goal)
    if decision.plan is None:
        return decision, None
    committing.compare(decision.plan)
    wanted = goal.commit or goal.rehearse
    return decision, committing.rehearse(decision.plan, _shorter(settings, goal)) if wanted else None


def _hand_over(goal: Goal, rehearsed: Rehearsed | None) -> None:
    """Give the dense network to whoever lets it teach further."""
    if goal.commit and goal.take_teacher is not None and rehearsed is not None and rehearsed.teacher is not None:
        rehearsed.teacher.let_go()
        goal.take_teacher(rehearsed.teacher)


def _runner(trainer: pl.Trainer, module: pl.LightningModule, settings: RoundSettings, seed: int) -> ModuleRunner:
    batches, limit = settings.least_calibration_batches, settings.memory_limit
    return ModuleRunner(trainer, module, memory_limit=limit, seed=seed, calibration_batches=batches)


def _shorter(settings: RoundSettings, goal: Goal) -> RoundSettings:
    """The settings of a commit; one batch of healing shows all that could fail where all of it is taken back."""
    return settings if goal.commit else replace(settings, healing=min(settings.healing, 1))


def _search(
    evaluator: Evaluator, settings: RoundSettings, goal: Goal, stopwatch: Stopwatch, phases: Phases
) -> tuple[SearchStrategy, SearchOutcome, Decision]:
    """Search, and decide.

    Raises:
        Exception: The user's own, where their code fails with every plan.
    """
    runner, trials, before = evaluator.runner, evaluator.trials, evaluator.before
    enough = pruned_already(evaluator.problem, trials, before, goal)
    if enough is not None:
        return settings.search, SearchOutcome(0, 0, "pruned already"), enough
    if not goal.rehearse:
        evaluator.on = choose_part(evaluator, settings, before, lambda: phases("choosing a part"))
    with phases.timed("searching"):
        strategy, outcome = (try_one_plan if goal.rehearse else search)(evaluator, settings, goal, before)
    if trials.failure is not None and all(scored.trial.reason for scored in trials.done):
        raise trials.failure
    if failed := [scored.trial.reason for scored in trials.done if scored.trial.reason]:
        rank_zero_info(f"SoftPruning: {len(failed)} of {len(trials.done)} plans could not be scored: {failed[0]}")
    if goal.rehearse:
        return strategy, outcome, Decision(trials.done[-1], Verdict.FEASIBLE)  # feasible or not
    if evaluator.on.share < 1.0:
        with phases("finalists"):
            race(evaluator, settings)
    with phases("timing") if "latency" in (settings.limits or {}) else nullcontext():
        decision = decide(runner, settings, evaluator.problem, trials, before, stopwatch)
    if trials.failure is not None and decision.verdict is Verdict.NOT_A_NUMBER:
        raise trials.failure  # the user's own, which is why there is no score
    return strategy, outcome, decision


def _journal(runner: ModuleRunner, settings: RoundSettings, goal: Goal) -> Journal:
    if goal.rehearse:
        return Journal(None, {})
    data = runner.validation_batches
    return open_journal(runner.trainer, runner.module, settings, data, epoch=goal.epoch, target=goal.target)


def _outcome(goal: Goal, best: ScoredPlan | None) -> Outcome:
    if not goal.commit:
        return Outcome.DRY_RUN
    return Outcome.SKIPPED if best is None else Outcome.APPLIED


def _tell(decision: Decision, settings: RoundSettings, goal: Goal) -> None:
    """Warn, or raise, where no plan is feasible."""
    if not goal.commit or decision.verdict is Verdict.FEASIBLE:
        return
    if decision.verdict is Verdict.PRUNED_ALREADY:
        rank_zero_info(f"SoftPruning: the model is left as it is: {decision.sentence}")
        return
    if decision.plan is None and settings.on_violation == "error":
        raise MisconfigurationException(f"on_violation='error': {decision.sentence}")
    what = "left as it is" if decision.plan is None else "pruned all the same"
    rank_zero_warn(f"SoftPruning: the model is {what}: {decision.sentence}")


@dataclass(frozen=True)
class _Found:
    """What a round has found: metrics before, dense costs, the search, the decision, and what was made of it."""

    before: dict[str, float]
    dense: Costs
    strategy: SearchStrategy
    outcome: SearchOutcome
    decision: Decision
    best: ScoredPlan | None
    rehearsed: Rehearsed | None


def _result(
    settings: RoundSettings, goal: Goal, evaluator: Evaluator, stopwatch: Stopwatch, found: _Found
) -> PruningResult:
    trials, problem = evaluator.trials, evaluator.problem
    final = found.best or trials.unpruned(problem.unpruned_plan(), found.before)
    costs_after = problem.costs_of(final.plan)
    shares = {name: getattr(costs_after, name) / dense for name in COSTS if (dense := getattr(found.dense, name))}
    latencies = None if found.best is None else stopwatch.compare(found.best.plan)
    if latencies is not None:
        shares["latency"] = stopwatch.share_of_dense(final.plan)
    reason = trials.shortfall(found.best) if found.best else found.decision.sentence
    if not goal.commit:
        sentence = found.decision.sentence or reason
        reason = f"{DRY_RUN}; {sentence}" if sentence else DRY_RUN
    return PruningResult(
        epoch=goal.epoch,
        sparsity=1.0 - getattr(costs_after, settings.cost) / getattr(found.dense, settings.cost),
        target_sparsity=goal.target,
        score_before=found.before[settings.monitor],
        score_after=final.trial.score,
        metrics_before=found.before,
        metrics_after=final.trial.metrics,
        costs_before=problem.costs_of(problem.unpruned_plan()),
        costs_after=costs_after,
        groups=problem.group_results(final.plan, final.trial.coefficients),
        evaluations=1 + len(trials.done) - trials.reused - trials.rescored,
        passes=1.0 + evaluator.passes,
        seconds=0.0,
        strategy=type(found.strategy).__name__,
        stop_reason=found.outcome.stop_reason,
        applied=goal.commit and found.best is not None,
        trials=tuple(scored.trial for scored in trials.done),
        monitor=settings.monitor,
        mode=settings.mode,
        sensitivity=evaluator.sensitivity(found.strategy.sensitivity),
        reason=reason,
        outcome=_outcome(goal, found.best),
        chosen=None if found.best is None else trials.done.index(found.best),
        tolerance=settings.tolerance,
        cost=settings.cost,
        limits=dict(settings.limits or {}),
        constraints=tuple(constraint.text for constraint in settings.constraints),
        latency_before=None if latencies is None else latencies[0],
        latency_after=None if latencies is None else latencies[1],
        latency_spread=None if latencies is None else latencies[2],
        device="" if latencies is None else stopwatch.device,
        latency_batch=None if latencies is None else stopwatch.batch,
        layers=stopwatch.layers.get(final.plan, ()),
        shares=shares,
        left_out=problem.left_out,
        coverage=problem.coverage,
        numbers=problem.numbers(found.dense),
        score_compensated=None if found.rehearsed is None else found.rehearsed.compensated,
        healing=None if found.rehearsed is None else found.rehearsed.healing,
    )
