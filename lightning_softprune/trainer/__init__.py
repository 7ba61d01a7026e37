"""The Trainer in mid-fit: scoring, stepping and reading data beside the running epoch, with nothing left behind.

Everything this library takes from Lightning's private interface is in this folder, and in no other. A contract test
fails by name when a release of Lightning moves any of it.
"""

from lightning_softprune.trainer.fit_loop import (
    _one_epoch_more,
    finish_epoch_without_training,
    logging_step,
    take_epoch_back,
    take_epoch_back_in,
)
from lightning_softprune.trainer.isolation import has_inference_tensors, isolated_rng, leave_inference
from lightning_softprune.trainer.module_steps import (
    Steps,
    _calibration,
    _run,
    _validation,
    rehearse,
    run_the_same,
    tracing_steps,
)
from lightning_softprune.trainer.other_callbacks import averaged_copies, forget_compiled, reset_monitors
from lightning_softprune.trainer.processes import over_processes, wrap_again
from lightning_softprune.trainer.scorer import ValidationScorer, time_validation_step
from lightning_softprune.trainer.support import refuse_sharded_optimizers, refuse_sharding

__all__ = [
    "Steps",
    "ValidationScorer",
    "_calibration",
    "_one_epoch_more",
    "_run",
    "_validation",
    "averaged_copies",
    "finish_epoch_without_training",
    "forget_compiled",
    "has_inference_tensors",
    "isolated_rng",
    "leave_inference",
    "logging_step",
    "over_processes",
    "refuse_sharded_optimizers",
    "refuse_sharding",
    "rehearse",
    "reset_monitors",
    "run_the_same",
    "take_epoch_back",
    "take_epoch_back_in",
    "time_validation_step",
    "tracing_steps",
    "wrap_again",
]
