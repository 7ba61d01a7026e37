"""A transaction puts models and optimizers back: the same objects with the same values."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lightning_softprune.surgery import Transaction, apply_plan, repair_optimizers
from support import zoo
from support.plans import ELEMENTWISE, assert_same, batches, live, outputs, random_plan, snapshot, step, two_groups
from support.zoo import BY_NAME, prunable

pytestmark = pytest.mark.usefixtures("one_thread")


class Stateful(zoo.Residual):
    """Holds what modules hold: lists, dicts, plain tensors, buffers that are not saved."""

    def __init__(self):
        super().__init__()
        self.history, self.nested, self.seen = [1], {"a": [1, {"b": {2}}]}, {"x"}
        self.plain = torch.zeros(3)
        self.register_buffer("hidden", torch.ones(2), persistent=False)


def test_a_transaction_puts_everything_back():
    model, x = Stateful(), torch.randn(3, 1, 4, 4)
    outputs(model(x)).sum().backward()
    model.eval()
    held = dict(vars(model))
    before = snapshot(model)
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    groups = prunable(model, x)

    def ruin():
        model.train()
        model(x)  # running statistics
        apply_plan(model, groups, random_plan(groups, 0))
        model.history.append(2)
        model.nested["a"][1]["b"].clear()
        model.nested["c"] = 1
        model.seen.add("y")
        model.plain += 1
        model.hidden.zero_()
        model.extra, model.history = 3, [5]
        model.add_module("more", nn.Linear(1, 1))
        del model.plain
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.data.mul_(2)
            parameter.grad = None
        grads[0][0].zero_()

    def check():
        assert_same(model, before)
        assert all(vars(model)[key] is value for key, value in held.items() if key != "training")
        assert (model.history, model.nested, model.seen) == ([1], {"a": [1, {"b": {2}}]}, {"x"})
        assert torch.equal(model.plain, torch.zeros(3))
        assert torch.equal(model.hidden, torch.ones(2))
        assert not hasattr(model, "extra")
        assert not model.training
        for parameter, (grad, value) in zip(model.parameters(), grads, strict=True):
            assert parameter.requires_grad
            assert parameter.grad is grad
            assert torch.equal(grad, value)

    with Transaction(model):
        ruin()
    check()

    def fail():
        with Transaction(model):
            ruin()
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        fail()
    check()
    with Transaction(model) as transaction:
        ruin()
        transaction.rollback()
        check()
        model.history.append(7)
        transaction.rollback()
        check()


def test_a_committed_transaction_keeps_what_was_done():
    model, x = BY_NAME["Autoencoder"].make()
    groups = prunable(model, x)
    with Transaction(model) as transaction:
        apply_plan(model, groups, random_plan(groups, 0))
        transaction.commit()
    assert model.encoder[0].out_features < 10


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum", "LBFGS"])
def test_an_optimizer_transaction_puts_everything_back(kind):
    build = ELEMENTWISE.get(kind, lambda p: torch.optim.LBFGS(itertools.chain(*(group["params"] for group in p))))
    model, _ = BY_NAME["Autoencoder"].make()
    optimizer = build(two_groups(model))
    for x in batches("Autoencoder", 2, torch.float32):
        step(model, optimizer, x)
    parameters = live(optimizer)
    containers = [(group, group["params"]) for group in optimizer.param_groups]
    settings = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    state = {p: dict(value) for p, value in optimizer.state.items()}
    transaction = Transaction(model, optimizers=[optimizer])
    groups = prunable(model, torch.zeros(2, 12))
    for _ in range(2):
        repair_optimizers([optimizer], apply_plan(model, groups, random_plan(groups, 0)))
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.param_groups[0]["new"] = 1
        transaction.rollback()
        assert live(optimizer) == parameters == live(optimizer)
        for group, (dictionary, params) in zip(optimizer.param_groups, containers, strict=True):
            assert group is dictionary
            assert group["params"] is params
        now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        assert now == settings
        assert list(optimizer.state) == list(state)
        for parameter, value in state.items():
            assert optimizer.state[parameter].keys() == value.keys()
            assert all(optimizer.state[parameter][key] is item for key, item in value.items())
    step(model, optimizer, batches("Autoencoder", 1, torch.float32)[0])
