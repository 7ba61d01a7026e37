"""The search of a round: a strategy proposes, the evaluator scores, a bar shows it."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lightning_softprune.report import SearchProgress, Style
from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.round.feasibility import check_reachable, check_strategy, refusals
from lightning_softprune.round.latency import seconds_to_compare
from lightning_softprune.round.racing import finalists
from lightning_softprune.round.settings import Goal, RoundSettings
from lightning_softprune.search import (
    MaxSparsitySearch,
    SearchLoop,
    SearchOutcome,
    SearchSpace,
    SearchStrategy,
    UniformBaseline,
)
from lightning_softprune.utilities.arrays import FloatArray
from lightning_softprune.utilities.wording import counted


def search(
    evaluator: Evaluator, settings: RoundSettings, goal: Goal, before: Mapping[str, float]
) -> tuple[SearchStrategy, SearchOutcome]:
    """Run a copy of the user's strategy on the round's space; what it has asked for are the evaluator's trials.

    Args:
        evaluator: Scores plans.
        settings: What the user asked for.
        goal: What the round aims at.
        before: Metrics of the module as it is.

    Returns:
        The strategy after its search, and how the search went.

    Raises:
        MisconfigurationException: The budgets are out of reach, or the strategy cannot serve this space.
    """
    trials, trainer = evaluator.trials, evaluator.runner.trainer
    space = trials.space
    check_reachable(evaluator.problem, space, settings, trials.target)
    strategy = copy.deepcopy(settings.search)
    strategy.is_global_zero = trainer.is_global_zero
    if goal.earlier is not None:
        strategy.expected = goal.earlier.expected_curves(evaluator.problem.realisation.coefficients.names)

    def check(at: SearchSpace) -> None:
        with refusals():
            strategy.check(at)

    if trials.target is not None:
        space = _aimed(strategy, space)
    dense = space.key(np.zeros(space.size))
    cache = {} if any(dense) else {dense: trials.objective.loss(before)}  # bounds may forbid the dense model
    style: Style = "auto" if settings.verbose else "none"
    planned = strategy.max_evaluations if trials.target is None else strategy.planned_evaluations(space)
    progress_bar = SearchProgress(planned, settings.monitor, settings.mode, style, trainer=trainer)
    progress_bar.say(_announcement(evaluator, planned, settings, goal))
    with progress_bar as bar:

        def evaluate(x: FloatArray) -> float:
            scored = evaluator.score(x)
            bar.advance(scored.trial.score, trials.best.trial.score if trials.best else math.nan)
            return math.nan if scored.trial.reason else trials.objective.loss(scored.judged)

        if trials.target is None:
            unpruned = trials.unpruned(evaluator.problem.unpruned_plan(), before)
            progress = _Progress(trials.highest_feasible_sparsity(unpruned), trials.least_violation_at, check)
            outcome = MaxSparsitySearch(strategy, space, evaluate, progress, evaluator.runner.seed, cache).run()
        else:
            check(space)

            def reuse(x: FloatArray, *_: object) -> None:
                evaluator.reuse_unpruned(x, before)

            outcome = SearchLoop(evaluate, evaluator.runner.seed, cache, on_asked=reuse).run(strategy, space)
    return strategy, outcome


def _aimed(strategy: SearchStrategy, space: SearchSpace) -> SearchSpace:
    """The space from the target up; where a strategy proposes nothing there, the one on both sides of the target."""
    upper = space.at_least_target()
    with contextlib.suppress(ValueError):
        strategy.check_target(upper)
        return upper
    with refusals():
        strategy.check_target(space)
    return space


_PASSES_OF_A_LESSON = 4
"""A batch of healing takes about as long as so many passes: the dense network's, and a training step."""


def _announcement(evaluator: Evaluator, planned: int | None, settings: RoundSettings, goal: Goal) -> str:
    """What the round is about to do, and how long that may take, judged by the pass over the module as it is."""
    healing = settings.healing
    healed = f"; then healing on {healing:,} batches" if healing else ""
    if healing and (sizes := evaluator.runner.sizes()) is not None:
        each = evaluator.baseline_seconds / max(sum(map(sum, sizes)), 1)
        seconds = _PASSES_OF_A_LESSON * healing * evaluator.runner.training_batch_size * each
        healed += f", about {seconds:.2g} s" if seconds else ""
    groups, size = len(evaluator.problem.groups), evaluator.trials.space.size
    names = f"{counted(groups, 'group')}, {counted(size, 'coefficient')}"
    each = evaluator.baseline_seconds * evaluator.on.share
    if planned is None:
        return f"SoftPruning: {names}, about {each:.2g} s for each evaluation{healed}"
    last = min(finalists(evaluator), planned)
    seconds = planned * each + last * evaluator.baseline_seconds + _seconds_of_commit(evaluator, settings, goal)
    on_all = f" and {counted(last, 'finalist')} on all data" if last else ""
    return f"SoftPruning: {names}, up to {planned:,} evaluations{on_all}, about {seconds:.2g} s{healed}"


def _seconds_of_commit(evaluator: Evaluator, settings: RoundSettings, goal: Goal) -> float:
    """What comes after the search: the plan is timed beside the module as it is, refitted, and scored once more."""
    passes = 1 if goal.commit and settings.compensation == "least_squares" else 0
    sizes = evaluator.runner.sizes()
    batches = 0 if sizes is None else sum(map(len, sizes))
    timed = seconds_to_compare(evaluator.baseline_seconds / batches) if batches else 0.0
    return passes * evaluator.baseline_seconds + timed


def try_one_plan(evaluator: Evaluator, settings: RoundSettings, *_: object) -> tuple[SearchStrategy, SearchOutcome]:
    """Score the plan with the same coefficient everywhere, and ask the user's strategy whether it could search here.

    Without a target, the plan lies halfway to the highest sparsity that the bounds allow. Takes what `search` takes.

    Raises:
        MisconfigurationException: The budgets are out of reach, or the strategy cannot serve this space.
    """
    trials = evaluator.trials
    check_reachable(evaluator.problem, trials.space, settings, trials.target)
    space = trials.space if trials.target is not None else trials.space.halfway()
    check_strategy(trials.space, settings, trials.target)

    def evaluate(x: FloatArray) -> float:
        scored = evaluator.score(x)
        return math.nan if scored.trial.reason else trials.objective.loss(scored.judged)

    outcome = SearchLoop(evaluate, evaluator.runner.seed).run(UniformBaseline(), space)
    return UniformBaseline(), outcome


@dataclass(frozen=True)
class _Progress:
    """How far the trials have come towards the constraints."""

    highest_feasible_sparsity: Callable[[], float]
    least_violation_at: Callable[[float], float]
    begin: Callable[[SearchSpace], None]
