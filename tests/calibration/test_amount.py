"""How many training batches a round looks at where nobody says."""

import pytest
import torch
from torch import nn

from lightning_softprune.calibration import Reader, batches_wanted


def wanted(layer, batch, samples=64, stride=1):
    """For one reader, seen with a validation batch of this many samples; training batches have 16."""
    seen = {}
    layer.register_forward_hook(lambda module, _, output: seen.update(rows=output.numel() / output.shape[1]))
    layer(batch)
    rows = seen["rows"]
    if isinstance(layer, nn.Linear):
        rows = batch.numel() / batch.shape[-1]
    applied = rows * (layer.weight[0, 0].numel() if layer.weight.ndim > 2 else 1)
    return batches_wanted(nn.Sequential(layer), [Reader("0", "in", stride)], {"0": applied}, (samples, 16))


@pytest.mark.parametrize(
    ("inputs", "number"),
    [
        (4, 8),  # 32 samples would do: there are 8 batches at least
        (16, 8),  # 128 samples, as they have
        (17, 9),  # 8 * 17 samples are eight and a half batches
        (40, 20),
        (64, 32),
        (65, 32),  # never more
        (4000, 32),
    ],
)
def test_a_fully_connected_layer_is_to_see_eight_rows_for_each_input(inputs, number):
    assert wanted(nn.Linear(inputs, 3), torch.zeros(64, inputs)) == number


def test_positions_are_rows_and_so_are_tokens():
    assert wanted(nn.Linear(40, 3), torch.zeros(64, 5, 40)) == 8  # 4 batches of 16 with 5 tokens each
    assert wanted(nn.Linear(120, 3), torch.zeros(64, 5, 120)) == 12
    assert wanted(nn.Conv2d(10, 3, 3), torch.zeros(64, 10, 4, 4)) == 12  # 8 * 90 / 4 positions, of 16 samples
    assert wanted(nn.Conv2d(10, 3, 3), torch.zeros(64, 10, 12, 12)) == 8
    assert wanted(nn.Conv2d(10, 4, 3, groups=2), torch.zeros(64, 10, 3, 3)) == 23  # an output reads 45 numbers
    assert wanted(nn.Conv2d(10, 10, 3, groups=10), torch.zeros(64, 10, 3, 3)) == 8


def test_a_map_too_wide_for_a_regression_of_its_own_has_one_per_channel():
    flattened = torch.zeros(64, 64 * 100)
    assert wanted(nn.Linear(6400, 3), flattened, stride=100) == 8
    assert wanted(nn.Linear(6400, 3), flattened) == 32


def test_the_samples_of_both_batches_count():
    model, reader = nn.Sequential(nn.Linear(64, 3)), [Reader("0", "in", 1)]
    assert batches_wanted(model, reader, {"0": 10.0}, (10, 64)) == 8
    assert batches_wanted(model, reader, {"0": 10.0}, (10, 32)) == 16
    assert batches_wanted(model, reader, {"0": 40.0}, (10, 32)) == 8  # four rows a sample
    wide = nn.Sequential(nn.Linear(4000, 3))
    assert batches_wanted(wide, reader, {"0": 10.0}, (10, 256)) == 16  # 4,096 samples at most
    assert batches_wanted(wide, reader, {"0": 10.0}, (10, 300)) == 13
    assert batches_wanted(wide, reader, {"0": 10.0}, (10, 1024)) == 8
    assert batches_wanted(nn.Sequential(nn.Linear(3, 2)), reader, {"0": 10.0}, (10, 1)) == 24
    assert batches_wanted(wide, reader, {"0": 10.0}, (10, 0)) == 32  # no training data: nobody will ask for them


def test_the_neediest_reader_decides_and_one_that_did_not_run_says_nothing():
    model = nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 30), nn.Linear(30, 1000))
    readers = [Reader(name, "in", 1) for name in "012"]
    assert batches_wanted(model, readers, {"0": 64.0, "1": 64.0, "2": 64.0}, (64, 16)) == 20
    assert batches_wanted(model, readers, {"0": 64.0, "2": 64.0}, (64, 16)) == 15
    assert batches_wanted(model, readers, {}, (64, 16)) == 8
    assert batches_wanted(model, [], {"1": 64.0}, (64, 16)) == 8
