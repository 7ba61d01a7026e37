"""The trials of a round: plans that were scored, and which of them is best.

A trial is *feasible* when its plan meets the sparsity target and the limits on counted costs, and its metrics the
constraints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np

from lightning_softprune.report import SearchProgress
from lightning_softprune.results import Sensitivity, Trial
from lightning_softprune.round.feasibility import monitored
from lightning_softprune.round.journal import Journal, Key
from lightning_softprune.round.prepare import PruningProblem
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.search import Objective, Plan, SearchSpace, SearchStrategy
from lightning_softprune.trainer import ValidationScorer, mean_over_processes


@dataclass(frozen=True, eq=False)
class ScoredPlan:
    """A trial with the channels it removes from each group.

    Attributes:
        trial: As it will be reported.
        counts: Channels removed from each group.
        loss: The score, turned so that lower is better; NaN if there is none.
        budget_gap: How far the plan is from the sparsity target, and over the limits on counted costs; 0 where they
            are met.
        violation: How far its metrics are from meeting the constraints; 0 where they do.
    """

    trial: Trial
    counts: tuple[int, ...]
    loss: float
    budget_gap: float = 0.0
    violation: float = 0.0

    def is_better_than(self, other: ScoredPlan) -> bool:
        """Whether this is nearer to feasible, or as near and better."""
        mine, its = ((x.budget_gap + x.violation, math.inf if math.isnan(x.loss) else x.loss) for x in (self, other))
        return mine < its


class Trials:
    """Scores plans and keeps every one."""

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        scorer: ValidationScorer,
        settings: RoundSettings,
        objective: Objective,
        problem: PruningProblem,
        space: SearchSpace,
        target: float | None,
        journal: Journal,
    ) -> None:
        self.trainer, self.journal, self.objective, self.target = trainer, journal, objective, target
        self.module, self.scorer, self.settings, self.problem, self.space = module, scorer, settings, problem, space
        self.done: list[ScoredPlan] = []
        self.best: ScoredPlan | None = None  # of the feasible ones; of equals the earliest
        self.reused = 0  # trials whose score was known before the search

    def evaluate_with(self, bar: SearchProgress) -> Callable[[Any], float]:
        """Return the function that the search calls: coefficients in, loss out."""

        def evaluate(coefficients: Any) -> float:
            counts = tuple(int(n) for n in self.space.realise(coefficients[None])[0])
            spread = self.problem.coefficients.per_group(coefficients)
            soft = tuple(float(c) for c in self.problem.rounding.soft(spread, np.array(counts)))
            scored = self._score("trial", lambda: self._pruned_metrics(counts), soft, counts)
            bar.advance(scored.trial.score, self.best.trial.score if self.best else math.nan)
            return self.objective.loss(scored.trial.metrics)

        return evaluate

    def score_as_it_is(self, plan: ScoredPlan) -> ScoredPlan:
        """Score the module as it is now, pruned by this plan in another way."""
        return self._score("refined", self._metrics, plan.trial.coefficients, plan.counts)

    def _metrics(self) -> dict[str, float]:
        return mean_over_processes(self.trainer, self.scorer.metrics())

    def _pruned_metrics(self, counts: tuple[int, ...]) -> dict[str, float]:
        surgery = self.problem.prune(self.module, Plan.from_counts(counts, self.problem.rankings))
        try:
            return self._metrics()
        finally:
            surgery.undo()

    def _score(
        self,
        kind: str,
        score: Callable[[], dict[str, float]],
        coefficients: tuple[float, ...],
        counts: tuple[int, ...],
    ) -> ScoredPlan:
        key = Key(kind, counts, self.problem.identity)
        sparsity = float(self.space.sparsity(np.array([counts]))[0])
        found = self.journal.scored(key, score, coefficients=coefficients, sparsity=sparsity)
        return self._keep(found.metrics, coefficients, counts, found.seconds)

    def _keep(
        self, metrics: dict[str, float], coefficients: tuple[float, ...], counts: tuple[int, ...], seconds: float
    ) -> ScoredPlan:
        score = monitored(metrics, self.objective)
        removed = np.array([counts])
        sparsity, budget_gap = float(self.space.sparsity(removed)[0]), float(self.space.overrun(removed)[0])
        if self.target is not None and not self.space.within(np.array([sparsity]))[0]:
            budget_gap += abs(sparsity - self.target) - self.space.tolerance
        violation = self.objective.violation(metrics)
        feasible = budget_gap == violation == 0 and math.isfinite(score)
        trial = Trial(coefficients, sparsity, score, metrics, feasible, seconds)
        scored = ScoredPlan(trial, counts, self.objective.signed(score), budget_gap, violation)
        self.done.append(scored)
        if self._is_candidate(scored) and (self.best is None or self._rank(scored) < self._rank(self.best)):
            self.best = scored
        return scored

    def _is_candidate(self, scored: ScoredPlan) -> bool:
        # without a target, the module as it is needs no plan
        return scored.trial.feasible and (self.target is not None or any(scored.counts))

    def _rank(self, scored: ScoredPlan) -> tuple[float, ...]:
        return (scored.loss,) if self.target is not None else (-scored.trial.sparsity, scored.loss)

    def ranked(self) -> list[ScoredPlan]:
        """The feasible trials, best first; of equals the earliest."""
        return sorted(filter(self._is_candidate, self.done), key=self._rank)

    def least_violating(self) -> ScoredPlan | None:
        """The trial that is nearest to feasible."""
        pruned = [scored for scored in self.done if self.target is not None or any(scored.counts)]

        def badness(scored: ScoredPlan) -> tuple[float, ...]:
            preference = -scored.trial.sparsity if self.target is None else scored.loss
            finite = math.isfinite(scored.loss)
            return (scored.budget_gap, not finite, scored.violation, preference if finite else 0.0)

        return min(pruned, key=badness, default=None)

    def highest_feasible_sparsity(self, before: dict[str, float]) -> Callable[[], float]:
        """Return the function that tells a search without a target the highest sparsity that meets all it must."""
        unpruned = self.unpruned(before)
        start = unpruned.trial.sparsity if unpruned.budget_gap == unpruned.violation == 0 else -math.inf

        def highest_feasible_sparsity() -> float:
            return max((scored.trial.sparsity for scored in self.done if scored.trial.feasible), default=start)

        return highest_feasible_sparsity

    def least_violation_at(self, sparsity: float) -> float:
        """The least violation of the constraints by plans of at least this sparsity; inf where there is none."""
        plans = (scored for scored in self.done if scored.budget_gap == 0 and scored.trial.sparsity >= sparsity)
        return min((scored.violation for scored in plans), default=math.inf)

    def reuse_unpruned(self, coefficients: Any, metrics: dict[str, float]) -> None:
        """Where a strategy asks for the model as it is and that is on target already, it is a trial like any other."""
        known = any(not any(scored.counts) for scored in self.done)
        if not known and not any(self.space.key(coefficients)) and self.space.on_target(coefficients):
            groups = len(self.problem.groups)
            self.reused += 1
            self._keep(metrics, (0.0,) * groups, (0,) * groups, 0.0)

    def unpruned(self, metrics: dict[str, float]) -> ScoredPlan:
        """The module as it was, in the shape of a trial."""
        groups = len(self.problem.groups)
        counts = (0,) * groups
        removed = np.array([counts])
        sparsity, budget_gap = float(self.space.sparsity(removed)[0]), float(self.space.overrun(removed)[0])
        score = metrics[self.settings.monitor]
        trial = Trial((0.0,) * groups, sparsity, score, metrics, False, 0.0)
        return ScoredPlan(trial, counts, self.objective.signed(score), budget_gap, self.objective.violation(metrics))

    def sensitivity(self, strategy: SearchStrategy) -> tuple[Sensitivity, ...]:
        """The strategy's curves, in scores."""
        scores = {scored.counts: scored.trial.score for scored in reversed(self.done)}
        sign = 1.0 if self.settings.mode == "min" else -1.0
        curves = []
        for curve in strategy.sensitivity:
            points = np.repeat(self.space.low[None], len(curve.coefficients), axis=0)
            points[:, curve.index] = curve.coefficients
            found = [
                scores.get(self.space.key(point), sign * loss) for point, loss in zip(points, curve.losses, strict=True)
            ]
            curves.append(Sensitivity(self.problem.coefficients.names[curve.index], curve.coefficients, tuple(found)))
        return tuple(curves)

    def explain_infeasible(self) -> str:
        """Say why no trial is feasible."""
        if not self.done:
            return "there was no plan to score: within bounds and limits, nothing was found that removes channels"
        number = f"the {len(self.done)} scored plans"
        at = "" if self.target is None else f" at {self.target:.1%}"
        if all(math.isnan(scored.trial.score) for scored in self.done):
            return f"{self.settings.monitor} is nan for each of {number}"
        nearest = self.least_violating()
        if nearest is not None and nearest.violation:
            missed = ", ".join(self.objective.shortfalls(nearest.trial.metrics))
            return (
                f"none of {number} meets the constraints{at}; the nearest, of sparsity {nearest.trial.sparsity:.4f}, "
                f"misses {missed}"
            )
        return f"none of {number} has a finite {self.settings.monitor}{at}"
