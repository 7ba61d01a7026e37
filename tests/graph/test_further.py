"""Bilinear layers and bags of embeddings: against the dense network in which nobody reads what is removed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune import resize
from lightning_softprune.graph import (
    CostModel,
    Member,
    PruningGroup,
    layer_type,
    layout_of,
    record_macs,
    refuse_unjudged,
)
from lightning_softprune.graph.unseen import refuse_unseen_readers
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.plans import assert_same, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


def group(name, size, *members):
    return PruningGroup(
        name, "", "intra", size, tuple(Member(module, slot, np.arange(size)) for module, slot in members)
    )


class Pair(nn.Module):
    """Two sides that a bilinear layer reads together."""

    def __init__(self, bias=True, together=False):
        super().__init__()
        self.left = nn.Linear(4, 5)
        self.right = nn.Linear(4, 5 if together else 6)
        self.pair = nn.Bilinear(5, 5 if together else 6, 7, bias=bias)
        self.head = nn.Linear(7, 2)
        self.together = together
        self.double()

    def forward(self, x):
        left = self.left(x).tanh()
        return self.head(self.pair(left, left if self.together else self.right(x).tanh()).tanh())


PAIR = (
    group("left", 5, ("left", "out"), ("pair", "in1")),
    group("right", 6, ("right", "out"), ("pair", "in2")),
    group("pair", 7, ("pair", "out"), ("head", "in")),
)
SQUARE = (group("left", 5, ("left", "out"), ("pair", "in1"), ("pair", "in2")),)
PLANS = {
    "left": (PAIR, ((0, 3), (), ())),
    "right": (PAIR, ((), (1, 5), ())),
    "out": (PAIR, ((), (), (0, 2, 6))),
    "all": (PAIR, ((4,), (0, 1), (3, 5))),
    "one tensor at both sides": (SQUARE, ((0, 3),)),
}


def make(which, bias=True):
    torch.manual_seed(0)
    groups, gone = PLANS[which]
    return Pair(bias, groups is SQUARE), groups, Plan(gone)


def masked(model, groups, plan):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for found, gone in zip(groups, plan.removed, strict=True):
            for member in found.members:
                if member.slot in ("in1", "in2"):
                    model.pair.weight.transpose(0, 1 if member.slot == "in1" else 2)[list(gone)] = 0
                elif member.slot == "in":
                    model.head.weight[:, list(gone)] = 0
    return model


def batch():
    return torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("which", PLANS)
def test_a_bilinear_layer_computes_what_the_masked_one_does_and_comes_back(which, bias):
    model, groups, plan = make(which, bias)
    before, dense, expected = snapshot(model), model(batch()), masked(model, groups, plan)(batch())
    surgery = apply_plan(model, groups, plan)
    torch.testing.assert_close(model(batch()), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(dense, expected)
    pair = model.pair
    assert tuple(pair.weight.shape) == (pair.out_features, pair.in1_features, pair.in2_features)
    other = Pair(bias, groups is SQUARE)
    resize(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch()), model(batch()))
    assert str(other) == str(model)
    surgery.undo()
    assert_same(model, before)


def macs_of(model, x):
    with record_macs(model) as seen, torch.no_grad():
        model(x)
    return int(CostModel.build(model, [], [], seen).count("macs", np.zeros((1, 0), dtype=np.int64))[0])


@pytest.mark.parametrize("which", PLANS)
@pytest.mark.parametrize("what", ["params", "macs"])
def test_the_cost_model_counts_what_the_pruned_bilinear_layer_has(which, what):
    model, groups, plan = make(which)
    rankings = [
        np.array([*gone, *np.setdiff1d(np.arange(found.num_channels), gone)], dtype=np.int64)
        for found, gone in zip(groups, plan.removed, strict=True)
    ]
    with record_macs(model) as seen, torch.no_grad():
        model(batch())
    costs = CostModel.build(model, groups, rankings, seen)
    apply_plan(model, groups, plan)
    expected = sum(p.numel() for p in model.parameters()) if what == "params" else macs_of(model, batch())
    assert costs.count(what, np.array(plan.counts)).tolist() == [expected]


def test_a_bilinear_layer_weighs_every_pair_for_every_output():
    assert macs_of(nn.Sequential(Pair().double()), batch()) == 6 * (4 * 5 + 4 * 6 + 5 * 6 * 7 + 7 * 2)


def test_each_input_of_a_bilinear_layer_has_a_slot_of_its_own():
    layer, one, two = nn.Bilinear(5, 6, 7), torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    entry = layer_type(layer)
    for call in ({0: one, 1: two}, {0: one, "input2": two}, {"input2": two, "input1": one}):
        ports = list(entry.taken(layer, call))
        assert [(id(p.tensor), p.slot, p.dim, p.repeat) for p in ports] == [
            (id(one), "in1", 2, 1),
            (id(two), "in2", 2, 1),
        ]
    output = layer(one, two)
    assert [(id(p.tensor), p.slot, p.dim) for p in entry.given(layer, output)] == [(id(output), "out", 2)]


@pytest.mark.parametrize("width", [5, 6, 7, 8])
def test_an_unseen_bilinear_layer_may_read_at_either_side(width):
    model = nn.ModuleDict({"body": nn.Linear(3, width), "head": nn.Linear(width, 2), "pair": nn.Bilinear(5, 6, 7)})
    seen = {name for name, _ in model.named_parameters() if not name.startswith("pair")}
    found = refuse_unseen_readers(model, [group("body", width, ("body", "out"), ("head", "in"))], seen)
    assert [("pair" in one.reason) for one in found] == [width < 8]


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 6, mode=mode), nn.Linear(6, 2)

    def forward(self, tokens):
        return self.head(self.bag(tokens).tanh())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_embeddings_loses_width_and_no_tokens(mode):
    torch.manual_seed(0)
    model, gone, tokens = Bag(mode), [0, 4], torch.tensor([[1, 2, 8], [0, 0, 3]])
    before, twin = snapshot(model), copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight[:, gone] = 0
    surgery = apply_plan(model, [group("bag", 6, ("bag", "both"), ("head", "in"))], Plan((tuple(gone),)))
    torch.testing.assert_close(model(tokens), twin(tokens))
    assert tuple(model.bag.weight.shape) == (9, model.bag.embedding_dim) == (9, 4)
    other = Bag(mode)
    resize(other, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))
    surgery.undo()
    assert_same(model, before)


def test_the_tokens_of_a_bag_are_no_channels():
    layer, tokens = nn.EmbeddingBag(9, 6), torch.tensor([1, 2, 8, 0])
    entry, offsets = layer_type(layer), torch.tensor([0, 2])
    output = layer(tokens, offsets)
    assert list(entry.taken(layer, {0: tokens, 1: offsets})) == []
    assert [(id(p.tensor), p.slot, p.dim) for p in entry.given(layer, output)] == [(id(output), "both", 1)]
    assert dict(layout_of(layer).slots) == {"both": 6}


def test_a_bilinear_layer_that_reads_a_group_does_not_produce_it():
    judged = {"pair.weight", "pair.bias"}
    (found,) = refuse_unjudged(PAIR[:1], judged)
    assert found.reason.startswith("validation does not use left")
    (found,) = refuse_unjudged(PAIR[2:], judged)
    assert found.prunable
