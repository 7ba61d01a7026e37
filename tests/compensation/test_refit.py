"""The sequential refit, against its normal equations."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_softprune.calibration.statistics as calibration
import lightning_softprune.compensation.dense_run as dense_run
from lightning_softprune.calibration import ReadPositions, rows_per_call
from lightning_softprune.compensation.dense_run import DenseRun, run_dense
from lightning_softprune.compensation.refit import REFIT_RIDGE, refit_readers
from lightning_softprune.compensation.regression import RIDGE
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan
from support.processes import run_as_processes
from support.readers import (
    BROKEN,
    Prepared,
    broken_channels,
    dense_weight,
    inputs_of,
    names,
    prepared,
    raw_inputs_of,
    read_by_each_output,
    regress,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training.*"),
]


@pytest.fixture
def too_wide(monkeypatch):
    """No layer's windows are narrow enough for a regression of their own."""
    monkeypatch.setattr(calibration, "MAX_FEATURES", 0)


def deep(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    return model.eval(), torch.randn(300, 8) @ torch.randn(8, 8)


@pytest.mark.parametrize("seed", range(6))
def test_the_refit_brings_the_output_nearer_to_the_dense_networks_where_inputs_have_shifted(seed):
    model, x = deep(seed)
    dense = model(x).detach()
    net = Prepared(model, x, seed=seed, least=0.4, most=0.7)
    found = net.compensation()
    targets = run_dense(model, found, net.steps)
    surgery = apply_plan(model, net.groups, net.plan)
    uncompensated = (model(x) - dense).square().mean().item()
    found.apply(model, surgery)
    one_shot = (model(x) - dense).square().mean().item()
    refit_readers(model, surgery, found, targets)
    assert (model(x) - dense).square().mean().item() <= one_shot < uncompensated


@pytest.mark.parametrize("bias", [True, False])
def test_the_refit_is_the_ridge_regression_of_dense_inputs_on_shifted_ones_around_the_one_shot_solution(
    bias, monkeypatch
):
    monkeypatch.setattr(dense_run, "find_following_activations", lambda *_: {})  # the linear fit alone
    for seed in range(3):
        model, x = deep(seed)
        if not bias:
            model[4] = nn.Linear(20, 16, bias=False)
        dense = copy.deepcopy(model)
        net = Prepared(model, x, x[:100] + 1, seed=seed)
        found = net.compensation()
        targets = run_dense(model, found, net.steps)
        surgery = apply_plan(model, net.groups, net.plan)
        found.apply(model, surgery)
        refit_readers(model, surgery, found, targets)
        for reader in ("2", "4", "6"):
            layer = dense.get_submodule(reader)
            gone, lost = net.removed(reader, "in"), net.removed(reader, "out")
            wanted, given = inputs_of(dense, reader, *net.inputs), inputs_of(model, reader, *net.inputs)
            m, mz = wanted.mean(0), given.mean(0)
            a, z = wanted - m, given - mz
            one_shot = np.zeros((z.shape[1], a.shape[1]))
            one_shot[:, ~gone] = np.eye(z.shape[1])
            one_shot[:, gone] = regress(a[:, ~gone], a[:, gone], RIDGE * len(a) * a.var(0).mean())
            solution = regress(z, a, REFIT_RIDGE * len(z) * z.var(0).mean(), one_shot)
            weight = dense_weight(layer)[~lost, :, 0]
            start = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()[~lost]
            pruned = model.get_submodule(reader)
            np.testing.assert_allclose(dense_weight(pruned)[:, :, 0], weight @ solution.T, atol=1e-4)
            np.testing.assert_allclose(pruned.bias.detach(), start + weight @ (m - solution.T @ mz), atol=1e-4)


@pytest.mark.parametrize("name", names("Attention"))
def test_the_refit_without_shifted_inputs_changes_little_and_spoils_nothing(name):
    """Only readers that nothing upstream has shifted: what the regression of dense inputs on themselves finds."""
    net = prepared(name, 60)
    model = net.model
    first = min(range(len(net.groups)), key=lambda g: net.groups[g].name != net.compensation().readers[0])
    net.plan = Plan(tuple(gone if g == first else () for g, gone in enumerate(net.plan.removed)))
    found = net.compensation()
    targets = run_dense(model, found, net.steps)
    surgery = net.prune()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refit_readers(model, surgery, found, targets)
    for key, value in model.state_dict().items():
        assert value.isfinite().all()
        assert value.shape == before[key].shape
    surgery.undo()


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_the_refit_fits_what_outputs_read_now_to_the_dense_outputs_around_the_one_shot_solution(name, monkeypatch):
    monkeypatch.setattr(dense_run, "find_following_activations", lambda *_: {})  # the linear fit alone
    monkeypatch.setattr(DenseRun, "_take_sums", lambda *_: set())  # of each layer by itself
    net = prepared(name, 60)
    model, dense = net.model, copy.deepcopy(net.model)
    found = net.compensation()
    run = run_dense(model, found, net.steps)
    net.prune()
    one_shot = copy.deepcopy(model)
    refit_readers(model, net.surgery, found, run)
    for reader in found.readers:
        layer, start = model.get_submodule(reader), one_shot.get_submodule(reader)
        (x,), (z,) = raw_inputs_of(dense, reader, *net.inputs), raw_inputs_of(model, reader, *net.inputs)
        channels = 1 if hasattr(layer, "kernel_size") else -1
        with torch.no_grad():
            wanted = dense.get_submodule(reader)(x).movedim(channels, -1).double().numpy()
        wanted = wanted.reshape(-1, wanted.shape[-1])[:, ~net.removed(reader, "out")]
        rows, first, last = read_by_each_output(layer, z), dense_weight(start), dense_weight(layer)
        inputs, outputs = first.shape[1] // len(rows), len(first) // len(rows)
        for part, read in enumerate(rows):
            i, o = slice(part * inputs, (part + 1) * inputs), slice(part * outputs, (part + 1) * outputs)
            read, y = read - (mean := read.mean(0)), wanted[:, o]
            prior = first[o, i].reshape(outputs, -1).T
            ridge = max(REFIT_RIDGE * (read**2).sum(0).mean(), 1e-12 * len(read))  # a dead input has no variance
            solution = regress(read, y - y.mean(0), ridge, prior)
            np.testing.assert_allclose(last[o, i].reshape(outputs, -1), solution.T, atol=2e-4)
            np.testing.assert_allclose(layer.bias.detach()[o], y.mean(0) - mean @ solution, atol=2e-4)


def test_the_refit_leaves_grouped_convolutions_of_wide_windows_alone(too_wide):
    net = prepared("GroupedBothWays")
    model = net.model
    found = net.compensation()
    targets = run_dense(model, found, net.steps)
    surgery = net.prune()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refit_readers(model, surgery, found, targets)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.weight", "head.bias"}


class Scaled(nn.Linear):
    """Weights are three times what they are used as."""

    def forward(self, x):
        return F.linear(x, self.weight / 3, self.bias)


class Standardised(nn.Conv2d):
    """Weights are brought to unit norm before they are used."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.flatten(1).norm(dim=1)[:, None, None, None], self.bias)


@pytest.mark.parametrize(
    ("own", "kinds", "shape"),
    [(Scaled, (20, 16), (300, 24)), (Standardised, (20, 16, 2), (100, 24, 5, 5))],
    ids=["linear", "convolution"],
)
def test_the_refit_leaves_layers_that_compute_in_their_own_way_alone(own, kinds, shape):
    torch.manual_seed(0)
    plain = own.__mro__[1]
    size = kinds[2:]
    layers = [plain(24, 20, *size), nn.ReLU(), own(*kinds), nn.ReLU(), plain(16, 4, *size)]
    model, x = nn.Sequential(*layers), torch.randn(shape)
    net = Prepared(model, x)
    found = net.compensation()
    run = run_dense(model, found, net.steps)
    net.prune()
    before = copy.deepcopy(model.state_dict())
    refit_readers(model, net.surgery, found, run)
    assert found.readers == ["2", "4"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("4."))


def test_the_refit_leaves_alone_what_the_pruned_network_is_given_in_other_numbers():
    model, x = deep()
    net = Prepared(model, x)
    found = net.compensation()
    targets = run_dense(model, found, net.steps)
    targets.steps = [lambda: model(x[:50])]
    surgery = net.prune()
    before = copy.deepcopy(model.state_dict())
    refit_readers(model, surgery, found, targets)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("swallow", [False, True])
def test_the_refit_runs_each_step_as_far_as_the_reader_and_survives_code_that_catches_everything(swallow):
    model, x = deep()
    reference = copy.deepcopy(model)
    calls = []

    def step():
        try:
            return model(x)
        except BaseException:
            if not swallow:
                raise
        finally:
            calls.append("step")

    for layer in (2, 4, 6):
        model[layer].register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    net = Prepared(model, x)
    found = net.compensation()
    run = run_dense(model, found, [step, step])
    net.prune()
    calls.clear()
    refit_readers(model, net.surgery, found, run)
    assert calls == ["step"] * 2 + [2, "step"] * 2 + [2, 4, "step"] * 2
    plain = Prepared(reference, x)
    found = plain.compensation()
    run = run_dense(reference, found, plain.steps * 2)
    plain.prune()
    refit_readers(reference, plain.surgery, found, run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("kind", BROKEN)
def test_nothing_in_the_data_makes_a_refitted_weight_nan(kind):
    model, x = broken_channels(kind)
    net = Prepared(model, x)
    if kind in ("nan channel", "infinite channel"):
        net.plan = Plan(((4, 7, 8), *net.plan.removed[1:]))
    found = net.compensation()
    targets = run_dense(model, found, net.steps)
    surgery = net.prune()
    refit_readers(model, surgery, found, targets)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_broken_sample_spoils_no_refit():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(300, 8)
    x[7] = torch.nan
    net = Prepared(model, x)
    found = net.compensation()
    run = run_dense(model, found, net.steps)
    net.prune()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    refit_readers(model, net.surgery, found, run)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


class Branches(nn.Module):
    """Two readers of one tensor around a chain."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(8, 24), nn.Linear(24, 20), nn.Linear(20, 16)
        self.shortcut, self.head = nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.b(self.a(x).relu()) + self.shortcut(x)).relu())


@pytest.mark.parametrize("sums", [False, True])
def test_readers_of_one_tensor_are_refitted_in_one_pass_as_they_would_be_one_by_one(sums, monkeypatch):
    """But for one that is fitted to a sum: what is added changes with the refit of the other."""
    torch.manual_seed(0)
    if not sums:
        monkeypatch.setattr(DenseRun, "_take_sums", lambda *_: set())
    fitted = []
    for together in (True, False):
        model, steps = copy.deepcopy(fitted[0][1]) if fitted else Branches().eval(), []
        dense = copy.deepcopy(model)
        x = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
        net = Prepared(model, x)
        found = net.compensation()
        run = run_dense(model, found, [lambda model=model, steps=steps, x=x: steps.append(0) or model(x)])
        assert run.reads_as == {"shortcut": "a"}
        if not together:
            run.reads_as = {}
        net.prune()
        steps.clear()
        refit_readers(model, net.surgery, found, run)
        assert len(steps) == (3 if together and not sums else 4)
        fitted.append((model, dense))
    for one, other in zip(fitted[0][0].parameters(), fitted[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_readers_whose_observations_do_not_fit_keep_their_one_shot_predictions():
    model, x = deep()
    net = Prepared(model, x)
    found = net.compensation()
    rows = [rows_per_call(width) for width in (24, 20, 16)]
    sizes = {name: 4 * n * outputs for name, n, outputs in zip(found.readers, rows, (20, 16, 4), strict=True)}
    assert list(run_dense(model, found, net.steps, sizes["6"] + sizes["4"]).rows) == ["4", "6"]
    assert list(run_dense(model, found, net.steps, sizes["6"] + sizes["4"] - 1).rows) == ["6"]
    assert list(run_dense(model, found, net.steps, 1e12).rows) == ["2", "4", "6"]
    run = run_dense(model, found, net.steps, sizes["6"])
    net.prune()
    one_shot = copy.deepcopy(model)
    refit_readers(model, net.surgery, found, run)
    changed = [name for name in found.readers if not torch.equal(model[int(name)].weight, one_shot[int(name)].weight)]
    assert changed == ["6"]


def test_processes_refit_the_layers_that_all_of_them_have_run_in_one_order(monkeypatch):
    class Ordered(nn.ModuleDict):
        def forward(self, x, names):
            return sum(self[name](x) for name in names)

    model = Ordered({name: nn.Linear(4, 3) for name in "abcd"})
    kinds = {"a": True, "b": False, "c": True, "d": False}

    def process(order):
        own = copy.deepcopy(model)
        steps = [lambda: own(torch.ones(5, 4), order)]
        dense = DenseRun(own, kinds, steps, ReadPositions())

        def run():
            for step in dense.watched():
                step()
            dense.finish()
            return list(dense.rows)

        return run

    assert process("dcba")() == ["d", "c", "b", "a"]
    found = run_as_processes(monkeypatch, [process(order) for order in ("cba", "bca", "cbad")])
    assert found == [["c", "b", "a"]] * 3
