"""Oracle: what readers and the whole network really miss once they are pruned and compensated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_softprune.compensation import errors_of_outputs, errors_of_readers
from lightning_softprune.search import ExpectedErrors
from lightning_softprune.search.plan import Plan
from support.readers import prepared, raw_inputs_of

pytestmark = pytest.mark.usefixtures("one_thread")


def readers_of(net, number):
    """The members of one group that read it and make none of it."""
    members = net.groups[number].members
    made = {member.module for member in members if member.slot != "in"}
    return [member for member in members if member.slot == "in" and member.module not in made]


def missed(net, number, count, readers):
    """The mean over readers of the fraction of their outputs' variance that they miss, by running them."""
    plan = Plan.from_counts([count if n == number else 0 for n in range(len(net.groups))], net.rankings)
    layers = {reader.module: net.model.get_submodule(reader.module) for reader in readers}
    inputs = {name: torch.cat(raw_inputs_of(net.model, name, *net.inputs)) for name in layers}
    with torch.no_grad():
        wanted = {name: layer(inputs[name]) for name, layer in layers.items()}
    surgery = net.prune("least_squares", plan)
    errors = []
    for reader in readers:
        name, dense = reader.module, wanted[reader.module]
        channel = -1 if isinstance(layers[name], torch.nn.Linear) else 1
        stay = torch.from_numpy(np.flatnonzero(~np.isin(reader.owner, plan.removed[number])))
        with torch.no_grad():
            found = layers[name](inputs[name].index_select(channel, stay))
        flat = dense.movedim(channel, -1).flatten(0, -2)
        errors.append(float((found - dense).square().mean() / (flat - flat.mean(0)).square().mean()))
    surgery.undo()
    return np.mean(errors)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        *((name, 0.02) for name in ("Autoencoder", "Residual", "Dense", "Volume", "Joined")),
        *((name, 0.1) for name in ("GroupedConv", "TransposedConv")),  # whose statistics are of some positions
    ],
)
def test_errors_of_readers_are_what_pruned_readers_miss(name, tolerance):
    net = prepared(name, samples=200)
    tables = errors_of_readers(net.model, net.groups, net.rankings, net.compensation())
    compared = 0
    for number, (group, table) in enumerate(zip(net.groups, tables, strict=True)):
        readers = readers_of(net, number)
        assert table.shape == (group.num_channels + 1,)
        assert table[0] == 0.0
        assert (np.diff(table) >= 0).all()
        for count in range(1, group.num_channels if len(readers) else 1):
            compared += 1
            assert missed(net, number, count, readers) == pytest.approx(table[count], rel=tolerance, abs=1e-3)
    assert compared > 3


def test_nothing_is_known_where_nothing_is_predicted():
    net = prepared("Autoencoder")
    for mode in ("none", "bias"):
        assert errors_of_readers(net.model, net.groups, net.rankings, net.compensation(mode)) == [None] * 3


def outputs(*errors):
    """Two outputs of a dense network, and these with the given fractions of their variance missed."""
    torch.manual_seed(0)
    dense = {("", 1, n): torch.randn(200, 3) for n in range(len(errors))}
    variances = {place: (value - value.mean(0)).square().mean() for place, value in dense.items()}
    pruned = {
        place: value + (error * variances[place]).sqrt()
        for (place, value), error in zip(dense.items(), errors, strict=True)
    }
    return dense, pruned


def test_errors_of_outputs_are_measured_at_two_counts_and_go_with_the_readers_between_them():
    readers = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 40)])
    asked = []

    def run(group, count):
        asked.append((group, count))
        dense, pruned = outputs(0.5 * readers[count], 0.25 * readers[count])
        return pruned if count else dense

    (table,) = errors_of_outputs([readers], [39], run)
    assert [np.searchsorted(readers, level) for level in (0.02, 0.15)] == [count for _, count in asked[1:]]
    np.testing.assert_allclose(table, 0.75 * readers, rtol=0.02)


def test_a_width_that_the_code_does_not_take_tells_nothing_and_stops_nothing():
    readers = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 40)])

    def run(group, count):
        if count > 30 or (group == 1 and count):
            raise RuntimeError("not this one")
        dense, pruned = outputs(readers[count])
        return pruned if count else dense

    first, second = errors_of_outputs([readers, readers], [39, 39], run)
    np.testing.assert_allclose(first, readers, rtol=0.02)
    assert second is None


def test_channels_whose_loss_no_reader_notices_are_free():
    readers = np.array([0.0, 0.0, 0.0, 0.2, 1.0])
    dense, pruned = outputs(0.4)
    (table,) = errors_of_outputs([readers], [3], lambda group, count: pruned if count else dense)
    assert (table[:3] == 0.0).all()
    assert (table[3:] > 0.0).all()


def test_a_group_of_which_nothing_is_known_is_taken_to_be_as_the_others_are():
    known, channels = np.linspace(0.0, 1.0, 11), np.array([10, 5, 10])
    errors = ExpectedErrors.of([known, None, 3.0 * known], channels, channels)
    one = np.array([[0, 5, 0]])
    assert errors(one)[0] == pytest.approx(2.0)  # between the others
    assert errors(np.array([[4, 0, 0], [0, 0, 4], [4, 5, 4]])) == pytest.approx([0.4, 1.2, 3.6])
    assert ExpectedErrors.of([known, None, None], channels, channels) is None
    assert ExpectedErrors.of([], channels[:0], channels[:0]) is None
    kept_whole = ExpectedErrors.of([known, None, None], channels, np.array([9, 0, 0]))
    assert kept_whole(np.array([[4, 0, 0]]))[0] == pytest.approx(0.4)


def test_a_wide_group_keeps_some_of_its_numbers():
    table = np.linspace(0.0, 1.0, 2049) ** 3
    errors = ExpectedErrors.of([table], np.array([2048]), np.array([2047]))
    assert len(errors.errors[0]) == 65
    removed = np.array([[10], [1000], [2047]])
    np.testing.assert_allclose(errors(removed), table[removed[:, 0]], rtol=0.01, atol=1e-4)
