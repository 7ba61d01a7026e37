"""Readers whose outputs are added to something, against their normal equations with the other addend subtracted."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_softprune.compensation import dense_run
from lightning_softprune.compensation.dense_run import DenseRun, run_dense
from lightning_softprune.compensation.refit import REFIT_RIDGE, refit_readers
from lightning_softprune.compensation.sums import watch_sums
from support.readers import Prepared, inputs_of, regress

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(nn.Module):
    """Two blocks on a stream; `read` is done to the outputs of the second one, `after` to what they are added up to."""

    def __init__(self, read=lambda y: y, after=lambda y: y):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.up1, self.down1 = nn.Linear(8, 20), nn.Linear(20, 8)
        self.up2, self.down2 = nn.Linear(8, 20), nn.Linear(20, 8)
        self.read, self.after = read, after

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down1(self.up1(x).relu())
        return self.after(self.read(self.down2(self.up2(x).relu())) + x)


def norm():
    """A BatchNorm as after training."""
    layer = nn.BatchNorm1d(8).eval()
    for tensor in (layer.weight, layer.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    for tensor in (layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.weight[:3], -2.0, -0.5)
    return layer


def pruned_residual(read=lambda y: y, seed=0, after=lambda y: y):
    """The dense model, the one-shot and the refitted one, and their inputs; half of the units are gone."""
    torch.manual_seed(seed)
    model, x = Residual(read, after).eval(), torch.randn(200, 6) @ torch.randn(6, 6)
    dense = copy.deepcopy(model)
    net = Prepared(model, x, seed=seed, least=0.5, most=0.5)
    found = net.compensation()
    run = run_dense(model, found, net.steps)
    net.prune()
    one_shot = copy.deepcopy(model)
    refit_readers(model, net.surgery, found, run)
    return dense, one_shot, model, x, run


def fitted(layer, one_shot, rows, wanted):
    """Weight and bias by the normal equations."""
    z, y = rows - (mean := rows.mean(0)), wanted - wanted.mean(0)
    ridge = REFIT_RIDGE * (z**2).sum(0).mean()
    solution = regress(z, y, ridge, one_shot.weight.detach().double().numpy().T)
    return solution.T, wanted.mean(0) - mean @ solution


def test_a_reader_in_front_of_a_sum_is_fitted_to_what_the_dense_sum_lacks_of_the_other_addend():
    dense, one_shot, model, x, run = pruned_residual()
    assert {"down1", "down2"} <= run.summed
    stream = inputs_of(model, "up2", x)  # the stream that the second block is added to
    wanted = dense(x).detach().double().numpy() - stream
    weight, bias = fitted(model.down2, one_shot.down2, inputs_of(model, "down2", x), wanted)
    np.testing.assert_allclose(model.down2.weight.detach(), weight, atol=1e-4)
    np.testing.assert_allclose(model.down2.bias.detach(), bias, atol=1e-4)
    alone = dense.down2(torch.from_numpy(inputs_of(dense, "down2", x)).float()).detach().double().numpy()
    other, _ = fitted(model.down2, one_shot.down2, inputs_of(model, "down2", x), alone)
    assert np.abs(other - weight).max() > 1e-2  # it makes a difference


@pytest.mark.parametrize("seed", range(4))
def test_the_output_is_nearer_to_the_dense_networks_than_with_each_layer_by_itself(seed, monkeypatch):
    dense, _, model, x, _ = pruned_residual(seed=seed)
    with_sums = (model(x) - dense(x)).square().mean().item()
    monkeypatch.setattr(DenseRun, "_take_sums", lambda *_: set())
    dense, _, model, x, _ = pruned_residual(seed=seed)
    assert with_sums < 0.95 * (model(x) - dense(x)).square().mean().item()


def test_a_batchnorm_in_front_of_the_sum_is_looked_through():
    dense, one_shot, model, x, run = pruned_residual(norm())
    assert {"down1", "down2"} <= run.summed
    missing = dense(x).detach().double().numpy() - inputs_of(model, "up2", x)
    scale, shift = (values.detach().double().numpy() for values in affine(dense.read))
    weight, bias = fitted(model.down2, one_shot.down2, inputs_of(model, "down2", x), (missing - shift) / scale)
    np.testing.assert_allclose(model.down2.weight.detach(), weight, atol=1e-4)
    np.testing.assert_allclose(model.down2.bias.detach(), bias, atol=1e-4)


def affine(layer):
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    return scale, layer.bias - scale * layer.running_mean


@pytest.mark.parametrize("seed", range(3))
def test_where_a_relu_follows_the_sum_errors_count_behind_it(seed, monkeypatch):
    torch.manual_seed(seed)
    read = norm()
    dense, _, model, x, run = pruned_residual(read, seed, torch.relu)
    assert run.activations["down2"].is_summed
    behind = (model(x) - dense(x)).square().mean().item()
    found = dense_run.find_following_activations
    alone = lambda *args: {name: one for name, one in found(*args).items() if not one.is_summed}  # noqa: E731
    monkeypatch.setattr(dense_run, "find_following_activations", alone)
    dense, _, model, x, _ = pruned_residual(read, seed, torch.relu)
    assert behind < 0.95 * (model(x) - dense(x)).square().mean().item()


def test_outputs_that_anything_but_a_sum_reads_are_fitted_by_themselves():
    assert pruned_residual(lambda y: y.tanh())[4].summed == {"down1"}
    assert pruned_residual(lambda y: y + y.mean())[4].summed == {"down1"}


def test_a_dropout_at_rest_is_looked_through():
    assert "down2" in pruned_residual(nn.Dropout(0.3).eval())[4].summed


def test_what_is_added_is_seen_before_the_sum_is_written_over_it():
    layer, seen = nn.Linear(3, 3), []
    stream = torch.ones(2, 3)
    with watch_sums(nn.Sequential(layer), ["0"], lambda _, addend: seen.append(addend)), torch.no_grad():
        stream += layer(torch.randn(2, 3))
    torch.testing.assert_close(seen, [torch.ones(2, 3)])
