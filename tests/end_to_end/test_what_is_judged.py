"""Only what validation judges is pruned and counted; what is read by position, or by a branch not seen, stays."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_softprune import RandomSearch, find_groups, prune
from support.modules import FEATURES, AutoEncoder, count, fit, loaders, made, softpruning, trainer_of, vectors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def mlp(*sizes):
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def widths(module):
    return [layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)]


class WithLossNetwork(AutoEncoder):
    """A frozen network of the loss, which training alone runs."""

    def __init__(self):
        super().__init__()
        self.perceptual = mlp(FEATURES, 40, 20, 6).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        return F.mse_loss(self.perceptual(out), self.perceptual(batch[0])) + F.mse_loss(out, batch[0])


class WithProjection(AutoEncoder):
    """A projection head on the latent space, for a contrastive loss."""

    def __init__(self):
        super().__init__()
        self.projection = mlp(8, 30, 7)

    def training_step(self, batch, batch_idx):
        latent = self.encoder(batch[0])
        return self.projection(latent).square().mean() * 1e-3 + F.mse_loss(self.decoder(latent), batch[0])


class FeatureDistance(torchmetrics.Metric):
    """A metric with a network of its own."""

    def __init__(self):
        super().__init__()
        self.network = mlp(FEATURES, 24, 24, 4).requires_grad_(False)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, one, other):
        self.total += F.mse_loss(self.network(one), self.network(other))

    def compute(self):
        return self.total


class WithMetricNetwork(AutoEncoder):
    def __init__(self):
        super().__init__()
        self.distance = FeatureDistance()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.distance.update(self(batch[0]), batch[0])
        self.log("val_distance", self.distance)


@pytest.mark.parametrize(
    ("kind", "part"),
    [(WithLossNetwork, "perceptual"), (WithProjection, "projection"), (WithMetricNetwork, "distance")],
)
def test_only_what_validation_judges_is_pruned_and_counted(tmp_path, kind, part):
    module, callback = made(kind), softpruning(target_sparsity=0.5)
    outside = widths(getattr(module, part))
    judged = count(module.encoder) + count(module.decoder)
    fit(tmp_path, module, callback)
    (result,) = callback.results
    assert widths(getattr(module, part)) == outside
    assert result.costs_before.params == judged
    assert result.costs_after.params == count(module.encoder) + count(module.decoder)
    assert result.sparsity == pytest.approx(1 - result.costs_after.params / judged, abs=1e-6)
    assert abs(result.sparsity - 0.5) <= 0.03
    assert {group.name for group in result.groups} == {"encoder.0", "encoder.2", "decoder.0"}
    reasons = [left.reason for left in result.left_out if left.name.startswith(part)]
    assert reasons
    assert all("validation does not use" in reason or "a metric" in reason or "output" in reason for reason in reasons)


class Measured(AutoEncoder):
    """A frozen network beside the trained one, which validation runs as well; what they do with each other is a method.

    The metric that is monitored does not depend on it.
    """

    def __init__(self, by, inputs=FEATURES, outputs=FEATURES):
        super().__init__()
        self.by, self.beside = by, mlp(inputs, 40, 20, outputs).requires_grad_(False)

    def loss(self, batch):
        return getattr(self, self.by)(batch[0], self(batch[0]))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_whole", self.loss(batch))

    def perceptual(self, x, out):
        return F.l1_loss(self.beside(out), self.beside(x)) + 0.1 * F.mse_loss(out, x)

    def perceptual_of_features(self, x, out):
        first = self.beside[:2]
        return sum((a - b).square().mean() for a, b in zip(map(first, (out, out)), map(first, (x, x)), strict=True))

    def regression(self, x, out):
        return F.mse_loss(out, self.beside(x))

    def distillation(self, x, out):
        return F.kl_div(out.log_softmax(-1), self.beside(x).softmax(-1), reduction="batchmean")

    def cosine(self, x, out):
        return 1 - F.cosine_similarity(out, self.beside(x)).mean()

    def branch(self, x, out):
        return F.mse_loss(out + self.beside(x), x)

    def input_stage(self, x, out):
        return F.mse_loss(self(self.beside(x)), x) + 0 * out.sum()

    def output_stage(self, x, out):
        return F.mse_loss(self.beside(out), x)


class Unheld(Measured):
    """It is not told to be frozen, but no optimizer holds it."""

    def __init__(self, by):
        super().__init__(by)
        self.beside.requires_grad_()

    def configure_optimizers(self):
        return torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], 1e-3)


MEASURING = ["perceptual", "perceptual_of_features", "regression", "distillation", "cosine"]


@pytest.mark.parametrize(("kind", "by"), [*((Measured, by) for by in MEASURING), (Unheld, "perceptual")])
def test_a_frozen_network_that_only_measures_is_neither_pruned_nor_counted_where_validation_runs_it(tmp_path, kind, by):
    module, callback = made(kind, by=by), softpruning(target_sparsity=0.5)
    judged, whole = count(module.encoder) + count(module.decoder), widths(module.beside)
    fit(tmp_path, module, callback)
    (result,) = callback.results
    assert widths(module.beside) == whole
    assert result.costs_before.params == judged
    assert abs(result.sparsity - 0.5) <= 0.03
    kind = "a loss network" if by.startswith("perceptual") else "a teacher"
    reasons = {left.reason.partition(":")[0] for left in result.left_out if left.name.startswith("beside")}
    assert f"it is inside of beside, {kind}" in reasons
    batch = next(iter(loaders(module)["val_dataloaders"]))
    found = [group for group in find_groups(made(Measured, by=by), batch) if group.name.startswith("beside")]
    assert found
    assert not any(group.prunable for group in found)


@pytest.mark.filterwarnings("ignore:.LightningModule.configure_optimizers. returned")
def test_without_optimizers_frozen_is_what_requires_no_gradients():
    class Unoptimized(Measured):
        def configure_optimizers(self):
            return None

    module = made(Unoptimized, by="perceptual")
    judged = count(module.encoder) + count(module.decoder)
    result = prune(module, **loaders(module), search=softpruning().search, target_sparsity=0.5, tolerance=0.1,
                   verbose=False, report=False)  # fmt: skip
    assert widths(module.beside) == [40, 20, FEATURES]
    assert result.costs_before.params == judged


@pytest.mark.parametrize("by", ["branch", "input_stage", "output_stage"])
def test_a_frozen_part_of_the_network_is_pruned(by):
    batch = next(iter(loaders(made())["val_dataloaders"]))
    groups = {group.name: group for group in find_groups(made(Measured, by=by), batch)}
    assert groups["beside.0"].prunable
    assert groups["beside.2"].prunable


@pytest.mark.parametrize("inside", [False, True])
def test_a_target_network_that_is_a_twin_is_pruned_as_one(tmp_path, inside):
    """Also inside of a frozen module of its own."""
    module, target = made(Measured, by="regression"), mlp(FEATURES, 16, 8)  # of the encoder's shape
    module.beside = (nn.Sequential(target) if inside else target).requires_grad_(False)
    module.regression = lambda x, out: F.mse_loss(module.encoder(x), module.beside(x))
    callback, parameters = softpruning(twins={"beside.0" if inside else "beside": "encoder"}), count(module)
    fit(tmp_path, module, callback)
    assert callback.results[0].costs_before.params == parameters
    assert widths(target) == widths(module.encoder)
    assert target[0].out_features < 16


def test_what_is_ignored_counts(tmp_path):
    module, callback = made(Measured, by="regression"), softpruning(ignore=["beside"], target_sparsity=0.1)
    parameters = count(module)
    fit(tmp_path, module, callback)
    assert callback.results[0].costs_before.params == parameters
    assert widths(module.beside) == [40, 20, FEATURES]


def test_the_readers_that_only_training_runs_follow_and_do_not_count(tmp_path):
    module, callback = made(WithProjection), softpruning(target_sparsity=0.5, bounds={"encoder.2": [0.5, 0.5]})
    fit(tmp_path, module, callback)
    assert module.encoder[2].out_features == 4
    assert module.projection[0].in_features == 4
    assert module.projection[0].out_features == 30


def test_macs_of_a_metric_do_not_count(tmp_path):
    found = []
    for kind in (AutoEncoder, WithMetricNetwork):
        callback = softpruning()
        fit(tmp_path, made(kind), callback)
        found.append(callback.results[0].costs_before)
    assert found[1].params == found[0].params
    assert found[1].macs == 2 * found[0].macs  # the network itself runs twice


# ------------------------------------------------------------------------------------------------ meaning by position


class Uncertain(AutoEncoder):
    """One hidden feature has a meaning of its own; training or a log reads it by its position."""

    def __init__(self, where=0, how="loss"):
        super().__init__()
        self.where, self.how, self.kept = where, how, []

    def hidden(self, x):
        return self.encoder(x)

    def forward(self, x):
        h = self.hidden(x)
        return self.decoder(h), h[:, self.where]

    def loss(self, batch):
        mean, spread = self(batch[0])
        extra = spread.square().mean() if self.how == "loss" else 0.0
        return F.mse_loss(mean, batch[0]) + extra

    def validation_step(self, batch, batch_idx):
        mean, spread = self(batch[0])
        self.mse.update(mean, batch[0])
        self.log("val_loss", F.mse_loss(mean, batch[0]))
        if self.how == "log":
            self.log_dict({"val_spread": spread.mean()})
        if self.how == "kept":
            self.kept.append(spread)


@pytest.mark.parametrize("where", [0, 4, 7])
@pytest.mark.parametrize("how", ["loss", "log", "kept", "returned by forward alone"])
def test_a_feature_that_is_read_by_its_position_pins_its_group(where, how):
    module = made(Uncertain, where=where, how=how)
    groups = {group.name: group for group in find_groups(module, next(iter(loaders(module)["val_dataloaders"])))}
    reason = groups["encoder.2"].reason
    if how == "returned by forward alone":  # no step reads it, and a probe sees it
        assert "told apart by their number" in reason or (where == 7 and "with fewer channels: IndexError" in reason)
    else:
        assert f"takes channel {where} of 8 by its number" in reason
        assert "test_what_is_judged.py:" in reason
    assert reason.endswith("what is read by its number needs a layer of its own")
    assert groups["encoder.0"].prunable
    assert groups["decoder.0"].prunable


class Pooled(AutoEncoder):
    """All channels count alike: a norm, a mean and a softmax over them."""

    def forward(self, x):
        h = self.encoder(x)
        h = F.layer_norm(h, h.shape[1:]) + h.softmax(1) * h.mean(1, keepdim=True)
        return self.decoder(h)


def test_what_treats_all_channels_alike_pins_nothing():
    module = made(Pooled)
    groups = {group.name: group for group in find_groups(module, next(iter(loaders(module)["val_dataloaders"])))}
    assert all(groups[name].prunable for name in ("encoder.0", "encoder.2", "decoder.0"))


class EverySecond(AutoEncoder):
    """Two readers of the even and of the odd channels: at other even widths it runs, and each reads the other's."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.ModuleList([mlp(4, 16, FEATURES), mlp(4, 16, FEATURES)])

    def forward(self, x):
        h = self.encoder(x)
        return self.decoder[0](h[:, ::2]) + self.decoder[1](h[:, 1::2])


def test_channels_that_take_turns_go_in_pairs():
    module = made(EverySecond)
    groups = {group.name: group for group in find_groups(module, next(iter(loaders(module)["val_dataloaders"])))}
    assert groups["encoder.2"].prunable
    assert groups["encoder.2"].members[0].owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# ------------------------------------------------------------------------------------------------------------ branches


class Tasks(AutoEncoder):
    """Two heads, of which a training batch runs one."""

    def __init__(self, late=False):
        super().__init__()
        self.other, self.late = mlp(8, 16, FEATURES), late

    def training_step(self, batch, batch_idx):
        latent = self.encoder(batch[0])
        other = self.current_epoch >= 2 if self.late else batch_idx % 2 == 1
        return F.mse_loss((self.other if other else self.decoder)(latent), batch[0])


def test_branches_of_several_training_batches_are_traced(tmp_path):
    module, callback = made(Tasks), softpruning()
    fit(tmp_path, module, callback, max_epochs=3)
    assert callback.results[0].applied
    assert module.other[0].in_features == module.encoder[2].out_features < 8


def test_a_branch_that_no_batch_takes_pins_what_it_could_read(tmp_path):
    module, callback = made(Tasks, late=True), softpruning(target_sparsity=0.4)
    fit(tmp_path, module, callback, max_epochs=4)
    (result,) = callback.results
    assert result.applied
    reason = next(left.reason for left in result.left_out if left.name == "encoder.2")
    assert "other.0, which no traced batch ran" in reason
    assert module.other[0].in_features == module.encoder[2].out_features == 8
    assert module.encoder[0].out_features < 16


def test_a_head_that_nothing_runs_pins_what_it_could_read_until_it_is_deleted():
    def latent(**arguments):
        groups = find_groups(module, next(iter(loaders(module)["val_dataloaders"])), **arguments)
        return next(group for group in groups if group.name == "encoder.2")

    module = made(Tasks, late=True)
    assert "or delete other (None in its place)" in latent().reason
    assert "other.0, which no traced batch ran" in latent(ignore=["other"]).reason  # whose inputs stay
    module.other = None
    assert latent().prunable


class TwoLoaders(Tasks):
    """Each validation loader has a head of its own."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[0])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        out = (self.decoder, self.other)[dataloader_idx](self.encoder(batch[0]))
        self.mse.update(out, batch[0])
        self.log("val_loss", F.mse_loss(out, batch[0]))


def test_the_heads_of_all_validation_loaders_are_traced(tmp_path):
    module, callback = made(TwoLoaders), softpruning(monitor="val_loss/dataloader_idx_1")
    val = [DataLoader(vectors(16, 2), 8), DataLoader(vectors(8, 3), 8)]
    fit(tmp_path, module, callback, data={**loaders(module), "val_dataloaders": val})
    (result,) = callback.results
    assert result.costs_before.params == count(made(TwoLoaders))
    assert {"decoder.0", "other.0"} <= {group.name for group in result.groups}


class Experts(AutoEncoder):
    """The router sends samples to one of several experts; a rare one sees none in the first batches."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(mlp(8, 10, 8) for _ in range(3))

    def forward(self, x):
        h = self.encoder(x)
        number = int(x.sum() > 1e6) + 1 if x.sum() > 0 else 0
        return self.decoder(h + self.experts[number](h))


def test_a_rare_expert_pins_the_stream_it_would_read(tmp_path):
    module, callback = made(Experts), softpruning(target_sparsity=0.3)
    fit(tmp_path, module, callback)
    reasons = {left.name: left.reason for left in callback.results[0].left_out}
    assert "experts.2.0, which no traced batch ran" in reasons["encoder.2"]


# ------------------------------------------------------------------------------------------------------- other layers


class WithEmptyHead(AutoEncoder):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(8, 0)

    def forward(self, x):
        h = self.encoder(x)
        return torch.cat([self.decoder(h), self.extra(h)], 1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_is_left_alone_and_follows_what_it_reads(tmp_path):
    module, callback = made(WithEmptyHead), softpruning()
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert module.extra.weight.shape == (0, module.encoder[2].out_features)
    assert module.encoder[2].out_features < 8


class NoInputs(AutoEncoder):
    """A linear layer without inputs is a learned constant."""

    def __init__(self):
        super().__init__()
        self.constant = nn.Linear(0, 8)

    def forward(self, x):
        return self.decoder(self.encoder(x) + self.constant(x[:, :0]))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_follows_what_it_is_added_to(tmp_path):
    module, callback = made(NoInputs), softpruning()
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert module.constant.out_features == module.encoder[2].out_features


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is (deprecated|not supported).*")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_left_alone_and_the_rest_is_pruned(tmp_path):
    module = made(AutoEncoder, hidden=24)
    module.decoder[2] = torch.jit.script(nn.Sequential(nn.Linear(24, FEATURES), nn.Tanh()))
    module.decoder.add_module("3", nn.Linear(FEATURES, FEATURES))
    size, callback = count(module), softpruning(target_sparsity=0.25)
    fit(tmp_path, module, callback)
    assert callback.results[0].applied
    assert count(module) < size
    assert callback.results[0].costs_before.params == size
    assert module.decoder[0].out_features == 24, "it feeds TorchScript"
    assert all(part.training for part in module.modules())


# ------------------------------------------------------------------------------------------------------ failing trials


class Picky(AutoEncoder):
    """Its own code fails at some widths that no probe has tried."""

    def forward(self, x):
        h = self.encoder(x)
        if h.shape[1] in (3, 5):
            raise ValueError(f"{h.shape[1]} channels are not to my taste")
        return self.decoder(h)


def test_a_trial_in_which_the_users_code_fails_is_infeasible_and_the_round_goes_on(tmp_path):
    module = made(Picky)
    callback = softpruning(search=RandomSearch(num_candidates=12), tolerance=0.1)
    fit(tmp_path, module, callback)
    (result,) = callback.results
    failed = [trial for trial in result.trials if trial.reason]
    assert failed
    assert all("not to my taste" in trial.reason and not trial.feasible for trial in failed)
    assert result.applied
    assert module.encoder[2].out_features not in (3, 5)
    assert type(result).from_dict(result.to_dict()) == result


class Never(AutoEncoder):
    """Fails as soon as a search has begun."""

    armed = False

    def validation_step(self, batch, batch_idx):
        if self.armed and self.encoder[2].out_features + self.encoder[0].out_features < 16:
            raise KeyError("no such width")
        super().validation_step(batch, batch_idx)


def test_where_every_trial_fails_the_users_own_exception_goes_on(tmp_path):
    module = made(Never)
    module.armed = True
    before = {name: parameter.shape for name, parameter in module.named_parameters()}
    with pytest.raises(KeyError, match="no such width"):
        prune(module, **loaders(module), search=RandomSearch(num_candidates=3), tolerance=0.1, target_sparsity=0.7,
              verbose=False, report=False)  # fmt: skip
    assert before == {name: parameter.shape for name, parameter in module.named_parameters()}


def test_find_groups_of_a_plain_module_judges_all_that_it_runs():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert [group.prunable for group in find_groups(model, torch.randn(3, 4))] == [True, False]


def test_find_groups_says_what_to_do_where_a_step_asks_for_a_trainer():
    class AsksForTrainer(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch) * (1 + 0 * self.trainer.current_epoch))

    module = made(AsksForTrainer)
    batch = [torch.randn(5, FEATURES)]
    with pytest.raises(ValueError, match=r"validation_step asks for `self\.trainer`.*model\.trainer = Trainer\(\)"):
        find_groups(module, batch)
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert [group.prunable for group in find_groups(module, batch)] == [True, True, True, False]


def test_a_lazy_layer_that_never_runs_is_no_obstacle(tmp_path):
    class WithSpare(AutoEncoder):
        def __init__(self):
            super().__init__()
            self.spare, self.norm = nn.LazyLinear(3), nn.LazyBatchNorm1d()

        def configure_optimizers(self):
            return torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()])

    module, callback = made(WithSpare), softpruning()
    fit(tmp_path, module, callback)
    (result,) = callback.results
    assert result.applied
    assert nn.parameter.is_lazy(module.spare.weight)
    assert module.spare(torch.randn(2, 5)).shape == (2, 3)


class Lazy(AutoEncoder):
    """Its layers get their sizes when they first run."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(8))
        self.decoder = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(FEATURES))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def assert_pruned(module, result):
    assert result.applied
    assert [group.channels_before for group in result.groups] == [16, 8, 16]
    assert count(module) == result.costs_after.params
    assert module.encoder[2].in_features == module.encoder[0].out_features < 16
    assert module.decoder[0].in_features == module.encoder[2].out_features < 8


@pytest.mark.parametrize("epoch", [0, 1])
def test_lazy_layers_are_pruned_as_others_are(tmp_path, epoch):
    module, callback = made(Lazy), softpruning(epochs=epoch)
    fit(tmp_path, module, callback)
    assert_pruned(module, callback.results[0])


def test_prune_and_find_groups_take_lazy_layers():
    module = made(Lazy)
    assert [group.num_channels for group in find_groups(module, [torch.randn(5, FEATURES)])] == [16, 8, 16, FEATURES]
    module = made(Lazy)
    assert_pruned(module, prune(module, **loaders(module), search=softpruning().search, target_sparsity=0.5,
                                tolerance=0.1, verbose=False, report=False))  # fmt: skip


class LazyInTraining(AutoEncoder):
    """An auxiliary head on the latent space, which training alone runs."""

    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(FEATURES)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.mse_loss(self.head(self.encoder(batch[0])), batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.parametrize("samples", [4, 48])  # one batch is run for the first time where it is traced
def test_a_lazy_layer_that_training_alone_runs_follows(samples):
    module = made(LazyInTraining)
    result = prune(module, **loaders(module, samples), search=softpruning().search, target_sparsity=0.5, tolerance=0.2,
                   verbose=False, report=False)  # fmt: skip
    assert result.applied
    assert module.head.in_features == module.encoder[2].out_features < 8


def test_lazy_layers_made_in_inference_mode_are_said_to_be_unfit(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"encoder\.0\.weight, .*: made in inference mode"):
        trainer_of(tmp_path, softpruning()).validate(made(Lazy), DataLoader(vectors(), 8), verbose=False)


class FailsFrom(Never):
    """Fails from one call on, with every width."""

    at, calls = 0, itertools.count()

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(FEATURES, 24, 16), nn.Linear(16, FEATURES)

    def validation_step(self, batch, batch_idx):
        if self.armed and next(FailsFrom.calls) >= self.at:
            raise KeyError("the user's own")
        AutoEncoder.validation_step(self, batch, batch_idx)


@pytest.mark.parametrize("at", range(2, 26, 3))
def test_what_fails_with_every_width_is_no_reason_of_a_group(at, monkeypatch):
    monkeypatch.setattr(FailsFrom, "calls", itertools.count())
    module = made(FailsFrom)
    module.armed, module.at = True, at
    with pytest.raises(KeyError, match="the user's own"):
        prune(module, **loaders(module), search=softpruning().search, target_sparsity=0.5, tolerance=0.1,
              verbose=False, report=False)  # fmt: skip
