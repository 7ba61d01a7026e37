"""The trials of a round: plans that were scored, and which of them is best.

A trial is *feasible* when its plan meets the sparsity target and the limits on counted costs, and its metrics the
constraints. Of feasible ones, those that remove at least what was asked for come first. A trial on a part of the
validation data is judged by an estimate of what it has on all of them, and only one on all of them can be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lightning_softprune.results import Trial
from lightning_softprune.round.feasibility import monitored
from lightning_softprune.search import Objective, Plan, SearchSpace, reaches
from lightning_softprune.trainer import ALL, Part


@dataclass(frozen=True)
class ScoredOn:
    """The validation data that trials are scored on.

    Attributes:
        part: Which batches.
        share: The fraction of all.
        scales: What to multiply a metric on the part by first, where that is not 1: a sum grows with the data.
        offsets: What to add to that for an estimate of it on all: what the module as it is has more.
        noise: Standard error of the difference of two scores on the part; NaN: not known.
    """

    part: Part = ALL
    share: float = 1.0
    scales: Mapping[str, float] = field(default_factory=dict)
    offsets: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.0

    def judged(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics on the part as an estimate of those on all data."""
        return {
            name: value * self.scales.get(name, 1.0) + self.offsets.get(name, 0.0) for name, value in metrics.items()
        }


WHOLE = ScoredOn()


@dataclass(frozen=True, eq=False)
class ScoredPlan:
    """A trial with the plan that was scored.

    Attributes:
        trial: As it will be reported.
        plan: Which channels it removes.
        loss: The score, turned so that lower is better, estimated for all data where it is of a part; NaN if there is
            none.
        budget_gap: How far the plan is from the sparsity target, and over the limits on counted costs; 0 where they
            are met.
        violation: How far its metrics are from meeting the constraints; 0 where they do.
        judged: Its metrics, estimated for all data where they are of a part.
    """

    trial: Trial
    plan: Plan
    loss: float
    budget_gap: float = 0.0
    violation: float = 0.0
    judged: Mapping[str, float] = field(default_factory=dict)

    def is_better_than(self, other: ScoredPlan) -> bool:
        """Whether this is nearer to feasible, or as near and better."""
        mine, its = ((x.budget_gap + x.violation, math.inf if math.isnan(x.loss) else x.loss) for x in (self, other))
        return mine < its


class Trials:
    """Keeps every scored plan, and ranks them.

    Args:
        objective: What makes one better than another.
        space: What is searched.
        target: The sparsity asked for; ``None``: the highest that meets the constraints.

    Attributes:
        done: All of them, in order.
        best: Of the feasible ones; of equals the earliest. One that was scored on all data is better than any that was
            not.
        failure: The first exception that the user's code has raised in a trial.
        reused: How many of them had a score that was known before the search.
        rescored: How many of them are of a plan that was scored on a part before.
    """

    def __init__(self, objective: Objective, space: SearchSpace, target: float | None) -> None:
        self.objective, self.space, self.target = objective, space, target
        self.done: list[ScoredPlan] = []
        self.best: ScoredPlan | None = None
        self.reused = self.rescored = 0
        self.failure: Exception | None = None

    def add(
        self,
        plan: Plan,
        coefficients: tuple[float, ...],
        metrics: Mapping[str, float],
        seconds: float,
        on: ScoredOn = WHOLE,
    ) -> ScoredPlan:
        """Keep what a plan has scored on a part of the validation data, or on all.

        Raises:
            MisconfigurationException: The score, or a metric with a constraint, was not logged.
        """
        score = monitored(metrics, self.objective)
        sparsity, budget_gap = self._costs_of(plan)
        if self.target is not None and not self.space.within(np.array([sparsity]))[0]:
            budget_gap += abs(sparsity - self.target) - self.space.tolerance
        judged = on.judged(metrics)
        violation = self.objective.violation(judged)
        feasible = budget_gap == violation == 0 and math.isfinite(score)
        trial = Trial(coefficients, sparsity, score, dict(metrics), feasible, seconds, share=on.share)
        loss = self.objective.signed(judged[self.objective.monitor])
        scored = ScoredPlan(trial, plan, loss, budget_gap, violation, judged)
        self.done.append(scored)
        if self._is_candidate(scored) and (self.best is None or self._is_first(scored, self.best)):
            self.best = scored
        return scored

    def _is_first(self, one: ScoredPlan, other: ScoredPlan) -> bool:
        return (one.trial.share < 1.0, *self._rank(one)) < (other.trial.share < 1.0, *self._rank(other))

    def fail(self, plan: Plan, coefficients: tuple[float, ...], error: Exception, share: float = 1.0) -> ScoredPlan:
        """Keep a plan with which the user's own code has failed."""
        self.failure = self.failure or error
        sparsity, budget_gap = self._costs_of(plan)
        line = (str(error).splitlines() or [""])[0]
        trial = Trial(coefficients, sparsity, math.nan, {}, False, 0.0, f"{type(error).__name__}: {line}", share)
        self.done.append(ScoredPlan(trial, plan, math.nan, budget_gap, math.inf))
        return self.done[-1]

    def reuse(self, plan: Plan, coefficients: tuple[float, ...], metrics: Mapping[str, float]) -> None:
        """Keep a plan whose metrics were known before the search, unless it is among the trials."""
        if all(scored.plan != plan for scored in self.done):
            self.reused += 1
            self.add(plan, coefficients, metrics, 0.0)

    def unpruned(self, plan: Plan, metrics: Mapping[str, float]) -> ScoredPlan:
        """The module as it was, in the shape of a trial; it is none."""
        sparsity, budget_gap = self._costs_of(plan)
        score = metrics[self.objective.monitor]
        trial = Trial((0.0,) * len(plan.removed), sparsity, score, dict(metrics), False, 0.0)
        violation = self.objective.violation(metrics)
        return ScoredPlan(trial, plan, self.objective.signed(score), budget_gap, violation, metrics)

    def _costs_of(self, plan: Plan) -> tuple[float, float]:
        """The sparsity of a plan, and how far it is over the limits."""
        removed = np.array([plan.counts])
        return float(self.space.sparsity(removed)[0]), float(self.space.overrun(removed)[0])

    def _is_candidate(self, scored: ScoredPlan) -> bool:
        # without a target, the module as it is needs no plan
        return scored.trial.feasible and (self.target is not None or not scored.plan.is_empty())

    def _rank(self, scored: ScoredPlan) -> tuple[float, ...]:
        if self.target is None:
            return (-scored.trial.sparsity, scored.loss)
        return (not self.reaches(scored), scored.loss)

    def reaches(self, scored: ScoredPlan) -> bool:
        """Whether a plan removes at least what was asked for."""
        return reaches(scored.trial.sparsity, self.target)

    def shortfall(self, scored: ScoredPlan) -> str:
        """Why a plan that was chosen removes less than was asked for, in words; empty where it does not."""
        if self.target is None or self.reaches(scored):
            return ""
        most = self.target + self.space.tolerance
        return (
            f"it removes {scored.trial.sparsity:.4f} and not target_sparsity={self.target:g}: no feasible plan from "
            f"there to {most:g} was found, since channels go as a whole"
        )

    def ranked(self) -> list[ScoredPlan]:
        """The feasible trials on all data, best first; of equals the earliest."""
        return sorted(filter(self._is_candidate, self.on_all), key=self._rank)

    @property
    def on_all(self) -> list[ScoredPlan]:
        """The trials on all data."""
        return [scored for scored in self.done if scored.trial.share == 1.0]

    def scored_on_part(self) -> tuple[list[ScoredPlan], list[ScoredPlan]]:
        """The trials on a part of the data: those that seem to be feasible, best first; the others, nearest first."""
        found = [scored for scored in self.done if scored.trial.share < 1.0 and not scored.trial.reason]
        found = [scored for scored in found if self.target is not None or not scored.plan.is_empty()]
        feasible = sorted(filter(self._is_candidate, found), key=self._rank)
        return feasible, sorted((s for s in found if not s.trial.feasible), key=self._badness)

    def plans(self) -> int:
        """How many plans were scored, on whatever data."""
        return len({scored.plan for scored in self.done})

    def least_violating(self) -> ScoredPlan | None:
        """The trial on all data that is nearest to feasible."""
        ran = [scored for scored in self.on_all if not scored.trial.reason]
        pruned = [scored for scored in ran if self.target is not None or not scored.plan.is_empty()]
        return min(pruned, key=self._badness, default=None)

    def _badness(self, scored: ScoredPlan) -> tuple[float, ...]:
        preference = -scored.trial.sparsity if self.target is None else scored.loss
        finite = math.isfinite(scored.loss)
        return (scored.budget_gap, not finite, scored.violation, preference if finite else 0.0)

    def highest_feasible_sparsity(self, unpruned: ScoredPlan) -> Callable[[], float]:
        """Return the function that tells a search without a target the highest sparsity that meets all it must."""
        start = unpruned.trial.sparsity if unpruned.budget_gap == unpruned.violation == 0 else -math.inf

        def highest_feasible_sparsity() -> float:
            return max((scored.trial.sparsity for scored in self.done if scored.trial.feasible), default=start)

        return highest_feasible_sparsity

    def least_violation_at(self, sparsity: float) -> float:
        """The least violation of the constraints by plans of at least this sparsity; inf where there is none."""
        plans = (scored for scored in self.done if scored.budget_gap == 0 and scored.trial.sparsity >= sparsity)
        return min((scored.violation for scored in plans), default=math.inf)
