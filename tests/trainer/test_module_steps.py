"""Groups are probed on a few samples where that shows as much as whole batches do."""

import copy
from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_softprune.round.preparing.prepare as prepare
import lightning_softprune.round.preparing.problem as problem
import lightning_softprune.round.preparing.tracing as tracing
from lightning_softprune import UniformBaseline, find_groups, prune
from lightning_softprune.graph.layer_types.pruned_attention import PrunedMultiheadAttention
from lightning_softprune.round.preparing.tracing import PROBE_SAMPLES
from lightning_softprune.trainer import ModuleRunner
from lightning_softprune.trainer.module_steps import (
    StepsOfAllKinds,
    code_in_training,
    head_of_batch,
    reads_its_mode,
    run_steps,
)
from support.modules import AutoEncoder, loaders, made, trainer_of

pytestmark = pytest.mark.usefixtures("one_thread")
Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(8.0),
        (torch.ones(8, 3), torch.ones(8)),
        [torch.ones(8, 3), {"a": (torch.ones(8, 2, 2),)}],
        OrderedDict(x=torch.ones(8)),
        defaultdict(list, x=torch.ones(8)),
        Pair(torch.ones(8, 1), torch.ones(8)),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_of_tensors_of_one_length_are_cut_and_keep_their_type(batch):
    shorter = head_of_batch(batch, 5)
    assert type(shorter) is type(batch)
    whole, cut = (torch.utils._pytree.tree_flatten(value) for value in (batch, shorter))
    assert whole[1] == cut[1]
    assert all(torch.equal(a[:5], b) for a, b in zip(whole[0], cut[0], strict=True))
    assert torch.utils._pytree.tree_flatten(head_of_batch(batch, 50))[0][0].shape == whole[0][0].shape


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(7, 8), torch.ones(8)),
        {"x": torch.ones(8), "names": list("abcdefgh")},
        (torch.ones(8), torch.tensor(1.0)),
        (torch.ones(8), None),
        (torch.ones(8), 0.5),
        "abc",
        (),
    ],
    ids=str,
)
def test_any_other_batch_stays_whole(batch):
    assert head_of_batch(batch, 5) is batch


def test_no_number_cuts_nothing():
    batch = torch.ones(8)
    assert head_of_batch(batch, None) is batch


GIVEN: list[int] = []


class Counting(AutoEncoder):
    """Its training step notes how many samples it is given; it may insist on whole batches, or do more with them."""

    validated = 0

    def __init__(self, whole=False, more=False):
        super().__init__()
        self.whole, self.more = whole, more

    def validation_step(self, batch, batch_idx):
        Counting.validated += 1
        super().validation_step(batch, batch_idx)

    def loss(self, batch):
        size = len(batch[0])
        GIVEN.append(size)
        if self.whole and size < 48:
            raise ValueError("give me all of them")
        if self.more and size >= 48:
            self.encoder[1](batch[0])
        return super().loss(batch)


def round_of(module, **more):
    x = torch.randn(96, next(iter(loaders(module)["val_dataloaders"]))[0].shape[1], generator=torch.manual_seed(0))
    data = DataLoader(TensorDataset(x), batch_size=48)
    result = prune(
        module, train_dataloaders=data, val_dataloaders=data, search=UniformBaseline(), tolerance=0.05,
        verbose=False, report=False, **more,
    )  # fmt: skip
    return result, x


def test_probing_on_a_few_samples_finds_what_whole_batches_find(monkeypatch):
    seen = {}
    original = tracing.probe_with_counts

    def probe_with_counts(*given):
        model = given[0]
        GIVEN.clear()
        found = original(*given)
        seen[model.whole, model.more] = set(GIVEN)
        return found

    monkeypatch.setattr(tracing, "probe_with_counts", probe_with_counts)
    results = {}
    for whole, more in ((False, False), (True, False), (False, True)):
        module = made(Counting, whole=whole, more=more)
        results[whole, more], _ = round_of(module)
    assert seen[False, False] == {PROBE_SAMPLES}
    assert seen[True, False] == {48}, "fewer samples do not run"
    assert seen[False, True] == {48}, "fewer samples run other layers"
    groups = [[(g.name, g.channels_before) for g in result.groups] for result in results.values()]
    assert groups[0] == groups[1] == groups[2]
    assert all(result.applied for result in results.values())


def test_a_round_runs_whole_batches_once_to_trace_and_counts_their_calls_meanwhile(monkeypatch):
    """What probing is compared with is what tracing has run."""
    given, original = [], tracing.trace_model

    def trace_model(*args):
        GIVEN.clear()
        found = original(*args)
        given.append(list(GIVEN))
        GIVEN.clear()
        return found

    def probe_with_counts(*args):
        given.append(list(GIVEN))
        return probe(*args)

    probe = tracing.probe_with_counts
    monkeypatch.setattr(tracing, "trace_model", trace_model)
    monkeypatch.setattr(tracing, "probe_with_counts", probe_with_counts)
    round_of(made(Counting))
    assert given == [[48], [PROBE_SAMPLES]]  # of the training step, which notes them


@pytest.mark.parametrize("compensation", ["least_squares", "none"])
def test_the_rehearsal_trains_the_pruned_network_and_does_not_validate_it_again(monkeypatch, compensation):
    """A plan was scored on all batches, and timed."""
    ran, original = [], ModuleRunner.rehearse

    def rehearse(self):
        validated, trained = Counting.validated, len(GIVEN)
        original(self)
        ran.append((Counting.validated - validated, len(GIVEN) - trained))

    monkeypatch.setattr(ModuleRunner, "rehearse", rehearse)
    result, _ = round_of(made(Counting), compensation=compensation)
    assert result.applied
    assert ran == [(0, 1)]


def test_costs_are_counted_while_the_validation_step_is_traced(monkeypatch):
    counted, original = [], problem.CostModel.build

    def build(*args):
        counted.append(Counting.validated)
        return original(*args)

    def rank(*args):
        counted.append(Counting.validated)
        return ranked(*args)

    ranked = prepare.rank
    monkeypatch.setattr(problem.CostModel, "build", build)
    monkeypatch.setattr(prepare, "rank", rank)
    result, _ = round_of(made(Counting))
    assert len(set(counted)) == 1, "no step of its own"
    assert result.costs_before.macs == sum(
        layer.weight.numel() for layer in made(Counting).modules() if isinstance(layer, torch.nn.Linear)
    )


def test_a_round_looks_for_positions_on_a_few_samples_first(monkeypatch):
    given, original = [], prepare.find_read_positions

    def find_read_positions(*args):
        GIVEN.clear()
        found = original(*args)
        given.append(set(GIVEN))
        return found

    monkeypatch.setattr(prepare, "find_read_positions", find_read_positions)
    round_of(made(Counting))
    assert given == [{PROBE_SAMPLES}]


def test_a_layer_that_runs_the_first_time_only_does_not_keep_probes_from_few_samples():
    """Tracing runs a model once more where it makes some of its layers when it first runs."""

    class Warming(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.once, self.is_warm = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), False

        def forward(self, x):
            x = x if self.is_warm else self.once(x)
            self.is_warm = True
            return self.layer(x)

    module, sizes = Warming(), []

    def make(samples=None, shown=False):
        def step():
            sizes.append(samples or 48)
            return module(torch.ones(samples or 48, 2))

        return step

    steps = StepsOfAllKinds(module, ([make], []), lambda flag: flag)
    for _ in range(2):
        run_steps(steps.steps())
    assert steps.calls_of_first(training=False) == {"": 1, "layer": 1}
    assert steps.calls_of_first(training=True) is None
    for few in (4, 8):
        sizes.clear()
        run_steps(steps.on_few(few))
        run_steps(steps.on_few(few))
        assert sizes == [few] * 3, "one to see that it runs the same layers"


class Plain(AutoEncoder):
    """An autoencoder that logs nothing at the end of an epoch."""

    def on_validation_epoch_end(self):
        pass


class Momentum(Plain):
    """Its training step moves a copy of the encoder, as momentum encoders are; validation compares the two."""

    way = "lerp"

    def __init__(self):
        super().__init__()
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.target.parameters():
                parameter.mul_(1.5)

    def training_step(self, batch, batch_idx):
        if self.way == "with gradients":  # before it moves anything
            x = batch[0].clone().requires_grad_()
            torch.autograd.grad(self(x).sum(), x)
        with torch.no_grad():
            if self.way == "lists":
                torch._foreach_mul_([*self.target.parameters()], 0.7)
                torch._foreach_add_([*self.target.parameters()], [*self.encoder.parameters()], alpha=0.3)
            for own, other in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
                if self.way == "lists" or (self.way == "in training" and not self.training):
                    break
                if self.way in ("lerp", "in training", "with gradients"):
                    own.lerp_(other, 0.3)
                elif self.way == "data":
                    own.data.mul_(0.7).add_(0.3 * other.data)
                else:
                    own.data = 0.7 * own.data + 0.3 * other.data
        return super().training_step(batch, batch_idx) + self.apart(batch)

    def apart(self, batch):
        return (self.encoder(batch[0]) - self.target(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.apart(batch))


@pytest.mark.parametrize("way", ["lerp", "data", "new data", "in training", "with gradients", "lists"])
def test_what_training_moves_by_itself_is_put_back_while_a_round_looks_at_the_module(way, tmp_path):
    module = made(Momentum)
    module.way = way
    before = {name: value.clone() for name, value in module.target.state_dict().items()}
    result = prune(
        module, **loaders(module), monitor="val_loss", target_sparsity=0.4, twins={"target": "encoder"},
        search=UniformBaseline(), compensation="none", tolerance=0.1, report=False, verbose=False,
    )  # fmt: skip
    assert result.applied
    for name, value in module.target.state_dict().items():
        rows = value.reshape(len(value), -1)
        kept = before[name].reshape(len(before[name]), -1)
        assert all(any(set(row.tolist()) <= set(old.tolist()) for old in kept) for row in rows), name
    (metrics,) = trainer_of(tmp_path).validate(module, loaders(module)["val_dataloaders"], verbose=False)
    assert result.score_after == pytest.approx(metrics["val_loss"], rel=1e-5)


class Penalised(AutoEncoder):
    """Its training step takes gradients itself; they add nothing to the loss."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        loss = super().training_step([x, *batch[1:]], batch_idx)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 0.0 * slope.square().mean()


def test_a_step_that_takes_gradients_is_looked_at_like_any_other():
    found = {}
    for kind in (AutoEncoder, Penalised):
        module = made(kind)
        result = prune(module, **loaders(module), monitor="val_loss", target_sparsity=0.4, report=False, verbose=False)
        found[kind] = [trial.coefficients for trial in result.trials], module.state_dict()
        batch = next(iter(loaders(module)["val_dataloaders"]))
        assert any(group.prunable for group in find_groups(made(kind), batch))
    assert found[AutoEncoder][0] == found[Penalised][0]
    for (name, one), (_, other) in zip(*(state.items() for _, state in found.values()), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


class Handing(Plain):
    """Its validation hands what the network gives to NumPy, as metrics of other libraries want it."""

    def validation_step(self, batch, batch_idx):
        reconstruction = self(batch[0])
        error = np.square(reconstruction.cpu().numpy() - batch[0].cpu().numpy()).mean()
        self.log("val_loss", float(error))


def test_validation_may_hand_its_outputs_to_numpy():
    module, plain = made(Handing), made()
    batch = next(iter(loaders(module)["val_dataloaders"]))
    assert [(g.name, g.prunable) for g in find_groups(module, batch)] == [
        (g.name, g.prunable) for g in find_groups(plain, batch)
    ]
    result = prune(module, **loaders(module), monitor="val_loss", target_sparsity=0.4, report=False, verbose=False)
    assert result.applied


class Concepts(Plain):
    """In training it also gives the first features, which have a meaning of their own."""

    asks = True

    def forward(self, x):
        features = self.encoder(x)
        if self.training or not self.asks:
            return self.decoder(features), features[:, :2]
        return self.decoder(features)

    def training_step(self, batch, batch_idx):
        found = self(batch[0])
        pictures, concepts = found if isinstance(found, tuple) else (found, None)
        loss = (pictures - batch[0]).square().mean()
        return loss if concepts is None else loss + (concepts - batch[0][:, :2]).square().mean()

    def validation_step(self, batch, batch_idx):
        found = self(batch[0])
        self.log("val_loss", ((found[0] if isinstance(found, tuple) else found) - batch[0]).square().mean())


@pytest.mark.parametrize("asks", [True, False], ids=["in training only", "always"])
def test_what_only_training_reads_by_position_stays(asks):
    module = made(Concepts)
    module.asks = asks
    batch = next(iter(loaders(module)["val_dataloaders"]))
    refused = [group.name for group in find_groups(module, batch) if not group.prunable]
    assert "encoder.2" in refused
    result = prune(module, **loaders(module), monitor="val_loss", target_sparsity=0.3, report=False, verbose=False)
    assert "encoder.2" not in [group.name for group in result.groups]
    assert module.training


def test_layers_and_what_is_in_eval_mode_are_not_told_that_they_train():
    module = made(Concepts)
    module.encoder.add_module("norm", torch.nn.BatchNorm1d(8))
    module.frozen = made(Concepts).eval()
    code_in_training(module)
    assert module.training
    assert not module.encoder.norm.training
    assert not module.frozen.training
    code_in_training(module.eval())
    assert module.frozen.training
    assert reads_its_mode(module)
    assert not reads_its_mode(made())


def test_pruned_attention_is_a_layer_like_any_and_not_told_that_it_trains():
    module = made()
    module.attention = torch.nn.MultiheadAttention(8, 2, dropout=0.5)
    module.attention.__class__ = PrunedMultiheadAttention  # as surgery makes one
    code_in_training(module)
    assert module.training
    assert not module.attention.training
    assert not reads_its_mode(module)
