"""The search of a round: a strategy proposes, the evaluator scores, a bar shows it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_softprune.report import SearchProgress
from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.round.feasibility import check_reachable
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.search import SearchOutcome, SearchSpace, SearchStrategy, run_search, search_max_sparsity
from lightning_softprune.utilities.arrays import FloatArray


def search(
    evaluator: Evaluator, settings: RoundSettings, seed: int, before: Mapping[str, float]
) -> tuple[SearchStrategy, SearchOutcome]:
    """Run a copy of the user's strategy on the round's space; what it has asked for are the evaluator's trials.

    Args:
        evaluator: Scores plans.
        settings: What the user asked for.
        seed: Of the strategy's random numbers.
        before: Metrics of the module as it is.

    Returns:
        The strategy after its search, and how the search went.

    Raises:
        MisconfigurationException: The budgets are out of reach, or the strategy cannot serve this space.
    """
    trials, trainer = evaluator.trials, evaluator.runner.trainer
    space = trials.space
    check_reachable(space, settings, trials.target)
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

        def evaluate(x: FloatArray) -> float:
            scored = evaluator.score(x)
            bar.advance(scored.trial.score, trials.best.trial.score if trials.best else math.nan)
            return trials.objective.loss(scored.trial.metrics)

        if trials.target is None:
            unpruned = trials.unpruned(evaluator.problem.unpruned_plan(), before)
            outcome = search_max_sparsity(
                strategy,
                space,
                evaluate,
                highest_feasible_sparsity=trials.highest_feasible_sparsity(unpruned),
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
                on_asked=lambda x, *_: evaluator.reuse_unpruned(x, before),
            )
    return strategy, outcome
