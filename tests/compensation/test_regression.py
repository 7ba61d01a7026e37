"""Regressions of removed on kept inputs, against NumPy's least squares."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import lightning_softprune.calibration.statistics as calibration
import lightning_softprune.compensation.regression as regression
from lightning_softprune.compensation.regression import RIDGE
from lightning_softprune.graph import parts_called
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.readers import (
    MODES,
    Prepared,
    dense_weight,
    inputs_of,
    make,
    names,
    prepared,
    raw_inputs_of,
    read_by_each_output,
    regress,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training.*"),
]


STRIDES = {("Residual", "head"): 4, ("Sequence", "head"): 7, ("Attention", "attention.out_proj"): 4}


def taps_on_the_input(layer, x):
    """At each output position, how many positions of a convolution's kernel fall on the input."""
    ones = copy.deepcopy(layer)
    nn.init.ones_(ones.weight)
    if ones.bias is not None:
        nn.init.zeros_(ones.bias)
    with torch.no_grad():
        return ones(torch.ones_like(x)).double().numpy() / (layer.in_channels // layer.groups)


@pytest.fixture
def too_wide(monkeypatch):
    """No layer's windows are narrow enough for a regression of their own."""
    monkeypatch.setattr(calibration, "MAX_FEATURES", 0)


def expected(layer, x, gone, lost, mode):
    """The reader's weight and bias after compensation: the docstring's formulas, group by group."""
    weight = dense_weight(layer)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().numpy().copy()
    positions = weight.shape[2]
    rows = read_by_each_output(layer, x)
    ridge = RIDGE * rows.var(1).mean() * rows.shape[1]
    inputs, outputs = weight.shape[1] // len(rows), len(weight) // len(rows)
    for part, read in enumerate(rows):
        i, o = slice(part * inputs, (part + 1) * inputs), slice(part * outputs, (part + 1) * outputs)
        removed = np.repeat(gone[i], positions)
        mean, centred = read.mean(0), read - read.mean(0)
        b = regress(centred[:, ~removed], centred[:, removed], ridge)  # (kept, removed)
        if mode == "bias":
            b = np.zeros_like(b)
        held = weight[o, i].reshape(outputs, -1)
        bias[o] += held[:, removed] @ (mean[removed] - b.T @ mean[~removed])
        held[:, ~removed] += held[:, removed] @ b.T
        weight[o, i] = held.reshape(outputs, inputs, positions)
    return weight[~lost][:, ~gone], bias[~lost]


def expected_of_shared(layer, rows, gone, lost, stride, mode, n):
    """The same for one regression of channels that serves all positions."""
    weight = dense_weight(layer)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().numpy().copy()
    mean = rows.mean(0)
    centred = (rows - mean).reshape(len(rows), -1, stride)
    observations = centred.transpose(0, 2, 1).reshape(-1, centred.shape[1])
    if n is not None and n.std() > 0:  # uneven positions: the means are one more observation
        weight_of_means = np.sqrt(len(rows) * n.var() / n.mean())
        observations = np.concatenate([observations, weight_of_means * mean[None]])
    samples = len(rows) * stride
    ridge = RIDGE * (observations**2).sum(0).mean() / samples
    parts = getattr(layer, "groups", 1)
    share = 1.0 if n is None else n.mean() / weight.shape[2]
    size = observations.shape[1] // parts
    for part in range(parts):
        channels = np.arange(part * size, (part + 1) * size)
        k, r = channels[~gone[channels * stride]], channels[gone[channels * stride]]
        b = regress(observations[:, k], observations[:, r], ridge * samples)  # (kept, removed)
        if mode == "bias":
            b = np.zeros_like(b)
        for position in range(stride):
            ki, ri = k * stride + position, r * stride + position
            weight[:, ki] += np.einsum("orp,kr->okp", weight[:, ri], b)
            bias += np.einsum("orp,r->o", weight[:, ri], mean[ri] - b.T @ mean[ki]) * share
    return weight[~lost][:, ~gone], bias[~lost]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bias", "least_squares"])
@pytest.mark.parametrize("name", names())
def test_readers_get_the_ridge_regression_of_removed_on_kept_channels(name, mode):
    for seed in range(2):
        net = prepared(name, seed=seed)
        model, dense = net.model, copy.deepcopy(net.model)
        found = net.compensation(mode)
        assert found.readers
        net.prune(mode)
        for reader in found.readers:
            layer = dense.get_submodule(reader)
            gone, lost = net.removed(reader, "in"), net.removed(reader, "out")
            (x,) = raw_inputs_of(dense, reader, *net.inputs)
            weight, bias = expected(layer, x, gone, lost, mode)
            pruned = model.get_submodule(reader)
            np.testing.assert_allclose(dense_weight(pruned), weight, atol=5e-4)  # 1e-7, over a ridge of 1e-4
            np.testing.assert_allclose(pruned.bias.detach(), bias, atol=1e-4)


@pytest.mark.parametrize("mode", ["bias", "least_squares"])
@pytest.mark.parametrize("name", names())
def test_readers_of_wide_windows_get_one_regression_of_channels_for_all_positions(name, mode, too_wide):
    for seed in range(2):
        net = prepared(name, seed=seed)
        model, dense = net.model, copy.deepcopy(net.model)
        found = net.compensation(mode)
        net.prune(mode)
        for reader in found.readers:
            layer = dense.get_submodule(reader)
            rows = inputs_of(dense, reader, *net.inputs)
            gone, lost = net.removed(reader, "in"), net.removed(reader, "out")
            stride = STRIDES.get((name, reader), 1)
            (x,) = raw_inputs_of(dense, reader, *net.inputs)
            n = taps_on_the_input(layer, x) if hasattr(layer, "kernel_size") else None
            weight, bias = expected_of_shared(layer, rows, gone, lost, stride, mode, n)
            pruned = model.get_submodule(reader)
            np.testing.assert_allclose(dense_weight(pruned), weight, atol=5e-4)  # 1e-7, over a ridge of 1e-4
            np.testing.assert_allclose(pruned.bias.detach(), bias, atol=1e-4)


@pytest.mark.parametrize("name", ["Autoencoder", "Residual", "Sequence", "Joined"])
def test_the_solution_cut_from_one_factorisation_is_that_of_a_fresh_one_for_every_plan(name):
    net = prepared(name)
    found = net.compensation()
    rng = np.random.default_rng(0)
    for reader in found.readers:
        solver = found.regression(reader).covariance
        known = net.statistics[reader]
        covariance = (known.unfolded or known).covariance
        if solver.order is None:
            assert (name, reader) == ("Joined", "inner")  # the reader of two groups
        width = len(covariance)
        orders = [rng.permutation(width)] if solver.order is None else [solver.order.numpy(), rng.permutation(width)]
        for order, k in itertools.product(orders, range(1, width)):  # plans of the ranking, and any others
            kept, removed = torch.from_numpy(np.sort(order[:k])), torch.from_numpy(np.sort(order[k:]))
            left = torch.randn(3, len(removed), dtype=torch.float64)
            ridge = RIDGE * covariance.diagonal().mean() * torch.eye(k, dtype=torch.float64)
            fresh = torch.linalg.solve(covariance[kept][:, kept] + ridge, covariance[kept][:, removed]).t()
            torch.testing.assert_close(solver.predicted(left, kept, removed), left @ fresh, rtol=1e-6, atol=1e-8)


def test_a_matrix_that_rounding_made_indefinite_gets_as_much_ridge_as_it_takes():
    for matrix in (torch.ones(3, 3), torch.diag(torch.tensor([1.0, -1e-9, 0.0])), torch.zeros(2, 2)):
        given = matrix.double()
        factor = regression.cholesky(given, 0.0)
        assert factor.isfinite().all()
        torch.testing.assert_close(factor @ factor.t(), matrix.double(), atol=1e-7, rtol=0)
        assert torch.equal(given, matrix.double())  # the ridge is taken out again


@pytest.mark.parametrize("name", ["Autoencoder", "Residual", "Critic"])
def test_a_plan_of_the_ranking_needs_no_fresh_factorisation(name, monkeypatch):
    net = prepared(name)
    found = net.compensation()

    def refuse(*args):
        raise AssertionError("factorised again")

    monkeypatch.setattr(regression, "cholesky", refuse)
    for count in range(1, 5):
        counts = [min(count, group.num_channels - 1) for group in net.groups]
        surgery = apply_plan(net.model, net.groups, Plan.from_counts(counts, net.rankings))
        found.apply(net.model, surgery)
        surgery.undo()


def test_channels_of_no_group_stay_as_predictors():
    torch.manual_seed(0)
    model, x = make("Joined", 200)
    with torch.no_grad():  # both groups say again what the raw input says
        model.left.weight.copy_(torch.randn(6, 5))
        model.left.bias.fill_(50.0)  # in the linear part of the relu
        model.right.weight.mul_(1e-3)  # in the linear part of the tanh
    dense = model(x)
    net = Prepared(model, x)
    net.plan = Plan(
        tuple(tuple(range(1, g.num_channels)) if g.name != "inner" else () for g in net.groups)
    )  # one channel of each stays
    net.prune()
    assert model.inner.in_features == 1 + 5 + 1
    torch.testing.assert_close(model(x), dense, rtol=1e-3, atol=2e-3)


def chain(layer_type, seed):
    """Three layers; all but four channels of the two hidden ones are combinations of those four, plus constants."""
    torch.manual_seed(seed)
    if layer_type is nn.Linear:
        layers = [nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 3)]
    else:
        layers = [layer_type(5, 12, 1), layer_type(12, 10, 1), layer_type(10, 3, 1)]
    with torch.no_grad():
        for layer in layers[:2]:
            mix = torch.randn(layer.bias.numel() - 4, 4) / 2
            base = nn.init.orthogonal_(torch.empty(4, layer.weight.numel() // len(layer.bias)))
            weight = torch.cat([base, mix @ base])
            if layer_type is nn.ConvTranspose2d:
                weight = weight.t()
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            layer.bias[4:] = mix @ layer.bias[:4] + torch.randn(len(mix))
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("layer_type", "shape"),
    [
        (nn.Linear, (300, 5)),
        (nn.Conv1d, (60, 5, 6)),
        (nn.Conv2d, (30, 5, 4, 4)),
        (nn.ConvTranspose2d, (30, 5, 4, 4)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_combinations_of_kept_channels_are_removed_without_loss(layer_type, shape, seed, monkeypatch):
    model = chain(layer_type, seed)
    x = torch.randn(shape, dtype=torch.float64)
    dense = model(x)
    net = Prepared(model, x)
    assert [group.num_channels for group in net.groups] == [12, 10]
    net.plan = Plan((tuple(range(4, 12)), tuple(range(4, 10))))

    def error(mode):
        surgery = net.prune(mode)
        found = (model(x) - dense).detach().abs().max().item() / dense.std().item()
        surgery.undo()
        return found

    assert error("none") > 0.5
    assert error("least_squares") < 1e-2  # what the ridge costs
    monkeypatch.setattr(regression, "ridge_of", lambda covariance: 1e-9 * float(covariance.diagonal().mean()))
    assert error("least_squares") < 1e-6


def reader_errors(net, mode):
    """Mean squared error of each reader's outputs, given what the dense network gives it."""
    dense = copy.deepcopy(net.model)
    readers = net.compensation().readers
    seen: dict[str, list] = {name: [] for name in readers}
    handles = [
        dense.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen[name].append((args[0].detach(), out.detach()))
        )
        for name in readers
    ]
    with parts_called(dense):
        for x in net.inputs:
            dense(x)
    for handle in handles:
        handle.remove()
    surgery = net.prune(mode)
    errors = {}
    for name in readers:
        layer = net.model.get_submodule(name)
        channels = 1 if hasattr(layer, "kernel_size") else -1
        kept = torch.from_numpy(np.flatnonzero(~net.removed(name, "in")))
        stays = torch.from_numpy(np.flatnonzero(~net.removed(name, "out")))
        total = 0.0
        for x, out in seen[name]:
            with torch.no_grad():
                left = layer(x.index_select(channels, kept)) - out.index_select(channels, stays)
            total += left.double().square().mean().item()
        errors[name] = total / len(seen[name])
    surgery.undo()
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", names())
def test_no_reader_is_worse_off_than_without_compensation_and_bias_lies_between(name, seed):
    net = prepared(name, 64, seed, least=0.1, most=0.9)
    none, bias, least_squares = (reader_errors(net, mode) for mode in MODES)
    assert any(error > 0 for error in none.values())
    for reader, error in none.items():
        assert least_squares[reader] <= bias[reader] * (1 + 1e-5) + 1e-10
        assert bias[reader] <= error * (1 + 1e-5) + 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Residual", "Dense", "TransposedConv", "GroupedBothWays", "Volume", "Sequence"])
def test_kernels_and_maps_that_share_one_regression_are_hardly_ever_worse_off(name, too_wide):
    """One regression for all positions minimises the sum of their errors; the outputs weigh positions differently."""
    ratios: dict[str, list] = {}
    for seed in range(8):
        net = prepared(name, 64, seed, least=0.1, most=0.9)
        none, bias, least_squares = (reader_errors(net, mode) for mode in MODES)
        for reader, error in none.items():
            if error > 0:
                ratios.setdefault(reader, []).append((bias[reader] / error, least_squares[reader] / error))
    for reader, found in ratios.items():
        of_bias, of_least_squares = np.transpose(found)
        assert of_least_squares.max() < 1.02, reader
        assert of_bias.max() < 1.1, reader
        assert of_least_squares.mean() < of_bias.mean() < 1.0, reader


def test_means_that_dwarf_the_variance_do_not_spoil_the_borders():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 1, 1)).eval()
    with torch.no_grad():
        model[0].bias.uniform_(5, 20)
    net = Prepared(model, torch.randn(30, 1, 4, 4))
    errors = {mode: reader_errors(net, mode)["1"] for mode in MODES}
    assert errors["least_squares"] < 0.05 * errors["bias"] < 0.05 * errors["none"]


def test_each_output_of_a_transposed_convolution_gets_its_share_of_a_removed_constant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 5.0
        positions = model[1].weight[2]  # one value for all positions: a constant input gives a constant output
        positions.copy_(torch.arange(1.0, 5.0)[:, None, None].expand_as(positions) / 10)
    x = torch.randn(9, 1, 8, 8)
    dense = model(x)
    net = Prepared(model, x)
    net.plan = Plan(((2,), ()))
    for mode in ("bias", "least_squares"):
        surgery = net.prune(mode)
        torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)
        surgery.undo()
