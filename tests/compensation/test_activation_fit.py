"""Oracles: explicit Gauss-Newton systems, one per output, by `numpy.linalg.solve`; the dense network's outputs."""

import itertools

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_softprune.compensation.activation_fit as response
import lightning_softprune.compensation.dense_run as dense_run
from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.compensation import Compensation
from lightning_softprune.compensation.activation_fit import Start, fit_after_activation
from lightning_softprune.compensation.activations import FollowingActivation, find_following_activations
from lightning_softprune.compensation.dense_run import run_dense
from lightning_softprune.compensation.refit import refit_readers
from lightning_softprune.graph.grouping import trace_groups
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import apply_plan

pytestmark = pytest.mark.usefixtures("one_thread")


class Ways(nn.Module):
    """A pointwise function follows some layers only."""

    def __init__(self):
        super().__init__()
        for name in ("module", "function", "method", "in_place", "skip", "norm", "norms", "prelu", "looked_at", "last"):
            self.add_module(name, nn.Linear(5, 5))
        self.norm_and_skip, self.norm_alone, self.norm_of_the_batch = (nn.Linear(5, 5) for _ in range(3))
        self.act, self.slopes = nn.LeakyReLU(0.3), nn.PReLU(5)
        self.batch_norm, self.plain = nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False)
        self.of_the_batch = nn.BatchNorm1d(5, track_running_stats=False)
        for norm in (self.batch_norm, self.plain):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.1, 4)
        nn.init.uniform_(self.batch_norm.weight, -1, 1)
        nn.init.uniform_(self.batch_norm.bias, -1, 1)

    def forward(self, x):
        x = self.act(self.module(x))
        x = torch.sigmoid(self.function(x))
        x = self.method(x).tanh()
        x = self.in_place(x)
        x = F.relu(x, inplace=True)
        y = self.skip(x)
        x = F.relu(y) + y
        x = F.relu(self.batch_norm(self.norm(x)), inplace=True)
        x = self.plain(self.batch_norm(self.norms(x))).tanh()
        y = self.batch_norm(self.norm_and_skip(x))
        x = y.relu() + y
        x = self.batch_norm(self.norm_alone(x)) * 2
        x = self.of_the_batch(self.norm_of_the_batch(x)).relu()
        x = self.slopes(self.prelu(x))
        y = self.looked_at(x)
        x = F.gelu(y.reshape(y.shape)) if y.ndim > 2 else F.gelu(y)
        return torch.cat([x, self.last(x)], 1)


def test_the_function_that_follows_a_layer_is_found_where_nothing_else_reads_the_layer():
    model = Ways().eval()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    found = find_following_activations(model, names, lambda: model(torch.randn(7, 5)))
    y = torch.randn(20, 5) * 3
    kept = y.clone()
    expected = {
        "module": F.leaky_relu(y, 0.3), "function": y.sigmoid(), "method": y.tanh(), "in_place": y.relu(),
        "looked_at": F.gelu(y), "norm": model.batch_norm(y).relu(), "norms": model.plain(model.batch_norm(y)).tanh(),
    }  # fmt: skip
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name](y), values)
        torch.testing.assert_close(found[name].of(torch.tensor([3, 1]))(y[:, [3, 1]]), values[:, [3, 1]])
        torch.testing.assert_close(found[name].of(slice(1, 3))(y[:, 1:3]), values[:, 1:3])
    assert torch.equal(y, kept)


FUNCTIONS = {
    "relu": (torch.relu, lambda p: (p > 0).astype(float)),
    "sigmoid": (torch.sigmoid, lambda p: np.exp(-p) / (1 + np.exp(-p)) ** 2),
    "tanh": (torch.tanh, lambda p: 1 - np.tanh(p) ** 2),
}


def problem(seed, rows=120, width=6, outputs=4):
    torch.manual_seed(seed)
    z = torch.randn(rows, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    z = z - z.mean(0)
    wanted = z @ torch.randn(width, outputs, dtype=torch.float64) + torch.randn(rows, outputs, dtype=torch.float64)
    weight = torch.randn(outputs, width, dtype=torch.float64) / 2
    bias, prior = torch.randn(outputs, dtype=torch.float64), weight + 0.1
    covariance = z.t() @ z / rows
    ridge = 0.05 * float(covariance.diagonal().mean())
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(width, dtype=torch.float64))
    return wanted, z, weight, bias, prior, factor, ridge


def fitted(f, given):
    wanted, z, *start = given
    return fit_after_activation(FollowingActivation(f), wanted, z, Start(*start))


def lost(f, wanted, z, w, prior, pull):
    """`J` of one output."""
    after = [f(torch.from_numpy(values)).numpy() for values in (wanted, z @ w)]
    return ((after[0] - after[1]) ** 2).sum() + pull * ((w - prior)[:-1] ** 2).sum()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_the_solution_of_each_outputs_own_gauss_newton_system(name, seed, monkeypatch):
    monkeypatch.setattr(response, "STEPS", 1)
    monkeypatch.setattr(response, "SOLVES", 40)
    monkeypatch.setattr(response, "LEAST_GAINS", (0.0, 0.0))
    f, slope = FUNCTIONS[name]
    given = problem(seed)
    weight, bias = fitted(f, given)
    wanted, z, *start, _, ridge = (value.numpy() if isinstance(value, torch.Tensor) else value for value in given)
    z = np.concatenate([z, np.ones((len(z), 1))], 1)
    for output in range(len(weight)):
        w = np.append(start[0][output], start[1][output])
        prior = np.append(start[2][output], 0.0)
        d = slope(z @ w)
        e = f(torch.from_numpy(wanted[:, output])).numpy() - f(torch.from_numpy(z @ w)).numpy()
        pull = ridge * (d**2).sum()
        penalty = np.diag([pull] * (len(w) - 1) + [0.0])
        step = np.linalg.solve(z.T @ (d[:, None] ** 2 * z) + penalty, z.T @ (d * e) - penalty @ (w - prior))
        lengths = [0.5**k for k in range(6)]
        before = lost(f, wanted[:, output], z, w, prior, pull)
        length = next((t for t in lengths if lost(f, wanted[:, output], z, w + t * step, prior, pull) <= before), 0.0)
        np.testing.assert_allclose(np.append(weight[output], bias[output]), w + length * step, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_output_ends_further_from_the_wanted_one_than_it_began(name, seed):
    f, _ = FUNCTIONS[name]
    wanted, z, weight, bias, prior, factor, _ = problem(seed)
    moved, shift = fitted(f, (wanted, z, weight, bias, prior, factor, 0.0))
    before, after = ((f(wanted) - f(z @ w.t() + b)).square().sum(0) for w, b in ((weight, bias), (moved, shift)))
    assert (after <= before).all()
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("seed", range(4))
def test_gradients_go_on_while_one_takes_a_noticeable_part_of_the_errors_away(seed, monkeypatch):
    monkeypatch.setattr(response, "STEPS", 1)
    wanted, z, weight, bias, *rest = problem(seed)

    def errors(solves, least):
        monkeypatch.setattr(response, "SOLVES", solves)
        monkeypatch.setattr(response, "LEAST_GAINS", (0.0, least))
        w, b = fitted(torch.sigmoid, (wanted, z, weight, bias, *rest[:-1], 0.0))
        return float((wanted.sigmoid() - (z @ w.t() + b).sigmoid()).square().sum())

    start = float((wanted.sigmoid() - (z @ weight.t() + bias).sigmoid()).square().sum())
    ends = [errors(solves, 0.0) for solves in range(1, 9)]
    assert ends[0] > ends[1]
    assert errors(8, 1.0) == ends[0]  # one gradient never takes all of it
    few = errors(8, 0.01)
    assert few in ends[1:-1]
    assert few - ends[-1] <= 0.01 * start


def test_steps_go_on_while_one_takes_a_noticeable_part_of_the_errors_away(monkeypatch):
    given = problem(1)
    wanted, z, weight, bias, *_ = given

    def errors(w, b):
        return float((wanted.sigmoid() - (z @ w.t() + b).sigmoid()).square().sum())

    def fit(steps, least):
        monkeypatch.setattr(response, "STEPS", steps)
        monkeypatch.setattr(response, "LEAST_GAINS", (least, 0.0))
        return fitted(torch.sigmoid, (*given[:-1], 0.0))

    ends = [errors(weight, bias), *(errors(*fit(steps, 0.0)) for steps in (1, 2))]
    first, second = (1 - after / before for before, after in itertools.pairwise(ends))
    assert 0 < second < first
    assert errors(*fit(2, 1.01 * first)) == ends[1]
    assert errors(*fit(2, 0.99 * first)) == ends[2]


def test_an_output_without_a_slope_anywhere_stays_as_it_is():
    wanted, z, weight, bias, *rest = problem(0)
    bias[1] = -1e4
    moved, shift = fitted(torch.relu, (wanted, z, weight, bias, *rest))
    assert torch.equal(moved[1], weight[1])
    assert shift[1] == bias[1]
    assert moved.isfinite().all()


@pytest.mark.parametrize("numbers", ["observations", "weights"])
def test_outputs_fitted_in_blocks_are_those_fitted_at_once(monkeypatch, numbers):
    given = problem(0)
    whole = fitted(torch.relu, given)
    wanted, inputs = given[:2]
    blocks = []

    class Counted(response._Problem):
        def __init__(self, *args):
            blocks.append(args)
            super().__init__(*args)

    monkeypatch.setattr(response, "_Problem", Counted)
    size = max(inputs.shape)
    if numbers == "weights":
        monkeypatch.setattr(response, "WEIGHTS", size)
        size *= inputs.shape[1]
    monkeypatch.setattr(response, "BLOCK", 2 * size)  # of two outputs
    for a, b in zip(whole, fitted(torch.relu, given), strict=True):
        torch.testing.assert_close(a, b)
    assert len(blocks) == -(-wanted.shape[1] // 2)


def pruned_error(layers, x, seen, monkeypatch, follow):
    """How far the output is from the dense network's after a refit on `seen`, on fresh inputs `x`."""
    torch.manual_seed(0)
    model = layers().eval()
    dense = model(x).detach()
    steps = [lambda: model(seen)]
    groups = [group for group in trace_groups(model, steps) if group.prunable]
    rankings = [np.arange(group.num_channels) for group in groups]
    statistics = collect_statistics(model, find_readers(model, groups), steps)
    found = Compensation("least_squares", model, groups, rankings, statistics)
    with monkeypatch.context() as patch:
        if not follow:
            patch.setattr(dense_run, "find_following_activations", lambda *_: {})
        targets = run_dense(model, found, steps)
    surgery = apply_plan(model, groups, Plan.from_counts([group.num_channels // 2 for group in groups], rankings))
    found.apply(model, surgery)
    refit_readers(model, surgery, found, targets)
    return (model(x) - dense).square().mean().item()


def stack():
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 12), nn.Sigmoid())
    model[4].weight.data *= 12.0  # deep in saturation
    return model


def pointwise_convolutions():
    model = nn.Sequential(
        nn.Conv2d(8, 30, 1), nn.ReLU(), nn.Conv2d(30, 30, 1), nn.ReLU(), nn.Conv2d(30, 12, 1), nn.Sigmoid()
    )
    model[4].weight.data *= 12.0
    return model


def kernels():
    model = nn.Sequential(
        nn.Conv2d(8, 30, 1), nn.ReLU(), nn.Conv2d(30, 30, 2), nn.ReLU(), nn.ConvTranspose2d(30, 12, 2, 2), nn.Sigmoid()
    )
    model[4].weight.data *= 12.0
    return model


def normed_kernels():
    model = nn.Sequential(
        nn.Conv2d(8, 30, 1), nn.ReLU(), nn.Conv2d(30, 30, 2), nn.BatchNorm2d(30), nn.ReLU(), nn.Conv2d(30, 12, 1),
        nn.BatchNorm2d(12), nn.Sigmoid(),
    )  # fmt: skip
    nn.init.uniform_(model[3].running_var, 0.01, 0.1)
    nn.init.constant_(model[3].bias, -1.0)
    nn.init.constant_(model[6].weight, 12.0)  # deep in saturation
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (stack, (2000, 8)),
        (pointwise_convolutions, (100, 8, 4, 5)),
        (kernels, (300, 8, 6, 6)),
        (normed_kernels, (300, 8, 5, 5)),
    ],
)
def test_the_refit_through_the_functions_is_nearer_to_the_dense_network_on_fresh_inputs(
    layers, shape, dtype, monkeypatch
):
    pl.seed_everything(1, verbose=False)
    x, seen = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    linear, through = (
        pruned_error(lambda: layers().to(dtype), x, seen, monkeypatch, follow) for follow in (False, True)
    )
    assert through < linear
