"""The Trainer in mid-fit: scoring, stepping and reading data beside the running epoch, with nothing left behind.

Everything this library takes from Lightning's private interface is in this folder, and in no other. A contract test
fails by name when a release of Lightning moves any of it.
"""

from lightning_softprune.trainer.ending import why_training_ended
from lightning_softprune.trainer.fit_loop import (
    as_if_at_epoch,
    end_epoch_at_this_batch,
    finish_epoch_without_training,
    logging_step,
    may_stop,
    one_epoch_more,
    take_epoch_back,
    take_epoch_back_in,
)
from lightning_softprune.trainer.isolation import (
    StillParameters,
    forget_evaluations,
    has_inference_tensors,
    isolated_rng,
    make_fresh,
    metrics_in,
    seed_from,
)
from lightning_softprune.trainer.lightning_names import MisconfigurationException, is_overridden
from lightning_softprune.trainer.module_steps import (
    GradientsWhereNeeded,
    Step,
    Steps,
    as_far_as_it_runs,
    attributes_of,
    code_in_training,
    may_log,
    reads_its_mode,
    run_steps,
    what_a_step_shows,
)
from lightning_softprune.trainer.other_callbacks import (
    averaged_copies,
    callbacks_of,
    ends_with_average,
    forget_compiled,
    record_new_parameters,
    reset_monitors,
    users_callbacks,
)
from lightning_softprune.trainer.processes import mean_over_processes, wrap_again
from lightning_softprune.trainer.runner import ModuleRunner
from lightning_softprune.trainer.steps import LoadedBatch, compiler_off, watched
from lightning_softprune.trainer.support import (
    UntrainedCopies,
    refuse_schedule,
    refuse_sharded_optimizers,
    refuse_sharding,
    refuse_teacher,
    refuse_undeclared_twins,
    refuse_unsuited,
)
from lightning_softprune.trainer.validation_data import ALL, BatchesReadAgain, Part

__all__ = [
    "ALL",
    "BatchesReadAgain",
    "GradientsWhereNeeded",
    "LoadedBatch",
    "MisconfigurationException",
    "ModuleRunner",
    "Part",
    "Step",
    "Steps",
    "StillParameters",
    "UntrainedCopies",
    "as_far_as_it_runs",
    "as_if_at_epoch",
    "attributes_of",
    "averaged_copies",
    "callbacks_of",
    "code_in_training",
    "compiler_off",
    "end_epoch_at_this_batch",
    "ends_with_average",
    "finish_epoch_without_training",
    "forget_compiled",
    "forget_evaluations",
    "has_inference_tensors",
    "is_overridden",
    "isolated_rng",
    "logging_step",
    "make_fresh",
    "may_log",
    "may_stop",
    "mean_over_processes",
    "metrics_in",
    "one_epoch_more",
    "reads_its_mode",
    "record_new_parameters",
    "refuse_schedule",
    "refuse_sharded_optimizers",
    "refuse_sharding",
    "refuse_teacher",
    "refuse_undeclared_twins",
    "refuse_unsuited",
    "reset_monitors",
    "run_steps",
    "seed_from",
    "take_epoch_back",
    "take_epoch_back_in",
    "users_callbacks",
    "watched",
    "what_a_step_shows",
    "why_training_ended",
    "wrap_again",
]
