"""The module's own steps on real batches: what tracing, calibration and rehearsal run.

Steps are `validation_step` and `training_step`, run so that they leave nothing behind. No example input is asked for.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_softprune.trainer.batches import training_batches
from lightning_softprune.trainer.isolation import clone_inference_tensors_and_reset_metrics, isolated_rng, untouched
from lightning_softprune.trainer.scorer import ValidationScorer
from lightning_softprune.trainer.steps import run_step, transfer
from lightning_softprune.utilities.hooks import registered

Steps = list[Callable[[], Any]]


def head_of_batch(batch: Any, count: int | None) -> Any:
    """The first samples of a batch that is made of tensors of one length; any other batch as it is.

    >>> x, y = head_of_batch((torch.ones(64, 3), torch.ones(64)), 32)
    >>> len(x), len(y), head_of_batch({"x": torch.ones(64), "scale": 1.0}, 32)["x"].shape
    (32, 32, torch.Size([64]))
    """
    lengths: set[int | None] = set()

    def cut(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            lengths.add(len(part) if part.ndim else None)
            return part[:count] if part.ndim else part
        if isinstance(part, dict):
            shorter = copy.copy(part)
            shorter.update({key: cut(value) for key, value in part.items()})
            return shorter
        if isinstance(part, (list, tuple)):
            inside = [cut(value) for value in part]
            return type(part)(*inside) if hasattr(part, "_fields") else type(part)(inside)
        lengths.add(None)
        return part

    shorter = cut(batch) if count else batch
    return shorter if len(lengths) == 1 and None not in lengths else batch


def validation_step(
    trainer: pl.Trainer, module: pl.LightningModule, scorer: ValidationScorer, samples: int | None = None
) -> Callable[[], Any]:
    """The module's `validation_step` on the first validation batch, in eval mode, leaving nothing behind."""

    def step() -> Any:
        with untouched(trainer, module):
            clone_inference_tensors_and_reset_metrics(module)
            module.eval()
            batch, batch_idx, dataloader_idx = scorer.first_batch()
            batch = head_of_batch(batch, samples)
            return run_step(trainer, module, "validation_step", batch, batch_idx, dataloader_idx)

    return step


def _training(
    trainer: pl.Trainer, module: pl.LightningModule, raw: Any, number: int, samples: int | None = None
) -> Callable[[], Any]:
    """The module's `training_step` on one training batch, in eval mode, leaving nothing behind."""

    def step() -> Any:
        with untouched(trainer, module):
            clone_inference_tensors_and_reset_metrics(module)
            module.eval()
            batch = head_of_batch(transfer(trainer, module, raw, step="training_step"), samples)
            return run_step(trainer, module, "training_step", batch, number)

    return step


def tracing_steps(
    trainer: pl.Trainer, module: pl.LightningModule, scorer: ValidationScorer, samples: int | None = None
) -> Steps:
    """The steps that tracing runs: what validation runs, and what training runs where optimization is automatic."""
    steps: Steps = [validation_step(trainer, module, scorer, samples)]
    if module.automatic_optimization and is_overridden("training_step", module):
        steps += [_training(trainer, module, batch, 0, samples) for batch in training_batches(trainer, 1)]
    return steps


def calibration_steps(
    trainer: pl.Trainer, module: pl.LightningModule, scorer: ValidationScorer, count: int
) -> tuple[Steps, list[Any]]:
    """Training batches, and one step for each: `training_step`; where there is none, one validation batch's step."""
    automatic = module.automatic_optimization and is_overridden("training_step", module)
    batches = training_batches(trainer, count) if automatic else []
    steps: Steps = [validation_step(trainer, module, scorer)]
    if batches:
        steps = [_training(trainer, module, batch, number) for number, batch in enumerate(batches)]
    return [_repeatable(step, number) for number, step in enumerate(steps)], batches


def _repeatable(step: Callable[[], Any], seed: int) -> Callable[[], Any]:
    """The step with the same random numbers each time: dense and pruned inputs are compared sample by sample."""

    def run() -> Any:
        with isolated_rng(seed):
            return step()

    return run


def rehearse(trainer: pl.Trainer, module: pl.LightningModule, scorer: ValidationScorer, seed: int) -> None:
    """Run the pruned module once as validation and as training will; the user's own exception goes on."""
    with isolated_rng(seed):
        with torch.no_grad():
            validation_step(trainer, module, scorer)()
        if module.automatic_optimization and is_overridden("training_step", module):
            for raw in training_batches(trainer, 1):
                with untouched(trainer, module), torch.enable_grad():
                    clone_inference_tensors_and_reset_metrics(module)
                    batch = transfer(trainer, module, raw, step="training_step")
                    run_step(trainer, module, "training_step", batch, 0, autocast=True)


def run_steps(steps: Steps, seed: int = 0) -> None:
    """Run steps one after another, without gradients, always with the same random numbers."""
    with isolated_rng(seed), torch.no_grad():
        for step in steps:
            step()


def same_layer_calls(model: nn.Module, few: Steps, whole: Steps) -> bool:
    """Whether steps on fewer samples run, and call every layer of the model as often as those on whole batches."""

    def calls(steps: Steps) -> Counter[str]:
        seen: Counter[str] = Counter()
        with registered(
            layer.register_forward_hook(lambda *_, name=name: seen.update([name]))
            for name, layer in model.named_modules()
        ):
            run_steps(steps)
        return seen

    wanted = calls(whole)
    try:
        return calls(few) == wanted
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the user's code says to fewer samples: whole batches do
        return False
