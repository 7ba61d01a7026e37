"""What layers see of a group's channels on a few training batches, and which channels go first by it."""

from lightning_softprune.calibration.importance import IMPORTANCES, norms, rank
from lightning_softprune.calibration.readers import Reader, as_rows, find_readers, watch_calls, watch_inputs
from lightning_softprune.calibration.statistics import InputStatistics, collect_statistics, in_double, reads_one_row
from lightning_softprune.calibration.unfold import (
    evenly_spaced,
    features_of,
    kernel_positions,
    most_rows,
    outputs_at_rows,
    unfold_inputs,
)

__all__ = [
    "IMPORTANCES",
    "InputStatistics",
    "Reader",
    "as_rows",
    "collect_statistics",
    "evenly_spaced",
    "features_of",
    "find_readers",
    "in_double",
    "kernel_positions",
    "most_rows",
    "norms",
    "outputs_at_rows",
    "rank",
    "reads_one_row",
    "unfold_inputs",
    "watch_calls",
    "watch_inputs",
]
