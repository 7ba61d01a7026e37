"""Why a fit came to its end, in words for people."""

from __future__ import annotations

from datetime import timedelta

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer

from lightning_softprune.trainer.other_callbacks import callbacks_of
from lightning_softprune.utilities.libraries import counterparts


def why_training_ended(trainer: pl.Trainer) -> str:
    """Name what ended a fit that ended without an exception, as in ``"max_steps=12 was reached"``.

    Limits are asked in Lightning's own order. Nobody keeps who set `trainer.should_stop`: EarlyStopping and Timer are
    known by their own records, whatever else did it is not.

    Args:
        trainer: The trainer, once training is over.
    """
    if trainer.limit_train_batches == 0:
        return "limit_train_batches=0 left no training batch"
    if trainer.num_training_batches == 0:
        return "there was no training batch"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"max_steps={trainer.max_steps} was reached"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"max_epochs={trainer.max_epochs} was reached"
    if not trainer.should_stop:
        return "no limit was reached and `trainer.should_stop` was not set; a hook may have raised StopIteration"
    callbacks = callbacks_of(trainer)
    for callback in callbacks:
        if isinstance(callback, counterparts(EarlyStopping)) and _has_stopped(trainer, callback):
            return f"{type(callback).__name__}(monitor={callback.monitor!r}) stopped it"
    for callback in callbacks:
        if isinstance(callback, counterparts(Timer)):
            left = callback.time_remaining()
            if left is not None and left <= 0:
                return f"its time was over: max_time={timedelta(seconds=round(callback.time_elapsed() + left))}"
    return "`trainer.should_stop` was set, by the module or by a callback"


def _has_stopped(trainer: pl.Trainer, callback: EarlyStopping) -> bool:
    """Whether this callback ended this fit; it may remember an end from the checkpoint that the fit began with."""
    if not callback.stopped_epoch and callback.stopping_reason_message is None:
        return False
    forced_on = bool(trainer.min_epochs or trainer.min_steps)  # then training goes on for a while
    return forced_on or callback.stopped_epoch == trainer.current_epoch - 1
