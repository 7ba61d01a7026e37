"""How long plans take, against the module as it is; measured on a few finalists only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_softprune.round.prepare import PruningProblem
from lightning_softprune.round.trials import ScoredPlan
from lightning_softprune.search import Plan
from lightning_softprune.trainer import ValidationScorer, mean_over_processes, time_validation_step

_FINALISTS = 6  # plans whose latency is measured, at most


class Stopwatch:
    """Times the validation step of plans against that of the module as it is.

    Latency is no function of counts, and measuring is noisy: the better of two medians of repeated steps on the first
    validation batch, in eval mode after a warm-up, on the training device. Only plans that are about to be chosen are
    timed, each once: what is reported is what was decided on.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        scorer: ValidationScorer,
        problem: PruningProblem,
        dense_latency_ratio: float,
    ) -> None:
        self.trainer, self.module, self.scorer, self.problem, self.dense_latency_ratio = (
            trainer,
            module,
            scorer,
            problem,
            dense_latency_ratio,
        )
        self.known: dict[tuple[int, ...], tuple[float, float]] = {}

    def compare(self, plan: ScoredPlan, runs: int = 9, seconds: float = 0.1) -> tuple[float, float]:
        """Seconds of the module as it is and as this plan would make it."""
        if plan.counts not in self.known:
            self.known[plan.counts] = self._compare(plan, runs, seconds)
        return self.known[plan.counts]

    def _compare(self, plan: ScoredPlan, runs: int, seconds: float) -> tuple[float, float]:
        def measure() -> float:
            measured = time_validation_step(self.trainer, self.module, self.scorer, runs=runs, seconds=seconds)
            return mean_over_processes(self.trainer, {"seconds": measured})["seconds"]

        before = after = math.inf
        for _ in range(2):  # in turns: what else the machine does meanwhile disturbs both
            before = min(before, measure())
            surgery = self.problem.prune(self.module, Plan.from_counts(plan.counts, self.problem.rankings))
            try:
                after = min(after, measure())
            finally:
                surgery.undo()
        return before, after

    def first_within(self, limit: float, ranked: Sequence[ScoredPlan]) -> tuple[ScoredPlan | None, str]:
        """The best of the plans that is fast enough, or none and why.

        After the best one come those that are better than all others with fewer MACs.
        """
        fastest, fewest, timed = math.inf, math.inf, 0
        for plan in ranked:
            macs = self.problem.costs_of(plan.counts).macs
            if macs >= fewest:
                continue
            if timed == _FINALISTS:
                break
            fewest, timed = macs, timed + 1
            before, after = self.compare(plan, runs=50, seconds=0.5)
            fastest = min(fastest, after / before / self.dense_latency_ratio)
            if after <= limit * before * self.dense_latency_ratio:
                return plan, ""
        return None, (
            f"limits['latency']={limit:g}: the fastest of the {timed} plans that were timed takes {fastest:.3f} of the "
            "dense model's time"
        )
