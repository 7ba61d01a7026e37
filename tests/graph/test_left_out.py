"""What is left alone says why."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.graph import refuse_unseen_readers
from lightning_softprune.surgery import probe_groups
from support.groups import Attending, Wide, by_name, groups_of, slots
from support.zoo import find

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("network", "group", "reason"),
    [
        ("Autoencoder", "classifier", "classifier produces an output of the network"),
        ("Autoencoder", "decoder.2", "decoder.2 produces an output of the network"),
        ("ConstantView", "body", "the model does not run with fewer channels: RuntimeError"),
        ("RawResidual", "back", "add in the module itself (zoo.py:"),
        ("Unused", "spare.0", "spare.0 was run by neither validation_step nor training_step"),
        ("Unused", "temperature", "temperature is a single number: it has no channels"),
        ("TornWeights", "body", "body reads a tensor whose width is fixed"),
    ],
)
def test_what_is_left_alone_says_why(network, group, reason):
    found = groups_of(network)[group]
    assert not found.prunable
    assert found.reason.startswith(reason) or reason in found.reason


class TwoInputs(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


class OwnKernel(nn.Module):
    """A matrix of its own."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.kernel


@pytest.mark.parametrize(
    "between",
    [
        nn.RNN(8, 8),
        nn.LSTM(8, 8),
        nn.LSTM(8, 8, num_layers=2, bidirectional=False),
        nn.GRUCell(8, 8),
        TwoInputs(nn.Bilinear(8, 8, 8)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)),
        nn.LayerNorm((3, 8)),
        nn.RMSNorm(8, elementwise_affine=False),
        OwnKernel(),
        Attending(kdim=8, vdim=6),
        nn.Sequential(nn.Unflatten(-1, (2, 4)), nn.Flatten(-2)),
        nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Dropout()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_no_layer_type_crashes(between):
    model = Wide(between).eval()
    x = torch.randn(3, 5) if isinstance(between, nn.GRUCell) else torch.randn(3, 3, 5)
    groups = find(model, x)
    assert all(group.reason for group in groups if not group.prunable)
    names = " ".join(f"{g.name} {g.reason} {' '.join(map(str, g.members))}" for g in groups)
    for name, _ in between.named_parameters(prefix="between"):
        layer = name.split(".parametrizations")[0].removesuffix(".out_proj.weight").removesuffix(".out_proj.bias")
        assert layer.rsplit(".", 1)[0] in names
    prunable = [group for group in groups if group.prunable]
    assert len(probe_groups(model, prunable, lambda: model(x))) == len(prunable)


@pytest.mark.parametrize("norm", ["spectral_norm", "orthogonal"])
def test_weights_of_which_slices_cannot_be_computed_are_refused_by_name(norm):
    layer = getattr(nn.utils.parametrizations, norm)(nn.Linear(8, 8))
    found = by_name(find(Wide(layer), torch.randn(3, 5)))
    assert {"spectral_norm": "SpectralNorm", "orthogonal": "Orthogonal"}[norm] in found["between"].reason
    assert "feeds between" in found["body"].reason


def sphere(inputs, outputs):
    """A layer whose only parameter is what its weight is computed from."""
    return nn.utils.parametrizations.orthogonal(nn.Linear(inputs, outputs, bias=False))


def test_layers_all_of_whose_parameters_are_behind_a_computed_weight_are_listed():
    model = nn.Sequential(nn.Linear(5, 6), sphere(6, 9), nn.ReLU(), sphere(9, 4))
    groups = find_groups(model, torch.randn(3, 5))
    found = by_name(groups)
    assert list(found) == ["0", "1", "3"]
    assert all("computed by Orthogonal" in found[name].reason for name in "13")
    assert groups.coverage.largest == "1"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_without_parameters_of_its_own_is_listed_once():
    inner = torch.jit.trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.randn(3, 6))
    found = by_name(find_groups(nn.Sequential(nn.Linear(5, 6), inner), torch.randn(3, 5)))
    assert list(found) == ["0", "1"]
    assert "TorchScript" in found["1"].reason


@pytest.mark.parametrize("numbers", [(), (1,), (1, 1)])
def test_a_parameter_of_one_element_has_no_channels(numbers):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 2)
            self.scale, self.table = nn.Parameter(torch.ones(numbers)), nn.Parameter(torch.ones(3, 2))

        def forward(self, x):
            return self.head(self.body(x)) * self.scale.exp()

    found = by_name(find_groups(Scaled(), torch.randn(3, 5)))
    assert found["scale"].reason == "scale is a single number: it has no channels"
    assert found["table"].reason == "table is used by neither validation_step nor training_step"


def test_a_layer_with_one_number_for_all_channels_has_none():
    found = by_name(find_groups(Wide(nn.PReLU()), torch.randn(3, 5)))
    assert found["between"].reason == "between has no channels: its weight is a single number"
    assert found["body"].prunable


def test_tied_weights_that_two_groups_would_tear_are_refused():
    found = groups_of("TornWeights")
    assert slots(found["body"]) == {f"{layer} ({side})" for layer in ("body", "other") for side in ("in", "out")} | {
        "head (in)"
    }
    assert not found["body"].prunable


def test_tied_embeddings_are_one_group_and_lose_no_tokens():
    found = groups_of("Transformer")
    assert "head (in)" in slots(found["embedding"])
    assert not found["head"].prunable  # its outputs are the tokens


def test_a_layer_all_of_whose_channels_meet_fixed_places_is_listed_though_it_reads_others():
    class ReadsItself(nn.Module):
        """Its own outputs take the place of the raw input in what it reads."""

        def __init__(self):
            super().__init__()
            self.body, self.twice, self.head = nn.Linear(5, 6), nn.Linear(11, 5), nn.Linear(5, 2)

        def forward(self, x):
            y = self.body(x).relu()
            first = self.twice(torch.cat([y, x], 1)).tanh()
            return self.head(self.twice(torch.cat([y, first], 1)))

    groups = by_name(find_groups(ReadsItself(), torch.randn(3, 5)))
    assert groups["body"].prunable
    assert slots(groups["twice"]) == {"twice (out)"}
    assert groups["twice"].reason.startswith("all of its 5 channels meet places whose size is fixed")


def test_a_model_without_layers_has_no_groups():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    (group,) = find(Scale(), torch.randn(2, 3))
    assert (group.name, group.prunable) == ("scale", False)


class Critic(nn.Module):
    """A network that is run, and one that is not, whose first weight may be computed."""

    def __init__(self, norm):
        super().__init__()
        self.body, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        self.critic = nn.Sequential(norm(nn.Linear(3, 16)), nn.ReLU(), norm(nn.Linear(16, 1)))

    def forward(self, x):
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("norm", ["spectral_norm", "orthogonal", "weight_norm", "", "of old"])
def test_an_unseen_layer_takes_and_gives_the_same_whatever_its_weight_is_computed_from(norm):
    kinds = {"": lambda layer: layer, "of old": nn.utils.spectral_norm}
    model = Critic(kinds[norm] if norm in kinds else getattr(nn.utils.parametrizations, norm))
    groups = find(model, torch.randn(2, 5))
    seen = {name for name, _ in model.named_parameters() if not name.startswith("critic")}
    assert all(group.prunable for group in refuse_unseen_readers(model, groups, seen) if group.name == "body")
    model.critic[0] = kinds[norm](nn.Linear(16, 8)) if norm in kinds else sphere(16, 8)
    body = by_name(refuse_unseen_readers(model, groups, seen))["body"]
    assert "critic.0, which no traced batch ran, may be coupled to its channels (it takes 16)" in body.reason
    assert "or name it in twins if it mirrors a module" in body.reason


@pytest.mark.parametrize(("width", "what"), [(4, "takes 4"), (8, "gives 8"), (6, "")])
def test_an_unseen_layer_gives_as_many_of_each_channel_as_it_has_kernels_for_it(width, what):
    class Spare(nn.Module):
        """A convolution that nothing runs."""

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, width, 1), nn.Conv2d(width, 2, 1)
            self.spare = nn.Conv2d(4, 8, 3, groups=4)

        def forward(self, x):
            return self.head(self.body(x).relu())

    model = Spare()
    seen = {name for name, _ in model.named_parameters() if not name.startswith("spare")}
    body = by_name(refuse_unseen_readers(model, find(model, torch.randn(2, 3, 5, 5)), seen))["body"]
    assert body.prunable == (what == "")
    assert what in body.reason


class ByHand(pl.LightningModule):
    """Two networks, one of which training alone runs, by steps of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        self.critic, self.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4))

    def training_step(self, batch, batch_idx):
        self.critic(self.body(batch)).mul(self.scale).mean().backward()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.body(batch).square().mean())


def test_what_training_by_hand_alone_runs_is_said_not_to_be_traced():
    found = by_name(find_groups(ByHand(), torch.randn(2, 5)))
    said = "no validation_step, and training_step, with manual optimization, is not traced"
    assert found["critic"].reason.startswith(f"critic was run by {said}")
    assert found["scale"].reason == f"scale is used by {said}"
