"""The evaluator: applies a plan to the live module, scores it, and undoes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from lightning_softprune.results import Sensitivity
from lightning_softprune.round.journal import Journal, Key
from lightning_softprune.round.preparing import PruningProblem
from lightning_softprune.round.trials import WHOLE, ScoredOn, ScoredPlan, Trials
from lightning_softprune.search import Plan, SensitivityCurve
from lightning_softprune.trainer import ALL, ModuleRunner, Part
from lightning_softprune.utilities.arrays import FloatArray


class _PassError(Exception):
    """A validation pass of a pruned model has failed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _without_channels(layer: str, error: Exception) -> ValueError:
    line = (str(error).splitlines() or [""])[0]
    return ValueError(f"{layer} would be left without channels: {line}")


class Evaluator:
    """Scores plans; every one becomes a trial, also one with which the user's own code fails.

    Args:
        runner: Runs the module.
        problem: What plans do to it.
        journal: Holds what a killed run has scored already.
        trials: Keeps what was scored.

    Attributes:
        on: The validation data that `score` uses.
        before: Metrics of the module as it is, on all validation data.
        baseline_seconds: What the pass that gave them has taken.
        passes: Validation passes so far, those on a part as fractions; what a killed run has scored counts too.
    """

    def __init__(self, runner: ModuleRunner, problem: PruningProblem, journal: Journal, trials: Trials) -> None:
        self.runner, self.problem, self.journal, self.trials = runner, problem, journal, trials
        self.on = WHOLE
        self.before: Mapping[str, float] = {}
        self.baseline_seconds = 0.0
        self.passes = 0.0

    def score(self, x: FloatArray) -> ScoredPlan:
        """Score the plan that a vector of coefficients stands for."""
        return self._tried(self.problem.plan_of(x), self.problem.realisation.reported(x), self.on)

    def score_on_all(self, scored: ScoredPlan) -> ScoredPlan:
        """Score a plan on all validation data that was scored on a part of them: a trial of its own."""
        self.trials.rescored += 1
        return self._tried(scored.plan, scored.trial.coefficients, WHOLE)

    def _tried(self, plan: Plan, coefficients: tuple[float, ...], on: ScoredOn) -> ScoredPlan:
        key = self._key("trial", plan, on.part)
        try:
            return self._scored(key, plan, coefficients, lambda: self._pruned_metrics(plan, on.part), on)
        except _PassError as failed:
            self.passes += on.share
            return self.trials.fail(plan, coefficients, failed.error, on.share)

    def metrics_on(self, plan: Plan, part: Part) -> dict[str, float]:
        """Metrics of a plan on a part of the validation data, which make no trial; none where the user's code fails."""
        details = {"sparsity": self._sparsity(plan), "share": self.runner.share_of(part)}
        self.passes += details["share"]
        run = (lambda: self.runner.metrics(part)) if plan.is_empty() else (lambda: self._pruned_metrics(plan, part))
        try:
            return self.journal.scored(self._key("trial", plan, part), run, **details).metrics
        except _PassError:
            return {}

    def confirm(self, scored: ScoredPlan | None) -> bool:
        """Score a plan that a killed run has scored once more; whether it still scores the same."""
        if scored is None:
            return True
        details = {"coefficients": scored.trial.coefficients, "sparsity": scored.trial.sparsity}
        parts = [ALL] if self.on.part == ALL else [self.on.part, ALL]
        try:
            return all(
                self.journal.confirm(
                    self._key("trial", scored.plan, part), partial(self._pruned_metrics, scored.plan, part), **details
                )
                for part in parts
            )
        except _PassError as failed:
            raise failed.error from None

    def score_as_it_is(self, scored: ScoredPlan, made: str) -> ScoredPlan:
        """Score the module as it is now, pruned by this plan in another way: refined, healed."""
        key = self._key(made, scored.plan, ALL)
        return self._scored(key, scored.plan, scored.trial.coefficients, self.runner.metrics, WHOLE)

    def reuse_unpruned(self, x: FloatArray, metrics: Mapping[str, float]) -> None:
        """Where a strategy asks for the model as it is and that is on target already, it is a trial like any other."""
        plan = self.problem.unpruned_plan()
        if self.problem.plan_of(x) == plan and self.trials.space.on_target(x):
            self.trials.reuse(plan, (0.0,) * len(plan.removed), metrics)

    def _pruned_metrics(self, plan: Plan, part: Part) -> dict[str, float]:
        emptied = self.problem.emptied(plan)
        try:
            surgery = self.problem.prune(self.runner.module, plan)
        except (RuntimeError, ValueError) as error:
            if not emptied or isinstance(error, torch.OutOfMemoryError):
                raise
            raise _PassError(_without_channels(emptied, error)) from error
        try:
            return self.runner.metrics(part)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code does not take this width, perhaps no other either
            raise _PassError(_without_channels(emptied, error) if emptied else error) from error
        finally:
            surgery.undo()

    def _key(self, kind: str, plan: Plan, part: Part) -> Key:
        """What a journal knows a pass by; a part has its name beside the network's."""
        identity = self.problem.identity
        return Key(kind, plan.counts, identity if part == ALL else f"{identity} {part}")

    def _sparsity(self, plan: Plan) -> float:
        return float(self.trials.space.sparsity(np.array([plan.counts]))[0])

    def _scored(
        self,
        key: Key,
        plan: Plan,
        coefficients: tuple[float, ...],
        score: Callable[[], dict[str, float]],
        on: ScoredOn,
    ) -> ScoredPlan:
        details = {"coefficients": coefficients, "sparsity": self._sparsity(plan)}
        found = self.journal.scored(key, score, **details, **({} if on is WHOLE else {"share": on.share}))
        self.passes += on.share
        return self.trials.add(plan, coefficients, found.metrics, found.seconds, on)

    def sensitivity(self, curves: Sequence[SensitivityCurve]) -> tuple[Sensitivity, ...]:
        """A strategy's curves, in scores; estimated for all validation data where they are of a part."""
        space, names = self.trials.space, self.problem.realisation.coefficients.names
        monitor = self.trials.objective.monitor
        scores = {scored.plan.counts: scored.judged.get(monitor, math.nan) for scored in reversed(self.trials.done)}
        sign = 1.0 if self.trials.objective.mode == "min" else -1.0
        found = []
        for curve in curves:
            points = np.repeat(space.low[None], len(curve.coefficients), axis=0)
            points[:, curve.index] = curve.coefficients
            known = [
                scores.get(space.key(point), sign * loss) for point, loss in zip(points, curve.losses, strict=True)
            ]
            found.append(Sensitivity(names[curve.index], curve.coefficients, tuple(known)))
        return tuple(found)
