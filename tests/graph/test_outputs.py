"""Components that give channels to other code are known, with the width of what they give."""

import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.graph.components import assign_components
from lightning_softprune.graph.grouping import trace_groups

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
