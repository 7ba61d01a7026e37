"""Layers whose weights are computed, against the same layers whose weights are parameters."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm

from lightning_softprune import UniformBaseline, find_groups, load_from_checkpoint, prune, record, resize
from lightning_softprune.calibration import rank
from lightning_softprune.checkpoint import ModelShapes
from lightning_softprune.compensation.replay import Replay
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import References, apply_plan, repair_optimizers
from support.modules import trainer_of
from support.plans import assert_same, random_plan, snapshot
from support.zoo import materialise, prunable

pytestmark = pytest.mark.usefixtures("one_thread")


class Between(nn.Module):
    """A layer between two others of its kind."""

    def __init__(self, before, layer, after):
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x):
        return self.after(self.layer(self.before(x).relu()).relu())


def old_weight_norm(layer, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp() - 2

    def right_inverse(self, weight):
        return (weight + 2).log()


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, weight):
        return weight / 2


def parametrized(layer, part):
    parametrize.register_parametrization(layer, "weight", part)
    return layer


def linear(norm):
    return Between(nn.Linear(5, 6), norm(nn.Linear(6, 8)), nn.Linear(8, 2)), torch.randn(3, 5)


def conv1d(norm):
    layer = norm(nn.Conv1d(6, 8, 3, groups=2, padding=1))
    return Between(nn.Conv1d(2, 6, 1), layer, nn.Conv1d(8, 2, 1)), torch.randn(3, 2, 7)


def conv2d(norm):
    return Between(nn.Conv2d(2, 6, 1), norm(nn.Conv2d(6, 8, 3)), nn.Conv2d(8, 2, 1)), torch.randn(3, 2, 5, 5)


def transposed(norm):
    layer = norm(nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2))
    return Between(nn.Conv2d(2, 6, 1), layer, nn.Conv2d(8, 2, 1)), torch.randn(3, 2, 4, 4)


def depthwise(norm):
    layer = norm(nn.Conv1d(6, 6, 3, groups=6))
    return Between(nn.Conv1d(2, 6, 1), layer, nn.Conv1d(6, 2, 1)), torch.randn(3, 2, 7)


NORMS = {
    "dim 0": lambda layer: parametrizations.weight_norm(layer),
    "dim 1": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "dim 2": lambda layer: parametrizations.weight_norm(layer, dim=2),
    "dim None": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "old": lambda layer: old_weight_norm(layer, 0),
    "old, dim None": lambda layer: old_weight_norm(layer, None),
    "doubled": lambda layer: parametrized(layer, Doubled()),
    "exponential": lambda layer: parametrized(layer, Exponential()),
}
BUILDS = (linear, conv1d, conv2d, transposed, depthwise)
EVERY = [(build, norm) for build in BUILDS for norm in NORMS if not (build is linear and norm == "dim 2")]
SOME = [(linear, "dim 0"), (conv1d, "dim 2"), (transposed, "old"), (conv2d, "dim None")]


def ids(value):
    return value if isinstance(value, str) else value.__name__


def make(build, norm):
    torch.manual_seed(0)
    model, x = build(NORMS[norm])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_g", "original0")):
                parameter.mul_(torch.where(torch.rand_like(parameter) < 0.4, -1.5, 0.7))  # lengths need not be positive
    return model, x


def plain(model):
    """The same network with parameters in the place of computed weights."""
    twin = copy_of(model)
    for module in twin.modules():
        if hasattr(module, "weight_v"):
            remove_weight_norm(module)
    materialise(twin)
    return twin


def copy_of(model):
    for module in model.modules():
        if "weight" in vars(module):
            module.weight = module.weight.detach()  # what has a graph cannot be copied
    return copy.deepcopy(model)


@pytest.mark.parametrize(("build", "norm"), EVERY, ids=ids)
def test_a_pruned_layer_computes_the_slice_of_what_it_computed(build, norm):
    model, x = make(build, norm)
    twin = plain(model)
    groups, own = prunable(model, x), prunable(twin, x)
    assert groups == own
    assert {"before", "layer"} <= {group.name for group in groups} or build is depthwise
    plan = random_plan(groups, 3)
    before = snapshot(model)
    surgery = apply_plan(model, groups, plan)
    apply_plan(twin, own, plan)
    assert model.layer.weight.shape == twin.layer.weight.shape
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
    surgery.undo()
    assert_same(model, before)


@pytest.mark.parametrize(("build", "norm"), SOME, ids=ids)
def test_training_goes_on_with_the_gradients_of_a_network_built_at_this_size(build, norm):
    model, x = make(build, norm)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, random_plan(groups, 1))
    repair_optimizers([optimizer], surgery)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    fresh, _ = make(build, norm)
    resize(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    for network in (model, fresh):
        network.zero_grad()
        network(x).square().mean().backward()
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(model(x).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("build", "norm"), SOME, ids=ids)
def test_a_record_brings_a_dense_network_to_the_pruned_ones_size_and_back(build, norm):
    model, x = make(build, norm)
    dense, dense_record = copy_of(model).state_dict(), record(model)
    groups = prunable(model, x)
    apply_plan(model, groups, Plan(tuple(tuple(range(group.num_channels - 1)) for group in groups)))  # widths of one
    fresh, _ = make(build, norm)
    resize(fresh, record(model))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    resize(fresh, dense_record)
    fresh.load_state_dict(dense)
    torch.testing.assert_close(fresh(x), make(build, norm)[0](x))


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize(("build", "norm"), SOME, ids=ids)
def test_channels_are_ranked_by_the_weight_that_is_computed(build, norm, importance):
    model, x = make(build, norm)
    twin = plain(model)
    ranked = [
        rank(importance, net, prunable(net, x), [lambda net=net: net(x).square().mean()], {}, None)
        for net in (model, twin)
    ]
    for one, other in zip(*ranked, strict=True):
        assert one.tolist() == other.tolist()


class Regressor(pl.LightningModule):
    """A layer with weight norm between two others, and what it would be with parameters."""

    def __init__(self, normed=True):
        super().__init__()
        self.net, _ = make(conv1d, "dim 2")
        if not normed:
            self.net = plain(self.net)

    def training_step(self, batch, _=0):
        return (self.net(batch) - batch.flip(1)).square().mean()

    def validation_step(self, batch, _=0):
        self.log("val_loss", self.training_step(batch), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.mark.slow
def test_a_round_chooses_and_computes_the_same_as_with_parameters_and_the_checkpoint_brings_it_back(tmp_path):
    torch.manual_seed(1)
    data = torch.utils.data.DataLoader(torch.randn(64, 2, 7), batch_size=16)
    results = []
    for normed in (True, False):
        module = Regressor(normed)
        arguments = {"monitor": "val_loss", "target_sparsity": 0.4, "tolerance": 0.2, "report": False, "verbose": False}
        result = prune(module, train_dataloaders=data, val_dataloaders=data, search=UniformBaseline(), **arguments)
        results.append((module, result))
    (normed, one), (parameters, other) = results
    assert [group.channels_after for group in one.groups] == [group.channels_after for group in other.groups]
    assert any(group.channels_after < group.channels_before for group in one.groups)
    assert one.score_after == pytest.approx(other.score_after, rel=1e-4)
    for batch in data:
        torch.testing.assert_close(normed.net(batch), parameters.net(batch), rtol=1e-4, atol=1e-4)
    trainer_of(tmp_path, max_epochs=1).fit(normed, data, data)
    path = tmp_path / "pruned.ckpt"
    normed.trainer.save_checkpoint(path)
    loaded = load_from_checkpoint(Regressor, path)
    torch.testing.assert_close(loaded.net(batch), normed.net(batch), rtol=0, atol=0)


def test_a_weight_that_a_hook_computes_is_none_that_has_to_follow():
    """It has the shape that another one had, and is written anew whenever the layer runs."""
    layers = [old_weight_norm(nn.Linear(*sizes), 0) for sizes in ((5, 8), (8, 8), (8, 6), (6, 2))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])
    groups, shapes = find_groups(model, torch.randn(3, 5)), ModelShapes.of(model).shapes
    found = [group for group in groups if group.prunable]
    assert [group.num_channels for group in found] == [8, 8, 6]
    surgery = apply_plan(model, found, Plan(((), (0, 1), ())))
    references = References(model, surgery, shapes)
    assert layers[0].weight.shape == (8, 5)
    model.table = torch.zeros(8, 8)
    references.carry("self", model)
    assert references.left == ["self.table"]


def test_a_layer_whose_weight_a_hook_computes_is_spared():
    model = nn.Sequential(old_weight_norm(nn.Linear(8, 8), 0)).eval().requires_grad_(False)
    replay = Replay(model)
    with model[0].register_forward_pre_hook(lambda *_: replay.spare(model[0])), replay.step(0):
        assert not model(torch.randn(3, 8)).any()
