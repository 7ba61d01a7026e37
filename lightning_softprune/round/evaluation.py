"""The evaluator: applies a plan to the live module, scores it, and undoes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from lightning_softprune.results import Sensitivity
from lightning_softprune.round.journal import Journal, Key
from lightning_softprune.round.prepare import PruningProblem
from lightning_softprune.round.trials import ScoredPlan, Trials
from lightning_softprune.search import Plan, SensitivityCurve
from lightning_softprune.trainer import ModuleRunner
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
    """

    def __init__(self, runner: ModuleRunner, problem: PruningProblem, journal: Journal, trials: Trials) -> None:
        self.runner, self.problem, self.journal, self.trials = runner, problem, journal, trials

    def score(self, x: FloatArray) -> ScoredPlan:
        """Score the plan that a vector of coefficients stands for."""
        plan, coefficients = self.problem.plan_of(x), self.problem.realisation.reported(x)
        try:
            return self._scored("trial", plan, coefficients, lambda: self._pruned_metrics(plan))
        except _PassError as failed:
            return self.trials.fail(plan, coefficients, failed.error)

    def confirm(self, scored: ScoredPlan | None) -> bool:
        """Score a plan that a killed run has scored once more; whether it still scores the same."""
        if scored is None:
            return True
        key = Key("trial", scored.plan.counts, self.problem.identity)
        details = {"coefficients": scored.trial.coefficients, "sparsity": scored.trial.sparsity}
        try:
            return self.journal.confirm(key, lambda: self._pruned_metrics(scored.plan), **details)
        except _PassError as failed:
            raise failed.error from None

    def score_as_it_is(self, scored: ScoredPlan) -> ScoredPlan:
        """Score the module as it is now, pruned by this plan in another way."""
        return self._scored("refined", scored.plan, scored.trial.coefficients, self.runner.metrics)

    def reuse_unpruned(self, x: FloatArray, metrics: Mapping[str, float]) -> None:
        """Where a strategy asks for the model as it is and that is on target already, it is a trial like any other."""
        plan = self.problem.unpruned_plan()
        if self.problem.plan_of(x) == plan and self.trials.space.on_target(x):
            self.trials.reuse(plan, (0.0,) * len(plan.removed), metrics)

    def _pruned_metrics(self, plan: Plan) -> dict[str, float]:
        emptied = self.problem.emptied(plan)
        try:
            surgery = self.problem.prune(self.runner.module, plan)
        except (RuntimeError, ValueError) as error:
            if not emptied or isinstance(error, torch.OutOfMemoryError):
                raise
            raise _PassError(_without_channels(emptied, error)) from error
        try:
            return self.runner.metrics()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code does not take this width, perhaps no other either
            raise _PassError(_without_channels(emptied, error) if emptied else error) from error
        finally:
            surgery.undo()

    def _scored(
        self, kind: str, plan: Plan, coefficients: tuple[float, ...], score: Callable[[], dict[str, float]]
    ) -> ScoredPlan:
        sparsity = float(self.trials.space.sparsity(np.array([plan.counts]))[0])
        key = Key(kind, plan.counts, self.problem.identity)
        found = self.journal.scored(key, score, coefficients=coefficients, sparsity=sparsity)
        return self.trials.add(plan, coefficients, found.metrics, found.seconds)

    def sensitivity(self, curves: Sequence[SensitivityCurve]) -> tuple[Sensitivity, ...]:
        """A strategy's curves, in scores."""
        space, names = self.trials.space, self.problem.realisation.coefficients.names
        scores = {scored.plan.counts: scored.trial.score for scored in reversed(self.trials.done)}
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
