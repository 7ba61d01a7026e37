"""One round without a training run: a trained module goes in, the same module comes out smaller.

The round is the callback's own, at the start of a fit that ends before its first batch. So everything the Trainer
provides (device, precision, data hooks, distributed processes) is as in a fit, and there is no second way to prune.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_softprune.callback import SoftPruning
from lightning_softprune.results import PruningResult
from lightning_softprune.trainer import _one_epoch_more, has_inference_tensors, leave_inference

_WITHOUT_MEANING = ("epochs", "finetune_epochs")


def prune(
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None = None,
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    trainer: pl.Trainer | None = None,
    **arguments: Any,
) -> PruningResult:
    """Prune a trained module in place: search, prune, compensate, no training.

    Args:
        model: A trained LightningModule. Sparsity is measured against it as it is given.
        datamodule: Its data; or else `train_dataloaders` and `val_dataloaders`, or the module's own loaders.
        train_dataloaders: Training data, for rankings and compensation. Nothing is trained on them.
        val_dataloaders: Validation data, which trials are scored on.
        trainer: For devices, precision, strategy and folders; its callbacks and loggers take part. Its count of epochs
            is afterwards what it was. Default: a Trainer with one device and neither logger nor checkpoints.
        **arguments: Those of :class:`SoftPruning`, except `epochs` and `finetune_epochs`.

    Returns:
        What was found; ``applied`` says whether the module was pruned. As after every fit, the module is on the CPU.

    Raises:
        TypeError: `model` is not a LightningModule, or an argument is unknown or has no meaning here.
        MisconfigurationException: See :class:`SoftPruning`; the module is then as it was.
    """
    if not isinstance(model, pl.LightningModule):
        raise TypeError(f"model: {type(model).__name__} is not a LightningModule, which is needed to score plans")
    for name in _WITHOUT_MEANING:
        if name in arguments:
            raise TypeError(f"{name}: {arguments[name]!r} has no meaning in prune(), which runs one round at once")
    if datamodule is not None and not isinstance(datamodule, pl.LightningDataModule):
        raise TypeError(
            f"datamodule: {datamodule!r} is not a LightningDataModule; loaders go to train_dataloaders, val_dataloaders"
        )
    if trainer is not None and not isinstance(trainer, pl.Trainer):
        raise TypeError(f"trainer: {trainer!r} is not a Trainer")
    _check_data(model, datamodule, train_dataloader=train_dataloaders, val_dataloader=val_dataloaders)
    if trainer is None:
        trainer = pl.Trainer(
            max_epochs=1,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
    elif any(isinstance(callback, SoftPruning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException("trainer: it has a SoftPruning callback already; prune() brings its own")
    if trainer.limit_train_batches == 0:
        raise MisconfigurationException(
            "trainer: limit_train_batches=0 leaves no training batch, which rankings and compensation look at"
        )
    flags = {name: module.training for name, module in model.named_modules()}
    callback = SoftPruning(epochs=trainer.current_epoch, finetune_epochs=0, **arguments)
    try:
        with _one_epoch_more(trainer, callback):
            if has_inference_tensors(model):
                leave_inference(model)
            model.train()  # as a fit expects it; the round sets the mode of each pass itself
            trainer.fit(model, train_dataloaders, val_dataloaders, datamodule)
    finally:
        for name, module in model.named_modules():
            module.training = flags.get(name, module.training)
    if not callback.results:
        raise RuntimeError("the trainer ended its fit before the round began")
    return callback.results[0]


def _check_data(model: pl.LightningModule, datamodule: pl.LightningDataModule | None, **given: Any) -> None:
    """Refuse data that are missing; what is given twice is Lightning's to refuse."""
    sources = [source for source in (datamodule, model) if source is not None]
    purposes = {"train_dataloader": "rankings and compensation look at", "val_dataloader": "plans are scored on"}
    for method, purpose in purposes.items():
        if given[method] is None and not any(is_overridden(method, source) for source in sources):
            names = " and ".join(type(source).__name__ for source in sources)
            raise MisconfigurationException(
                f"{method}s: None, and there is no `{method}` in {names}; it gives the data that {purpose}"
            )
