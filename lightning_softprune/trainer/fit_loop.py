"""The fit loop's own counters: an epoch that ends without training, and one that never was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_softprune.trainer.other_callbacks import callbacks_of
from lightning_softprune.utilities.libraries import counterparts
from lightning_softprune.utilities.ownership import is_of_a_framework

Hook = Callable[[pl.Trainer, pl.LightningModule], object]


def logging_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning itself would write a row into the loggers now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def may_stop(trainer: pl.Trainer) -> bool:
    """Whether training ends where it is told to stop now, which takes the steps that the trainer wants at least."""
    return trainer.global_step >= (trainer.min_steps or 0)


def finish_epoch_without_training(trainer: pl.Trainer) -> ExitStack:
    """At the start of a training epoch: validate for real and let the fit end after this epoch, with no batch run.

    Checkpoints, metrics and loggers then belong to the model as it is now. ModelCheckpoint saves once per step only, so
    it is told that this step has no checkpoint yet; and one that would wait for later steps or epochs saves now.

    What users have written for the end of an epoch (`on_train_epoch_end` of the module and of callbacks) reads what
    training has left behind, as a list of losses or a metric. Nothing has been trained, so it is left out; callbacks
    that monitor a metric are called if the metric is there.

    Returns:
        What is left out; to be closed once training is over.
    """
    kinds = counterparts(ModelCheckpoint)
    checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, kinds)]
    for callback in checkpoints:
        callback._last_global_step_saved = -1
    loop = trainer.fit_loop.epoch_loop
    trainer.validating = True
    try:
        with _replaced("on_validation_end", _if_metrics_are_there(trainer, "on_validation_end")):
            loop.val_loop.run()
        for callback in checkpoints:
            if callback._should_skip_saving_checkpoint(trainer):
                continue
            if not _has_metric(trainer, callback):
                _save_last_alone(trainer, callback)
            elif _waits_for_later(trainer, callback):
                _save_now(trainer, callback)
    finally:
        trainer.training = True
    trainer.should_stop = True
    left_out = ExitStack()
    hook = "on_train_epoch_end"
    left_out.enter_context(_replaced(hook, [*_of_the_users(trainer, hook), *_if_metrics_are_there(trainer, hook)]))
    return left_out


def _has_metric(trainer: pl.Trainer, callback: Any) -> bool:
    return callback.monitor in (None, "epoch", "step", *trainer.callback_metrics)


def _of_the_users(trainer: pl.Trainer, hook: str) -> Iterator[tuple[object, None]]:
    """The module, and the callbacks that are no checkpoints and have a hook that users have written."""
    yield trainer.lightning_module, None
    saving = (*counterparts(EarlyStopping), *counterparts(Checkpoint))
    for callback in callbacks_of(trainer):
        if not is_of_a_framework(getattr(callback, hook)) and not isinstance(callback, saving):
            yield callback, None


def _if_metrics_are_there(trainer: pl.Trainer, hook: str) -> Iterator[tuple[object, Hook]]:
    """The callbacks that monitor a metric, with hooks that ask first whether it is there."""
    kinds = (*counterparts(EarlyStopping), *counterparts(ModelCheckpoint))
    for callback in callbacks_of(trainer):
        if isinstance(callback, kinds):
            yield callback, partial(_ask_first, callback, getattr(callback, hook))


def _ask_first(callback: Any, hook: Hook, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    if _has_metric(trainer, callback):
        hook(trainer, pl_module)


@contextmanager
def _replaced(hook: str, owners: Iterable[tuple[object, Hook | None]]) -> Iterator[None]:
    """While this lasts, a hook of these objects is another, or none, which Lightning passes over."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for owner, instead in owners:
            attributes = vars(owner)
            before.append((attributes, {hook: attributes[hook]} if hook in attributes else {}))
            attributes[hook] = instead
        yield
    finally:
        for attributes, own in before:
            attributes.pop(hook, None)
            attributes.update(own)


def _save_last_alone(trainer: pl.Trainer, callback: ModelCheckpoint) -> None:
    """Without a score, the model has no place among the best."""
    if callback.save_last is True:
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    if callback.save_top_k != 0:
        rank_zero_warn(
            f"SoftPruning: ModelCheckpoint(monitor={callback.monitor!r}) has no score for the pruned model, after "
            "which nothing is trained, and does not keep it among its best; monitor a metric of validation, or save "
            "it yourself"
        )


def _waits_for_later(trainer: pl.Trainer, callback: ModelCheckpoint) -> bool:
    """Whether it saves from time to time, and this epoch's end is no such time."""
    epochs = callback.every_n_epochs or 0
    if epochs:
        return (trainer.current_epoch + 1) % epochs != 0
    return callback._every_n_train_steps > 0 or callback._train_time_interval is not None


def _save_now(trainer: pl.Trainer, callback: ModelCheckpoint) -> None:
    candidates = callback._monitor_candidates(trainer)
    callback._save_topk_checkpoint(trainer, candidates)
    callback._save_last_checkpoint(trainer, candidates)


def take_epoch_back(trainer: pl.Trainer, epoch: int) -> None:
    """Once training is over: an epoch that ended without training is still to come.

    Lightning counts every epoch that was begun. A fit that goes on from there would train one epoch less than asked.
    """
    for counter in (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current):
        counter.load_state_dict(dict.fromkeys(vars(counter), epoch))


def take_epoch_back_in(checkpoint: dict[str, Any], epoch: int) -> None:
    """The same in a checkpoint, whenever it was saved since: it is one from between two epochs."""
    state = checkpoint["loops"]["fit_loop"]
    trained = state["epoch_loop.batch_progress"]
    for counts, count in (
        *((counts, epoch) for counts in state["epoch_progress"].values()),
        (trained["total"], trained["total"]["completed"]),
        (trained["current"], 0),
    ):
        counts.update(dict.fromkeys(counts, count))
    trained["is_last_batch"] = False


@contextmanager
def one_epoch_more(trainer: pl.Trainer, callback: pl.Callback) -> Iterator[None]:
    """Let a trainer that may have trained already begin another epoch, and forget it afterwards."""
    loop = trainer.fit_loop
    callbacks, steps = callbacks_of(trainer), (loop.epoch_loop.max_steps, loop.epoch_loop.min_steps)
    before = (loop.max_epochs, loop.min_epochs, copy.deepcopy(loop.epoch_progress))
    trainer.callbacks = [*callbacks, callback]  # type: ignore[attr-defined]
    loop.max_epochs, loop.min_epochs = trainer.current_epoch + 1, None
    loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = -1, None
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        loop.max_epochs, loop.min_epochs, loop.epoch_progress = before
        loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = steps


@contextmanager
def as_if_at_epoch(trainer: pl.Trainer, epoch: int) -> Iterator[None]:
    """While this lasts, whoever asks for the fit's epoch is told this one."""
    counter = trainer.fit_loop.epoch_progress.current
    before = counter.completed
    counter.completed = epoch
    try:
        yield
    finally:
        counter.completed = before


def end_epoch_at_this_batch() -> NoReturn:
    """From `on_train_batch_start`: neither this batch nor any after it is trained on in this epoch.

    Raises:
        StopIteration: How Lightning's epoch loop ends its batches.
    """
    raise StopIteration
