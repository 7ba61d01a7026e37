"""Which optimizer a created bias joins: one that can train it. Oracle: the optimizer, given a vector."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_softprune.surgery import Surgery, repair_optimizers, weights_without_bias

pytestmark = pytest.mark.usefixtures("one_thread")


class Orthogonal(Optimizer):
    """Refuses vectors in its step."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.direction(p.grad))
        return loss

    def direction(self, grad):
        u, _, v = torch.linalg.svd(grad, full_matrices=False)
        return u @ v


class Refusing(Orthogonal):
    """Refuses vectors when it is built."""

    def __init__(self, params, rate, **other):
        Optimizer.__init__(self, params, {"lr": rate, **other})
        if any(p.ndim < 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("matrices only")


class Skipping(Orthogonal):
    """Passes vectors over."""

    def direction(self, grad):
        return super().direction(grad) if grad.ndim == 2 else torch.zeros_like(grad)


class Nan(Orthogonal):
    """Makes NaNs of vectors."""

    def direction(self, grad):
        return super().direction(grad) if grad.ndim == 2 else grad * torch.nan


class Mixed(Orthogonal):
    """Matrices in one way and vectors in another, told apart by a flag of the group; strict about keys."""

    def __init__(self, groups):
        for group in groups:
            assert group.keys() == {"params", "lr", "orthogonal"}
        Optimizer.__init__(self, groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (self.direction(p.grad) if group["orthogonal"] else p.grad))
        return loss


class Wrapping(Orthogonal):
    """Cannot be built from parameters alone."""

    def __init__(self, inner, module):
        self.inner, self.module = inner, module
        Optimizer.__init__(self, inner.param_groups, {})


def layers():
    net = nn.ModuleDict({
        "a": nn.Linear(5, 4, bias=False), "b": nn.Linear(4, 3, bias=False), "c": nn.Linear(3, 2), "n": nn.LayerNorm(2)
    })  # fmt: skip
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    return net, {name: net[name].weight for name in ("a", "b")}


MATRICES_ONLY = {
    "Muon": lambda p: torch.optim.Muon(p),
    "Muon without a rate yet": lambda p: torch.optim.Muon(p, lr=0.0),
    "in its step": Orthogonal,
    "when it is built": lambda p: Refusing(p, 0.1),
    "by passing over": Skipping,
    "by a NaN": Nan,
    "one that cannot be tried": lambda p: Wrapping(torch.optim.SGD(p), None),
    "groups with a flag": lambda p: Mixed([{"params": p, "lr": 0.1, "orthogonal": True}]),
}

ANYTHING = {
    "Adam": torch.optim.Adam,
    "without a rate yet": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "a tensor for the rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), capturable=False),
    "LBFGS": torch.optim.LBFGS,
    "groups with a flag": lambda p: Mixed([{"params": p, "lr": 0.1, "orthogonal": False}]),
}


@pytest.mark.parametrize("build", MATRICES_ONLY.values(), ids=MATRICES_ONLY)
def test_no_bias_for_an_optimizer_that_refuses_vectors(build):
    _, weights = layers()
    optimizer = build(list(weights.values()))
    before = [weight.clone() for weight in weights.values()]
    assert weights_without_bias([optimizer], weights) == {"a", "b"}
    assert all(torch.equal(weight, value) for weight, value in zip(weights.values(), before, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("build", ANYTHING.values(), ids=ANYTHING)
def test_a_bias_for_an_optimizer_that_happens_to_hold_matrices_alone(build):
    _, weights = layers()
    optimizer = build(list(weights.values()))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert weights_without_bias([optimizer], weights) == set()
    assert schedule.optimizer is optimizer
    assert not optimizer.state
    assert weights_without_bias([], weights) == set()


def created(net, *names):
    surgery = Surgery()
    for name in names:
        weight = net[name].weight
        net[name].bias = nn.Parameter(torch.zeros(len(weight)))
        net[name].bias.grad = torch.ones(len(weight))
        surgery.created.append((f"{name}.bias", weight, net[name].bias))
    return surgery


def held(optimizer):
    return [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("build", MATRICES_ONLY.values(), ids=MATRICES_ONLY)
def test_the_bias_joins_the_optimizer_of_the_other_vectors(build):
    net, weights = layers()
    matrices = build(list(weights.values()))
    adam = torch.optim.Adam([{"params": [net["c"].weight]}, {"params": [net["c"].bias], "lr": 0.1}])
    assert weights_without_bias([matrices, adam], weights) == set()
    repair_optimizers([matrices, adam], created(net, "a", "b"))
    assert held(matrices) == [[id(weight) for weight in weights.values()]]
    assert held(adam) == [[id(net["c"].weight)], [id(net[name].bias) for name in "cab"]]
    before = net["a"].bias.clone()
    adam.step()
    assert torch.allclose(before - net["a"].bias, torch.tensor(0.1))


def test_the_bias_joins_the_vectors_of_its_weights_own_optimizer_first():
    net, weights = layers()
    sgd = torch.optim.SGD(net["n"].parameters())
    mixed = Mixed([
        {"params": list(weights.values()), "lr": 0.1, "orthogonal": True},
        {"params": [net["c"].bias], "lr": 0.1, "orthogonal": False},
    ])  # fmt: skip
    repair_optimizers([sgd, mixed], created(net, "b"))
    assert held(mixed)[1] == [id(net["c"].bias), id(net["b"].bias)]
    mixed.step()
    assert torch.allclose(net["b"].bias, torch.tensor(-0.1))


def test_the_bias_is_where_the_models_order_has_it():
    net, weights = layers()
    muon, adam = torch.optim.Muon(list(weights.values())), torch.optim.Adam([net["c"].bias, *net["n"].parameters()])
    surgery = created(net, "a", "b")
    surgery.order = list(net.parameters())
    repair_optimizers([muon, adam], surgery)
    vectors = [id(parameter) for parameter in net.parameters() if parameter.ndim == 1]
    assert held(adam) == [vectors]  # as an optimizer that is built for the pruned module


def test_a_named_bias_is_named_in_the_group_that_it_joins():
    net, weights = layers()
    muon = torch.optim.Muon([(f"{name}.weight", weight) for name, weight in weights.items()])
    adam = torch.optim.Adam([("c.bias", net["c"].bias)])
    repair_optimizers([muon, adam], created(net, "a"))
    assert adam.param_groups[0]["param_names"] == ["c.bias", "a.bias"]
    assert muon.param_groups[0]["param_names"] == ["a.weight", "b.weight"]


def test_a_frozen_weight_may_come_to_any_optimizer_later():
    net, weights = layers()
    muon = torch.optim.Muon([weights["a"]])
    assert weights_without_bias([muon], weights) == {"a", "b"}
    assert weights_without_bias([muon, torch.optim.SGD(net["n"].parameters())], weights) == set()
