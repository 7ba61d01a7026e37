"""Oracle: the layer itself, which is linear in what its outputs read."""

import math

import pytest
import torch
from torch import nn

import lightning_softprune.calibration.statistics as calibration
from lightning_softprune.calibration import InputStatistics, Reader, Wanted, collect_statistics
from lightning_softprune.calibration.statistics import has_unfolded_rows
from lightning_softprune.calibration.unfold import (
    evenly_spaced,
    outputs_at_rows,
    rows_per_call,
    sampled_rows,
    unfold_inputs,
)
from lightning_softprune.graph import geometry_of

LAYERS = [
    (nn.Linear(6, 4), (6,)),
    (nn.Linear(6, 4), (3, 6)),
    (nn.Conv1d(4, 2, 3, padding=1), (4, 5)),
    (nn.Conv2d(4, 2, 3, padding=1, stride=2), (4, 5, 7)),
    (nn.Conv2d(4, 2, (1, 4), padding="same", dilation=2), (4, 6, 6)),
    (nn.Conv2d(4, 2, 3, padding="valid"), (4, 6, 6)),
    (nn.Conv2d(4, 2, 1, stride=2), (4, 5, 5)),
    (nn.Conv3d(4, 2, 2), (4, 3, 3, 3)),
    (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), (4, 5, 5)),
    (nn.Conv2d(4, 2, 3, padding=2, padding_mode="circular"), (4, 5, 5)),
    (nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1), (4, 4)),
    (nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1), (4, 4, 5)),
    (nn.ConvTranspose2d(4, 2, 2, padding=2), (4, 6, 5)),
    (nn.ConvTranspose3d(4, 2, 2, dilation=2), (4, 3, 2, 3)),
    (nn.ConvTranspose2d(4, 2, 2, stride=3), (4, 2, 2)),
]


def matrix(layer):
    weight = layer.weight.detach()
    return (weight.transpose(0, 1) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else weight).flatten(1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel.*")
@pytest.mark.parametrize("most", [10**6, 7])
@pytest.mark.parametrize("batch", [(3,), ()])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_the_rows_times_the_weights_are_the_outputs_at_the_same_places(layer, shape, batch, most):
    x = torch.randn(*batch, *shape)
    with torch.no_grad():
        outputs = layer(x)
    geometry = geometry_of(layer)
    rows, wanted = unfold_inputs(geometry, x, most), outputs_at_rows(geometry, outputs, most)
    assert rows.shape == (len(wanted), geometry.features)
    assert len(rows) == min(len(rows), most)
    assert (
        len(rows) == outputs.numel() // outputs.shape[-1 if isinstance(layer, nn.Linear) else len(batch)] or most == 7
    )
    torch.testing.assert_close(rows @ matrix(layer).t() + layer.bias.detach(), wanted)


def test_rows_are_copies_that_later_changes_in_place_do_not_reach():
    for layer, shape in LAYERS:
        x = torch.ones(2, *shape)
        output = torch.ones(2, *shape)
        rows, held = (
            unfold_inputs(geometry_of(layer), x, 10**6),
            outputs_at_rows(geometry_of(nn.Linear(1, 1)), output, 10**6),
        )
        before = rows.clone()
        x.zero_()
        output.zero_()
        assert torch.equal(rows, before)
        assert held.min() == 1


@pytest.mark.parametrize("places", [(128, 14, 14), (64, 56, 56), (5,), (3, 7), (1, 1024), (2, 30, 30, 30)])
@pytest.mark.parametrize("most", [1, 3, 100, 4096])
def test_chosen_places_are_few_evenly_spread_and_not_in_step_with_rows_and_columns(places, most):
    chosen = evenly_spaced(places, most, torch.device("cpu"))
    total, inside = math.prod(places), math.prod(places[1:])
    assert 1 <= len(chosen) <= most
    assert torch.equal(chosen, torch.arange(0, total, step := total if len(chosen) == 1 else int(chosen[1])))
    assert step == 1 or len(chosen) == 1 or math.gcd(step, inside) == 1
    if len(chosen) >= 4 * inside:  # every place of a sample is met
        assert len((chosen % inside).unique()) == inside


def test_wide_rows_are_fewer():
    assert rows_per_call(10) == 4096
    assert rows_per_call(1024) == 2048
    assert rows_per_call(4608) == 512


def test_a_round_takes_no_more_rows_than_its_regressions_can_use():
    assert [calls * rows_per_call(10, calls) for calls in (8, 16, 64)] == [2**14] * 3
    assert 8 * rows_per_call(1152, 8) == 8 * (2**21 // 1152)
    assert [64 * rows_per_call(features, 64) for features in (1000, 1152)] == [2**14, 16 * 1152]


def as_rows(layer, x):
    """An input as ``(observations, channels)``: positions of a map are observations."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    return x.movedim(x.ndim - len(layer.kernel_size) - 1, -1).reshape(-1, layer.in_channels)


@pytest.mark.parametrize("most", [10**6, 7])
@pytest.mark.parametrize("batch", [(3,), ()])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_sampled_rows_are_rows_of_the_input_at_evenly_spread_places(layer, shape, batch, most):
    x = torch.randn(*batch, *shape)
    geometry = geometry_of(layer)
    every = as_rows(layer, x)
    places = (len(batch) * 3 or 1, len(every) // (len(batch) * 3 or 1))
    rows = sampled_rows(geometry, x, most)
    assert torch.equal(rows, every[evenly_spaced(places, most, x.device)])
    x.zero_()
    assert rows.any()


@pytest.mark.parametrize(
    ("layer", "stride", "one", "several"),
    [
        (nn.Linear(6, 2), 1, True, False),
        (nn.Linear(6, 2), 3, False, True),
        (nn.Conv2d(6, 2, 1), 1, True, False),
        (nn.Conv2d(6, 2, 1, padding="same"), 1, True, False),
        (nn.Conv2d(6, 2, 1, stride=2), 1, False, True),
        (nn.Conv2d(6, 2, 1, padding=1), 1, False, True),
        (nn.Conv2d(6, 2, 3), 1, False, True),
        (nn.Conv2d(6, 4, 3, groups=2), 1, False, True),
        (nn.Conv2d(6, 6, 3, groups=6), 1, False, False),
        (nn.ConvTranspose2d(6, 2, 2), 1, False, True),
        (nn.Conv2d(513, 2, 3), 1, False, False),
        (nn.Conv2d(512, 2, 3), 1, False, True),
        (nn.Linear(4609, 2), 11, False, False),
        (nn.Linear(4609, 2), 1, True, False),
    ],
    ids=str,
)
def test_windows_are_taken_where_an_output_reads_several_rows_and_not_too_much(layer, stride, one, several):
    assert geometry_of(layer).reads_one_row(stride) == one
    assert has_unfolded_rows(layer, stride) == several
    positions = math.prod(getattr(layer, "kernel_size", (stride,)))
    assert geometry_of(layer).positions(stride) == positions


def test_statistics_of_windows_are_streamed_over_batches_and_merged_over_processes(monkeypatch):
    layer = nn.Conv2d(3, 2, 3, padding=1)
    model, reader = nn.Sequential(layer), Reader("0", "in", 1)
    batches = [torch.randn(4, 3, 5, 5), torch.randn(7, 3, 4, 6)]
    found = collect_statistics(model, [reader], [lambda x=x: model(x) for x in batches])["0"]
    rows = torch.cat([unfold_inputs(geometry_of(layer), x, 10**6) for x in batches]).double()
    torch.testing.assert_close(found.unfolded.mean, rows.mean(0))
    torch.testing.assert_close(found.unfolded.covariance, torch.cov(rows.t(), correction=0), rtol=1e-5, atol=1e-6)
    merged = []
    monkeypatch.setattr(InputStatistics, "all_reduce", lambda self: merged.append(self))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor)
    found = collect_statistics(model, [reader], [lambda: model(batches[0])])["0"]
    assert merged == [found]
    monkeypatch.undo()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))  # another process saw the same
    found.all_reduce()
    assert found.unfolded.count == 2 * 4 * 25
    torch.testing.assert_close(found.unfolded.mean, rows[:100].mean(0))


def test_nobody_pays_for_windows_that_nobody_wants(monkeypatch):
    monkeypatch.setattr(calibration, "unfold_inputs", lambda *_: pytest.fail("built"))
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    steps = [lambda: model(torch.ones(2, 3, 4, 4))]
    assert collect_statistics(model, [Reader("0", "in", 1)], steps, wanted=Wanted(unfolded=False))["0"].unfolded is None
