"""Optimizers of a pruned model go on as those of a masked model would."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan, repair_optimizers
from support.plans import ELEMENTWISE, batches, live, loss_of, plan_for, random_plan, step, two_groups
from support.zoo import BY_NAME, prunable

pytestmark = pytest.mark.usefixtures("one_thread")


MLP = {"encoder_0": (1, 4, 9), "encoder_2": (2,), "decoder_0": (0, 3)}


RESIDUAL = {"stem": (0, 3), "up": (2, 5, 8)}


def spread(channels, stride):
    return [channel * stride + place for channel in channels for place in range(stride)]


# What removing these channels removes from each tensor: (tensor, dimension, indices), written down by hand.
REMOVED = {
    "Autoencoder": [
        *(("encoder.0.weight", 0, (1, 4, 9)), ("encoder.0.bias", 0, (1, 4, 9)), ("encoder.2.weight", 1, (1, 4, 9))),
        *(("encoder.2.weight", 0, (2,)), ("encoder.2.bias", 0, (2,))),
        *(("decoder.0.weight", 1, (2,)), ("classifier.weight", 1, (2,))),
        *(("decoder.0.weight", 0, (0, 3)), ("decoder.0.bias", 0, (0, 3)), ("decoder.2.weight", 1, (0, 3))),
    ],
    "Residual": [
        *((name, 0, (0, 3)) for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias")),
        *(("up.weight", 1, (0, 3)), ("down.weight", 0, (0, 3)), ("down.bias", 0, (0, 3))),
        ("head.weight", 1, spread((0, 3), 4)),
        *((name, 0, (2, 5, 8)) for name in ("up.weight", "inner_norm.weight", "inner_norm.bias")),
        ("down.weight", 1, (2, 5, 8)),
    ],
}


def masks(model, name):
    found = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    for tensor, dim, indices in REMOVED[name]:
        found[tensor].index_fill_(dim, torch.tensor(indices), 0.0)
    return found


OTHERS = {"SparseAdam", "LBFGS", "Adafactor", "Muon", "Optimizer"}


def test_every_optimizer_of_torch_is_tested():
    known = {name.split()[0] for name in ELEMENTWISE} | OTHERS
    found = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    assert found <= known


def pruned_pair(name, build):
    """A masked dense network and a pruned one in the middle of the same training."""
    dense, _ = BY_NAME[name].make()
    dense.train().double()  # Rprop and the first steps of Adam follow the signs of gradients: rounding would decide
    optimizer = build(two_groups(dense))
    for x in batches(name, 3):
        step(dense, optimizer, x)
    dense.zero_grad(set_to_none=True)  # deepcopy keeps no gradients
    pruned, pruned_optimizer = copy.deepcopy((dense, optimizer))
    groups = prunable(pruned, batches(name, 1)[0])
    removed = MLP if name == "Autoencoder" else RESIDUAL
    surgery = apply_plan(pruned, groups, plan_for(groups, **removed))
    mask = masks(dense, name)
    with torch.no_grad():
        for n, parameter in dense.named_parameters():
            parameter.mul_(mask[n])
    return dense, optimizer, mask, pruned, pruned_optimizer, surgery


@pytest.mark.slow
@pytest.mark.parametrize("network", ["Autoencoder", "Residual"])
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_training_goes_on_as_masked_training_would(kind, network):
    dense, optimizer, mask, pruned, pruned_optimizer, surgery = pruned_pair(network, ELEMENTWISE[kind])
    repair_optimizers([pruned_optimizer], surgery)
    for x in batches(network, 12)[3:]:
        expected = step(dense, optimizer, x, mask)
        assert step(pruned, pruned_optimizer, x) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("kind", ["Adam", "SGD momentum", "ASGD"])
def test_without_the_repair_training_would_not_go_on(kind):
    dense, optimizer, mask, pruned, pruned_optimizer, _ = pruned_pair("Autoencoder", ELEMENTWISE[kind])
    losses = []
    for x in batches("Autoencoder", 12)[3:]:
        step(dense, optimizer, x, mask)
        losses.append(abs(step(dense, optimizer, x, mask) - step(pruned, pruned_optimizer, x)))
    assert max(losses) > 1e-3


@pytest.mark.parametrize("kind", ["Adam", "LBFGS", "Adafactor", "Muon", "SparseAdam"])
def test_optimizers_hold_exactly_the_live_parameters_and_train_on(kind):
    model, _ = BY_NAME["Autoencoder"].make()
    if kind == "Muon":
        for parameter in model.parameters():  # it takes matrices only
            parameter.requires_grad_(parameter.ndim == 2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "SparseAdam":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, 6, sparse=True), nn.Flatten(), nn.Linear(72, 2))
        trained = [model[0].weight]
    settings = {"line_search_fn": "strong_wolfe", "max_iter": 2} if kind == "LBFGS" else {}
    optimizer = getattr(torch.optim, kind)(trained, lr=0.01, **settings)

    def loss():
        if kind == "SparseAdam":
            return model(torch.arange(12)[None].expand(4, -1)).square().mean()
        return loss_of(model, batches("Autoencoder", 1, torch.float32)[0])

    def train():
        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        return optimizer.step(closure).item()

    for _ in range(3):
        train()
    x = torch.zeros(1, 12, dtype=torch.long) if kind == "SparseAdam" else torch.zeros(2, 12)
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, random_plan(groups, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repair_optimizers([optimizer], surgery)
    wanted = [id(p) for p in model.parameters() if p.requires_grad]
    assert live(optimizer) == (wanted[:1] if kind == "SparseAdam" else wanted)
    by_id = {id(p): p for p in model.parameters()}
    for parameter, state in optimizer.state.items():
        assert id(parameter) in by_id
        for value in state.values():
            if kind != "LBFGS" and torch.is_tensor(value) and value.ndim == parameter.ndim:
                assert all(v in (1, p) for v, p in zip(value.shape, parameter.shape, strict=True))
    assert bool(optimizer.state) == (kind != "LBFGS")
    losses = [train() for _ in range(30)]
    assert losses[-1] < losses[0]


def test_sparse_adam_goes_on_as_masked_training_would():
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Flatten(), nn.Linear(18, 2))
        return model, torch.optim.SparseAdam([model[0].weight], lr=0.05), torch.optim.SGD(model[2].parameters(), 0.1)

    def train(model, optimizers, mask=None):
        losses = []
        for seed in range(3):
            tokens = torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(seed))
            loss = model(tokens).square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            if mask is not None:
                with torch.no_grad():
                    model[0].weight[:, mask] = 0
                    model[2].weight[:, [6 * place + index for place in range(3) for index in mask]] = 0
            losses.append(loss.item())
        return losses

    model, *optimizers = build()
    train(model, optimizers)
    x = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        dense, dense_optimizers = copy.deepcopy((model, optimizers))
        dense[2].weight[:, [6 * place + index for place in range(3) for index in (1, 4)]] = 0
    groups = prunable(model, x)
    surgery = apply_plan(model, groups, Plan(((1, 4),)))
    repair_optimizers(optimizers, surgery)
    assert train(model, optimizers) == pytest.approx(train(dense, dense_optimizers, [1, 4]), abs=1e-5)


def test_parameter_groups_lists_and_schedulers_stay_the_same_objects():
    model, _ = BY_NAME["Autoencoder"].make()
    optimizer = torch.optim.AdamW(two_groups(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model, optimizer, batches("Autoencoder", 1, torch.float32)[0])
    scheduler.step()
    groups_before, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    order = [[n for n, p in model.named_parameters() if any(p is q for q in params)] for params in lists]
    groups = prunable(model, torch.zeros(2, 12))
    repair_optimizers([optimizer], apply_plan(model, groups, random_plan(groups, 0)))
    assert all(now is then for now, then in zip(optimizer.param_groups, groups_before, strict=True))
    assert all(group["params"] is params for group, params in zip(optimizer.param_groups, lists, strict=True))
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
    names = {id(p): n for n, p in model.named_parameters()}
    assert [sorted(names[id(p)] for p in params) for params in lists] == [sorted(found) for found in order]
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_two_optimizers_over_two_parts_are_both_repaired():
    model, _ = BY_NAME["Autoencoder"].make()
    one = torch.optim.Adam(model.encoder.parameters())
    other = torch.optim.SGD([*model.decoder.parameters(), *model.classifier.parameters()], 0.1, momentum=0.9)
    groups = prunable(model, torch.zeros(2, 12))
    repair_optimizers([one, other], apply_plan(model, groups, random_plan(groups, 0)))
    assert set(live(one)) | set(live(other)) == {id(p) for p in model.parameters()}


class Strange(torch.optim.Adagrad):
    """Keeps states whose shapes have nothing to do with the parameter's, one of them made with the optimizer."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sketch"] = torch.zeros(3, 7)

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "count" not in state:  # the first step makes both
                    state.update(count=torch.tensor(0.0), factors=[torch.zeros(5), torch.zeros(6)])
                state["count"] += 1.0
                state["factors"][0] += 1.0
        return super().step(closure)


def test_where_a_state_cannot_be_sliced_all_of_its_parameter_is_as_in_a_new_optimizer():
    model, _ = BY_NAME["Autoencoder"].make()
    optimizer = Strange(model.parameters())
    x = batches("Autoencoder", 1, torch.float32)[0]
    step(model, optimizer, x)
    groups = prunable(model, torch.zeros(2, 12))
    surgery = apply_plan(model, groups, plan_for(groups, encoder_0=(0,)))
    with pytest.warns(UserWarning, match="Strange: the state 'sketch'") as caught:
        repair_optimizers([optimizer], surgery)
    assert len(caught) == len(surgery.parameters)
    pruned, whole = optimizer.state[model.encoder[0].weight], optimizer.state[model.decoder[0].weight]
    assert pruned.keys() == {"step", "sum", "sketch"}  # Adagrad and this one make these at once
    assert float(pruned["step"]) == 0.0
    assert pruned["sum"].shape == model.encoder[0].weight.shape
    assert float(whole["step"]) == float(whole["count"]) == 1.0  # untouched
    step(model, optimizer, x)
    assert float(pruned["count"]) == 1.0


class Factored(torch.optim.SGD):
    """Keeps sums over rows and columns of matrices alone, all from its first step on, as Adafactor does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state, square = self.state[parameter], parameter.grad.square()
                if not state:
                    shapes = [square.shape[:-1], square.shape[:-2] + square.shape[-1:]]
                    state.update(step=0, whole=[torch.zeros_like(square)])
                    state.update(zip(("rows", "columns"), map(torch.zeros, shapes), strict=True))
                state["step"] += 1
                state["whole"][0] += square
                if square.ndim > 1:
                    state["rows"] += square.mean(-1)
                    state["columns"] += square.mean(-2)
        return super().step(closure)


def train_on(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("widths", [(6, 8, 2), (8, 8, 2)], ids=["no square", "a square and others"])
def test_sums_over_rows_and_columns_are_sliced_with_their_parameter(widths, recwarn):
    a, b, c = widths
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))
    optimizer = Factored(model.parameters(), 0.0)
    x = torch.randn(4, a)
    train_on(model, optimizer, x)
    states = [optimizer.state[layer.weight] for layer in (model[0], model[2])]
    surgery = apply_plan(model, prunable(model, x), Plan(((0, 1, 5),)))
    repair_optimizers([optimizer], surgery)
    kept = [at for at in range(b) if at not in (0, 1, 5)]
    first, second = (optimizer.state[layer.weight] for layer in (model[0], model[2]))
    assert torch.equal(first["rows"], states[0]["rows"][kept])
    assert torch.equal(first["columns"], states[0]["columns"])
    assert torch.equal(second["rows"], states[1]["rows"])
    assert torch.equal(second["columns"], states[1]["columns"][kept])
    assert torch.equal(second["whole"][0], states[1]["whole"][0][:, kept])
    train_on(model, optimizer, x)
    assert [first["step"], second["step"]] == [2, 2]
    assert not recwarn.list


class FactoredWhereLarge(torch.optim.SGD):
    """Keeps sums over rows and columns of large matrices, and all squares of others."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                square, known = parameter.grad.square(), dict(self.state[parameter])
                large = min(square.shape) > 6
                seen = {"rows": square.mean(1), "columns": square.mean(0)} if large else {"squares": square}
                self.state[parameter].update({name: new + known[name] if known else new for name, new in seen.items()})
        return super().step(closure)


def test_what_an_optimizer_keeps_of_large_parameters_alone_starts_afresh_where_they_are_small_now():
    model = nn.Sequential(nn.Linear(9, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    optimizer, x = FactoredWhereLarge(model.parameters(), 0.0), torch.randn(4, 9)
    train_on(model, optimizer, x)
    squares = optimizer.state[model[2].weight]["squares"]
    surgery = apply_plan(model, prunable(model, x), Plan(((0, 1, 5),)))
    with pytest.warns(UserWarning, match=r"a parameter of shape \(5, 9\) than of one of shape \(8, 9\); all that"):
        repair_optimizers([optimizer], surgery)
    assert torch.equal(optimizer.state[model[2].weight]["squares"], squares[:, [2, 3, 4, 6, 7]])
    train_on(model, optimizer, x)
    assert list(optimizer.state[model[0].weight]) == ["squares"]


def test_sums_of_which_no_parameter_tells_the_dimension_start_afresh():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    optimizer = Factored(model.parameters(), 0.0)
    x = torch.randn(4, 8)
    train_on(model, optimizer, x)
    surgery = apply_plan(model, prunable(model, x), Plan(((0, 1, 5),)))
    with pytest.warns(UserWarning, match="'rows' of shape \\(8,\\) does not follow"):
        repair_optimizers([optimizer], surgery)
    train_on(model, optimizer, x)
    assert [optimizer.state[parameter]["step"] for parameter in model.parameters()] == [1, 1]
