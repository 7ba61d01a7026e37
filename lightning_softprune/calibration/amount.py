"""How many training batches a round is calibrated on, where the user does not say.

A regression on p inputs, fitted on n rows, errs by about p / n more than it has to. A convolution sees hundreds of rows
of a single picture, a fully connected layer one: for it, the batches that are plenty for convolutions are few, and with
no more rows than inputs the fit is as good as arbitrary. So there are more batches where a layer that loses inputs
would see fewer than :data:`ROWS_PER_INPUT` rows for each of them; as many as it lacks, within bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_softprune.calibration.readers import Reader, weight_geometry
from lightning_softprune.calibration.unfold import MAX_FEATURES

LEAST_BATCHES, MOST_BATCHES = 8, 32

MOST_SAMPLES = 4096
"""Beyond :data:`LEAST_BATCHES`, no more than so many samples: the batches are held in memory while a round lasts."""

MOST_OF_EPOCH = 0.05
"""Beyond :data:`LEAST_BATCHES`, no larger part of an epoch, so that a round is not longer for it than that."""

ROWS_PER_INPUT = 8


def batches_wanted(
    model: nn.Module, readers: Sequence[Reader], applied: Mapping[str, float], samples: tuple[int, int]
) -> int:
    """How many training batches let every reader see enough rows, between the least and the most.

    Args:
        model: The model.
        readers: Layers whose inputs go.
        applied: How often a validation batch applies their weights (rows of a linear layer, rows times positions of a
            kernel), by name; others are left out of account.
        samples: In that batch, and in a training batch.

    >>> batches_wanted(nn.Sequential(nn.Linear(512, 10)), [Reader("0", "in", 1)], {"0": 64.0}, (64, 128))
    32
    >>> batches_wanted(nn.Sequential(nn.Conv2d(16, 10, 3)), [Reader("0", "in", 1)], {"0": 64 * 9 * 100.0}, (64, 128))
    8
    """
    validated, trained = samples
    wanted = 0.0
    for reader in readers:
        geometry = weight_geometry(model.get_submodule(reader.name))
        rows = applied.get(reader.name, 0.0) / max(validated, 1)
        if geometry.kernel is not None:
            rows /= geometry.kernel.positions
        features = geometry.features / max(geometry.groups, 1)
        if features > MAX_FEATURES:  # these have one regression over channels, whose positions are rows
            features, rows = features / reader.stride, rows * reader.stride
        if rows > 0.0:
            wanted = max(wanted, ROWS_PER_INPUT * features / rows)
    trained = max(trained, 1)
    batches = min(math.ceil(wanted / trained), MOST_SAMPLES // trained, MOST_BATCHES)
    return max(batches, LEAST_BATCHES)
