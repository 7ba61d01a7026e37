"""The commit: a plan is applied for good, refined, scored and rehearsed, with the optimizers and averaged copies."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_softprune.checkpoint import ModelShapes, keep_dense
from lightning_softprune.compensation import DenseRun, refit_readers
from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.round.trials import ScoredPlan
from lightning_softprune.surgery import References, Surgery, Transaction, inner_optimizers, repair_optimizers
from lightning_softprune.trainer import (
    ModuleRunner,
    forget_compiled,
    record_new_parameters,
    users_callbacks,
    wrap_again,
)


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
        dense = DenseRun(module, problem.compensation, problem.calibration, runner.memory_left)
    for averaged in copies:
        problem.prune(averaged, best.plan)
    surgery = problem.prune(module, best.plan)
    repair_optimizers(all_optimizers(trainer, module), surgery)
    if dense is not None:
        best = _refined(evaluator, surgery, dense, best)
    runner.rehearse()
    return best, surgery


def commit(
    runner: ModuleRunner, copies: Sequence[nn.Module], transaction: Transaction, surgery: Surgery, dense: ModelShapes
) -> None:
    """Keep what was rehearsed; whatever else points at parameters follows.

    Args:
        runner: Has the trainer and the module.
        copies: Averaged copies of the module, which were pruned alike.
        transaction: Is committed.
        surgery: What was done to the module.
        dense: The shapes of the module before that.
    """
    trainer, module = runner.trainer, runner.module
    references = References(module, surgery, dense.shapes, copies)
    listeners = [module, *users_callbacks(trainer)]
    try:
        references.carry_hooks()
        for holder in (*listeners, *all_optimizers(trainer, module)):
            name = "self" if holder is module else type(holder).__name__
            references.carry(name, holder, companions=not hasattr(holder, "on_softprune"))
        if references.left:
            rank_zero_warn(
                f"SoftPruning: {', '.join(references.left[:8])}: of the shape of a pruned parameter, and cannot "
                "follow it by itself; give its owner (the module or a callback) a method `on_softprune(self, surgery)`"
            )
        for listener in listeners:
            if callable(hook := getattr(listener, "on_softprune", None)):
                hook(surgery)
        keep_dense(module, dense, {name: before for name, (before, _) in surgery.counts.items()}, surgery.unsaved)
        forget_compiled()
        wrap_again(trainer, module)  # last: the dense wrapper serves until nothing can fail any more
    except BaseException:
        references.undo()
        raise
    record_new_parameters(trainer, [bias for _, _, bias in surgery.created])
    transaction.commit()


def all_optimizers(trainer: pl.Trainer, module: nn.Module) -> list[Optimizer]:
    """The trainer's optimizers, those inside of them, and those that the module and callbacks keep."""
    return [*trainer.optimizers, *inner_optimizers(trainer.optimizers, [module, *users_callbacks(trainer)])]


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
