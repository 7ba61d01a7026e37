"""Oracle: the same plan with a created bias, whose outputs have to be the same, in eval mode and in training."""

import copy

import pytest
import torch
from torch import nn

from lightning_softprune.compensation import Compensation, Intercepts, find_intercepts
from lightning_softprune.compensation.dense_run import run_dense
from lightning_softprune.compensation.refit import refit_readers
from lightning_softprune.graph.costs import CostModel
from lightning_softprune.surgery import apply_plan
from support.costs import count_parameters
from support.readers import Prepared

pytestmark = pytest.mark.usefixtures("one_thread")


class Convolutions(nn.Module):
    """Stem, a convolution without bias and what follows it, head; the norm's statistics are no round numbers."""

    def __init__(self, norm=nn.BatchNorm2d, **arguments):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 6, 3, bias=False)
        self.norm = norm(6, **arguments)
        self.head = nn.Conv2d(6, 3, 1)
        for name, buffer in self.norm.named_buffers():
            if name.startswith("running"):
                buffer.copy_(torch.rand(6) + 0.5)

    def between(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        return self.head(self.between(self.stem(x).relu()).relu()).mean((2, 3))


class Transposed(Convolutions):
    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose2d(8, 6, 2, 2, bias=False)


class TwiceThroughOne(Convolutions):
    def between(self, x):
        return self.norm(self.conv(x)) + self.norm(self.conv(x.flip(2)))


class ThroughTwoNorms(Convolutions):
    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(6)

    def between(self, x):
        y = self.conv(x)
        return self.norm(y) + self.other(y)


class NormOfTwoLayers(Convolutions):
    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(8, 6, 3, bias=False)

    def between(self, x):
        return self.norm(self.conv(x)) + self.norm(self.second(x))


class ReadElsewhere(Convolutions):
    def between(self, x):
        y = self.conv(x)
        return self.norm(y) + 0.1 * y


class Activated(Convolutions):
    def between(self, x):
        return self.norm(self.conv(x).relu())


class Identical(Convolutions):
    def between(self, x):
        y = nn.Identity()(self.conv(x))
        assert y.shape[1] == y.size(1) == self.conv.out_channels
        assert y.is_floating_point()
        return self.norm(y)


class MeanInTheLoss(Convolutions):
    def between(self, x):
        return self.norm(self.conv(x)) + self.norm.running_mean.square().sum()


class LooksAtValues(Convolutions):
    def between(self, x):
        y = self.conv(x)
        self.seen = y.detach().numpy().mean()
        return self.norm(y)


class Hooked(Convolutions):
    """A hook that was there before ours reads the outputs, as penalties on activations do."""

    def __init__(self):
        super().__init__()
        self.penalty = 0.0
        self.conv.register_forward_hook(self.penalise)

    def penalise(self, _, __, output):
        self.penalty = output.square().mean()

    def forward(self, x):
        return super().forward(x) + self.penalty


class ReturnsIt(Convolutions):
    def between(self, x):
        self.features = self.conv(x)
        return self.norm(self.features)

    def forward(self, x):
        return super().forward(x), self.features


class Sentences(nn.Module):
    """A linear layer over rows; BatchNorm1d takes the second dimension, which is not the layer's, for the channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.conv = nn.Linear(8, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(1)[:, :24].reshape(-1, 6, 4)
        return self.head(self.norm(self.conv(self.stem(x).relu())).relu())


class Rows(Sentences):
    def forward(self, x):
        x = x.flatten(1)[:, :4]
        return self.head(self.norm(self.conv(self.stem(x).relu())).relu())


TAKEN = {
    "a BatchNorm": Convolutions,
    "a SyncBatchNorm": lambda: Convolutions(nn.SyncBatchNorm),
    "a BatchNorm without weights": lambda: Convolutions(affine=False),
    "a BatchNorm behind a transposed convolution": Transposed,
    "a BatchNorm behind a linear layer": Rows,
    "one BatchNorm, several times": TwiceThroughOne,
    "nothing that reads values, and a BatchNorm": Identical,
}

CREATED = {
    "no running statistics": lambda: Convolutions(track_running_stats=False),
    "an InstanceNorm": lambda: Convolutions(nn.InstanceNorm2d, track_running_stats=True),
    "two norms": ThroughTwoNorms,
    "a norm that reads two layers": NormOfTwoLayers,
    "another reader": ReadElsewhere,
    "something in between": Activated,
    "a running mean that something else reads": MeanInTheLoss,
    "NumPy": LooksAtValues,
    "a hook": Hooked,
    "the step's result": ReturnsIt,
    "other channels": Sentences,
}


def net_of(build, samples=24):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Prepared(build().eval(), torch.randn(samples, 2, 5, 5) + 0.4)


def pruned(net, intercepts, mode="least_squares", refit=False):
    """A copy of the network, pruned and compensated."""
    model = copy.deepcopy(net.model)
    compensation = Compensation(mode, model, net.groups, net.rankings, net.statistics, intercepts)
    steps = [lambda: model(*net.inputs)]
    dense = run_dense(model, compensation, steps)
    surgery = apply_plan(model, net.groups, net.plan)
    compensation.apply(model, surgery)
    if refit:
        refit_readers(model, surgery, compensation, dense)
    return model, surgery, compensation


@pytest.mark.parametrize("refit", [False, True], ids=["folded", "refitted"])
@pytest.mark.parametrize("mode", ["bias", "least_squares"])
@pytest.mark.parametrize("build", TAKEN.values(), ids=TAKEN)
def test_the_running_mean_takes_what_would_be_the_bias_in_front_of(build, mode, refit):
    net = net_of(build)
    intercepts = find_intercepts(net.model, net.groups, net.steps)
    assert intercepts.norms == {"conv": "norm"}
    created, _, _ = pruned(net, Intercepts(), mode, refit)
    shifted, surgery, _ = pruned(net, intercepts, mode, refit)
    assert list(shifted.state_dict()) == list(net.model.state_dict())
    assert surgery.created == []
    assert created.conv.bias.abs().max() > 1e-2
    x = net.inputs[0]
    assert torch.allclose(shifted(x), created(x), atol=1e-6)
    if build is not TAKEN["a SyncBatchNorm"]:  # which trains on GPUs only
        assert torch.allclose(shifted.train()(x), created.train()(x), atol=1e-5)


@pytest.mark.parametrize("build", CREATED.values(), ids=CREATED)
def test_a_bias_is_created_where_the_outputs_meet(build):
    net = net_of(build)
    intercepts = find_intercepts(net.model, net.groups, net.steps)
    assert intercepts == Intercepts()
    model, surgery, _ = pruned(net, intercepts)
    assert "conv.bias" in [name for name, *_ in surgery.created]
    assert model.conv.bias is not None


@pytest.mark.parametrize("build", [Convolutions, Rows])
def test_undo_puts_the_running_mean_back(build):
    net = net_of(build)
    model = net.model
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    intercepts = find_intercepts(model, net.groups, net.steps)
    compensation = Compensation("least_squares", model, net.groups, net.rankings, net.statistics, intercepts)
    for whole in ("stem", "conv"):  # a norm whose channels stay, and one that is sliced
        counts = [
            0 if any(m.module == whole and m.slot == "out" for m in g.members) else c
            for g, c in zip(net.groups, net.counts, strict=True)
        ]
        plan = type(net.plan).from_counts(counts, net.rankings)
        surgery = apply_plan(model, net.groups, plan)
        compensation.apply(model, surgery)
        surgery.undo()
        for name, buffer in model.named_buffers():
            assert buffer is before[name][0]
            assert torch.equal(buffer, before[name][1])


def test_a_bias_that_is_not_created_is_not_counted():
    net = net_of(Convolutions)
    model, _, compensation = pruned(net, find_intercepts(net.model, net.groups, net.steps))
    costs = CostModel.build(net.model, net.groups, net.rankings, {}, compensation.new_biases)
    assert count_parameters(model) == costs.count("params", [net.counts])[0]


class Twins(nn.Module):
    """A network and its momentum encoder, which runs or does not."""

    def __init__(self, runs=False, twin=Convolutions):
        super().__init__()
        self.net, self.twin, self.runs = Convolutions(), twin(), runs

    def forward(self, x):
        return self.net(x) + (self.twin(x) if self.runs else 0)


@pytest.mark.parametrize("runs", [True, False])
def test_a_twin_takes_it_where_its_original_does(runs):
    net = net_of(lambda: Twins(runs))
    found = find_intercepts(net.model, [*net.groups, *Prepared(Both(net.model), *net.inputs).groups], net.steps)
    assert found.norms["net.conv"] == "net.norm"
    both = Prepared(Both(net.model), *net.inputs)
    steps = [lambda: net.model(*net.inputs)]
    renamed = find_intercepts(both.model, both.groups, steps, twins={"model.twin": "model.net"})
    assert renamed.norms == {"model.net.conv": "model.net.norm", "model.twin.conv": "model.twin.norm"}


class Both(nn.Module):
    """Runs both, so that both are traced."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.net(x) + self.model.twin(x)


def test_original_and_twin_get_biases_where_one_of_them_has_another_reader():
    model = Twins(runs=True, twin=ReadElsewhere)
    both = Prepared(Both(model.eval()), torch.randn(24, 2, 5, 5))
    found = find_intercepts(both.model, both.groups, both.steps, twins={"model.twin": "model.net"})
    assert found == Intercepts()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 12, bias=False)
        self.second = nn.Linear(12, 4, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("refit", [False, True], ids=["folded", "refitted"])
def test_without_an_optimizer_for_a_bias_the_outputs_are_fitted_without_intercept(refit):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Prepared(Plain().eval(), torch.randn(400, 5) + 0.3)
    muon = torch.optim.Muon(net.model.parameters())
    intercepts = find_intercepts(net.model, net.groups, net.steps, [muon])
    assert intercepts.refused == {"second"}
    model, surgery, compensation = pruned(net, intercepts, refit=refit)
    assert compensation.new_biases == []
    assert model.second.bias is None
    assert surgery.created == []
    x = net.inputs[0]
    with torch.no_grad():
        inputs, wanted = model.first(x).relu().double(), net.model(x).double()
    best = torch.linalg.lstsq(inputs, wanted).solution
    error = (inputs @ best - wanted).square().mean()
    assert (model(x) - wanted).square().mean().item() == pytest.approx(float(error), rel=1e-3)


def test_means_alone_cannot_make_up_for_anything_without_a_bias():
    net = net_of(lambda: Activated())
    weight = copy.deepcopy(net.model.conv.weight)
    model, surgery, _ = pruned(net, Intercepts(refused=frozenset({"conv"})), "bias")
    rows = surgery.kept["conv.weight"]
    kept = weight.detach()
    for dim, indices in rows.items():
        kept = kept.index_select(dim, indices)
    assert model.conv.bias is None
    assert torch.equal(model.conv.weight, kept)


class LowRank(nn.Module):
    """A layer with low-rank factors beside it, which may be merged into its weight."""

    def __init__(self, keyed=False):
        super().__init__()
        self.base, rank = nn.Linear(6, 5), 4
        self.down, self.up = nn.Linear(6, rank, bias=False), nn.Linear(rank, 5, bias=False)
        if keyed:
            self.down, self.up = nn.ModuleDict({"a": self.down}), nn.ModuleDict({"a": self.up})
        self.keyed = keyed

    def reset(self):
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + (self.up["a"](self.down["a"](x)) if self.keyed else self.up(self.down(x)))


class Merging(LowRank):
    def merged(self):
        return self.base.weight + self.up.weight @ self.down.weight


class MergingByKey(LowRank):
    def __init__(self):
        super().__init__(keyed=True)

    def merged(self, key="a"):
        return self.base.weight + self.up[key].weight @ self.down[key].weight


class Read(LowRank):
    """Its weights are read where that says nothing of biases."""

    def tie_weights(self):
        self.base.weight = self.up.weight

    def forward(self, x):
        return super().forward(x).to(self.up.weight.dtype)


@pytest.mark.parametrize(
    ("build", "refused"),
    [(LowRank, set()), (Read, set()), (Merging, {"1.down", "1.up"}), (MergingByKey, {"1.down.a", "1.up.a"})],
)
def test_weights_that_are_merged_into_others_get_no_bias(build, refused):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Prepared(nn.Sequential(nn.Linear(3, 6), build()).eval(), torch.randn(24, 3) + 0.4)
    intercepts = find_intercepts(net.model, net.groups, net.steps)
    assert intercepts == Intercepts(refused=frozenset(refused))
    model, surgery, _ = pruned(net, intercepts)
    assert bool(surgery.created) is not bool(refused)
    if build is Merging:
        x = model[0](net.inputs[0])
        assert torch.allclose(
            model(*net.inputs), nn.functional.linear(x, model[1].merged(), model[1].base.bias), atol=1e-6
        )
