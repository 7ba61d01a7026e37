"""The commit: a plan is applied for good, refined, scored and rehearsed, with the optimizers and averaged copies."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_softprune.compensation import DenseRun, refit_readers
from lightning_softprune.round.prepare import PruningProblem
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.round.trials import ScoredPlan, Trials
from lightning_softprune.search import Plan
from lightning_softprune.surgery import repair_optimizers
from lightning_softprune.trainer import ValidationScorer, forget_compiled, rehearse, wrap_again


def commit_plan(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    copies: Sequence[nn.Module],
    scorer: ValidationScorer,
    settings: RoundSettings,
    problem: PruningProblem,
    trials: Trials,
    best: ScoredPlan,
    seed: int,
) -> ScoredPlan:
    """Prune for good, and refine the compensation where that helps; the model's own score decides.

    Returns:
        The trial that the model now is.
    """
    dense = None
    if settings.compensation == "least_squares":
        dense = DenseRun(module, problem.compensation, problem.calibration)
    plan = Plan.from_counts(best.counts, problem.rankings)
    for averaged in copies:
        problem.prune(averaged, plan)
    surgery = problem.prune(module, plan)
    repair_optimizers(trainer.optimizers, surgery)
    if dense is not None:
        values = [(new, new.detach().clone()) for _, new, _ in surgery.parameters]
        values += [(bias, bias.detach().clone()) for _, _, bias in surgery.created]
        refit_readers(module, surgery, problem.compensation, dense)
        refined = trials.score_as_it_is(best)
        if refined.is_better_than(best):
            best = refined
        else:
            with torch.no_grad():
                for parameter, value in values:
                    parameter.copy_(value)
    rehearse(trainer, module, scorer, seed)
    forget_compiled()
    wrap_again(trainer, module)  # last: the dense wrapper serves until nothing can fail any more
    return best
