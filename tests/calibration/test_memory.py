"""Oracle: the matrices that are there after statistics were taken and regressions prepared."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune.calibration import Wanted, collect_statistics, find_readers, statistics_bytes
from lightning_softprune.calibration.memory import MATRICES
from lightning_softprune.compensation import Compensation
from lightning_softprune.compensation.regression import ChannelRegression, FeatureRegression
from lightning_softprune.graph.grouping import trace_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    torch.manual_seed(0)
    widths = (4, 8, 16, 24)
    layers = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.ReLU(), nn.Conv2d(narrow, wide, 3, padding=1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 2, 1)).eval()
    x = torch.randn(6, 3, 8, 8)
    steps = [lambda: model(x)]
    groups = [group for group in trace_groups(model, steps) if group.prunable]
    return model, groups, steps


def held(statistics):
    """Bytes of the covariances."""
    parts = [part for known in statistics.values() for part in (known, known.unfolded) if part is not None]
    return sum(8 * part.covariance.numel() for part in parts)


def test_layers_whose_unfolded_inputs_do_not_fit_share_one_regression_per_channel_the_widest_first():
    model, groups, steps = network()
    readers = find_readers(model, groups)
    wide = ["2", "4", "6"]
    sizes = [statistics_bytes(model, readers, wide[:count]) for count in range(4)]
    assert sizes == sorted(sizes)
    rankings = [np.arange(group.num_channels) for group in groups]
    for count, size in enumerate(sizes):
        for budget in (size, size + 1):
            found = collect_statistics(model, readers, steps, budget=budget)
            assert [name for name in found if found[name].unfolded is not None] == wide[:count]
            assert MATRICES * held(found) <= budget
            compensation = Compensation("least_squares", model, groups, rankings, found)
            kinds = [type(compensation.regression(name)) for name in wide]
            assert kinds == [FeatureRegression] * count + [ChannelRegression] * (3 - count)
    everything = collect_statistics(model, readers, steps)
    assert all(everything[name].unfolded is not None for name in wide)
    nothing = collect_statistics(model, readers, steps, budget=0)
    assert not any(nothing[name].unfolded for name in wide)
    assert nothing.keys() == everything.keys()
    means = collect_statistics(model, readers, steps, budget=0, wanted=Wanted(covariances=False))
    assert all(means[name].unfolded is not None for name in wide)  # which take no matrix
