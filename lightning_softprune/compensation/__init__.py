"""What the readers of removed channels do to make up for them, in closed form; and healing, without labels."""

from lightning_softprune.compensation.dense_run import DenseRun, run_dense
from lightning_softprune.compensation.expected_errors import errors_of_outputs, errors_of_readers
from lightning_softprune.compensation.fold import COMPENSATIONS, Compensation, kinds_of_readers
from lightning_softprune.compensation.healing import (
    DenseNetwork,
    Teacher,
    changeable,
    layers_in_eval_mode,
    learning_in,
    teach,
    teaching_bytes,
    watch_outputs,
)
from lightning_softprune.compensation.intercepts import Intercepts, find_intercepts
from lightning_softprune.compensation.logits import find_logit_fits
from lightning_softprune.compensation.refit import refit_readers

__all__ = [
    "COMPENSATIONS",
    "Compensation",
    "DenseNetwork",
    "DenseRun",
    "Intercepts",
    "Teacher",
    "changeable",
    "errors_of_outputs",
    "errors_of_readers",
    "find_intercepts",
    "find_logit_fits",
    "kinds_of_readers",
    "layers_in_eval_mode",
    "learning_in",
    "refit_readers",
    "run_dense",
    "teach",
    "teaching_bytes",
    "watch_outputs",
]
