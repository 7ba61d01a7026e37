"""Oracles: `numpy.linalg.lstsq` on the augmented system, the dense network's outputs, and `Trainer.validate`."""

import copy
import itertools
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_softprune.calibration.statistics as calibration
import lightning_softprune.compensation.refit as refits
import lightning_softprune.compensation.regression as regression
from lightning_softprune import (
    GradientSearch,
    PruningResult,
    SensitivitySearch,
    SoftPruning,
    UniformBaseline,
)
from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.compensation import Compensation
from lightning_softprune.compensation.refit import REFIT_RIDGE, DenseRun, refit_readers
from lightning_softprune.compensation.regression import RIDGE
from lightning_softprune.graph.costs import CostModel, count_parameters
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan, repair_optimizers
from support import zoo

MODES = ("none", "bias", "least_squares")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training.*"),
]


# ------------------------------------------------------------------------------------------------------- the networks


class Volume(nn.Module):
    """Conv3d with steps and holes, and no padding."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv3d(1, 6, 2)
        self.inner = nn.Conv3d(6, 4, 2, bias=False)
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.head(self.inner(self.body(x).relu()).relu())


class GroupedBothWays(nn.Module):
    """Grouped convolutions, to and fro, without biases."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 1)
        self.grouped = nn.Conv2d(12, 9, 3, groups=3, bias=False)
        self.back = nn.ConvTranspose2d(9, 6, 3, groups=3, bias=False)
        self.head = nn.Conv2d(6, 2, 1, bias=False)

    def forward(self, x):
        return self.head(self.back(self.grouped(self.stem(x).relu()).relu()).relu())


class Joined(nn.Module):
    """Two groups and the raw input, side by side before one layer."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(5, 6)
        self.right = nn.Linear(5, 4)
        self.inner = nn.Linear(6 + 5 + 4, 7, bias=False)
        self.head = nn.Linear(7, 3, bias=False)

    def forward(self, x):
        return self.head(self.inner(torch.cat([self.left(x).relu(), x, self.right(x).tanh()], 1)).relu())


NETWORKS = {
    **{name: (zoo.BY_NAME[name].build, zoo.BY_NAME[name].shape[1:]) for name in zoo.BY_NAME},
    "ChunkGate": (zoo.ChunkGate, (5,)),
    "Critic": (zoo.Critic, (6,)),
    "Volume": (Volume, (1, 4, 4, 4)),
    "GroupedBothWays": (GroupedBothWays, (2, 4, 4)),
    "Joined": (Joined, (5,)),
}
STRIDES = {("Residual", "head"): 4, ("Sequence", "head"): 7}


def make(name, samples=40, seed=0):
    build, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        return model, torch.randn(samples, *shape) + 0.3


class Prepared:
    """A model, its groups in a random ranking, its readers' statistics and a plan."""

    def __init__(self, model, *inputs, seed=0, least=0.2, most=0.8):
        rng = np.random.default_rng(seed)
        self.model, self.inputs = model, inputs
        self.steps = [lambda x=x: model(x) for x in inputs]
        self.groups = [group for group in trace_groups(model, self.steps) if group.prunable]
        self.rankings = [rng.permutation(group.num_channels) for group in self.groups]
        self.counts = [
            int(np.clip(round(rng.uniform(least, most) * g.num_channels), 1, g.num_channels - 1)) for g in self.groups
        ]
        self.plan = Plan.from_counts(self.counts, self.rankings)
        self.readers = find_readers(model, self.groups)
        self.statistics = collect_statistics(model, self.readers, self.steps)

    def compensation(self, mode="least_squares"):
        return Compensation(mode, self.model, self.groups, self.rankings, self.statistics)

    def prune(self, mode="least_squares", plan=None):
        surgery = apply_plan(self.model, self.groups, plan or self.plan)
        self.compensation(mode).apply(self.model, surgery)
        self.surgery = surgery
        return surgery

    def removed(self, name, slot):
        """Mask of a slot's indices that the plan removes."""
        masks = [
            np.isin(member.owner, gone)
            for group, gone in zip(self.groups, self.plan.removed, strict=True)
            for member in group.members
            if (member.module, member.slot) == (name, slot)
        ]
        module = self.model.get_submodule(name)
        size = dense_weight(module).shape[1 if slot == "in" else 0]
        return np.any(masks, axis=0) if masks else np.zeros(size, bool)


def prepared(name, samples=40, seed=0, **kwargs):
    return Prepared(*make(name, samples, seed), seed=seed, **kwargs)


# -------------------------------------------------------------------------------------------------------- the oracles


def dense_weight(layer):
    """A layer's weight as (out, in, kernel positions), with zeros between the parts of a grouped convolution."""
    weight = layer.weight.detach().double().numpy()
    if isinstance(layer, nn.Linear):
        return weight[:, :, None].copy()
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    weight = weight.reshape(*weight.shape[:2], -1)
    full = np.zeros((layer.out_channels, layer.in_channels, weight.shape[2]))
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for part in range(layer.groups):
        i, o = slice(part * inputs, (part + 1) * inputs), slice(part * outputs, (part + 1) * outputs)
        full[o, i] = weight[i].swapaxes(0, 1) if transposed else weight[o]
    return full


def inputs_of(model, name, *batches):
    """What a layer is given, one row per sample and position."""
    channels_first = hasattr(model.get_submodule(name), "kernel_size")
    rows = [x.movedim(1, -1) if channels_first else x for x in raw_inputs_of(model, name, *batches)]
    return np.concatenate([x.double().numpy().reshape(-1, x.shape[-1]) for x in rows])


def raw_inputs_of(model, name, *batches):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    return seen


def regress(inputs, targets, ridge, prior=None):
    """`argmin |targets - inputs B|^2 + ridge |B - prior|^2`, by least squares on the augmented system."""
    width = inputs.shape[1]
    prior = np.zeros((width, targets.shape[1])) if prior is None else prior
    above = np.concatenate([inputs, np.sqrt(ridge) * np.eye(width)])
    below = np.concatenate([targets, np.sqrt(ridge) * prior])
    return np.linalg.lstsq(above, below, rcond=None)[0]


def taps_on_the_input(layer, x):
    """At each output position, how many taps of a convolution's kernel fall on the input."""
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


def read_by_each_output(layer, x):
    """What multiplies each weight of one output, seen by weights that are one-hot: (groups, positions, weights)."""
    if isinstance(layer, nn.Linear):
        return x.double().numpy().reshape(1, -1, x.shape[-1])
    probe = copy.deepcopy(layer).double()
    probe.bias = None
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    parts = []
    for part in range(layer.groups):
        columns = []
        for channel, tap in itertools.product(range(inputs), np.ndindex(*layer.kernel_size)):
            nn.init.zeros_(probe.weight)
            place = (part * inputs + channel, 0) if transposed else (part * outputs, channel)
            with torch.no_grad():
                probe.weight[(*place, *tap)] = 1.0
                columns.append(probe(x.double())[:, part * outputs].flatten().numpy())
        parts.append(np.stack(columns, 1))
    return np.stack(parts)


def expected(layer, x, gone, lost, mode):
    """The reader's weight and bias after compensation: the docstring's formulas, group by group."""
    weight = dense_weight(layer)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().numpy().copy()
    taps = weight.shape[2]
    rows = read_by_each_output(layer, x)
    ridge = RIDGE * rows.var(1).mean() * rows.shape[1]
    inputs, outputs = weight.shape[1] // len(rows), len(weight) // len(rows)
    for part, read in enumerate(rows):
        i, o = slice(part * inputs, (part + 1) * inputs), slice(part * outputs, (part + 1) * outputs)
        removed = np.repeat(gone[i], taps)
        mean, centred = read.mean(0), read - read.mean(0)
        b = regress(centred[:, ~removed], centred[:, removed], ridge)  # (kept, removed)
        if mode == "bias":
            b = np.zeros_like(b)
        held = weight[o, i].reshape(outputs, -1)
        bias[o] += held[:, removed] @ (mean[removed] - b.T @ mean[~removed])
        held[:, ~removed] += held[:, removed] @ b.T
        weight[o, i] = held.reshape(outputs, inputs, taps)
    return weight[~lost][:, ~gone], bias[~lost]


def expected_of_shared(layer, rows, gone, lost, stride, mode, n):
    """The same for one regression of channels that serves all positions."""
    weight = dense_weight(layer)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().numpy().copy()
    mean = rows.mean(0)
    centred = (rows - mean).reshape(len(rows), -1, stride)
    observations = centred.transpose(0, 2, 1).reshape(-1, centred.shape[1])
    if n is not None and n.std() > 0:  # uneven taps: the means are one more observation
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


def names(*skip):
    wanted = ["Autoencoder", "Residual", "Dense", "UnevenSplit", "ChunkGate", "DepthwiseSeparable", "GroupedConv"]
    wanted += ["TransposedConv", "Attention", "PReLUs", "Sequence", "Critic", "Volume", "GroupedBothWays", "Joined"]
    return [name for name in wanted if name not in skip]


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
            np.testing.assert_allclose(dense_weight(pruned), weight, atol=1e-4)
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
            np.testing.assert_allclose(dense_weight(pruned), weight, atol=1e-4)
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
        factor = regression.cholesky(matrix.double(), 0.0)
        assert factor.isfinite().all()
        torch.testing.assert_close(factor @ factor.t(), matrix.double(), atol=1e-7, rtol=0)


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


# -------------------------------------------------------------------------------------------- never worse than without


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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", names())
def test_no_reader_is_worse_off_than_without_compensation_and_bias_lies_between(name, seed):
    net = prepared(name, 64, seed, least=0.1, most=0.9)
    none, bias, least_squares = (reader_errors(net, mode) for mode in MODES)
    assert any(error > 0 for error in none.values())
    for reader, error in none.items():
        assert least_squares[reader] <= bias[reader] * (1 + 1e-5) + 1e-10
        assert bias[reader] <= error * (1 + 1e-5) + 1e-10


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
        taps = model[1].weight[2]  # one value for all taps: a constant input gives a constant output
        taps.copy_(torch.arange(1.0, 5.0)[:, None, None].expand_as(taps) / 10)
    x = torch.randn(9, 1, 8, 8)
    dense = model(x)
    net = Prepared(model, x)
    net.plan = Plan(((2,), ()))
    for mode in ("bias", "least_squares"):
        surgery = net.prune(mode)
        torch.testing.assert_close(model(x), dense, rtol=1e-4, atol=1e-4)
        surgery.undo()


# --------------------------------------------------------------------------------------------- biases, ties and undo


def test_a_reader_without_bias_gets_one_which_undo_takes_away_again():
    for name in ("Joined", "GroupedBothWays"):
        net = prepared(name)
        model = net.model
        without = [n for n, m in model.named_modules() if hasattr(m, "bias") and m.bias is None]
        assert sorted(net.compensation().new_biases) == sorted(without)
        before = [
            (module, key, value, None if value is None else value.detach().clone())
            for module in model.modules()
            for key, value in (*module._parameters.items(), *module._buffers.items())
        ]
        for mode in ("bias", "least_squares"):
            surgery = net.prune(mode)
            assert sorted(created for created, _, _ in surgery.created) == sorted(f"{n}.bias" for n in without)
            for created, weight, bias in surgery.created:
                assert model.get_parameter(created) is bias
                assert model.get_parameter(created.replace("bias", "weight")) is weight
                assert bias.dtype == weight.dtype
            surgery.undo()
            for module, key, value, copied in before:
                assert {**module._parameters, **module._buffers}[key] is value
                assert value is None or torch.equal(value, copied)
            assert len(before) == sum(len(m._parameters) + len(m._buffers) for m in model.modules())


@pytest.mark.parametrize("name", names())
def test_applying_writes_into_no_tensor_of_the_dense_model(name):
    net = prepared(name)
    for parameter in net.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    held = [*net.model.parameters(), *net.model.buffers()]
    before = [
        (tensor, tensor.detach().clone(), None if tensor.grad is None else tensor.grad.clone()) for tensor in held
    ]
    state = {key: value.clone() for key, value in net.model.state_dict().items()}
    surgery = net.prune()
    refit_readers(net.model, surgery, net.compensation(), DenseRun(net.model, net.compensation(), []))
    for tensor, value, grad in before:
        assert torch.equal(tensor, value)
        assert grad is None or torch.equal(tensor.grad, grad)
    surgery.undo()
    after = net.model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert all(a is b for a, b in zip(held, [*net.model.parameters(), *net.model.buffers()], strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", names())
def test_counted_parameters_are_those_of_the_pruned_compensated_network(name, mode):
    net = prepared(name)
    rng = np.random.default_rng(1)
    found = net.compensation(mode)
    costs = CostModel.build(net.model, net.groups, net.rankings, {}, found.new_biases)
    channels = [group.num_channels for group in net.groups]
    plans = [[int(rng.integers(0, c)) for c in channels] for _ in range(6)]
    plans += [[0] * len(channels), [c - 1 for c in channels]]
    plans += [[1 if i == j else 0 for j in range(len(channels))] for i in range(len(channels))]
    for counts in plans:
        surgery = net.prune(mode, Plan.from_counts(counts, net.rankings))
        assert count_parameters(net.model) == costs.count("params", np.array([counts]))[0]
        surgery.undo()


def test_an_optimizer_gets_a_created_bias_in_its_weights_parameter_group():
    model, x = make("Joined")
    heads = list(model.head.parameters())
    rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 0.1}, {"params": heads, "lr": 0.2}])
    model(x).square().sum().backward()
    optimizer.step()
    net = Prepared(model, x)
    surgery = net.prune()
    repair_optimizers([optimizer], surgery)
    first, second = optimizer.param_groups
    assert {id(p) for p in second["params"]} == {id(model.head.weight), id(model.head.bias)}
    assert {id(p) for g in (first, second) for p in g["params"]} == {id(p) for p in model.parameters()}
    assert sum(len(g["params"]) for g in (first, second)) == len(list(model.parameters()))
    bias = model.head.bias.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert (model.head.bias - bias).abs().min() > 0.1


def test_a_created_bias_is_frozen_where_its_weight_is():
    model, x = make("Joined")
    model.head.requires_grad_(False)
    net = Prepared(model, x)
    net.prune()
    assert not model.head.bias.requires_grad
    assert model.inner.bias.requires_grad


def test_a_replaced_bias_keeps_its_flag_its_attributes_and_its_gradient():
    model, x = make("Autoencoder")
    bias = model.classifier.bias
    bias.requires_grad_(False)
    bias.no_decay = True
    kept = model.decoder[2].bias
    kept.grad = torch.randn_like(kept)
    net = Prepared(model, x)
    surgery = net.prune()
    assert model.classifier.bias is not bias
    assert model.classifier.bias.no_decay
    assert not model.classifier.bias.requires_grad
    assert torch.equal(model.decoder[2].bias.grad, kept.grad)
    assert model.decoder[2].bias.grad is not kept.grad
    surgery.undo()
    assert model.classifier.bias is bias


def test_tied_weights_are_left_to_themselves():
    case = zoo.BY_NAME["Transformer"]
    model, tokens = case.make()
    net = Prepared(model, tokens)
    readers = net.compensation().readers
    assert "head" not in readers
    assert "layer.linear1" in readers
    without = net.prune("none")
    tied = model.head.weight.detach().clone()
    without.undo()
    net.prune()
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, tied)
    assert model(tokens).isfinite().all()


def test_a_bias_that_two_layers_share_stays_one_and_is_not_changed_for_both():
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    twin.append(nn.Linear(4, 2))
    twin[4].bias = twin[2].bias
    bias = twin[2].bias.detach().clone()
    y = torch.randn(20, 5)
    net = Prepared(twin, y)
    net.plan = Plan(tuple((0, 1) if group.name == "0" else () for group in net.groups))
    net.prune()
    assert twin[4].bias is twin[2].bias
    assert torch.equal(twin[2].bias, bias)


# ------------------------------------------------------------------------------------------------------- broken data


def broken_channels(kind):
    """An MLP with a bad first layer, and its calibration batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    x = torch.randn(50, 6)
    weight, bias = model[0].weight.data, model[0].bias.data
    if kind == "rank-deficient":
        weight[3:] = torch.rand(9, 3) @ weight[:3]
        bias[3:] = 0.0
    elif kind == "constant":
        weight[:8], bias[:8] = 0.0, 2.0
    elif kind == "all constant":
        weight.zero_()
    elif kind == "dead":
        bias[:8] = -100.0
    elif kind == "all dead":
        bias.fill_(-100.0)
    elif kind == "duplicated":
        weight[1:], bias[1:] = weight[0], bias[0]
    elif kind == "nan channel":
        weight[4] = float("nan")
    elif kind == "infinite channel":
        bias[4] = float("inf")
    elif kind == "nan sample":
        x[3] = float("nan")
    elif kind == "huge":
        weight[4] *= 1e30
    elif kind == "tiny":
        model[0].weight.data *= 1e-20
        model[0].bias.data *= 1e-20
    elif kind == "few samples":
        x = x[:4]
    elif kind == "one sample":
        x = x[:1]
    return model, x


BROKEN = ["rank-deficient", "constant", "all constant", "dead", "all dead", "duplicated", "nan channel"]
BROKEN += ["infinite channel", "nan sample", "huge", "tiny", "few samples", "one sample"]


@pytest.mark.parametrize("mode", ["bias", "least_squares"])
@pytest.mark.parametrize("kind", BROKEN)
def test_nothing_in_the_data_makes_a_weight_nan(kind, mode):
    for seed in range(4):
        model, x = broken_channels(kind)
        healthy = torch.randn(5, 6)
        gone = torch.zeros(12, dtype=torch.bool)
        net = Prepared(model, x, seed=seed)
        if kind in ("nan channel", "infinite channel"):  # the bad channel goes
            net.plan = Plan(((4, *range(5 + seed, 12)), *net.plan.removed[1:]))
        finite = {n for n, p in model.named_parameters() if p.isfinite().all()}
        net.prune(mode)
        gone[list(net.plan.removed[0])] = True
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all() or name not in finite
        assert model(healthy).isfinite().all()
        net.model.zero_grad()


@pytest.mark.parametrize("kind", ["rank-deficient", "constant", "dead", "duplicated", "few samples", "one sample"])
def test_what_the_calibration_data_cannot_tell_apart_costs_nothing_on_them(kind):
    model, x = broken_channels(kind)
    dense = model[2](model[1](model[0](x))).detach()
    net = Prepared(model, x)
    gone = {"rank-deficient": range(6, 12), "constant": range(8), "dead": range(8), "duplicated": range(1, 12)}
    net.plan = Plan((tuple(gone.get(kind, range(6, 12))), ()))
    net.prune()
    if kind not in ("rank-deficient", "few samples"):
        torch.testing.assert_close(model[2](model[1](model[0](x))), dense, rtol=1e-2, atol=1e-2)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["bias", "least_squares"])
@pytest.mark.parametrize("name", ["Autoencoder", "Residual", "Joined", "TransposedConv", "Sequence"])
def test_modules_of_any_precision_stay_in_it_and_stay_finite(name, mode, dtype):
    model, x = make(name, 200)
    reference = prepared(name, 200)
    reference.prune(mode)
    model, x = model.to(dtype), x.to(dtype)
    net = Prepared(model, x)
    assert net.plan == reference.plan
    net.prune(mode)
    for parameter in model.parameters():
        assert parameter.dtype == dtype
        assert parameter.isfinite().all()
    outputs, expected_outputs = model(x), reference.model(x.float())
    if not isinstance(outputs, tuple):
        outputs, expected_outputs = (outputs,), (expected_outputs,)
    for out, other in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(out.float(), other, rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------------------------ sequential refit


def deep(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    return model.eval(), torch.randn(300, 8) @ torch.randn(8, 8)


@pytest.mark.parametrize("seed", range(6))
def test_the_refit_brings_the_output_nearer_to_the_dense_networks_where_inputs_have_shifted(seed):
    model, x = deep(seed)
    dense = model(x).detach()
    net = Prepared(model, x, seed=seed, least=0.4, most=0.7)
    found = net.compensation()
    targets = DenseRun(model, found, net.steps)
    surgery = apply_plan(model, net.groups, net.plan)
    uncompensated = (model(x) - dense).square().mean().item()
    found.apply(model, surgery)
    one_shot = (model(x) - dense).square().mean().item()
    refit_readers(model, surgery, found, targets)
    assert (model(x) - dense).square().mean().item() <= one_shot < uncompensated


@pytest.mark.parametrize("bias", [True, False])
def test_the_refit_is_the_ridge_regression_of_dense_inputs_on_shifted_ones_around_the_one_shot_solution(
    bias, monkeypatch
):
    monkeypatch.setattr(refits, "find_following_activations", lambda *_: {})  # the linear fit alone
    for seed in range(3):
        model, x = deep(seed)
        if not bias:
            model[4] = nn.Linear(20, 16, bias=False)
        dense = copy.deepcopy(model)
        net = Prepared(model, x, x[:100] + 1, seed=seed)
        found = net.compensation()
        targets = DenseRun(model, found, net.steps)
        surgery = apply_plan(model, net.groups, net.plan)
        found.apply(model, surgery)
        refit_readers(model, surgery, found, targets)
        for reader in ("2", "4", "6"):
            layer = dense.get_submodule(reader)
            gone, lost = net.removed(reader, "in"), net.removed(reader, "out")
            wanted, given = inputs_of(dense, reader, *net.inputs), inputs_of(model, reader, *net.inputs)
            m, mz = wanted.mean(0), given.mean(0)
            a, z = wanted - m, given - mz
            one_shot = np.zeros((z.shape[1], a.shape[1]))
            one_shot[:, ~gone] = np.eye(z.shape[1])
            one_shot[:, gone] = regress(a[:, ~gone], a[:, gone], RIDGE * len(a) * a.var(0).mean())
            solution = regress(z, a, REFIT_RIDGE * len(z) * z.var(0).mean(), one_shot)
            weight = dense_weight(layer)[~lost, :, 0]
            start = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()[~lost]
            pruned = model.get_submodule(reader)
            np.testing.assert_allclose(dense_weight(pruned)[:, :, 0], weight @ solution.T, atol=1e-4)
            np.testing.assert_allclose(pruned.bias.detach(), start + weight @ (m - solution.T @ mz), atol=1e-4)


@pytest.mark.parametrize("name", names("Attention"))
def test_the_refit_without_shifted_inputs_changes_little_and_spoils_nothing(name):
    """Only readers that nothing upstream has shifted: what the regression of dense inputs on themselves finds."""
    net = prepared(name, 60)
    model = net.model
    first = min(range(len(net.groups)), key=lambda g: net.groups[g].name != net.compensation().readers[0])
    net.plan = Plan(tuple(gone if g == first else () for g, gone in enumerate(net.plan.removed)))
    found = net.compensation()
    targets = DenseRun(model, found, net.steps)
    surgery = net.prune()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refit_readers(model, surgery, found, targets)
    for key, value in model.state_dict().items():
        assert value.isfinite().all()
        assert value.shape == before[key].shape
    surgery.undo()


@pytest.mark.parametrize("name", names())
def test_the_refit_fits_what_outputs_read_now_to_the_dense_outputs_around_the_one_shot_solution(name, monkeypatch):
    monkeypatch.setattr(refits, "find_following_activations", lambda *_: {})  # the linear fit alone
    net = prepared(name, 60)
    model, dense = net.model, copy.deepcopy(net.model)
    found = net.compensation()
    run = DenseRun(model, found, net.steps)
    net.prune()
    one_shot = copy.deepcopy(model)
    refit_readers(model, net.surgery, found, run)
    for reader in found.readers:
        layer, start = model.get_submodule(reader), one_shot.get_submodule(reader)
        (x,), (z,) = raw_inputs_of(dense, reader, *net.inputs), raw_inputs_of(model, reader, *net.inputs)
        channels = 1 if hasattr(layer, "kernel_size") else -1
        with torch.no_grad():
            wanted = dense.get_submodule(reader)(x).movedim(channels, -1).double().numpy()
        wanted = wanted.reshape(-1, wanted.shape[-1])[:, ~net.removed(reader, "out")]
        rows, first, last = read_by_each_output(layer, z), dense_weight(start), dense_weight(layer)
        inputs, outputs = first.shape[1] // len(rows), len(first) // len(rows)
        for part, read in enumerate(rows):
            i, o = slice(part * inputs, (part + 1) * inputs), slice(part * outputs, (part + 1) * outputs)
            read, y = read - (mean := read.mean(0)), wanted[:, o]
            prior = first[o, i].reshape(outputs, -1).T
            ridge = max(REFIT_RIDGE * (read**2).sum(0).mean(), 1e-12 * len(read))  # a dead input has no variance
            solution = regress(read, y - y.mean(0), ridge, prior)
            np.testing.assert_allclose(last[o, i].reshape(outputs, -1), solution.T, atol=2e-4)
            np.testing.assert_allclose(layer.bias.detach()[o], y.mean(0) - mean @ solution, atol=2e-4)


def test_the_refit_leaves_grouped_convolutions_of_wide_windows_alone(too_wide):
    net = prepared("GroupedBothWays")
    model = net.model
    found = net.compensation()
    targets = DenseRun(model, found, net.steps)
    surgery = net.prune()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refit_readers(model, surgery, found, targets)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.weight", "head.bias"}


class Scaled(nn.Linear):
    """Weights are three times what they are used as."""

    def forward(self, x):
        return F.linear(x, self.weight / 3, self.bias)


class Standardised(nn.Conv2d):
    """Weights are brought to unit norm before they are used."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None], self.bias)


@pytest.mark.parametrize(
    ("own", "kinds", "shape"),
    [(Scaled, (20, 16), (300, 24)), (Standardised, (20, 16, 2), (100, 24, 5, 5))],
    ids=["linear", "convolution"],
)
def test_the_refit_leaves_layers_that_compute_in_their_own_way_alone(own, kinds, shape):
    torch.manual_seed(0)
    plain = own.__mro__[1]
    size = kinds[2:]
    layers = [plain(24, 20, *size), nn.ReLU(), own(*kinds), nn.ReLU(), plain(16, 4, *size)]
    model, x = nn.Sequential(*layers), torch.randn(shape)
    net = Prepared(model, x)
    found = net.compensation()
    run = DenseRun(model, found, net.steps)
    net.prune()
    before = copy.deepcopy(model.state_dict())
    refit_readers(model, net.surgery, found, run)
    assert found.readers == ["2", "4"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("4."))


def test_the_refit_leaves_alone_what_the_pruned_network_is_given_in_other_numbers():
    model, x = deep()
    net = Prepared(model, x)
    found = net.compensation()
    targets = DenseRun(model, found, net.steps)
    targets.steps = [lambda: model(x[:50])]
    surgery = net.prune()
    before = copy.deepcopy(model.state_dict())
    refit_readers(model, surgery, found, targets)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("swallow", [False, True])
def test_the_refit_runs_each_step_as_far_as_the_reader_and_survives_code_that_catches_everything(swallow):
    model, x = deep()
    reference = copy.deepcopy(model)
    calls = []

    def step():
        try:
            return model(x)
        except BaseException:
            if not swallow:
                raise
        finally:
            calls.append("step")

    for layer in (2, 4, 6):
        model[layer].register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    net = Prepared(model, x)
    found = net.compensation()
    run = DenseRun(model, found, [step, step])
    net.prune()
    calls.clear()
    refit_readers(model, net.surgery, found, run)
    assert calls == ["step"] * 2 + [2, "step"] * 2 + [2, 4, "step"] * 2
    plain = Prepared(reference, x)
    found = plain.compensation()
    run = DenseRun(reference, found, plain.steps * 2)
    plain.prune()
    refit_readers(reference, plain.surgery, found, run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("kind", BROKEN)
def test_nothing_in_the_data_makes_a_refitted_weight_nan(kind):
    model, x = broken_channels(kind)
    net = Prepared(model, x)
    if kind in ("nan channel", "infinite channel"):
        net.plan = Plan(((4, 7, 8), *net.plan.removed[1:]))
    found = net.compensation()
    targets = DenseRun(model, found, net.steps)
    surgery = net.prune()
    refit_readers(model, surgery, found, targets)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------- the callback


QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


class Regressor(pl.LightningModule):
    def __init__(self, widths=(12, 10), seed=0):
        super().__init__()
        torch.manual_seed(seed)
        sizes = [6, *widths]
        hidden = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.net = nn.Sequential(*[layer for pair in hidden for layer in pair], nn.Linear(sizes[-1], 2, bias=False))

    def loss(self, batch):
        x, y = batch
        loss = F.mse_loss(self.net(x.clone()), y)
        x.zero_()  # a careless user: the batch changes in place
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Data(torch.utils.data.Dataset):
    """A fresh pair at each reading, so that only what the round itself does can change it."""

    def __init__(self, n, seed):
        torch.manual_seed(seed)
        x = torch.randn(n, 6)
        self.pairs = TensorDataset(x, torch.stack([x[:, 0] * x[:, 1], x[:, 2:].sum(1)], 1))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]


def fitted(callback, epochs=2, model=None, seed=0):
    model = model or Regressor(seed=seed)
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[callback], **QUIET)
    loader = DataLoader(Data(64, 1), batch_size=16, shuffle=True)
    trainer.fit(model, loader, DataLoader(Data(40, 2), batch_size=20))
    return model, callback.results[0]


def pruning(**kwargs):
    settings = {"target_sparsity": 0.5, "tolerance": 0.05, "search": UniformBaseline()}
    return SoftPruning(**{**settings, "report": False, "verbose": False, **kwargs})


def validated(model):
    trainer = pl.Trainer(**QUIET)
    loader = DataLoader(Data(40, 2), batch_size=20)
    return trainer.validate(copy.deepcopy(model), loader, verbose=False)[0]["val_loss"]


@pytest.mark.parametrize("compensation", MODES)
def test_the_committed_model_is_the_scored_one(compensation):
    search = SensitivitySearch(levels=4, refine=2)
    model, result = fitted(pruning(compensation=compensation, search=search, finetune_epochs=0))
    assert result.applied
    assert result.score_after == pytest.approx(validated(model), abs=1e-6)
    assert result.costs_after.params == count_parameters(model)
    assert (model.net[-1].bias is None) == (compensation == "none")
    assert result.score_after == min(trial.score for trial in result.trials if trial.feasible)


def test_compensation_pays():
    trained = [fitted(pruning(compensation=mode, epochs=15, finetune_epochs=0), epochs=16) for mode in MODES]
    none, _, least_squares = (result.score_after for _, result in trained)
    assert least_squares < none


@pytest.mark.parametrize("compensation", MODES)
def test_the_same_seed_gives_the_same_weights(compensation):
    (first, one), (second, other) = (fitted(pruning(compensation=compensation), epochs=3) for _ in range(2))
    assert one.trials[0].coefficients == other.trials[0].coefficients
    assert one.score_after == other.score_after
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_created_bias_is_trained_on():
    model, _ = fitted(pruning(epochs=1), epochs=1 + 1, model=(net := Regressor()))
    before, _ = fitted(pruning(epochs=1, finetune_epochs=0), epochs=2)
    assert model is net
    assert model.net[-1].bias.shape == before.net[-1].bias.shape
    assert not torch.equal(model.net[-1].bias, before.net[-1].bias)


def test_calibration_changes_no_sample_and_no_random_number_of_the_run():
    class Draws(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append((batch[0].clone(), torch.rand(())))

    def run(callbacks):
        pl.seed_everything(0, verbose=False)
        trainer = pl.Trainer(max_epochs=2, callbacks=[draws := Draws(), *callbacks], **QUIET)
        data = Data(64, 1)
        trainer.fit(Regressor(), DataLoader(data, batch_size=16, shuffle=True), DataLoader(Data(40, 2), batch_size=20))
        return draws.seen, data.pairs.tensors

    (plain, data), (pruned, data_after) = run([]), run([pruning()])
    assert len(plain) == len(pruned) == 8
    for (batch, number), (other, drawn) in zip(plain, pruned, strict=True):
        assert torch.equal(batch, other)
        assert torch.equal(number, drawn)
    assert all(torch.equal(a, b) for a, b in zip(data, data_after, strict=True))


@pytest.mark.parametrize(
    "search", [SensitivitySearch(levels=4), GradientSearch(steps=3)], ids=lambda search: type(search).__name__
)
def test_sensitivity_curves_are_in_the_result_and_survive_json(search):
    _, result = fitted(pruning(search=search))
    assert [curve.group for curve in result.sensitivity] == [group.name for group in result.groups]
    for curve in result.sensitivity:
        assert curve.coefficients[0] == 0.0
        assert curve.scores[0] == pytest.approx(result.score_before)
        assert len(set(curve.scores)) > 2
        assert list(curve.coefficients) == sorted(curve.coefficients)
    assert PruningResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize(("groups", "levels"), [(4, 10), (8, 10), (16, 10), (32, 4)])
def test_evaluations_grow_at_most_linearly_with_the_number_of_groups(groups, levels):
    model = Regressor(widths=(11,) * groups)
    search = SensitivitySearch(levels=levels)
    callback = pruning(search=search, epochs=0, finetune_epochs=0, search_batches=1)
    _, result = fitted(callback, epochs=1, model=model)
    assert len(result.groups) == groups
    assert result.evaluations <= levels * groups + 6
    assert result.evaluations == 1 + len(result.trials)
