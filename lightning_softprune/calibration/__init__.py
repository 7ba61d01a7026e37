"""What layers see of a group's channels on a few training batches, and which channels go first by it."""

from lightning_softprune.calibration.amount import LEAST_BATCHES, MOST_OF_EPOCH, batches_wanted
from lightning_softprune.calibration.importance import (
    IMPORTANCES,
    Importance,
    checked_importance,
    norms,
    rank,
    sum_over_channels,
)
from lightning_softprune.calibration.memory import statistics_bytes
from lightning_softprune.calibration.positions import ReadPositions, find_read_positions
from lightning_softprune.calibration.products import centred, cross_products, mean_of, observations
from lightning_softprune.calibration.readers import (
    Reader,
    find_readers,
    is_reading,
    readers_that_lose,
    watch_calls,
    watch_inputs,
    weight_geometry,
)
from lightning_softprune.calibration.statistics import (
    InputStatistics,
    KernelCoverage,
    Wanted,
    collect_statistics,
    in_double,
    seen_by_twins,
    unfolded_readers,
)
from lightning_softprune.calibration.unfold import (
    Scratch,
    outputs_at_rows,
    rows_of_inputs,
    rows_per_call,
    sampled_rows,
    unfold_inputs,
)

__all__ = [
    "IMPORTANCES",
    "LEAST_BATCHES",
    "MOST_OF_EPOCH",
    "Importance",
    "InputStatistics",
    "KernelCoverage",
    "ReadPositions",
    "Reader",
    "Scratch",
    "Wanted",
    "batches_wanted",
    "centred",
    "checked_importance",
    "collect_statistics",
    "cross_products",
    "find_read_positions",
    "find_readers",
    "in_double",
    "is_reading",
    "mean_of",
    "norms",
    "observations",
    "outputs_at_rows",
    "rank",
    "readers_that_lose",
    "rows_of_inputs",
    "rows_per_call",
    "sampled_rows",
    "seen_by_twins",
    "statistics_bytes",
    "sum_over_channels",
    "unfold_inputs",
    "unfolded_readers",
    "watch_calls",
    "watch_inputs",
    "weight_geometry",
]
