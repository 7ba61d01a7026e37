"""How long plans take, against the module as it is; measured on a few finalists only."""

from __future__ import annotations

import time

from lightning_softprune.round.prepare import PruningProblem
from lightning_softprune.search import Plan
from lightning_softprune.trainer import ModuleRunner

_TURNS, _LEAST_TURNS, _ENOUGH = 3, 2, 0.5
"""Turns, and how many are enough once they have taken so many seconds: what is slow scatters less."""


class Stopwatch:
    """Times the validation step of plans against that of the module as it is.

    Latency is no function of counts, and measuring is noisy: both are timed in turns, on the first validation batch, in
    eval mode after a warm-up, on the training device. A turn's figure is the median of repeated steps; what is reported
    is the best of the turns for each, with the *spread*: the distance between the largest and the smallest of their
    ratios. Only plans that are about to be chosen are timed, each once: what is reported is what was decided on.

    Args:
        runner: Runs the module.
        problem: What plans do to it.
        dense_latency_ratio: How many times as long as the module now is the first dense model takes.
    """

    def __init__(self, runner: ModuleRunner, problem: PruningProblem, dense_latency_ratio: float) -> None:
        self.runner, self.problem, self.dense_latency_ratio = runner, problem, dense_latency_ratio
        self.known: dict[Plan, tuple[float, float, float]] = {}

    def compare(self, plan: Plan, runs: int = 5, seconds: float = 0.06) -> tuple[float, float, float]:
        """Seconds of the module as it is and as this plan would make it, and the spread of their ratio."""
        if plan not in self.known:
            self.known[plan] = self._compare(plan, runs, seconds)
        return self.known[plan]

    def share_of_dense(self, plan: Plan, runs: int = 5, seconds: float = 0.06) -> float:
        """The fraction of the first dense model's time that the plan takes."""
        before, after, _ = self.compare(plan, runs, seconds)
        return after / before / self.dense_latency_ratio

    def _compare(self, plan: Plan, runs: int, seconds: float) -> tuple[float, float, float]:
        before: list[float] = []
        after: list[float] = []
        started = time.monotonic()
        while len(before) < _TURNS:  # what else the machine does meanwhile disturbs both
            if len(before) >= _LEAST_TURNS and time.monotonic() - started > _ENOUGH:
                break
            before.append(self.runner.time(runs=runs, seconds=seconds))
            surgery = self.problem.prune(self.runner.module, plan)
            try:
                after.append(self.runner.time(runs=runs, seconds=seconds))
            finally:
                surgery.undo()
        ratios = [pruned / dense for dense, pruned in zip(before, after, strict=True)]
        return min(before), min(after), max(ratios) - min(ratios)
