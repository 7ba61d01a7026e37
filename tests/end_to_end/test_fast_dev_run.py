"""`Trainer(fast_dev_run=...)`: a whole round is rehearsed with one plan, and nothing of it is left."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from lightning_softprune import GradientSearch, GridSearch, RandomSearch, SensitivitySearch, prune
from lightning_softprune.results import Outcome
from support.modules import (
    AutoEncoder,
    ConvClassifier,
    Manual,
    assert_same,
    count,
    fit,
    loaders,
    made,
    softpruning,
    trainer_of,
    training_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Scheduled(AutoEncoder):
    """Momentum and two schedules, and a loss that is logged at the end of the epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_mean", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Last(Callback):
    """The state at the very end of training."""

    def on_train_end(self, trainer, pl_module):
        self.found = training_state(trainer, pl_module)
        self.found.pop("objects"), self.found.pop("held")  # of another module in the run to compare with
        self.buffers = copy.deepcopy(dict(pl_module.named_buffers()))


def dev_run(tmp_path, module, *callbacks, batches=True, **arguments):
    last = Last()
    fit(tmp_path, module, *callbacks, last, fast_dev_run=batches, max_epochs=9, **arguments)
    return last


@pytest.mark.parametrize("batches", [True, 3])
@pytest.mark.parametrize("kind", [AutoEncoder, ConvClassifier, Manual, Scheduled])
@pytest.mark.parametrize("epochs", [0, 4, [2, 8]], ids=str)
def test_the_run_is_bit_identical_to_one_without_the_callback(tmp_path, kind, batches, epochs):
    expected = dev_run(tmp_path, made(kind), batches=batches)
    module = made(kind)
    parameters = dict(module.named_parameters())
    callback = softpruning(epochs=epochs, report=True)
    last = dev_run(tmp_path, module, callback, batches=batches)
    assert_same(last.found, expected.found)
    assert_same(last.buffers, expected.buffers)
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    [result] = callback.results
    assert (result.outcome, result.applied) == (Outcome.DRY_RUN, False)
    assert list(tmp_path.rglob("*")) == [], "no report, no journal"


@pytest.mark.parametrize(
    "search", [GridSearch(levels=3), GradientSearch(), SensitivitySearch(), RandomSearch()], ids=repr
)
def test_one_plan_is_scored_whatever_the_strategy(tmp_path, search):
    callback = softpruning(epochs=3, search=search, target_sparsity=0.6, compensation="none")
    dev_run(tmp_path, made(), callback)
    [result] = callback.results
    assert (len(result.trials), result.evaluations) == (1, 2), "the baseline and the plan"
    assert abs(result.sparsity - 0.6) <= 0.03
    assert result.epoch == 3
    coefficients = result.trials[0].coefficients
    assert max(coefficients) - min(coefficients) < 1e-6, "the same everywhere"


def test_of_several_rounds_the_last_is_rehearsed(tmp_path):
    callback = softpruning(epochs=[0, 3, 5], target_sparsity=[0.2, 0.4, 0.7])
    dev_run(tmp_path, made(), callback)
    [result] = callback.results
    assert (result.epoch, result.target_sparsity) == (5, 0.7)
    assert abs(result.sparsity - 0.7) <= 0.03


class Picky(AutoEncoder):
    """Its training, and nothing else, relies on a width."""

    def training_step(self, batch, batch_idx):
        if self.encoder[0].out_features < 16 and self.training:
            raise ZeroDivisionError("the user's own")
        return super().training_step(batch, batch_idx)


MISTAKES = {
    "monitor": (AutoEncoder, {"monitor": "val_typo"}, "val_typo"),
    "constraint": (AutoEncoder, {"constraints": ["val_typo > 3"]}, "val_typo"),
    "nothing to prune": (AutoEncoder, {"ignore": ["*"]}, "nothing that can be pruned"),
    "target": (AutoEncoder, {"target_sparsity": 0.999}, "target_sparsity=0.999"),
    "limits": (AutoEncoder, {"limits": {"macs": 0.001}}, "limits"),
    "bounds": (AutoEncoder, {"bounds": {"typo": [0.1, 0.2]}}, "typo"),
    "grid": (AutoEncoder, {"search": GridSearch(levels=2000)}, "levels"),
    "names": (AutoEncoder, {"ignore": ["typo"]}, "typo"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("epochs", [0, 4])
def test_a_mistake_is_found_at_once(tmp_path, mistake, epochs):
    kind, arguments, said = MISTAKES[mistake]
    module = made(kind)
    with pytest.raises(MisconfigurationException, match=said):
        dev_run(tmp_path, module, softpruning(epochs=epochs, **arguments))
    assert count(module) == count(made(kind))


def test_what_the_pruned_module_cannot_do_is_found_and_taken_back(tmp_path):
    module = made(Picky)
    parameters = dict(module.named_parameters())
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        dev_run(tmp_path, module, softpruning(epochs=4))
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    assert (module.encoder[0].out_features, list(tmp_path.rglob("*"))) == (16, [])


@pytest.mark.parametrize("violation", ["skip", "prune", "error"])
@pytest.mark.parametrize("target", [0.5, None])
def test_constraints_that_an_untrained_model_cannot_meet_are_no_mistake(tmp_path, violation, target):
    callback = softpruning(epochs=4, target_sparsity=target, constraints=["val_loss < 0"], on_violation=violation)
    dev_run(tmp_path, made(), callback)
    [result] = callback.results
    assert not result.applied
    assert not any(trial.feasible for trial in result.trials)
    assert 0.3 < result.sparsity < 0.6


def test_scores_that_are_no_number_are_no_mistake(tmp_path):
    class Nan(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            self.mse.update(self(batch[0]), batch[0])
            self.log("val_loss", self.loss(batch) * torch.nan)

    callback = softpruning(epochs=4)
    dev_run(tmp_path, made(Nan), callback)
    assert callback.results[0].outcome == Outcome.DRY_RUN


@pytest.mark.filterwarnings("ignore:.*Swapping scheduler.*")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(0.1, 0.5)]
)
def test_averaged_weights_are_as_without_the_callback(tmp_path, averaging, first):
    expected = dev_run(tmp_path, made(), averaging(), batches=3)
    callback = softpruning(epochs=4)
    both = [callback, averaging()] if first else [averaging(), callback]
    assert_same(dev_run(tmp_path, made(), *both, batches=3).found, expected.found)
    assert len(callback.results) == 1


@pytest.mark.slow
def test_a_fit_afterwards_is_as_if_there_had_been_no_trial(tmp_path):
    weights = []
    for tried in (False, True):
        callback = softpruning(epochs=1, finetune_epochs=1)
        if tried:
            dev_run(tmp_path, made(), callback)
        module = made()
        trainer = fit(tmp_path, module, callback, max_epochs=4)
        assert trainer.current_epoch == 2
        assert [result.outcome for result in callback.results] == [Outcome.APPLIED]
        weights.append(copy.deepcopy(module.state_dict()))
    assert_same(weights[1], weights[0])


def test_a_checkpoint_saved_after_a_trial_has_no_round(tmp_path):
    callback = softpruning(epochs=1)
    trainer = fit(tmp_path, made(), callback, fast_dev_run=True)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["SoftPruning"]["results"] == []


@pytest.mark.parametrize("verbose", [True, False])
def test_the_trial_is_printed_where_rounds_are(tmp_path, capsys, verbose):
    dev_run(tmp_path, made(), softpruning(epochs=4, verbose=verbose, report=True))
    printed = capsys.readouterr().out
    assert ("this was a dry run" in printed) == verbose
    assert "Report:" not in printed


def test_pruning_at_once_with_such_a_trainer_trains_nothing_and_prunes_nothing(tmp_path):
    module = made()
    before = copy.deepcopy(module.state_dict())
    trainer = trainer_of(tmp_path, fast_dev_run=True)
    result = prune(module, **loaders(module), trainer=trainer, verbose=False, report=False, tolerance=0.03)
    assert result.outcome == Outcome.DRY_RUN
    assert_same(module.state_dict(), before)
    assert module.losses == []


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_without_validation_data_the_trial_says_so(tmp_path):
    data = {"train_dataloaders": loaders(made())["train_dataloaders"]}
    with pytest.raises(MisconfigurationException, match="val_dataloaders"):
        fit(tmp_path, made(), softpruning(epochs=2), data=data, fast_dev_run=True)


def test_layers_keep_their_widths(tmp_path):
    module = made(norm=True)
    dev_run(tmp_path, module, softpruning(epochs=4), batches=2)
    assert [layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)] == [16, 8, 16, 12]
