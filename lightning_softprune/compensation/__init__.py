"""What the readers of removed channels do to make up for them, in closed form."""

from lightning_softprune.compensation.fold import COMPENSATIONS, Compensation
from lightning_softprune.compensation.intercepts import Intercepts, find_intercepts
from lightning_softprune.compensation.logits import find_logit_fits
from lightning_softprune.compensation.refit import DenseRun, refit_readers

__all__ = [
    "COMPENSATIONS",
    "Compensation",
    "DenseRun",
    "Intercepts",
    "find_intercepts",
    "find_logit_fits",
    "refit_readers",
]
