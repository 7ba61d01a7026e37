"""Trainers, modules, strategies and optimizers that can be served; the others are refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_softprune.graph import equal_parts, undeclared_twins
from lightning_softprune.trainer.isolation import metrics_in
from lightning_softprune.trainer.lightning_names import MisconfigurationException, is_overridden
from lightning_softprune.trainer.other_callbacks import callbacks_of
from lightning_softprune.utilities.libraries import counterparts


def refuse_unsuited(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse a fit in which plans cannot be scored, or that has a strategy or a callback which cannot be served.

    Raises:
        MisconfigurationException: Says what is in the way.
    """
    if not is_overridden("validation_step", pl_module):
        raise MisconfigurationException(
            f"SoftPruning scores plans by validation, and {type(pl_module).__name__} has no `validation_step`"
        )
    refuse_sharding(trainer)
    if trainer.barebones:
        raise MisconfigurationException("barebones=True: there is no `self.log`, which SoftPruning needs for scores")
    if any(isinstance(callback, counterparts(ModelPruning)) for callback in callbacks_of(trainer)):
        raise MisconfigurationException(
            "callbacks: ModelPruning keeps masks of the size of the weights, which cannot follow where SoftPruning "
            "removes channels. Leave it out: `target_sparsity` takes the place of its `amount`"
        )


def refuse_schedule(trainer: pl.Trainer, last: int, finetune_epochs: int | None) -> None:
    """Refuse a last round, or an end of fine-tuning, that the trainer's number of epochs rules out.

    Args:
        trainer: The trainer in charge.
        last: The epoch of the last round.
        finetune_epochs: How many epochs are to follow it; ``None``: whatever the trainer allows.

    Raises:
        MisconfigurationException: Names the arguments that contradict each other.
    """
    end = trainer.max_epochs
    trial_run = getattr(trainer, "fast_dev_run", False)  # one batch and out, before any round
    if end is not None and end != -1 and not trial_run:
        if last >= end:
            raise MisconfigurationException(
                f"epochs={last} is never reached with max_epochs={end}; the largest allowed is {end - 1}"
            )
        if finetune_epochs is not None and last + finetune_epochs > end:
            raise MisconfigurationException(
                f"finetune_epochs={finetune_epochs} after epochs={last} "
                f"needs max_epochs >= {last + finetune_epochs}, this trainer has max_epochs={end}"
            )
    least = trainer.min_epochs or 0
    if finetune_epochs is not None and last + finetune_epochs < least:
        # without min_epochs, steps that are wanted at least make Lightning say 1
        limit = f"min_steps={trainer.min_steps}" if trainer.min_steps and least == 1 else f"min_epochs={least}"
        raise MisconfigurationException(
            f"finetune_epochs={finetune_epochs} would stop at epoch {last + finetune_epochs}, which {limit} forbids"
        )


def refuse_undeclared_twins(
    trainer: pl.Trainer, pl_module: pl.LightningModule, twins: Mapping[str, str], ignore: Sequence[str]
) -> None:
    """Refuse a module in which something looks like a teacher or target of a trained part, and nobody says what it is.

    Raises:
        MisconfigurationException: Names both, and what to write.
    """
    known = (*twins, *metrics_in(pl_module))
    if found := undeclared_twins(pl_module, _trained(trainer, pl_module), known, ignore):
        raise _undeclared(found, twins, ignore)


_ENOUGH_BATCHES = 50
"""What has got no gradient in so many batches, or in an epoch, is not trained."""


class UntrainedCopies:
    """Copies that an optimizer holds and that get no gradient: teachers and averages that nobody declared.

    Where a module begins with the values of another, the first training batches tell, up to the end of an epoch. One
    that is run without gradients, or not at all, is not trained.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module, before it is trained.
        twins: Those that are declared.
        ignore: Patterns of modules that stay as they are.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, twins: Mapping[str, str], ignore: Sequence[str]
    ) -> None:
        self._twins, self._ignore = twins, ignore
        known = (*twins, *metrics_in(pl_module))
        self._pairs = equal_parts(pl_module, _trained(trainer, pl_module), known, ignore)
        self._parts = {name: pl_module.get_submodule(name) for pair in self._pairs for name in pair}
        self._trained: set[str] = set()
        self._batches = 0

    def note_gradients(self) -> None:
        """Call it after a backward pass."""
        for name, part in self._parts.items():
            if any(parameter.grad is not None for parameter in part.parameters()):
                self._trained.add(name)

    def refuse(self, *, ends_epoch: bool) -> None:
        """Call it at the end of a training batch.

        Args:
            ends_epoch: Whether that is the last one of an epoch.

        Raises:
            MisconfigurationException: Names the copy and what it is a copy of, and what to write.
        """
        self._batches += 1
        if self._batches < _ENOUGH_BATCHES and not ends_epoch:
            return  # batches may be of different tasks, with a part of the network for each
        found = {copy: of for copy, of in self._pairs if of in self._trained and copy not in self._trained}
        if found:
            raise _undeclared(found, self._twins, self._ignore)
        self._pairs = [pair for pair in self._pairs if not self._trained.issuperset(pair)]
        self._parts = {name: part for name, part in self._parts.items() if any(name in pair for pair in self._pairs)}


def _trained(trainer: pl.Trainer, pl_module: pl.LightningModule) -> set[int]:
    held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    return {id(parameter) for parameter in held or pl_module.parameters() if parameter.requires_grad}


def _undeclared(found: Mapping[str, str], twins: Mapping[str, str], ignore: Sequence[str]) -> MisconfigurationException:
    name = next(iter(found))
    return MisconfigurationException(
        f"twins: {name!r} is not trained, and has the names and shapes of {found[name]!r}, which is. If it mirrors "
        f"it (a teacher, a target network), say twins={ {**twins, **found} }; if it shall stay as it is, say "
        f"ignore={[*ignore, name]}"
    )


def refuse_sharding(trainer: pl.Trainer) -> None:
    """Refuse strategies whose processes do not each hold the whole model, or that fork.

    Allowed are one device, and DistributedDataParallel with one script per process (``strategy="ddp"``).

    Raises:
        MisconfigurationException: Names the strategy and says what to do instead.
    """
    strategy = trainer.strategy
    if isinstance(strategy, counterparts(SingleDeviceStrategy)):
        return
    if isinstance(strategy, counterparts(DDPStrategy)) and not isinstance(strategy, counterparts(DeepSpeedStrategy)):
        if strategy._start_method == "popen":
            return
        how = f"{type(strategy).__name__} started by {strategy._start_method!r}"
    else:
        how = type(strategy).__name__
    raise MisconfigurationException(
        f"strategy: {how} is not supported: SoftPruning needs the whole model in every process, and processes that run "
        'the script (`strategy="ddp"`). Train as you do, then prune on one device from a consolidated checkpoint'
    )


def refuse_teacher(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse fits in which nothing can be added to the gradients of the module's own loss.

    Raises:
        MisconfigurationException: Says what is in the way.
    """
    compiled = [part for part in pl_module.modules() if part._compiled_call_impl is not None]
    if not pl_module.automatic_optimization:
        why = "optimization is manual, and its gradients are the module's own business"
    elif not isinstance(trainer.strategy, counterparts(SingleDeviceStrategy)):
        why = f"{type(trainer.strategy).__name__} trains in several processes, and it works on one device alone"
    elif is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        why = "`training_step` takes its batches from an iterator, and they have to be run again"
    elif compiled or pl_module._compiler_ctx is not None:
        why = "the module is compiled, and would be traced for the dense network and the pruned one in turns"
    else:
        return
    raise MisconfigurationException(f"teacher: anything but 0 is not supported here: {why}. Leave it at 0")


def refuse_sharded_optimizers(trainer: pl.Trainer) -> None:
    """Refuse optimizers that spread their state over the processes.

    Raises:
        MisconfigurationException: Names the optimizer and says what to do instead.
    """
    for optimizer in trainer.optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise MisconfigurationException(
                f"optimizer: {type(optimizer).__name__} spreads its state over the processes, which SoftPruning cannot "
                "slice. Use a plain optimizer, or prune on one device from a consolidated checkpoint"
            )
