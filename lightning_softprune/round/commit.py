"""The commit: a plan is applied for good, refined, scored and rehearsed, with the optimizers and averaged copies."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_softprune.compensation import DenseRun, refit_readers
from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.round.trials import ScoredPlan
from lightning_softprune.surgery import Surgery, Transaction, repair_optimizers
from lightning_softprune.trainer import forget_compiled, record_new_parameters, wrap_again


def rehearse_plan(
    evaluator: Evaluator, settings: RoundSettings, copies: Sequence[nn.Module], best: ScoredPlan
) -> tuple[ScoredPlan, Surgery]:
    """Prune, refine the compensation where that helps (the model's own score decides), and see that all of it runs.

    Args:
        evaluator: Scores the refined model.
        settings: What the user asked for.
        copies: Averaged copies of the module, which are pruned alike.
        best: The plan.

    Returns:
        The trial that the model now is.
    """
    runner, problem = evaluator.runner, evaluator.problem
    trainer, module = runner.trainer, runner.module
    dense = None
    if settings.compensation == "least_squares":
        dense = DenseRun(module, problem.compensation, problem.calibration)
    for averaged in copies:
        problem.prune(averaged, best.plan)
    surgery = problem.prune(module, best.plan)
    repair_optimizers(trainer.optimizers, surgery)
    if dense is not None:
        best = _refined(evaluator, surgery, dense, best)
    runner.rehearse()
    return best, surgery


def commit(trainer: pl.Trainer, module: pl.LightningModule, transaction: Transaction, surgery: Surgery) -> None:
    """Keep what was rehearsed."""
    forget_compiled()
    wrap_again(trainer, module)  # last: the dense wrapper serves until nothing can fail any more
    record_new_parameters(trainer, [bias for _, _, bias in surgery.created])
    transaction.commit()


def _refined(evaluator: Evaluator, surgery: Surgery, dense: DenseRun, best: ScoredPlan) -> ScoredPlan:
    """Refit the readers, and take it back where the score is not better for it."""
    values = [(new, new.detach().clone()) for _, new, _ in surgery.parameters]
    values += [(bias, bias.detach().clone()) for _, _, bias in surgery.created]
    means = [(mean, mean.clone()) for mean, _ in surgery.shifted.values()]
    refit_readers(evaluator.runner.module, surgery, evaluator.problem.compensation, dense)
    refined = evaluator.score_as_it_is(best)
    if refined.is_better_than(best):
        return refined
    with torch.no_grad():
        for parameter, value in [*values, *means]:
            parameter.copy_(value)
    return best
