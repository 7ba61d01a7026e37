"""Networks whose readers are compensated, and the numbers they should get."""

import copy
import itertools

import numpy as np
import torch
from torch import nn

from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.compensation import Compensation
from lightning_softprune.graph import parts_called
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support import zoo

MODES = ("none", "bias", "least_squares")


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
    with torch.no_grad(), parts_called(model):
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
        for channel, position in itertools.product(range(inputs), np.ndindex(*layer.kernel_size)):
            nn.init.zeros_(probe.weight)
            place = (part * inputs + channel, 0) if transposed else (part * outputs, channel)
            with torch.no_grad():
                probe.weight[(*place, *position)] = 1.0
                columns.append(probe(x.double())[:, part * outputs].flatten().numpy())
        parts.append(np.stack(columns, 1))
    return np.stack(parts)


def names(*skip):
    wanted = ["Autoencoder", "Residual", "Dense", "UnevenSplit", "ChunkGate", "DepthwiseSeparable", "GroupedConv"]
    wanted += ["TransposedConv", "Attention", "PReLUs", "Sequence", "Critic", "Volume", "GroupedBothWays", "Joined"]
    return [name for name in wanted if name not in skip]


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
