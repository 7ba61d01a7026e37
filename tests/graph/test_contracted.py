"""Widths that a product sums away are no outputs of a network; those that remain are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_softprune.graph.grouping import trace_groups
from support.groups import by_name
from support.masked import Net, check

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUT = "produces an output of the network"


def attention(m, x):
    scores = m.queries(x) @ m.keys(x).transpose(1, 2)
    return (scores / 3).softmax(-1) @ m.values(x)


def biaffine(m, x):
    return torch.einsum("bxi,ioj,byj->bxyo", m.heads(x).relu(), m.weight, m.tails(x).relu())


class Modulated(nn.Module):
    """A convolution whose weight is scaled and normalised for each sample, as StyleGAN2's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3))
        self.style = nn.Linear(6, inputs)

    def forward(self, x, style):
        batch, channels, height, width = x.shape
        weight = self.weight * self.style(style).view(batch, 1, channels, 1, 1)
        weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(batch, -1, 1, 1, 1)
        weight = weight.view(-1, channels, 3, 3)
        return F.conv2d(x.reshape(1, -1, height, width), weight, padding=1, groups=batch).view(batch, -1, height, width)


def modulated(m, x, style):
    return m.last(m.first(m.stem(x), style).relu(), style)


def hypernetwork(m, x):
    state = m.state(x).relu()
    return torch.bmm(m.weights(x).view(len(x), 4, state.shape[1]), state.unsqueeze(-1)).squeeze(-1)


def factors(m, a, b):
    return (m.users(a) * m.items(b)).sum(-1)


def triples(m, a, b, c):
    return (m.users(a) * m.items(b) * m.users(c)).sum(-1) - (m.users(a) * m.items(c)).sum(-1)


def numbers(count):
    return torch.arange(count) * 3 % 20


def towers(function, others):
    """Two layers whose vectors meet, and inputs for both."""
    inputs = torch.randn(4, 6), torch.randn(others, 7)
    return lambda: Net(function, one=nn.Linear(6, 8), other=nn.Linear(7, 8)), inputs, {"one": 8}


USERS, ITEMS = {"users": nn.Embedding(20, 8)}, {"items": nn.Embedding(30, 8)}
NETWORKS = {
    "matrix factorisation": (lambda: Net(factors, **USERS, **ITEMS), (numbers(6), numbers(6)), {"users": 8}),
    "triples": (lambda: Net(triples, **USERS, **ITEMS), (numbers(6),) * 3, {"users": 8}),
    "two towers": towers(
        lambda m, a, b: F.normalize(m.one(a), dim=-1) @ F.normalize(m.other(b), dim=-1).t(), others=5
    ),
    "cosines": towers(lambda m, a, b: F.cosine_similarity(m.one(a), m.other(b)), others=4),
    "the last attention": (
        lambda: Net(
            attention, queries=nn.Linear(6, 8), keys=nn.Linear(6, 8), values=nn.Linear(6, 4)
        ),
        (torch.randn(3, 5, 6),),
        {"queries": 8},
    ),
    "biaffine": (
        lambda: Net(
            biaffine,
            heads=nn.Linear(6, 8),
            tails=nn.Linear(6, 10),
            weight=nn.Parameter(torch.randn(8, 3, 10)),
        ),
        (torch.randn(3, 5, 6),),
        {"heads": 8, "tails": 10},
    ),
    "modulated convolution": (
        lambda: Net(
            modulated, stem=nn.Conv2d(3, 8, 1), first=Modulated(8, 12), last=Modulated(12, 3)
        ),
        (torch.randn(2, 3, 5, 5), torch.randn(2, 6)),
        {"stem": 8, "first": 12},
    ),
    "hypernetwork": (
        lambda: Net(hypernetwork, weights=nn.Linear(6, 4 * 8), state=nn.Linear(6, 8)),
        (torch.randn(3, 6),),
        {"state": 8},
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_product_sums_away_is_pruned_as_masked(name):
    make, inputs, channels = NETWORKS[name]
    check(make(), inputs, channels)


def test_the_width_that_remains_behind_a_product_is_an_output():
    make, inputs, _ = NETWORKS["the last attention"]
    model = make()
    step = lambda: {"loss": model(*inputs).square().mean()}  # noqa: E731, nothing that is shown has the width
    assert by_name(trace_groups(model, [step]))["values"].reason == f"values {OUTPUT}"


class Towers(nn.Module):
    """Two towers, whose vectors are multiplied by code around it."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 8), nn.Linear(7, 8)

    def forward(self, a, b):
        return self.one(a), self.other(b)


def towers_traced(model, code, call):
    a, b = torch.randn(4, 6), torch.randn(4, 7)
    given = model(a, b) if call else (model.one(a), model.other(b))
    return code(*given).mean()


@pytest.mark.parametrize(
    ("code", "call", "prunable"),
    [
        pytest.param(lambda u, v: (u * v).sum(-1), False, True, id="a product, summed"),
        pytest.param(lambda u, v: (u @ v.t()).softmax(-1)[:, 0], False, True, id="a matrix product"),
        pytest.param(lambda u, v: (u * v / 2).neg().mean(-1), False, True, id="a product, scaled"),
        pytest.param(lambda u, v: (u * v).sum(-1), True, False, id="what the model's forward gives"),
        pytest.param(lambda u, v: u * v, False, False, id="all of a product, in a loss"),
        pytest.param(lambda u, v: (u - v).square().mean(-1), False, False, id="a difference"),
        pytest.param(lambda u, v: u.square().sum(-1) * v.square().sum(-1), False, False, id="a product of sums"),
        pytest.param(lambda u, v: (u * u * 2).sum(-1) + v.sum(-1), False, False, id="squares"),
        pytest.param(lambda u, v: (u * v).sum(-1) + v.abs().mean(), False, True, id="a product, and a penalty"),
    ],
)
def test_only_what_two_tensors_are_multiplied_along_is_contracted(code, call, prunable):
    torch.manual_seed(0)
    model = Towers()
    for group in trace_groups(model, [lambda: towers_traced(model, code, call)]):
        assert group.prunable == prunable
        assert prunable or OUTPUT in group.reason


def test_a_frozen_tower_is_a_target():
    model = Towers()
    model.other.requires_grad_(False)
    step = lambda: towers_traced(model, lambda u, v: F.cosine_similarity(u, v), False)  # noqa: E731
    (group,) = trace_groups(model, [step])
    assert not group.prunable
    assert "is multiplied by what other gives, which is frozen, as a target is; put a layer behind" in group.reason
    model.one.requires_grad_(False)  # where nothing is trained, nothing is told apart
    assert trace_groups(model, [step])[0].prunable


def test_how_many_channels_are_made_of_each_is_read_by_their_numbers():
    """Kernels made by a layer, of a convolution that is transposed and depthwise."""

    def enlarged(net, x):
        kernels = net.make(net.codes)[:, :, None, None]
        return net.last(F.conv_transpose2d(net.stem(x), kernels, groups=len(kernels)))

    parts = {"codes": nn.Parameter(torch.randn(12, 4)), "make": nn.Linear(4, 3)}
    net = Net(enlarged, stem=nn.Conv2d(3, 12, 1), last=nn.Conv2d(36, 2, 1), **parts)
    groups = by_name(trace_groups(net, [lambda: net(torch.randn(2, 3, 5, 5))]))
    assert groups["stem"].prunable
    assert "makes 3 channels of each, by their numbers" in groups["make"].reason


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("write", ["add_", "copy_"])
def test_a_codebook_that_a_product_updates_is_no_output_but_goes_with_the_width(shown, write):
    """Codes are moved to the mean of what is nearest to them, after they were read; a log may show the product."""

    def quantised(net, x):
        z = net.stem(x)
        nearest = torch.cdist(z, net.codes).argmin(1)
        codes = net.codes[nearest]
        means = F.one_hot(nearest, len(net.codes)).float().t() @ z.detach()
        if write == "add_":
            net.codes.mul_(0.9).add_(means, alpha=0.1)
        else:
            net.codes.copy_(0.9 * net.codes + 0.1 * means)
        out = net.last(z + (codes - z).detach())
        return (out, means) if shown else out

    torch.manual_seed(0)
    net = Net(quantised, {"codes": torch.randn(9, 6)}, stem=nn.Linear(4, 6), last=nn.Linear(6, 2))
    stem = by_name(trace_groups(net, [lambda: net(torch.randn(5, 4))]))["stem"]
    assert stem.prunable != shown
    if not shown:
        assert {str(member) for member in stem.members} == {"stem (out)", "codes (dim1)", "last (in)"}


@pytest.mark.parametrize("write", ["add_", "copy_"])
def test_what_is_written_into_a_tensor_of_the_batch_keeps_its_width(write):
    def remembering(net, x, memory):
        z = net.stem(x)
        getattr(memory, write)(z.detach())
        return net.last(z)

    net = Net(remembering, stem=nn.Linear(4, 6), last=nn.Linear(6, 2))
    batch = torch.randn(5, 4), torch.zeros(5, 6)
    stem = by_name(trace_groups(net, [lambda: net(*batch)]))["stem"]
    assert not stem.prunable
    assert "meets a tensor whose width is fixed: an input of shape (5, 6)" in stem.reason


def test_a_product_that_nobody_sees_is_an_output_where_nothing_is_shown():
    model, a, b = Towers(), torch.randn(4, 6), torch.randn(4, 7)

    def step():
        model.one(a).t() @ model.other(b)

    assert [group.prunable for group in trace_groups(model, [step])] == [False, False]
