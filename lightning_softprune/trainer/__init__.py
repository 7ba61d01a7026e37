"""The Trainer in mid-fit: scoring, stepping and reading data beside the running epoch, with nothing left behind.

Everything this library takes from Lightning's private interface is in this folder, and in no other. A contract test
fails by name when a release of Lightning moves any of it.
"""

from lightning_softprune.trainer.fit_loop import (
    end_epoch_at_this_batch,
    finish_epoch_without_training,
    logging_step,
    one_epoch_more,
    take_epoch_back,
    take_epoch_back_in,
)
from lightning_softprune.trainer.isolation import (
    clone_inference_tensors_and_reset_metrics,
    has_inference_tensors,
    isolated_rng,
)
from lightning_softprune.trainer.module_steps import Step, Steps, run_steps
from lightning_softprune.trainer.other_callbacks import (
    averaged_copies,
    forget_compiled,
    record_new_parameters,
    reset_monitors,
)
from lightning_softprune.trainer.processes import wrap_again
from lightning_softprune.trainer.runner import ModuleRunner
from lightning_softprune.trainer.support import refuse_sharded_optimizers, refuse_sharding

__all__ = [
    "ModuleRunner",
    "Step",
    "Steps",
    "averaged_copies",
    "clone_inference_tensors_and_reset_metrics",
    "end_epoch_at_this_batch",
    "finish_epoch_without_training",
    "forget_compiled",
    "has_inference_tensors",
    "isolated_rng",
    "logging_step",
    "one_epoch_more",
    "record_new_parameters",
    "refuse_sharded_optimizers",
    "refuse_sharding",
    "reset_monitors",
    "run_steps",
    "take_epoch_back",
    "take_epoch_back_in",
    "wrap_again",
]
