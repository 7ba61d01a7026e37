"""Expected errors: what a group's channels are worth, known before a single plan is scored.

*Errors of readers* come from the statistics alone. A reader computes ``W x``. With its input channels R removed, and
predicted from the kept ones K by the regression that compensation uses, its outputs miss the fraction

    e = tr(W_R (S_RR - B S_KR) W_R^T) / tr(W S W^T)

of their variance. In the order in which channels go, the last to go first, ``S + r I = L L^T``, and what is left of R
given K is ``L_RR L_RR^T``. So column j of ``W L`` is what outputs lose when channel j goes after all that go before it,
and the sum over any number of columns from the end is e for that number of channels: one product says it for all.
The error of a group is the mean over its readers. Channels of other groups that a reader has are taken as kept.

*Errors of outputs* say what of it arrives at the end: the fraction of the variance that a network with this group alone
pruned misses of the outputs that steps use, without labels. They are measured on a few training samples for two
numbers of channels; between and beyond these numbers they go as the errors of readers do, in logarithms a straight
line. They add up from group to group better than scores do, and no luck is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from lightning_softprune.calibration import Reader, find_readers, is_reading
from lightning_softprune.compensation.fold import Compensation
from lightning_softprune.compensation.healing import Place, errors_at
from lightning_softprune.compensation.regression import FeatureRegression, cholesky
from lightning_softprune.graph import PruningGroup, geometry_of, weight_of
from lightning_softprune.utilities.arrays import FloatArray, IntArray

_LEVELS = (0.02, 0.15)
"""Errors of readers at which outputs are looked at."""

_NOTHING = 1e-6
"""Errors below that are none."""

_SLOPES = (0.5, 2.0)  # of the one error over the other, in logarithms


def errors_of_readers(
    model: nn.Module,
    groups: Sequence[PruningGroup],
    rankings: Sequence[IntArray],
    compensation: Compensation,
) -> list[FloatArray | None]:
    """What the readers of each group miss as its channels go.

    Args:
        model: The dense model.
        groups: Its prunable groups.
        rankings: The order in which each group's channels go; the first is removed first.
        compensation: What its readers do about it.

    Returns:
        Per group, the error when 0, 1, ... of its channels are gone, shape ``(num_channels + 1,)``; None where nothing
        is known of its readers, or nothing is predicted.
    """
    modules = dict(model.named_modules())
    readers = {(reader.name, reader.slot): reader for reader in find_readers(model, groups)}
    known = set(compensation.readers)
    found: list[FloatArray | None] = []
    for group, ranking in zip(groups, rankings, strict=True):
        place = np.empty(len(ranking), dtype=np.int64)
        place[ranking] = np.arange(len(ranking))
        lost, number = np.zeros(len(ranking)), 0
        for member in group.members:
            if member.module not in known or not is_reading(modules, member):
                continue
            reader = readers[member.module, member.slot]
            # when each index goes: channels of other groups stay
            turn = np.where(member.owner >= 0, place[member.owner], len(ranking))[:: reader.stride]
            parts = _lost(modules[reader.name], reader, turn, compensation)
            if parts is not None:
                number += 1
                lost += np.bincount(turn, weights=parts, minlength=len(ranking) + 1)[:-1] / max(parts.sum(), 1e-300)
        found.append(np.concatenate([[0.0], np.cumsum(lost / number)]) if number else None)
    return found


def _lost(layer: nn.Module, reader: Reader, turn: IntArray, compensation: Compensation) -> FloatArray | None:
    """What a reader's outputs lose with each of its channels, given that those stay that go later."""
    geometry, regression = geometry_of(layer), compensation.regression(reader.name)
    if geometry is None or regression.covariance is None:
        return None
    weight = geometry.to_rows(weight_of(layer, geometry.weight).detach(), reader.stride)
    weight = weight.to(regression.mean.device, torch.float32)
    number, _, channels, positions = weight.shape
    inside = positions if isinstance(regression, FeatureRegression) else 1  # features per channel
    lost = np.zeros(number * channels)
    for part in range(number):
        own = slice(part * channels, (part + 1) * channels)
        order = torch.from_numpy(np.argsort(-turn[own], kind="stable")).to(weight.device)
        features = (order[:, None] * inside + torch.arange(inside, device=order.device)).flatten()
        if regression.covariance.order is not None:  # one part, in which channels of this group alone go
            factor, features = regression.covariance.matrix, regression.covariance.order
        else:
            at = features + part * channels * inside
            factor = cholesky(regression.covariance.matrix[at[:, None], at], regression.covariance.ridge)
        rows = weight[part].flatten(1)[:, None] if inside > 1 else weight[part].movedim(2, 1)
        factor = factor.float()  # what is lost in precision is far below what is asked of these numbers
        columns = torch.stack([(row[:, features] @ factor).square_().sum(0) for row in rows.unbind(1)]).sum(0)
        lost[own] = np.bincount((features // inside).cpu().numpy(), columns.double().cpu().numpy(), channels)
    return lost


Outputs = Mapping[Place, torch.Tensor]


def errors_of_outputs(
    of_readers: Sequence[FloatArray | None], most: Sequence[int], run: Callable[[int, int], Outputs]
) -> list[FloatArray | None]:
    """What the network's outputs miss as the channels of one group go.

    Args:
        of_readers: Per group, the errors of its readers.
        most: Per group, how many channels may go.
        run: Runs the network with so many channels of a group gone (its number, and how many), and gives the outputs.

    Returns:
        Per group, the error when 0, 1, ... of its channels are gone, shape ``(num_channels + 1,)``; None where the
        network has no output in common with the dense one, or its readers tell nothing.
    """
    dense = run(0, 0)
    found: list[FloatArray | None] = []
    for group, (errors, highest) in enumerate(zip(of_readers, most, strict=True)):
        if errors is None or highest < 1:
            found.append(None)
            continue
        counts = sorted({int(np.clip(np.searchsorted(errors, level), 1, highest)) for level in _LEVELS})
        measured = {count: _error(partial(run, group, count), dense) for count in counts}
        measured = {count: error for count, error in measured.items() if 0.0 < error < np.inf}
        found.append(_between(errors, measured) if measured else None)
    return found


def _error(run: Callable[[], Outputs], dense: Outputs) -> float:
    """The sum over the outputs; nan where the user's code does not take this width, which is said of plans."""
    try:
        pruned = run()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return np.nan
    return float(sum(errors_at(pruned, dense)))


def _between(errors: FloatArray, measured: Mapping[int, float]) -> FloatArray:
    """The errors of outputs for any number of channels, from those measured and those of the readers."""
    at = np.log(np.maximum(errors, _NOTHING))
    known = at[list(measured)]
    logs = np.maximum.accumulate(np.log(np.maximum(list(measured.values()), _NOTHING)))
    before, after = 1.0, 1.0
    if len(known) > 1:
        before, after = np.clip(np.diff(logs) / np.maximum(np.diff(known), 1e-9), *_SLOPES)[[0, -1]]
    outside = before * np.minimum(at - known[0], 0.0) + after * np.maximum(at - known[-1], 0.0)
    found = np.exp(np.interp(at, known, logs) + outside)
    found[errors <= _NOTHING] = 0.0
    return np.asarray(found, dtype=np.float64)
