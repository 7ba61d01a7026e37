"""Oracles: `numpy.linalg.lstsq` on the augmented system, the dense network's outputs, and `Trainer.validate`."""

import copy
import itertools
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import (
    GradientSearch,
    PruningResult,
    SensitivitySearch,
    SoftPruning,
    UniformBaseline,
)
from lightning_softprune.compensation.dense_run import run_dense
from lightning_softprune.compensation.refit import refit_readers
from lightning_softprune.graph.costs import CostModel
from lightning_softprune.search.plan import Plan
from lightning_softprune.surgery import repair_optimizers
from support import zoo
from support.costs import count_parameters
from support.readers import BROKEN, MODES, Prepared, broken_channels, make, names, prepared

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training.*"),
]


def test_a_reader_without_bias_gets_one_which_undo_takes_away_again():
    for name in ("Joined", "GroupedBothWays"):
        net = prepared(name)
        model = net.model
        without = [n for n, m in model.named_modules() if hasattr(m, "bias") and m.bias is None]
        assert sorted(net.compensation().new_biases) == sorted(without)
        before = [
            (module, key, value, None if value is None else value.detach().clone())
            for module in model.modules()
            for key, value in (*module._parameters.items(), *module._buffers.items())
        ]
        for mode in ("bias", "least_squares"):
            surgery = net.prune(mode)
            assert sorted(created for created, _, _ in surgery.created) == sorted(f"{n}.bias" for n in without)
            for created, weight, bias in surgery.created:
                assert model.get_parameter(created) is bias
                assert model.get_parameter(created.replace("bias", "weight")) is weight
                assert bias.dtype == weight.dtype
            surgery.undo()
            for module, key, value, copied in before:
                assert {**module._parameters, **module._buffers}[key] is value
                assert value is None or torch.equal(value, copied)
            assert len(before) == sum(len(m._parameters) + len(m._buffers) for m in model.modules())


@pytest.mark.parametrize("name", names())
def test_applying_writes_into_no_tensor_of_the_dense_model(name):
    net = prepared(name)
    for parameter in net.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    held = [*net.model.parameters(), *net.model.buffers()]
    before = [
        (tensor, tensor.detach().clone(), None if tensor.grad is None else tensor.grad.clone()) for tensor in held
    ]
    state = {key: value.clone() for key, value in net.model.state_dict().items()}
    surgery = net.prune()
    refit_readers(net.model, surgery, net.compensation(), run_dense(net.model, net.compensation(), []))
    for tensor, value, grad in before:
        assert torch.equal(tensor, value)
        assert grad is None or torch.equal(tensor.grad, grad)
    surgery.undo()
    after = net.model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert all(a is b for a, b in zip(held, [*net.model.parameters(), *net.model.buffers()], strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", names())
def test_counted_parameters_are_those_of_the_pruned_compensated_network(name, mode):
    net = prepared(name)
    rng = np.random.default_rng(1)
    found = net.compensation(mode)
    costs = CostModel.build(net.model, net.groups, net.rankings, {}, found.new_biases)
    channels = [group.num_channels for group in net.groups]
    plans = [[int(rng.integers(0, c)) for c in channels] for _ in range(6)]
    plans += [[0] * len(channels), [c - 1 for c in channels]]
    plans += [[1 if i == j else 0 for j in range(len(channels))] for i in range(len(channels))]
    for counts in plans:
        surgery = net.prune(mode, Plan.from_counts(counts, net.rankings))
        assert count_parameters(net.model) == costs.count("params", np.array([counts]))[0]
        surgery.undo()


def test_an_optimizer_gets_a_created_bias_in_its_weights_parameter_group():
    model, x = make("Joined")
    heads = list(model.head.parameters())
    rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 0.1}, {"params": heads, "lr": 0.2}])
    model(x).square().sum().backward()
    optimizer.step()
    net = Prepared(model, x)
    surgery = net.prune()
    repair_optimizers([optimizer], surgery)
    first, second = optimizer.param_groups
    assert {id(p) for p in second["params"]} == {id(model.head.weight), id(model.head.bias)}
    assert {id(p) for g in (first, second) for p in g["params"]} == {id(p) for p in model.parameters()}
    assert sum(len(g["params"]) for g in (first, second)) == len(list(model.parameters()))
    bias = model.head.bias.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert (model.head.bias - bias).abs().min() > 0.1


def test_a_created_bias_is_frozen_where_its_weight_is():
    model, x = make("Joined")
    model.head.requires_grad_(False)
    net = Prepared(model, x)
    net.prune()
    assert not model.head.bias.requires_grad
    assert model.inner.bias.requires_grad


def test_a_replaced_bias_keeps_its_flag_its_attributes_and_its_gradient():
    model, x = make("Autoencoder")
    bias = model.classifier.bias
    bias.requires_grad_(False)
    bias.no_decay = True
    kept = model.decoder[2].bias
    kept.grad = torch.randn_like(kept)
    net = Prepared(model, x)
    surgery = net.prune()
    assert model.classifier.bias is not bias
    assert model.classifier.bias.no_decay
    assert not model.classifier.bias.requires_grad
    assert torch.equal(model.decoder[2].bias.grad, kept.grad)
    assert model.decoder[2].bias.grad is not kept.grad
    surgery.undo()
    assert model.classifier.bias is bias


def test_tied_weights_are_left_to_themselves():
    case = zoo.BY_NAME["Transformer"]
    model, tokens = case.make()
    net = Prepared(model, tokens)
    readers = net.compensation().readers
    assert "head" not in readers
    assert "layer.linear1" in readers
    without = net.prune("none")
    tied = model.head.weight.detach().clone()
    without.undo()
    net.prune()
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, tied)
    assert model(tokens).isfinite().all()


def test_a_bias_that_two_layers_share_stays_one_and_is_not_changed_for_both():
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    twin.append(nn.Linear(4, 2))
    twin[4].bias = twin[2].bias
    bias = twin[2].bias.detach().clone()
    y = torch.randn(20, 5)
    net = Prepared(twin, y)
    net.plan = Plan(tuple((0, 1) if group.name == "0" else () for group in net.groups))
    net.prune()
    assert twin[4].bias is twin[2].bias
    assert torch.equal(twin[2].bias, bias)


@pytest.mark.parametrize("mode", ["bias", "least_squares"])
@pytest.mark.parametrize("kind", BROKEN)
def test_nothing_in_the_data_makes_a_weight_nan(kind, mode):
    for seed in range(4):
        model, x = broken_channels(kind)
        healthy = torch.randn(5, 6)
        gone = torch.zeros(12, dtype=torch.bool)
        net = Prepared(model, x, seed=seed)
        if kind in ("nan channel", "infinite channel"):  # the bad channel goes
            net.plan = Plan(((4, *range(5 + seed, 12)), *net.plan.removed[1:]))
        finite = {n for n, p in model.named_parameters() if p.isfinite().all()}
        net.prune(mode)
        gone[list(net.plan.removed[0])] = True
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all() or name not in finite
        assert model(healthy).isfinite().all()
        net.model.zero_grad()


@pytest.mark.parametrize("kind", ["rank-deficient", "constant", "dead", "duplicated", "few samples", "one sample"])
def test_what_the_calibration_data_cannot_tell_apart_costs_nothing_on_them(kind):
    model, x = broken_channels(kind)
    dense = model[2](model[1](model[0](x))).detach()
    net = Prepared(model, x)
    gone = {"rank-deficient": range(6, 12), "constant": range(8), "dead": range(8), "duplicated": range(1, 12)}
    net.plan = Plan((tuple(gone.get(kind, range(6, 12))), ()))
    net.prune()
    if kind not in ("rank-deficient", "few samples"):
        torch.testing.assert_close(model[2](model[1](model[0](x))), dense, rtol=1e-2, atol=1e-2)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["bias", "least_squares"])
@pytest.mark.parametrize("name", ["Autoencoder", "Residual", "Joined", "TransposedConv", "Sequence"])
def test_modules_of_any_precision_stay_in_it_and_stay_finite(name, mode, dtype):
    model, x = make(name, 200)
    reference = prepared(name, 200)
    reference.prune(mode)
    model, x = model.to(dtype), x.to(dtype)
    net = Prepared(model, x)
    assert net.plan == reference.plan
    net.prune(mode)
    for parameter in model.parameters():
        assert parameter.dtype == dtype
        assert parameter.isfinite().all()
    outputs, expected_outputs = model(x), reference.model(x.float())
    if not isinstance(outputs, tuple):
        outputs, expected_outputs = (outputs,), (expected_outputs,)
    for out, other in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(out.float(), other, rtol=0.1, atol=0.1)


QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


class Regressor(pl.LightningModule):
    def __init__(self, widths=(12, 10), seed=0):
        super().__init__()
        torch.manual_seed(seed)
        sizes = [6, *widths]
        hidden = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.net = nn.Sequential(*[layer for pair in hidden for layer in pair], nn.Linear(sizes[-1], 2, bias=False))

    def loss(self, batch):
        x, y = batch
        loss = F.mse_loss(self.net(x.clone()), y)
        x.zero_()  # a careless user: the batch changes in place
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Data(torch.utils.data.Dataset):
    """A fresh pair at each reading, so that only what the round itself does can change it."""

    def __init__(self, n, seed):
        torch.manual_seed(seed)
        x = torch.randn(n, 6)
        self.pairs = TensorDataset(x, torch.stack([x[:, 0] * x[:, 1], x[:, 2:].sum(1)], 1))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]


def fitted(callback, epochs=2, model=None, seed=0):
    model = model or Regressor(seed=seed)
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[callback], **QUIET)
    loader = DataLoader(Data(64, 1), batch_size=16, shuffle=True)
    trainer.fit(model, loader, DataLoader(Data(40, 2), batch_size=20))
    return model, callback.results[0]


def pruning(**kwargs):
    settings = {"target_sparsity": 0.5, "tolerance": 0.05, "search": UniformBaseline()}
    return SoftPruning(**{**settings, "report": False, "verbose": False, **kwargs})


def validated(model):
    trainer = pl.Trainer(**QUIET)
    loader = DataLoader(Data(40, 2), batch_size=20)
    return trainer.validate(copy.deepcopy(model), loader, verbose=False)[0]["val_loss"]


@pytest.mark.parametrize("compensation", MODES)
def test_the_committed_model_is_the_scored_one(compensation):
    search = SensitivitySearch(levels=4, refine=2)
    model, result = fitted(pruning(compensation=compensation, search=search, finetune_epochs=0))
    assert result.applied
    assert result.score_after == pytest.approx(validated(model), abs=1e-6)
    assert result.costs_after.params == count_parameters(model)
    assert (model.net[-1].bias is None) == (compensation == "none")
    assert result.score_after == min(trial.score for trial in result.trials if trial.feasible)


def test_compensation_pays():
    trained = [fitted(pruning(compensation=mode, epochs=15, finetune_epochs=0), epochs=16) for mode in MODES]
    none, _, least_squares = (result.score_after for _, result in trained)
    assert least_squares < none


@pytest.mark.slow
@pytest.mark.parametrize("compensation", MODES)
def test_the_same_seed_gives_the_same_weights(compensation):
    (first, one), (second, other) = (fitted(pruning(compensation=compensation), epochs=3) for _ in range(2))
    assert one.trials[0].coefficients == other.trials[0].coefficients
    assert one.score_after == other.score_after
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_created_bias_is_trained_on():
    model, _ = fitted(pruning(epochs=1), epochs=1 + 1, model=(net := Regressor()))
    before, _ = fitted(pruning(epochs=1, finetune_epochs=0), epochs=2)
    assert model is net
    assert model.net[-1].bias.shape == before.net[-1].bias.shape
    assert not torch.equal(model.net[-1].bias, before.net[-1].bias)


def test_calibration_changes_no_sample_and_no_random_number_of_the_run():
    class Draws(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append((batch[0].clone(), torch.rand(())))

    def run(callbacks):
        pl.seed_everything(0, verbose=False)
        trainer = pl.Trainer(max_epochs=2, callbacks=[draws := Draws(), *callbacks], **QUIET)
        data = Data(64, 1)
        trainer.fit(Regressor(), DataLoader(data, batch_size=16, shuffle=True), DataLoader(Data(40, 2), batch_size=20))
        return draws.seen, data.pairs.tensors

    (plain, data), (pruned, data_after) = run([]), run([pruning()])
    assert len(plain) == len(pruned) == 8
    for (batch, number), (other, drawn) in zip(plain, pruned, strict=True):
        assert torch.equal(batch, other)
        assert torch.equal(number, drawn)
    assert all(torch.equal(a, b) for a, b in zip(data, data_after, strict=True))


@pytest.mark.parametrize(
    "search", [SensitivitySearch(levels=4), GradientSearch(steps=3)], ids=lambda search: type(search).__name__
)
def test_sensitivity_curves_are_in_the_result_and_survive_json(search):
    _, result = fitted(pruning(search=search))
    assert [curve.group for curve in result.sensitivity] == [group.name for group in result.groups]
    for curve in result.sensitivity:
        assert curve.coefficients[0] == 0.0
        assert curve.scores[0] == pytest.approx(result.score_before)
        assert len(set(curve.scores)) > 1
        assert list(curve.coefficients) == sorted(curve.coefficients)
    assert PruningResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "levels"), [(4, 10), (8, 10), (16, 10), (32, 4)])
def test_evaluations_grow_at_most_linearly_with_the_number_of_groups(groups, levels):
    model = Regressor(widths=(11,) * groups)
    search = SensitivitySearch(levels=levels)
    callback = pruning(search=search, epochs=0, finetune_epochs=0, search_batches=1)
    _, result = fitted(callback, epochs=1, model=model)
    assert len(result.groups) == groups
    assert result.evaluations <= levels * groups + 6
    on_part = {trial.coefficients for trial in result.trials if trial.share < 1}
    rescored = sum(trial.share == 1 and trial.coefficients in on_part for trial in result.trials)
    assert 1 <= rescored <= 6  # finalists on all data, and the chosen plan refitted
    assert 1 + len(result.trials) - rescored <= result.evaluations <= 2 + len(result.trials) - rescored
