"""Layers that are not PyTorch's, beside the same networks of PyTorch's: what is done to both has the same outcome."""

import copy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lightning_softprune
from lightning_softprune import LayerSpec, SoftPruning, find_groups, register_layer, resize
from lightning_softprune.calibration import collect_statistics, find_readers, norms, rank
from lightning_softprune.checkpoint import ModelShapes, keep_record
from lightning_softprune.compensation import COMPENSATIONS, Compensation, find_intercepts
from lightning_softprune.compensation.dense_run import run_dense
from lightning_softprune.compensation.refit import refit_readers
from lightning_softprune.graph import (
    CostModel,
    Layout,
    Member,
    PruningGroup,
    TensorAxis,
    check_layers,
    geometry_of,
    layer_type,
    layout_of,
    record_macs,
    trace_groups,
)
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from lightning_softprune.trainer import MisconfigurationException
from support.costs import count_parameters
from support.modules import FEATURES, count, fit, made, softpruning

pytestmark = pytest.mark.usefixtures("one_thread")


class Conv1D(nn.Module):
    """As in transformers: the package knows it by these names."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        flat = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.nf)


class Swapped(nn.Module):
    """A linear layer with every name its own, and a bias that may be missing."""

    def __init__(self, width, out, bias=True):
        super().__init__()
        self.width, self.shape = width, (out,)
        self.kernel = nn.Parameter(torch.randn(width, out))
        self.register_parameter("shift", nn.Parameter(torch.zeros(out)) if bias else None)

    def forward(self, x):
        y = x.reshape(-1, self.width) @ self.kernel
        return (y if self.shift is None else y + self.shift).view(*x.shape[:-1], *self.shape)


class OptionalBias(nn.Module):
    """The other way round again, with PyTorch's name for the bias, which may come later."""

    def __init__(self, width, out, bias=True):
        super().__init__()
        self.register_parameter("bias", nn.Parameter(torch.zeros(out)) if bias else None)
        self.matrix = nn.Parameter(torch.randn(width, out))

    def forward(self, x):
        return F.linear(x, self.matrix.t(), self.bias)


class WithoutBias(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(out, width))

    def forward(self, x):
        return x @ self.matrix.t()


SWAPPED = LayerSpec(
    Swapped,
    inputs={"kernel": 0},
    outputs={"kernel": -1, "shift": 0},
    sizes={"in": "width", "out": "shape"},
    mixes="kernel",
    bias="shift",
)
OPTIONAL_BIAS = LayerSpec(OptionalBias, inputs={"matrix": 0}, outputs={"matrix": 1, "bias": 0}, mixes="matrix")
WITHOUT_BIAS = LayerSpec(WithoutBias, inputs={"matrix": 1}, outputs={"matrix": 0}, mixes="matrix")


@pytest.fixture(autouse=True)
def registered():
    for spec in (SWAPPED, OPTIONAL_BIAS, WITHOUT_BIAS):
        register_layer(spec)


KINDS = {  # how it is made, its weight transposed or not, its bias
    "Conv1D": (lambda n, m: Conv1D(m, n), "weight", True, "bias"),
    "Swapped": (Swapped, "kernel", True, "shift"),
    "Swapped without bias": (lambda n, m: Swapped(n, m, bias=False), "kernel", True, None),
    "OptionalBias": (OptionalBias, "matrix", True, "bias"),
    "OptionalBias without": (lambda n, m: OptionalBias(n, m, bias=False), "matrix", True, None),
    "WithoutBias": (WithoutBias, "matrix", False, None),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """An image, its flattened features, and a chain of layers with a normalisation among them."""

    def __init__(self, layer):
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3)
        self.up = layer(5 * 4, 14)
        self.norm = nn.LayerNorm(14)
        self.down = layer(14, 9)
        self.head = layer(9, 3)

    def forward(self, x):
        h = self.norm(self.up(self.stem(x).relu().flatten(1)))
        return self.head(self.down(h.relu()).tanh())


class Wrapped(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net


def with_layers_of(kind, model):
    """A model, and the same one with each linear layer replaced by one of this kind."""
    build, weight, swapped, bias = KINDS[kind]
    other = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if bias is None:
                module.bias = None
            layer = build(module.in_features, module.out_features).to(module.weight)
            with torch.no_grad():
                getattr(layer, weight).copy_(module.weight.t() if swapped else module.weight)
                if bias is not None:
                    getattr(layer, bias).copy_(module.bias)
            setattr(other.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
    return model, other


def pair(kind, seed=0):
    torch.manual_seed(seed)
    model, other = with_layers_of(kind, Net(nn.Linear).double().eval())
    x = torch.randn(60, 1, 4, 4, dtype=torch.float64)
    assert torch.allclose(model(x), other(x))
    return model, other, x


def groups_of(model, x):
    """The groups of the network with PyTorch's layers; the modules and slots of the other have the same names."""
    return [group for group in trace_groups(model, [lambda: model(x)]) if group.prunable]


def weights_of(layer):
    """Weight as (out, in) and bias, whatever they are called."""
    geometry = geometry_of(layer)
    weight = layer.get_parameter(geometry.weight)
    return weight.t() if geometry.input_dim == 0 else weight, layer._parameters.get(geometry.bias)


def assert_alike(model, other, x):
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for one, two in zip(weights_of(module), weights_of(other.get_submodule(name)), strict=True):
                assert (one is None) == (two is None), name
                assert one is None or torch.allclose(one, two, rtol=0, atol=1e-6), name
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-6)


def cut(model, *slots, channels, remove):
    """Remove channels from a group of these slots."""
    members = tuple(Member(*slot, np.arange(channels)) for slot in slots)
    apply_plan(model, [PruningGroup("", "", "intra", channels, members, True, "")], Plan((remove,)))


# -------------------------------------------------------------------------------------------- another library's Conv1D


def test_conv1d_has_its_inputs_first():
    layer = Conv1D(6, 4)
    axes = (TensorAxis("weight", 0, "in"), TensorAxis("weight", 1, "out"), TensorAxis("bias", 0, "out"))
    assert layout_of(layer) == Layout({"in": 4, "out": 6}, axes)
    assert layout_of(type("Mine", (Conv1D,), {})(6, 4)) == layout_of(layer)


def test_conv1d_is_known_by_its_full_name_alone():
    other = type("Conv1D", (nn.Module,), {"__module__": "somewhere.else"})
    assert layer_type(other()) is None


def test_conv1d_of_a_release_that_does_not_keep_the_number_of_inputs_is_resized_too():
    layer = nn.Sequential(nn.Linear(3, 4), Conv1D(6, 4))
    del layer[1].nx
    cut(layer, ("0", "out"), ("1", "in"), channels=4, remove=(1, 2))
    assert layer[1].weight.shape == (2, 6)
    assert not hasattr(layer[1], "nx")
    assert layer(torch.ones(5, 3)).shape == (5, 6)


def test_the_library_of_conv1d_is_not_imported():
    code = (
        "import sys, types, torch\n"  # without the package's own `__init__`: torchmetrics imports all that there is
        "sys.modules['lightning_softprune'] = package = types.ModuleType('lightning_softprune')\n"
        f"package.__path__ = [{str(Path(lightning_softprune.__file__).parent)!r}]\n"
        "from lightning_softprune.graph import layout_of\n"
        "layout_of(torch.nn.Linear(1, 1))\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["False"]


def test_the_real_conv1d_is_that_one():
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    assert type(layer_type(layer)) is type(layer_type(Conv1D(6, 4)))
    assert layout_of(layer) == layout_of(Conv1D(6, 4))


# ---------------------------------------------------------------------------------- like the same network of nn.Linear


@every_kind
@pytest.mark.parametrize("mode", COMPENSATIONS)
def test_pruned_compensated_and_refitted_layers_equal_linear_ones(kind, mode):
    model, other, x = pair(kind)
    groups = groups_of(model, x)
    assert [group.num_channels for group in groups] == [5, 14, 9]
    rng = np.random.default_rng(0)
    rankings = [rng.permutation(group.num_channels) for group in groups]
    plan = Plan.from_counts([2, 6, 4], rankings)
    for net in (model, other):
        steps = [lambda net=net: net(x[:30]), lambda net=net: net(x[30:])]
        readers = find_readers(net, groups)
        assert [reader.stride for reader in readers] == [4, 1, 1]
        statistics = collect_statistics(net, readers, steps)
        intercepts = find_intercepts(other, groups, [lambda: other(x)])  # of both: those that can have no bias
        compensation = Compensation(mode, net, groups, rankings, statistics, intercepts)
        dense = run_dense(net, compensation, steps)
        surgery = apply_plan(net, groups, plan)
        compensation.apply(net, surgery)
        net.one_shot = copy.deepcopy(net)
        if mode == "least_squares":
            refit_readers(net, surgery, compensation, dense)
    assert_alike(model.one_shot, other.one_shot, x)
    assert_alike(model, other, x)
    assert weights_of(other.down)[0].shape == (5, 8)


@pytest.mark.parametrize(("kind", "created"), [("OptionalBias without", True), ("Swapped without bias", False)])
def test_a_bias_is_created_where_there_is_a_place_for_one_called_bias(kind, created):
    model, other, x = pair(kind)
    groups = groups_of(model, x)
    statistics = collect_statistics(other, find_readers(other, groups), [lambda: other(x)])
    rankings = [np.arange(group.num_channels) for group in groups]
    intercepts = find_intercepts(other, groups, [lambda: other(x)])
    compensation = Compensation("least_squares", other, groups, rankings, statistics, intercepts)
    assert intercepts.refused == (set() if created else {"up", "down", "head"})
    assert compensation.new_biases == (["up", "down", "head"] if created else [])
    assert Compensation("bias", other, groups, rankings, statistics).new_biases == compensation.new_biases
    fresh, judged = copy.deepcopy(other), {name for name, _ in other.named_parameters()}
    surgery = apply_plan(other, groups, Plan(((0,), (1,), (2,))))
    compensation.apply(other, surgery)
    assert [name for name, *_ in surgery.created] == [f"{name}.bias" for name in compensation.new_biases]
    costs = CostModel.build(fresh, groups, rankings, {}, compensation.new_biases, judged)
    assert costs.count("params", np.array([1, 1, 1])) == count_parameters(other)
    resize(fresh, other.state_dict())
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(fresh(x), other(x))


@every_kind
def test_channels_are_ranked_as_those_of_linear_layers(kind):
    model, other, x = pair(kind)
    groups = groups_of(model, x)
    found = []
    for net in (model, other):
        statistics = collect_statistics(net, find_readers(net, groups), [lambda net=net: net(x)])
        losses = [lambda net=net: net(x).square().mean()]
        rankings = {
            name: rank(name, net, groups, losses, statistics, np.random.default_rng(0))
            for name in ("magnitude", "activation", "taylor", "reconstruction")
        }
        found.append((rankings, norms(net, groups)))
    (one, norm), (two, other_norm) = found
    assert norm == pytest.approx(other_norm)
    for name, ranking in one.items():
        assert [r.tolist() for r in ranking] == [r.tolist() for r in two[name]], name


@every_kind
def test_parameters_and_macs_of_plans_are_counted_as_those_of_linear_layers(kind):
    model, other, x = pair(kind)
    groups = groups_of(model, x)
    rankings = [np.arange(group.num_channels)[::-1] for group in groups]
    counts = []
    for net in (model, other):
        with record_macs(net) as seen, torch.no_grad():
            net(x)
        costs = CostModel.build(net, groups, rankings, seen)
        plans = np.array([[0, 0, 0], [2, 6, 4], [4, 13, 8]])
        counts.append((costs.count("params", plans).tolist(), costs.count("macs", plans).tolist()))
    assert counts[0] == counts[1]
    assert counts[0][1][0] == 60 * (5 * 9 * 4 + 20 * 14 + 14 * 9 + 9 * 3)
    apply_plan(other, groups, Plan.from_counts([2, 6, 4], rankings))
    assert counts[0][0][1] == count_parameters(other)
    with record_macs(other) as seen, torch.no_grad():
        other(x)
    pruned = CostModel.build(other, [], [], seen)
    assert pruned.count("macs", np.zeros((1, 0))).tolist() == [counts[0][1][1]]


@every_kind
@pytest.mark.parametrize("known", ["record", "state"])
def test_a_dense_network_takes_the_shape_of_a_pruned_one(kind, known):
    model, other, x = pair(kind)
    fresh = copy.deepcopy(other)
    groups = groups_of(model, x)
    dense = ModelShapes.of(Wrapped(other))
    apply_plan(other, groups, Plan(((0, 3), (1, 2, 13), (4,))))
    now = ModelShapes.of(other)
    assert now.layers["down"] == {"in": 11, "out": 8}
    if known == "record":
        module = Wrapped(other)
        keep_record(module, dense, [])
        checkpoint = {}
        module.on_save_checkpoint(checkpoint)
        resize(Wrapped(fresh), checkpoint["softprune"])
    else:
        resize(fresh, other.state_dict())
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(fresh(x), other(x))
    assert ModelShapes.of(fresh) == now
    layer = fresh.down
    if isinstance(layer, Swapped):
        assert (layer.width, layer.shape) == (11, (8,))
    if isinstance(layer, Conv1D):
        assert (layer.nx, layer.nf) == (11, 8)


# -------------------------------------------------------------------------------------------------- layers of any kind


class Gate(nn.Module):
    """Value and gate in one matrix."""

    def __init__(self, width, out):
        super().__init__()
        self.out = out
        self.weight = nn.Parameter(torch.randn(2 * out, width))
        self.bias = nn.Parameter(torch.randn(2 * out))

    def forward(self, x):
        value, gate = F.linear(x, self.weight, self.bias).split(self.out, -1)
        return value * gate.sigmoid()


class Scale(nn.Module):
    """One number per channel of an image, in groups of channels."""

    def __init__(self, width, groups=1):
        super().__init__()
        self.width, self.groups = [width], groups
        self.scale = nn.Parameter(torch.randn(1, width, 1, 1))
        self.register_buffer("mean", torch.randn(width))

    def forward(self, x):
        return (x - self.mean[:, None, None]) * self.scale


class Table(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(width, tokens))

    def forward(self, ids):
        return self.rows.t()[ids]


class Folded(nn.Module):
    """A layer with a layer inside it."""

    def __init__(self, width, out):
        super().__init__()
        self.inner = nn.Linear(width, out)
        self.gain = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return self.inner(x) * self.gain


class Kernel(nn.Module):
    """A transposed convolution without its attributes."""

    def __init__(self, width, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out, 3))

    def forward(self, x):
        return F.conv_transpose1d(x, self.weight, stride=2)


GATE = {
    "inputs": {"weight": 1},
    "outputs": {"weight": 0, "bias": 0},
    "copies": {"weight": 2, "bias": 2},
    "sizes": {"out": "out"},
}
SCALE = {"channels": {"scale": 1, "mean": 0}, "sizes": {"both": "width"}, "channel_dim": 1}
FOLDED = {
    "inputs": {"inner.weight": 1},
    "outputs": {"inner.weight": 0, "inner.bias": 0, "gain": 0},
    "sizes": {"in": "inner.in_features", "out": ["inner.out_features"]},
}


def macs_of(model, x):
    with record_macs(model) as seen, torch.no_grad():
        model(x)
    return CostModel.build(model, [], [], seen).count("macs", np.zeros((1, 0))).item()


def test_copies_of_the_channels_are_sliced_together():
    register_layer(Gate, **GATE)
    model = nn.Sequential(nn.Linear(3, 4), Gate(4, 6))
    whole = model[1].weight.detach().clone()
    x = torch.randn(10, 3)
    before = model(x)
    assert macs_of(model, x) == 10 * (3 * 4 + 4 * 12)
    cut(model, ("1", "out"), channels=6, remove=(0, 4))
    assert torch.equal(model[1].weight, whole[[1, 2, 3, 5, 7, 8, 9, 11]])
    assert model[1].out == 4
    torch.testing.assert_close(model(x), before[:, [1, 2, 3, 5]])
    cut(model, ("0", "out"), ("1", "in"), channels=4, remove=(3,))
    assert model[1].weight.shape == (8, 3)
    assert macs_of(model, x) == 10 * (3 * 3 + 3 * 8)


def test_layers_that_pass_channels_on_are_sliced_with_their_buffers():
    register_layer(Scale, **SCALE)
    model = nn.Sequential(nn.Conv2d(1, 5, 1), Scale(5))
    x = torch.randn(2, 1, 3, 3)
    before = model(x)
    assert macs_of(model, x) == 2 * 9 * 5
    cut(model, ("0", "out"), ("1", "both"), channels=5, remove=(1,))
    torch.testing.assert_close(model(x), before[:, [0, 2, 3, 4]])
    assert model[1].width == [4]
    assert not layer_type(model[1]).produces
    register_layer(Scale, **SCALE, macs="outputs")
    assert macs_of(model, x) == 2 * 9 * 4 + 2 * 9 * 4


def test_equal_parts_are_in_the_layout():
    register_layer(Scale, **SCALE, parts="groups")
    assert layout_of(Scale(6, groups=3)).parts == {"both": 3}
    assert layout_of(Scale(6, groups=np.int64(3))).parts == {"both": 3}
    assert layout_of(Scale(6)).parts == {}
    with pytest.raises(ValueError, match=r"parts: 5 channels of channels do not make 3 equal parts \(the layer ''\)"):
        check_layers(Scale(5, groups=3))


def test_an_embedding_has_outputs_alone():
    register_layer(Table, outputs={"rows": 0})
    layer, ids = Table(7, 5), torch.tensor([[1, 3]])
    assert layout_of(layer) == Layout({"out": 5}, (TensorAxis("rows", 0, "out"),))
    entry = layer_type(layer)
    assert entry.produces
    assert not list(entry.taken(layer, {0: ids}))
    (port,) = entry.given(layer, layer(ids))
    assert (port.slot, port.dim) == ("out", 2)
    assert LayerSpec(Table, outputs={"rows": np.int64(0)}) == LayerSpec(Table, outputs={"rows": 0})
    assert macs_of(layer, ids) == 0


def test_modules_inside_a_layer_are_parts_of_it():
    register_layer(Folded, **FOLDED)
    model = nn.Sequential(nn.Linear(3, 4), Folded(4, 6), nn.Linear(6, 2))
    x = torch.randn(5, 3)
    assert macs_of(model, x) == 5 * (3 * 4 + 4 * 6 + 6 * 2)
    dense = copy.deepcopy(model)
    cut(model, ("1", "out"), ("2", "in"), channels=6, remove=(0, 1))
    cut(model, ("0", "out"), ("1", "in"), channels=4, remove=(2,))
    assert str(model[1].inner) == str(nn.Linear(3, 4))
    assert macs_of(model, x) == 5 * (3 * 3 + 3 * 4 + 4 * 2)
    resize(dense, model.state_dict())
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(x), model(x))
    assert str(dense) == str(model)


def test_macs_of_transposed_convolutions_are_counted_at_their_input():
    x = torch.randn(2, 4, 5)
    register_layer(Kernel, inputs={"weight": 0}, outputs={"weight": 1}, channel_dim=1, macs="inputs")
    assert macs_of(Kernel(4, 6), x) == macs_of(nn.ConvTranspose1d(4, 6, 3, stride=2), x) == 2 * 5 * 4 * 6 * 3
    register_layer(Kernel, inputs={"weight": 0}, outputs={"weight": 1}, channel_dim=1)
    assert macs_of(Kernel(4, 6), x) == 2 * 11 * 4 * 6 * 3
    register_layer(Kernel, inputs={"weight": 0}, outputs={"weight": 1}, channel_dim=1, macs="none")
    assert macs_of(Kernel(4, 6), x) == 0


@pytest.mark.parametrize(("channel_dim", "dim"), [(-1, 3), (1, 1), (0, 0), (-2, 2)])
def test_channels_are_where_they_were_said_to_be(channel_dim, dim):
    register_layer(Kernel, inputs={"weight": 0}, outputs={"weight": 1}, channel_dim=channel_dim)
    layer, x = Kernel(4, 6), torch.zeros(4, 4, 4, 4)
    entry = layer_type(layer)
    assert [(p.tensor is x, p.slot, p.dim) for p in entry.taken(layer, {0: x})] == [(True, "in", dim)]
    assert [(p.tensor is x, p.slot, p.dim) for p in entry.given(layer, (x, None))] == [(True, "out", dim)]


def test_a_dimension_that_activations_have_not_is_named():
    register_layer(Kernel, inputs={"weight": 0}, outputs={"weight": 1}, channel_dim=2)
    layer = Kernel(4, 6)
    with pytest.raises(ValueError, match=r"channel_dim: 2 is not a dimension of what Kernel takes .* shape \(3, 4\)"):
        list(layer_type(layer).taken(layer, {"x": torch.zeros(3, 4)}))


def test_weights_that_are_computed_are_left_alone_and_counted():
    model = nn.Sequential(Swapped(4, 6), OptionalBias(6, 2))
    parametrizations.weight_norm(model[0], "kernel")
    nn.utils.parametrize.register_parametrization(model[1], "bias", nn.Identity())
    for layer in model:
        assert "are computed" in layout_of(layer)
        assert geometry_of(layer) is None
    assert macs_of(model, torch.zeros(3, 4)) == 3 * (4 * 6 + 6 * 2)
    check_layers(model)


def test_layers_without_a_shape_are_left_alone():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.UninitializedParameter()

    register_layer(Lazy, inputs={"weight": 0}, outputs={"weight": 1})
    check_layers(Lazy())
    assert layout_of(Lazy()) == "this Lazy has no shape before it runs"


def test_a_layer_without_any_of_its_tensors_is_left_alone():
    register_layer(Scale, channels={"scale": 1, "mean": 0})
    layer = Scale(4)
    layer.scale = layer.mean = None
    assert layout_of(layer) == "this Scale has none of the tensors that tell its channels"
    register_layer(Scale, **SCALE)
    assert layout_of(layer) == Layout({"both": 4}, ())


# -------------------------------------------------------------------------------------------------------- registering


def test_the_nearest_class_counts_and_of_the_same_one_the_last():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 5))

    class Middle(Base):
        pass

    class Last(Middle):
        pass

    assert layout_of(Last()) is None
    register_layer(Middle, inputs={"a": 0})
    register_layer(Base, inputs={"a": 1})
    assert [layout_of(kind()).slots["in"] for kind in (Base, Middle, Last)] == [3, 2, 2]
    register_layer(Middle, inputs={"b": 0})
    assert [layout_of(kind()).slots["in"] for kind in (Base, Middle, Last)] == [3, 4, 4]


def test_registering_the_same_twice_changes_nothing():
    entry = layer_type(Swapped(2, 3))
    register_layer(copy.deepcopy(SWAPPED))
    assert layer_type(Swapped(2, 3)) is entry


def test_a_class_of_pytorchs_can_be_registered():
    class Recurrent(nn.LSTM):
        pass

    assert layout_of(Recurrent(3, 4)).slots == {"in": 3, "out": 4}
    register_layer(Recurrent, inputs={"weight_ih_l0": 1}, sizes={"in": "input_size"})
    assert layout_of(Recurrent(3, 4)).slots == {"in": 3}
    assert layout_of(nn.LSTM(3, 4)).slots == {"in": 3, "out": 4}


def test_the_class_may_be_given_by_its_path():
    assert LayerSpec("torch.nn.Bilinear", outputs={"weight": 0}).type is nn.Bilinear
    assert LayerSpec("torch.nn.modules.linear.Bilinear", outputs={"weight": 0}).kind is nn.Bilinear


@pytest.mark.parametrize("by", ["SoftPruning", "find_groups"])
def test_the_callback_and_find_groups_register_layers(by):
    class Mine(Swapped):
        pass

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Mine(4, 2))
    spec = LayerSpec(Mine, inputs={"kernel": 0}, outputs={"kernel": 1, "shift": 0})
    if by == "SoftPruning":
        SoftPruning(layers=[spec])
    else:
        find_groups(net, torch.zeros(1, 3), layers=[spec])
    assert layer_type(net[2]).spec == spec


# ------------------------------------------------------------------------------------------------------------ mistakes

GIVEN = {"type": Swapped, "inputs": {"kernel": 0}, "outputs": {"kernel": 1, "shift": 0}}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"type": torch.relu}, TypeError, r"type: <built-in .*> is not a subclass of nn\.Module"),
        ({"type": dict}, TypeError, r"type: <class 'dict'> is not a subclass of nn\.Module"),
        ({"type": nn.Module}, ValueError, r"type: nn\.Module is the class of all modules"),
        ({"type": "torch.nn.Bilinar"}, ValueError, r"type: 'torch\.nn\.Bilinar' is not the dotted path of a class"),
        ({"type": "no.such.Thing"}, ValueError, r"type: 'no\.such\.Thing' is not the dotted path of a class"),
        ({"type": ""}, ValueError, r"type: '' is not the dotted path of a class"),
        ({"type": "torch.nn.functional.relu"}, TypeError, r"type: 'torch\.nn\.functional\.relu' is not a subclass"),
        ({"inputs": ["kernel"]}, TypeError, r"inputs: \['kernel'\] is not a dictionary with string keys"),
        ({"inputs": {"kernel": "0"}}, TypeError, r"inputs\['kernel'\]: '0' is not a whole number"),
        ({"inputs": {"kernel": [0, True]}}, TypeError, r"inputs\['kernel'\]\[1\]: True is not a whole number"),
        ({"inputs": {"kernel": []}}, ValueError, r"inputs\['kernel'\]: \[\] is not a dimension or a list of them"),
        ({"inputs": {"kernel": 1}}, ValueError, r"outputs\['kernel'\]: dimension 1 is given twice"),
        ({"inputs": {}, "outputs": {}}, ValueError, r"inputs: \{\} says of no tensor which dimension holds channels"),
        ({"channels": {"shift": 0}}, ValueError, r"channels: \{'shift': 0\} are at both sides of the layer"),
        ({"sizes": {"both": "n"}}, ValueError, r"channels: \{\} are at both sides .*sizes=\{'both': 'n'\}"),
        ({"sizes": {"nx": "in"}}, ValueError, r"sizes: 'nx' is not one of 'in', 'out', 'both'"),
        ({"sizes": {"in": 4}}, TypeError, r"sizes\['in'\]: 4 is not a list of strings"),
        ({"copies": {"kernel": 0}}, ValueError, r"copies\['kernel'\]: 0 is less than 1"),
        ({"copies": {"weight": 2}}, ValueError, r"copies: 'weight' is not among outputs=\{'kernel': 1, 'shift': 0\}"),
        ({"channel_dim": "last"}, TypeError, r"channel_dim: 'last' is not a whole number"),
        ({"macs": "flops"}, ValueError, r"macs: 'flops' is not one of 'outputs', 'inputs', 'none'"),
        ({"mixes": "shift"}, ValueError, r"mixes: 'shift' is not a matrix of the layer itself"),
        ({"mixes": "kernel", "copies": {"kernel": 2}}, ValueError, r"mixes: 'kernel' is not a matrix .*without copies"),
        ({"mixes": "kernel", "channel_dim": 1}, ValueError, r"mixes: 'kernel' needs channel_dim=-1, here it is 1"),
        ({"mixes": 1}, TypeError, r"mixes: 1 is not a str"),
        ({"parts": 2}, TypeError, r"parts: 2 is not a str"),
        ({"bias": None}, TypeError, r"bias: None is not a str"),
    ],
)
def test_what_is_wrong_for_any_layer_is_refused_when_it_is_written(changes, error, message):
    with pytest.raises(error, match=message):
        LayerSpec(**GIVEN | changes)
    with pytest.raises(error, match=message):
        register_layer(**GIVEN | changes)


def test_a_misspelt_argument_is_named_with_what_was_meant():
    with pytest.raises(
        TypeError, match=r"output: register_layer has no such argument, only .*; did you mean 'outputs'\?"
    ):
        register_layer(Swapped, output={"kernel": 1})
    with pytest.raises(TypeError, match="takes no further mixes"):
        register_layer(SWAPPED, mixes="kernel")


@pytest.mark.parametrize(
    ("layers", "message"),
    [(SWAPPED, "layers: LayerSpec.* is not a list"), ([{}], r"layers\[0\]: \{\} is not a LayerSpec")],
)
def test_layers_have_to_be_specifications(layers, message):
    for call in (
        lambda: SoftPruning(layers=layers),
        lambda: find_groups(nn.Linear(2, 3), torch.zeros(1, 2), layers=layers),
    ):
        with pytest.raises(TypeError, match=message):
            call()


class Mistaken(Swapped):
    def __init__(self, width, out):
        super().__init__(width, out)
        self.cube = nn.Parameter(torch.zeros(width, out, 2))
        self.flag, self.groups = True, 5

    @property
    def features(self):
        return self.kernel.shape[0]


UNFIT = [
    (
        {"inputs": {"kernal": 0}},
        r"inputs: 'kernal' is not a parameter or buffer of this Mistaken, which has 'kernel', 'shi",
    ),
    ({"inputs": {"kernel.weight": 0}}, r"inputs: 'kernel\.weight' is not a parameter or buffer of this Mistaken"),
    ({"inputs": {"inner.weight": 0}}, r"inputs: 'inner\.weight' is not a parameter or buffer of this Mistaken"),
    ({"inputs": {"width": 0}}, r"inputs: 'width' is not a parameter or buffer"),
    ({"inputs": {"kernel": 2}}, r"inputs\['kernel'\]: 2 is not a dimension of a tensor of the shape \(4, 6\)"),
    ({"inputs": {"kernel": -3}}, r"inputs\['kernel'\]: -3 is not a dimension of a tensor of the shape \(4, 6\)"),
    ({"inputs": {"kernel": -1}}, r"outputs\['kernel'\]: dimension 1 of 'kernel' is given twice"),
    (
        {"outputs": {"kernel": 1, "cube": 0}},
        r"outputs\['cube'\]: dimension 0 of 'cube' has 4 .* outputs\['kernel'\] has 6",
    ),
    ({"copies": {"kernel": 4}}, r"copies\['kernel'\]: 4 does not divide the 6 of dimension 1"),
    ({"sizes": {"in": "nx"}}, r"sizes\['in'\]: 'nx' of this Mistaken is None, not an int, nor a tuple or list of one"),
    ({"sizes": {"in": "flag"}}, r"sizes\['in'\]: 'flag' of this Mistaken is True, not an int"),
    ({"sizes": {"out": "width"}}, r"sizes\['out'\]: 'width' of this Mistaken is 4, outputs\['kernel'\] has 6 channels"),
    ({"sizes": {"in": "features"}}, r"sizes\['in'\]: 'features' of this Mistaken is a property that cannot be written"),
    ({"parts": "groups"}, r"parts: 4 channels of inputs do not make 5 equal parts"),
    ({"parts": "heads"}, r"parts: 'heads' of this Mistaken is None, not a number"),
    (
        {"inputs": {"cube": 0}, "outputs": {"cube": 1}, "mixes": "cube"},
        r"mixes: 'cube' has the shape \(4, 6, 2\), which is",
    ),
]


@pytest.mark.parametrize(("changes", "message"), UNFIT)
def test_what_does_not_fit_a_layer_is_an_error_before_anything_changes(changes, message):
    fields = {"inputs": {"kernel": 0}, "outputs": {"kernel": 1, "shift": 0}} | changes
    model = nn.Sequential(nn.Linear(3, 4), Mistaken(4, 6))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        find_groups(model, torch.zeros(2, 3), layers=[LayerSpec(Mistaken, **fields)])
    assert str(caught.value).endswith("(the layer '1')")
    assert isinstance(layout_of(model[1]), str)  # wherever else it is met, it is left alone
    assert ModelShapes.of(model).layers == {"0": {"in": 3, "out": 4}}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_callback_refuses_what_does_not_fit_before_training(tmp_path):
    class Unfit(WithoutBias):
        pass

    module = made()
    module.encoder[0] = Unfit(FEATURES, 16)
    pruning = softpruning(layers=[LayerSpec(Unfit, inputs={"matrix": 1}, outputs={"matrix": 2})])
    with pytest.raises(MisconfigurationException, match=r"outputs\['matrix'\]: 2 is not .* \(the layer 'encoder\.0'\)"):
        fit(tmp_path, module, pruning)
    assert not module.losses


# ----------------------------------------------------------------------------------------------------------- the tracer


@every_kind
def test_groups_are_those_of_the_network_of_linear_layers(kind):
    model, other, x = pair(kind)
    found = [
        {(g.name, g.num_channels, *map(str, g.members), g.prunable) for g in find_groups(net, x)}
        for net in (model, other)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [*KINDS, "Gate", "Folded"])
def test_a_module_of_such_layers_is_pruned_and_trained_on(tmp_path, kind):
    register_layer(Gate, **GATE)
    register_layer(Folded, **FOLDED)
    module = made()
    build = {"Gate": Gate, "Folded": Folded}.get(kind) or KINDS[kind][0]
    module.encoder[0], module.decoder[0] = build(FEATURES, 16), build(8, 16)
    before = count(module)
    pruning = softpruning(target_sparsity=0.4, tolerance=0.1)
    fit(tmp_path, module, pruning)
    (result,) = pruning.results
    assert result.applied
    assert count(module) == result.costs_after.params < 0.75 * before
