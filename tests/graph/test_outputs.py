"""Components that give channels to other code are known, with the width of what they give."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_softprune import find_groups, prune
from lightning_softprune.graph.components import assign_components
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.report.series import narrowed_features

pytestmark = pytest.mark.usefixtures("one_thread")


class Coder(nn.Module):
    """A stem whose width goes through the encoder, beside what the encoder adds; a decoder reads both."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.encoder = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "more": nn.Linear(12, 3)})
        self.encoder.forward = self.encode
        self.decoder = nn.Sequential(nn.Linear(11, 10), nn.ReLU(), nn.Linear(10, 6))

    def encode(self, x):
        inner = self.encoder["up"](x).relu()
        return torch.cat([x + self.encoder["down"](inner), self.encoder["more"](inner)], 1)

    def forward(self, x):
        return self.decoder(self.encoder(self.stem(x)))


def outputs_of(model, *inputs, **arguments):
    return {g.name: g.outputs for g in find_groups(model, *inputs, **arguments) if g.outputs}


def test_a_width_that_leaves_a_component_is_known_where_its_group_is_named_after_another():
    found = outputs_of(Coder(), torch.randn(3, 6))
    assert found.pop("decoder.2") == (("decoder", 6), ("", 6))
    assert found == {"stem": (("encoder", 11),), "encoder.more": (("encoder", 11),)}


def test_components_of_ones_own_are_named_as_they_are_called():
    found = outputs_of(Coder(), torch.randn(3, 6), components={"latent": ["encoder"]})
    assert found["stem"] == (("latent", 11),)


class Latent(nn.Module):
    """Its forward gives a latent width to the step that scores it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_what_forward_gives_to_a_step_is_known():
    model, x = Latent(), torch.randn(3, 6)
    groups = trace_groups(model, [lambda: model.head(model(x))])
    found = assign_components(model, groups, None)
    assert {g.name: (g.outputs, g.prunable) for g in found if g.outputs} == {"second": ((("", 4),), True)}


class Predicting(pl.LightningModule):
    """Its predictions are hidden features, which no step that is traced gives away."""

    def __init__(self, predict):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        self.predict = predict

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).square().mean())

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def predict_step(self, batch, batch_idx):
        return self.predict(self.net, batch)


def fails(net, x):
    raise KeyError("a batch of another kind")


def endless(net, x):
    while True:
        x = net[4](net[:4](x)).mean(1, keepdim=True).expand(-1, 6)


PREDICTIONS = {
    "hidden features": (lambda net, x: {"features": net[:2](x)}, {"net.0": 5}),
    "joined": (lambda net, x: (torch.cat([net[:4](x), x], 1), net[0](x)), {"net.0": 5, "net.2": 10}),
    "an outer product": (
        lambda net, x: torch.einsum("bi,bj->bij", net[0](x), net[:3](x)).flatten(1),
        {"net.0": 20, "net.2": 20},
    ),
    "classes": (lambda net, x: net(x), {}),
    "an error": (fails, {}),
    "an endless loop": (endless, {}),
}


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_what_predict_step_gives_is_known_and_pins_nothing(kind):
    predict, expected = PREDICTIONS[kind]
    groups = find_groups(Predicting(predict), torch.randn(3, 6))
    assert {g.name: dict(g.outputs)["predict_step"] for g in groups if g.prunable and g.outputs} == expected
    assert [g.name for g in groups if g.prunable] == ["net.0", "net.2"]


def test_groups_without_channels_give_none_to_predict_step():
    module = Predicting(lambda net, x: net(x) * module.scale)
    module.net[4] = nn.utils.parametrizations.orthogonal(nn.Linear(4, 2))
    module.scale = nn.Parameter(torch.ones(2))
    found = {g.name: g for g in find_groups(module, torch.randn(3, 6))}
    assert found["net.0"].prunable
    assert (found["scale"].num_channels, found["scale"].outputs) == (0, ())


def test_a_round_says_what_predict_step_now_gives():
    module = Predicting(PREDICTIONS["hidden features"][0])
    loader = DataLoader(torch.randn(16, 6), batch_size=8)
    settings = {"target_sparsity": 0.4, "tolerance": 0.2, "bounds": {"net.2": [0.0, 0.0]}, "report": False}
    result = prune(module, train_dataloaders=loader, val_dataloaders=loader, verbose=False, **settings)
    left = module.net[0].out_features
    assert left < 5
    assert narrowed_features(result) == [f"predict_step now gives {left} features instead of 5 (net.0)"]
