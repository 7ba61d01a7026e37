"""One round: from a trained module to a smaller one with its score, or to the module as it was.

A round traces the module, ranks the channels of every group, searches the coefficients and commits the best feasible
plan: the one with the best score on the sparsity target, or, where there is no target, the one with the highest
sparsity. It knows nothing of epochs, schedules and files; those are the callback's. Whatever fails before the commit,
or in it, the module and its optimizers are rolled back and the user's own exception goes on.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_softprune.graph import COSTS
from lightning_softprune.report import SearchProgress
from lightning_softprune.results import DRY_RUN, Costs, PruningResult
from lightning_softprune.round.commit import commit_plan
from lightning_softprune.round.feasibility import check_reachable, monitored
from lightning_softprune.round.journal import BASELINE, open_journal
from lightning_softprune.round.latency import Stopwatch
from lightning_softprune.round.prepare import PruningProblem
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.round.trials import ScoredPlan, Trials
from lightning_softprune.search import (
    Objective,
    SearchOutcome,
    SearchSpace,
    SearchStrategy,
    run_search,
    search_max_sparsity,
)
from lightning_softprune.surgery import OptimizerTransaction, Transaction
from lightning_softprune.trainer import ValidationScorer, averaged_copies, isolated_rng, mean_over_processes


def run_round(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    settings: RoundSettings,
    *,
    epoch: int,
    target: float | None,
    dense: Costs | None = None,
    dense_latency_ratio: float = 1.0,
    commit: bool = True,
) -> PruningResult:
    """Search, and prune the module in place.

    Args:
        trainer: The trainer in charge; its validation data score the trials.
        module: Its module.
        settings: What the user asked for.
        epoch: The epoch before which the round runs; with the seed, all that the round's random numbers depend on.
        target: Sparsity to reach, against the first dense model; ``None``: the highest that meets the constraints.
        dense: Costs of the first dense model; ``None``: the module as it is.
        dense_latency_ratio: How many times as long as the module now is the first dense model takes; of use for a
            latency limit.
        commit: Whether to prune; ``False`` searches only and leaves the module as it is.

    Returns:
        What was found; ``applied`` says whether the module was pruned.

    Raises:
        MisconfigurationException: A metric is not logged, nothing is prunable, a budget is out of reach, or no plan
            meets the constraints and that is to be an error.
        Exception: The user's own, with everything rolled back.
    """
    started = time.monotonic()
    seed = int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0])
    optimizers = list(trainer.optimizers)
    optimizers_before = OptimizerTransaction(optimizers)
    copies = averaged_copies(trainer)
    with (
        isolated_rng(seed),
        torch.inference_mode(False),
        Transaction(module, *copies) as transaction,
        ValidationScorer(trainer, module, max_batches=settings.search_batches, seed=seed) as scorer,
        open_journal(trainer, module, settings, scorer.batches, epoch=epoch, target=target) as journal,
    ):
        before = journal.scored(BASELINE, lambda: mean_over_processes(trainer, scorer.metrics())).metrics
        objective = Objective(settings.monitor, settings.mode, settings.constraints)
        objective = replace(objective, scale=monitored(before, objective))
        problem = PruningProblem.prepare(trainer, module, scorer, settings, np.random.default_rng(seed))
        costs_before = problem.costs_of((0,) * len(problem.groups))
        dense = dense or costs_before
        space = problem.space(settings, dense, target)
        trials = Trials(trainer, module, scorer, settings, objective, problem, space, target, journal)
        strategy, outcome = _search(trainer, settings, space, trials, target, seed, before)
        stopwatch = Stopwatch(trainer, module, scorer, problem, dense_latency_ratio)
        best, why = _choose(trainer, settings, trials, stopwatch)
        reason = "" if best else why
        if not commit:
            reason = f"{DRY_RUN}; {why}" if why else DRY_RUN
        elif best is None and settings.on_violation == "error":
            raise MisconfigurationException(f"on_violation='error': {why}")
        elif why:
            rank_zero_warn(f"SoftPruning: the model is {'pruned all the same' if best else 'left as it is'}: {why}")
        chosen = None if best is None else trials.done.index(best)
        latency_before, latency_after = stopwatch.compare(best) if best else (None, None)
        if best is not None and commit:
            transaction.rollback()  # also what the user's hooks may have done to parameter values meanwhile
            try:
                best = commit_plan(trainer, module, copies, scorer, settings, problem, trials, best, seed)
            except BaseException:
                optimizers_before.rollback()
                raise
            transaction.commit()
            chosen = trials.done.index(best)
        applied = commit and best is not None
        slow = latency_after / latency_before / dense_latency_ratio if latency_before and latency_after else None
        best = best or trials.unpruned(before)
        costs_after = problem.costs_of(best.counts)
        return PruningResult(
            epoch=epoch,
            sparsity=1.0 - getattr(costs_after, settings.cost) / getattr(dense, settings.cost),
            target_sparsity=target,
            score_before=before[settings.monitor],
            score_after=best.trial.score,
            metrics_before=before,
            metrics_after=best.trial.metrics,
            costs_before=costs_before,
            costs_after=costs_after,
            groups=problem.group_results(best.counts, best.trial.coefficients),
            evaluations=1 + len(trials.done) - trials.reused,
            seconds=time.monotonic() - started,
            strategy=type(strategy).__name__,
            stop_reason=outcome.stop_reason,
            applied=applied,
            trials=tuple(scored.trial for scored in trials.done),
            monitor=settings.monitor,
            mode=settings.mode,
            sensitivity=trials.sensitivity(strategy),
            reason=reason,
            chosen=chosen,
            tolerance=settings.tolerance,
            cost=settings.cost,
            limits=dict(settings.limits or {}),
            constraints=tuple(constraint.text for constraint in settings.constraints),
            latency_before=latency_before,
            latency_after=latency_after,
            shares={
                **{name: getattr(costs_after, name) / (getattr(dense, name) or 1) for name in COSTS},
                **({} if slow is None else {"latency": slow}),
            },
            left_out=problem.left_out,
        )


def _choose(
    trainer: pl.Trainer, settings: RoundSettings, trials: Trials, stopwatch: Stopwatch
) -> tuple[ScoredPlan | None, str]:
    """The plan to commit, and what is wrong with it; or none, and why."""
    limit = (settings.limits or {}).get("latency")
    ranked = trials.ranked()
    best = ranked[0] if ranked else None
    why = "" if best else trials.explain_infeasible()
    if best is not None and limit is not None:
        best, why = stopwatch.first_within(limit, ranked)
    if best is None and settings.on_violation == "prune":
        best = ranked[0] if ranked else trials.least_violating()
    return _agreed(trainer, best), why


def _agreed(trainer: pl.Trainer, best: ScoredPlan | None) -> ScoredPlan | None:
    """Make sure that every process is about to commit the same plan: rank zero's."""
    counts = None if best is None else best.counts
    same = trainer.strategy.broadcast(counts) == counts
    if not trainer.strategy.reduce_boolean_decision(same, all=True):
        raise RuntimeError(
            "the processes found different plans, so nothing was pruned; a metric or a hook that depends on the rank "
            "in an unsynchronised way may be the cause"
        )
    return best


def _search(
    trainer: pl.Trainer,
    settings: RoundSettings,
    space: SearchSpace,
    trials: Trials,
    target: float | None,
    seed: int,
    before: dict[str, float],
) -> tuple[SearchStrategy, SearchOutcome]:
    check_reachable(space, settings, target)
    strategy = copy.deepcopy(settings.search)
    strategy.is_global_zero = trainer.is_global_zero

    def check(at: SearchSpace) -> None:
        try:
            strategy.check(at)
        except ValueError as error:
            raise MisconfigurationException(f"search: {error}") from error

    dense = space.key(np.zeros(space.size))
    cache = {} if any(dense) else {dense: trials.objective.loss(before)}  # bounds may forbid the dense model
    with SearchProgress(
        strategy.max_evaluations, settings.monitor, settings.mode, settings.verbose, trainer=trainer
    ) as bar:
        evaluate = trials.evaluate_with(bar)
        if target is None:
            outcome = search_max_sparsity(
                strategy,
                space,
                evaluate,
                highest_feasible_sparsity=trials.highest_feasible_sparsity(before),
                least_violation_at=trials.least_violation_at,
                seed=seed,
                cache=cache,
                on_target=check,
            )
        else:
            check(space)
            outcome = run_search(
                strategy,
                space,
                evaluate,
                seed=seed,
                cache=cache,
                on_asked=lambda x, *_: trials.reuse_unpruned(x, before),
            )
        return strategy, outcome
