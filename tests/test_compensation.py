"""Oracles: `numpy.linalg.lstsq` on the augmented system, the dense network's outputs, and `Trainer.validate`."""

import copy
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import GradientSearch, PruningResult, SensitivitySearch, SoftPruning, UniformBaseline
from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.compensation import REFINE_RIDGE, RIDGE, Compensation, DenseInputs, refine
from lightning_softprune.costs import CostModel, count_parameters
from lightning_softprune.groups import trace_groups
from lightning_softprune.plan import Plan
from lightning_softprune.surgery import apply_plan, repair_optimizers

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
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    channels_first = hasattr(model.get_submodule(name), "kernel_size")
    rows = [x.movedim(1, -1) if channels_first else x for x in seen]
    return np.concatenate([x.double().numpy().reshape(-1, x.shape[-1]) for x in rows])


def regress(inputs, targets, ridge):
    """`argmin |targets - inputs B|^2 + n ridge |B|^2`, by least squares on the augmented system."""
    n, width = inputs.shape
    above = np.concatenate([inputs, np.sqrt(n * ridge) * np.eye(width)])
    below = np.concatenate([targets, np.zeros((width, targets.shape[1]))])
    return np.linalg.lstsq(above, below, rcond=None)[0]


def expected(layer, rows, gone, lost, stride, mode):
    """The reader's weight and bias after compensation: the docstring's formulas, channel part by channel part."""
    weight = dense_weight(layer)
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().numpy().copy()
    mean = rows.mean(0)
    centred = (rows - mean).reshape(len(rows), -1, stride)
    observations = centred.transpose(0, 2, 1).reshape(-1, centred.shape[1])
    ridge = RIDGE * observations.var(0).mean()
    parts = getattr(layer, "groups", 1)
    taps = np.prod(layer.stride) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
    size = observations.shape[1] // parts
    for part in range(parts):
        channels = np.arange(part * size, (part + 1) * size)
        k, r = channels[~gone[channels * stride]], channels[gone[channels * stride]]
        b = regress(observations[:, k], observations[:, r], ridge)  # (kept, removed)
        if mode == "bias":
            b = np.zeros_like(b)
        for position in range(stride):
            ki, ri = k * stride + position, r * stride + position
            weight[:, ki] += np.einsum("orp,kr->okp", weight[:, ri], b)
            bias += np.einsum("orp,r->o", weight[:, ri], mean[ri] - b.T @ mean[ki]) / taps
    return weight[~lost][:, ~gone], bias[~lost]


def names(*skip):
    wanted = ["Autoencoder", "Residual", "Dense", "UnevenSplit", "ChunkGate", "DepthwiseSeparable", "GroupedConv"]
    wanted += ["TransposedConv", "Attention", "PReLUs", "Sequence", "Critic", "Volume", "GroupedBothWays", "Joined"]
    return [name for name in wanted if name not in skip]


@pytest.mark.parametrize("mode", ["bias", "least_squares"])
@pytest.mark.parametrize("name", names())
def test_readers_get_the_ridge_regression_of_removed_on_kept_channels(name, mode):
    for seed in range(3):
        net = prepared(name, seed=seed)
        model, dense = net.model, copy.deepcopy(net.model)
        found = net.compensation(mode)
        assert found.readers
        net.prune(mode)
        for reader in found.readers:
            layer = dense.get_submodule(reader)
            rows = inputs_of(dense, reader, *net.inputs)
            gone, lost = net.removed(reader, "in"), net.removed(reader, "out")
            stride = STRIDES.get((name, reader), 1)
            weight, bias = expected(layer, rows, gone, lost, stride, mode)
            pruned = model.get_submodule(reader)
            np.testing.assert_allclose(dense_weight(pruned), weight, atol=1e-4)
            np.testing.assert_allclose(pruned.bias.detach(), bias, atol=1e-4)


@pytest.mark.parametrize("name", ["Autoencoder", "Residual", "Sequence", "Joined"])
def test_the_solution_cut_from_one_factorisation_is_that_of_a_fresh_one_for_every_plan(name):
    net = prepared(name)
    for reader in net.compensation().readers:
        regression = net.compensation().regression(reader)
        if regression.order is None:
            assert (name, reader) == ("Joined", "inner")  # the reader of two groups
            continue
        for k in range(1, len(regression.order)):
            kept, removed = regression.order[:k].sort().values, regression.order[k:].sort().values
            nested = regression.coefficients(kept, removed)
            covariance = regression.covariance
            ridge = RIDGE * covariance.diagonal().mean() * torch.eye(k, dtype=torch.float64)
            fresh = torch.linalg.solve(covariance[kept][:, kept] + ridge, covariance[kept][:, removed]).t()
            torch.testing.assert_close(nested, fresh, rtol=1e-7, atol=1e-9)


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
    """Three layers; all but the first four channels of the two hidden ones are combinations of those, plus constants."""
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
def test_combinations_of_kept_channels_are_removed_without_loss(layer_type, shape, seed):
    model = chain(layer_type, seed)
    x = torch.randn(shape, dtype=torch.float64)
    dense = model(x)
    net = Prepared(model, x)
    assert [group.num_channels for group in net.groups] == [12, 10]
    net.plan = Plan((tuple(range(4, 12)), tuple(range(4, 10))))
    without = net.prune("none")
    assert (model(x) - dense).square().mean() > 0.1 * dense.var()
    without.undo()
    net.prune("least_squares")
    assert (model(x) - dense).square().mean().sqrt() < 3e-4 * dense.std()
    print((model(x) - dense).square().mean().sqrt() /dense.std())
