import csv
import errno
import json
import logging
import math
import sys
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_softprune.report.files as report_module
import lightning_softprune.round.journal as journal_module
import lightning_softprune.round.trials as trials_module
from lightning_softprune import (
    GradientSearch,
    PruningResult,
    RandomSearch,
    SensitivitySearch,
    SoftPruning,
    UniformBaseline,
    prune,
)
from lightning_softprune.round.settings import cubic_schedule
from support.modules import (
    FEATURES,
    AtEpochStart,
    AutoEncoder,
    ConvClassifier,
    Manual,
    assert_optimizers_hold_live_parameters,
    count,
    fit,
    loaders,
    made,
    plain_validate,
    softpruning,
    trainer_of,
    vectors,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights_of(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


class PassCounter(Callback):
    """Counts validation passes by a hook on the class, so that nothing can put the count back."""

    def __init__(self, kind, monkeypatch):
        self.passes, self.during = Counter(), "fit"
        counter, original = self, kind.on_validation_epoch_end

        def counting(module):
            counter.passes[counter.during] += 1
            original(module)

        monkeypatch.setattr(kind, "on_validation_epoch_end", counting)


# ------------------------------------------------------------------------------------------------------------ one fit


@pytest.mark.parametrize(
    ("kind", "monitor", "mode"),
    [(AutoEncoder, "val_psnr", "max"), (ConvClassifier, "val_acc", "max"), (Manual, "val_loss", "min")],
)
def test_one_fit_trains_searches_prunes_and_finetunes(tmp_path, kind, monitor, mode):
    module = made(kind)
    dense, shapes = count(module), {name: p.shape for name, p in module.named_parameters()}
    data = loaders(module)
    initial = weights_of(module)
    before = AtEpochStart(lambda _, m: weights_of(m))
    oracle = AtEpochStart(lambda _, m: (plain_validate(tmp_path, m, data), weights_of(m)))
    callback = softpruning(monitor=monitor, mode=mode, search=RandomSearch(num_candidates=4))
    trainer = fit(tmp_path, module, before, callback, oracle, data=data)

    [result] = callback.results
    assert result.applied
    assert count(module) < dense
    assert result.sparsity == pytest.approx(1 - count(module) / dense, abs=1e-6)
    assert result.costs_before.params == dense
    assert result.costs_after.params == count(module)
    assert abs(result.sparsity - 0.5) <= 0.03
    smaller = [name for name, p in module.named_parameters() if p.numel() < shapes[name].numel()]
    assert len(smaller) >= 4
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape), name
        if isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels) == tuple(layer.weight.shape)[:2], name
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.weight) == len(layer.running_mean), name
    assert_optimizers_hold_live_parameters(trainer, module)

    validated, at_round = oracle.found
    assert result.score_after == pytest.approx(validated[monitor], abs=1e-6)
    assert {name: result.metrics_after[name] for name in validated} == pytest.approx(validated, abs=1e-6)
    assert not torch.equal(before.found, initial), "it trains before the round"
    assert not torch.equal(weights_of(module), at_round), "and after"
    best = max if mode == "max" else min
    assert result.score_after == best(t.score for t in result.trials if t.feasible)
    assert all(abs(t.sparsity - 0.5) <= 0.03 for t in result.trials if t.feasible)
    assert trainer.current_epoch == 3
    assert all(p.shape == p.grad.shape for p in module.parameters() if p.grad is not None)


def test_the_prune_is_in_force_when_its_epoch_starts_and_not_earlier(tmp_path):
    sizes = {}

    class Sizes(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            sizes.setdefault(trainer.current_epoch, count(pl_module))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.setdefault(f"{trainer.current_epoch} begins", count(pl_module))

    module = made()
    dense = count(module)
    fit(tmp_path, module, softpruning(epochs=2), Sizes(), max_epochs=3)
    assert sizes[1] == sizes["1 begins"] == dense
    assert sizes["2 begins"] == sizes[2] == count(module) < dense


def test_the_score_is_that_of_the_pruned_model_whether_or_not_the_refit_is_kept(tmp_path, monkeypatch):
    for better in (True, False):
        monkeypatch.setattr(trials_module.ScoredPlan, "is_better_than", lambda *_, keep=better: keep)
        module = made()
        data = loaders(module)
        oracle = AtEpochStart(lambda _, m, data=data: plain_validate(tmp_path, m, data))
        callback = softpruning(search=UniformBaseline())
        fit(tmp_path, module, callback, oracle, data=data)
        assert callback.results[0].score_after == pytest.approx(oracle.found["val_loss"], abs=1e-6)


def test_layers_without_bias_whose_bias_compensation_creates(tmp_path):
    module = made(bias=False)
    dense, data = count(module), loaders(module)
    oracle = AtEpochStart(lambda _, m: plain_validate(tmp_path, m, data))
    callback = softpruning()
    trainer = fit(tmp_path, module, callback, oracle, data=data)
    assert callback.results[0].sparsity == pytest.approx(1 - count(module) / dense, abs=1e-6)
    assert callback.results[0].score_after == pytest.approx(oracle.found["val_loss"], abs=1e-6)
    assert_optimizers_hold_live_parameters(trainer, module)


def test_evaluations_counts_the_validation_passes_of_the_round(tmp_path, monkeypatch):
    counter = PassCounter(AutoEncoder, monkeypatch)

    class Switch(Callback):
        def __init__(self, to):
            self.to = to

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                counter.during = self.to

    for search in (RandomSearch(num_candidates=5), GradientSearch(steps=2)):
        counter.passes.clear()
        callback = softpruning(search=search)
        fit(tmp_path, made(), Switch("round"), callback, Switch("fit"), num_sanity_val_steps=0)
        [result] = callback.results
        assert result.evaluations == counter.passes["round"]
        assert counter.passes["fit"] == 3 + 1, "one before training looks for mistakes"
        assert len(result.trials) in (result.evaluations - 1, result.evaluations)
    assert result.strategy == "GradientSearch"


def test_results_survive_json_and_the_files_hold_them(tmp_path):
    callback = softpruning(report=True, search=RandomSearch(num_candidates=4))
    trainer = fit(tmp_path, made(), callback, logger=CSVLogger(tmp_path, name="logs"))
    [result] = callback.results
    assert PruningResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    folder = tmp_path / "logs" / "version_0" / "softprune" / "epoch=1"
    assert str(folder).startswith(trainer.log_dir)
    assert PruningResult.from_dict(json.loads((folder / "result.json").read_text())) == result
    trials = rows_of(folder / "trials.csv")
    assert [float(row["score"]) for row in trials] == [t.score for t in result.trials]
    assert [float(row["sparsity"]) for row in trials] == [t.sparsity for t in result.trials]
    assert {row["feasible"] for row in trials} <= {"True", "False"}


def test_files_go_to_the_default_root_without_a_logger(tmp_path):
    fit(tmp_path, made(), softpruning(report=True))
    assert (tmp_path / "softprune" / "epoch=1" / "result.json").is_file()


def test_the_logger_gets_one_row_per_round_at_the_current_step(tmp_path):
    callback = softpruning(epochs=[1, 2])
    trainer = fit(tmp_path, made(), callback, logger=CSVLogger(tmp_path))
    rows = [row for row in rows_of(f"{trainer.log_dir}/metrics.csv") if row["softprune/sparsity"]]
    assert [int(row["step"]) for row in rows] == [4, 8]
    for row, result in zip(rows, callback.results, strict=True):
        assert float(row["softprune/sparsity"]) == pytest.approx(result.sparsity)
        assert float(row["softprune/params"]) == result.costs_after.params
        assert float(row["softprune/macs"]) == result.costs_after.macs
        assert float(row["softprune/score"]) == pytest.approx(result.score_after)
        assert float(row["softprune/evaluations"]) == result.evaluations
        for group in result.groups:
            assert float(row[f"softprune/coefficient/{group.name}"]) == pytest.approx(group.coefficient)


class Remembering(SensitivitySearch):
    """Keeps what it was told to expect."""

    seen = ()

    def propose(self, space, rng):
        type(self).seen = (*self.seen, self.expected)
        return (yield from super().propose(space, rng))


def test_a_later_round_is_told_the_curves_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(Remembering, "seen", ())
    callback = softpruning(epochs=[1, 2], target_sparsity=[0.3, 0.5], search=Remembering())
    fit(tmp_path, made(), callback)
    first, second = callback.results
    assert first.applied
    assert second.applied
    nothing, expected = Remembering.seen
    assert nothing == ()
    assert [curve.index for curve in expected] == list(range(len(second.groups)))
    assert all(curve.losses[0] == 0 and curve.losses[-1] > 0 for curve in expected)
    assert expected == first.expected_curves(second.numbers.coefficients)
    assert first.expected_curves(["of another model"]) == ()


def test_verbose_speaks_and_its_absence_is_silent(tmp_path, capsys):
    fit(tmp_path, made(), softpruning(verbose=False))
    quiet = capsys.readouterr()
    assert quiet.out == ""
    assert "parameters" not in quiet.err
    assert "oftPruning" not in quiet.err
    fit(tmp_path, made(), softpruning(verbose=True))
    loud = capsys.readouterr()
    assert "encoder.0" in loud.out + loud.err
    assert "val_loss" in loud.out + loud.err


class Broken(CSVLogger):
    """Fails at the row of a round."""

    def log_metrics(self, metrics, step=None):
        if "softprune/sparsity" in metrics:
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")  # Lightning looks for a checkpoint of an earlier exception
def test_a_loggers_exception_reaches_the_user_and_finds_the_round_complete(tmp_path):
    callback, module, found = softpruning(report=True), made(), {}

    class Catch(Callback):
        def on_exception(self, trainer, pl_module, exception):
            assert_optimizers_hold_live_parameters(trainer, pl_module)
            found["exception"] = exception

    best = ModelCheckpoint(tmp_path / "best", monitor="val_psnr", mode="max")
    dense = count(module)
    arguments = {"logger": Broken(tmp_path), "enable_checkpointing": True}
    with pytest.raises(ConnectionError, match="the server is gone"):
        fit(tmp_path, module, callback, Catch(), best, OnExceptionCheckpoint(tmp_path, "broken"), **arguments)
    assert isinstance(found["exception"], ConnectionError)
    [result] = callback.results
    assert result.applied
    assert result.sparsity == pytest.approx(1 - count(module) / dense, abs=1e-6)
    assert best.best_model_path == ""
    assert list(tmp_path.rglob("result.json"))
    assert result.score_after == pytest.approx(plain_validate(tmp_path, module, loaders(module))["val_loss"], abs=1e-6)

    again, other = softpruning(), made(seed=3)
    trainer = trainer_of(tmp_path, again)
    trainer.fit(other, **loaders(other), ckpt_path=tmp_path / "broken.ckpt")
    assert again.results == [result]
    assert count(other) == count(module)
    assert_optimizers_hold_live_parameters(trainer, other)


@pytest.mark.parametrize("how", ["folder", "disk"])
def test_a_report_that_cannot_be_written_is_a_warning_that_names_the_folder(tmp_path, monkeypatch, how):
    def fit_reporting(folder, report):
        callback, module = softpruning(report=report, finetune_epochs=1), made()
        trainer = fit(folder, module, callback)
        assert callback.results[0].applied
        return trainer, module

    if how == "folder":
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "softprune").write_text("a file where a folder should be")
    else:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(report_module, "replace_file", full)
    monkeypatch.setattr(journal_module.Journal, "_append", lambda *_: None)  # it has a warning of its own
    with pytest.warns(UserWarning, match=r"no report of the round in .*softprune.epoch=1: \w*Error: ") as warned:
        trainer, module = fit_reporting(tmp_path / "broken", report=True)
    assert len([one for one in warned if "no report" in str(one.message)]) == 1
    assert str(tmp_path / "broken") in str(next(one.message for one in warned if "no report" in str(one.message)))
    assert not list(tmp_path.rglob("result.json"))
    monkeypatch.undo()
    _, same = fit_reporting(tmp_path / "whole", report=False)
    assert trainer.current_epoch == 2
    assert module.losses == same.losses


def test_report_false_writes_nothing(tmp_path):
    fit(tmp_path, made(), softpruning(report=False))
    assert list(tmp_path.rglob("*")) == []


# ----------------------------------------------------------------------------------------------------------- schedules


def test_the_cubic_schedule_ends_at_the_target():
    assert cubic_schedule(0.5, 1) == [0.5]
    assert cubic_schedule(0.8, 4) == pytest.approx([0.8 * (1 - (1 - k / 4) ** 3) for k in (1, 2, 3, 4)])


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.7, cubic_schedule(0.7, 3)), ([0.2, 0.5, 0.7], [0.2, 0.5, 0.7]), ([0.3, 0.6, 0.6], [0.3, 0.6, 0.6])],
)
def test_several_rounds_count_against_the_first_dense_model(tmp_path, target, expected):
    module = made()
    dense = count(module)
    sizes = [AtEpochStart(lambda _, m: count(m), epoch) for epoch in (1, 2, 4)]
    callback = softpruning(epochs=[1, 2, 4], target_sparsity=target, search=RandomSearch(num_candidates=2))
    trainer = fit(tmp_path, module, callback, *sizes, max_epochs=5)
    assert [result.epoch for result in callback.results] == [1, 2, 4]
    assert [result.target_sparsity for result in callback.results] == pytest.approx(expected)
    for result, size, wanted in zip(callback.results, sizes, expected, strict=True):
        assert result.sparsity == pytest.approx(1 - size.found / dense, abs=1e-6)
        assert abs(result.sparsity - wanted) <= 0.03
        assert result.applied
    for earlier, later in zip(callback.results, callback.results[1:], strict=False):
        assert later.costs_before == earlier.costs_after
        assert [g.channels_before for g in later.groups] == [g.channels_after for g in earlier.groups]
    assert_optimizers_hold_live_parameters(trainer, module)


def test_a_second_fit_starts_afresh(tmp_path):
    callback = softpruning(search=RandomSearch(num_candidates=3))
    first = made()
    fit(tmp_path, first, callback)
    [result] = callback.results
    second = made()
    fit(tmp_path, second, callback)
    [again] = callback.results
    assert again is not result
    assert again.costs_before == result.costs_before
    assert [t.score for t in again.trials] == [t.score for t in result.trials]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_fresh_module_in_the_same_trainer_starts_afresh(tmp_path):
    callback, first, second = softpruning(), made(), made()
    trainer = fit(tmp_path, first, callback, max_epochs=2)
    [result] = callback.results
    trainer.fit_loop.max_epochs = 4
    trainer.fit(second, **loaders(second))
    [again] = callback.results
    assert again is not result
    assert again.costs_before == result.costs_before
    assert again.sparsity == pytest.approx(1 - count(second) / again.costs_before.params, abs=1e-6)
    assert len(second.losses) == 2 * 4
    assert_optimizers_hold_live_parameters(trainer, second)


def test_pruning_a_pruned_module_again_counts_against_the_first_dense_model(tmp_path):
    module, callback = made(), softpruning()
    dense = count(module)
    fit(tmp_path, module, callback)
    size = count(module)
    fit(tmp_path, module, callback)
    assert callback.results[0].costs_before.params == size == count(module)
    assert callback.results[0].sparsity == pytest.approx(1 - size / dense, abs=1e-6)


@pytest.mark.parametrize("sanity", [0, 2])
def test_epoch_zero_prunes_before_the_first_training_batch(tmp_path, sanity):
    sizes = []

    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append((trainer.global_step, count(pl_module)))

    module = made()
    dense = count(module)
    callback = softpruning(epochs=0)
    fit(tmp_path, module, callback, First(), num_sanity_val_steps=sanity)
    assert sizes[0] == (0, count(module))
    assert count(module) < dense
    assert callback.results[0].sparsity == pytest.approx(1 - count(module) / dense, abs=1e-6)
    assert len(callback.results) == 1


@pytest.mark.parametrize(("finetune", "stops"), [(None, 6), (1, 3), (2, 4), (4, 6)])
def test_fine_tuning_lasts_as_long_as_asked(tmp_path, finetune, stops):
    module = made()
    trainer = fit(tmp_path, module, softpruning(epochs=2, finetune_epochs=finetune), max_epochs=6)
    assert trainer.current_epoch == stops
    assert len(module.losses) == trainer.global_step == 4 * stops


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
@pytest.mark.parametrize("finetune", [0, 1, 3])
def test_fine_tuning_after_a_round_that_runs_late_lasts_as_long_as_asked(tmp_path, caplog, finetune):
    """Of a fit that goes on from a dense checkpoint: the round of epoch 1 runs before epoch 3."""
    dense = fit(tmp_path, made(), max_epochs=3)
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    module, callback = made(seed=1), softpruning(epochs=1, finetune_epochs=finetune)
    files = ModelCheckpoint(tmp_path / "pruned", save_top_k=-1)
    trainer = trainer_of(tmp_path, callback, files, max_epochs=9, enable_checkpointing=True)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, **loaders(module), ckpt_path=tmp_path / "dense.ckpt")
    assert "epochs=1 runs late, before epoch 3" in caplog.text
    assert [result.epoch for result in callback.results] == [1]
    assert trainer.current_epoch == 3 + finetune
    assert len(module.losses) == 4 * finetune
    for path in sorted((tmp_path / "pruned").glob("*.ckpt")):
        again, callback = made(seed=2), softpruning(epochs=1, finetune_epochs=finetune)
        resumed = trainer_of(tmp_path, callback, max_epochs=9)
        resumed.fit(again, **loaders(again), ckpt_path=path)
        assert resumed.current_epoch == 3 + finetune


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_no_fine_tuning_ends_with_the_pruned_validated_checkpointed_model(tmp_path, epoch):
    module = made()
    data, dense = loaders(module), count(module)
    best = ModelCheckpoint(
        tmp_path / "best",
        filename="{epoch}-{val_psnr:.4f}",
        monitor="val_psnr",
        mode="max",
        save_top_k=-1,
        save_last=True,
    )
    every = ModelCheckpoint(tmp_path / "every", save_last=True, save_top_k=1)
    logger = CSVLogger(tmp_path)
    callback = softpruning(epochs=epoch, finetune_epochs=0)
    trainer = fit(
        tmp_path, module, callback, best, every, data=data, enable_checkpointing=True, logger=logger, max_epochs=4
    )
    [result] = callback.results
    assert result.applied
    assert len(module.losses) == trainer.global_step == 4 * epoch, "nothing is trained after the prune"
    assert count(module) < dense
    validated = plain_validate(tmp_path, module, data)
    for name, value in validated.items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(value, abs=1e-6)
    assert result.score_after == pytest.approx(validated["val_loss"], abs=1e-6)
    for path in (best.last_model_path, every.last_model_path, every.best_model_path):
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in module.state_dict().items()}, path
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in saved.items())
    assert any(f"val_psnr={validated['val_psnr']:.4f}" in path for path in best.best_k_models), best.best_k_models
    assert not trainer.interrupted
    assert trainer.state.finished


def test_best_is_a_pruned_checkpoint_when_fine_tuning_is_off(tmp_path):
    """The dense model scored better; what a user loads as "best" must still be what the fit was for."""
    module = made()
    dense = count(module)
    best = ModelCheckpoint(tmp_path, monitor="val_psnr", mode="max", save_top_k=1)
    fit(tmp_path, module, softpruning(epochs=2, finetune_epochs=0), best, enable_checkpointing=True)
    assert count(module) < dense
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*Training will continue.*")
def test_where_more_steps_are_wanted_than_were_trained_a_fit_stops_behind_them(tmp_path):
    ended = []
    look = LambdaCallback(on_train_epoch_end=lambda trainer, _: ended.append(trainer.current_epoch))
    with pytest.warns(UserWarning, match="finetune_epochs=0 would stop training at step 4, which min_steps=6 forbids"):
        trainer = fit(
            tmp_path, module := made(), pruning := softpruning(epochs=1, finetune_epochs=0), look, min_steps=6
        )
    assert pruning.results[0].applied
    assert trainer.global_step == len(module.losses) == 6
    assert (trainer.current_epoch, ended) == (2, [0, 1])


class Stacking(AutoEncoder):
    """Looks at the epoch's losses when it ends, as Lightning's guide to version 2 has it."""

    def on_train_epoch_end(self):
        self.log("train_mean", torch.stack([torch.tensor(loss) for loss in self.losses]).mean())
        self.losses.clear()


class SteppingPlateau(Manual):
    """Steps a scheduler on a metric of training, as Lightning's page on manual optimization has it."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("loss", self.losses[-1])

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step(self.trainer.callback_metrics["loss"])

    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer) for optimizer in optimizers]


@pytest.mark.parametrize("kind", [Stacking, SteppingPlateau])
@pytest.mark.parametrize("epoch", [0, 2])
def test_what_ends_a_trained_epoch_is_left_out_of_one_without_training(tmp_path, kind, epoch):
    module, files = made(kind), ModelCheckpoint(tmp_path, monitor="val_loss")
    dense, ends = count(module), []
    counting = LambdaCallback(on_train_epoch_end=lambda trainer, _: ends.append(trainer.current_epoch))
    idle = Callback()
    idle.on_train_epoch_end = None  # which Lightning passes over
    callbacks = softpruning(epochs=epoch, finetune_epochs=0), files, counting, idle
    fit(tmp_path, module, *callbacks, enable_checkpointing=True)
    assert count(module) < dense
    assert ends == list(range(epoch))
    saved = torch.load(files.best_model_path, weights_only=True)["state_dict"]
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in module.state_dict().items()}
    fit(tmp_path, module, counting, max_epochs=1)
    assert ends == [*range(epoch), 0], "left out once"
    assert "on_train_epoch_end" not in vars(module)


@pytest.mark.parametrize("kind", [Stacking, SteppingPlateau])
def test_prune_has_no_training_epoch_to_end(kind):
    module = made(kind)
    dense = count(module)
    assert prune(module, search="uniform", tolerance=0.03, verbose=False, report=False, **loaders(module)).applied
    assert count(module) < dense


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_monitors_of_training_are_passed_over_where_nothing_was_trained(tmp_path, at_epoch_end):
    module = made(Stacking)
    files = ModelCheckpoint(tmp_path, monitor="train_mean", save_last=True, save_on_train_epoch_end=at_epoch_end)
    stopping = EarlyStopping("train_mean", check_on_train_epoch_end=at_epoch_end)
    callback = softpruning(epochs=0, finetune_epochs=0)
    with pytest.warns(UserWarning, match="monitor='train_mean'.* has no score for the pruned model"):
        fit(tmp_path, module, callback, stopping, files, enable_checkpointing=True)
    assert callback.results[0].applied
    assert files.best_model_path == ""
    saved = torch.load(files.last_model_path, weights_only=True)["state_dict"]
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert not {"on_train_epoch_end", "on_validation_end"} & {*vars(files), *vars(stopping), *vars(module)}


def test_hooks_are_back_where_the_end_of_an_epoch_without_training_fails(tmp_path):
    class Fails(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            raise ZeroDivisionError

    module = made(Stacking)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, softpruning(epochs=0, finetune_epochs=0), Fails())
    assert "on_train_epoch_end" not in vars(module)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
def test_a_round_whose_epoch_start_was_skipped_runs_at_the_next_batch(tmp_path):
    """Resuming from a step checkpoint of an epoch's last batch goes straight to the next epoch's batches."""
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, made(), steps, max_epochs=2, enable_checkpointing=True)
    module, callback = made(seed=1), softpruning()
    dense, at_start, sizes = count(module), [], []

    class Sizes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            at_start.append(trainer.current_epoch)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append((trainer.current_epoch, count(pl_module)))

    trainer = trainer_of(tmp_path, callback, Sizes(), max_epochs=3)
    trainer.fit(module, **loaders(module), ckpt_path=tmp_path / "step=4.ckpt")
    assert [result.epoch for result in callback.results] == [1]
    assert callback.results[0].sparsity == pytest.approx(1 - count(module) / dense, abs=1e-6)
    assert all(size == count(module) for epoch, size in sizes if epoch >= 1)
    assert_optimizers_hold_live_parameters(trainer, module)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*")
def test_no_fine_tuning_after_a_skipped_epoch_start_trains_on_no_batch(tmp_path):
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, made(), steps, max_epochs=2, enable_checkpointing=True)
    module, callback = made(seed=1), softpruning(finetune_epochs=0)
    dense, data = count(module), loaders(module)
    files = ModelCheckpoint(tmp_path / "pruned", save_last=True)
    trainer = trainer_of(tmp_path, callback, files, max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, **data, ckpt_path=tmp_path / "step=4.ckpt")
    assert count(module) < dense
    assert module.losses == []
    assert trainer.global_step == 4
    assert trainer.current_epoch == 1
    tuned, again = made(seed=2), softpruning()
    later = trainer_of(tmp_path, again, max_epochs=4)
    later.fit(tuned, **data, ckpt_path=files.last_model_path)
    assert [result.epoch for result in again.results] == [1]
    assert len(tuned.losses) == 3 * 4, "epochs 1, 2 and 3"
    assert later.global_step == 4 * 4
    validated = plain_validate(tmp_path, module, data)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(validated["val_loss"], abs=1e-6)


def test_the_batch_hook_alone_runs_a_round_that_is_due(tmp_path, monkeypatch):
    monkeypatch.setattr(SoftPruning, "on_train_epoch_start", lambda *_: None)
    module, callback = made(), softpruning()
    dense = count(module)
    trainer = fit(tmp_path, module, callback)
    assert [result.epoch for result in callback.results] == [1]
    assert count(module) < dense
    assert_optimizers_hold_live_parameters(trainer, module)


def test_a_fit_continued_by_the_same_trainer_repeats_no_round(tmp_path):
    module, callback = made(), softpruning()
    trainer = fit(tmp_path, module, callback, max_epochs=2)
    size = count(module)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, **loaders(module))
    assert len(callback.results) == 1
    assert count(module) == size


# -------------------------------------------------------------------------------------------- state, CLI, neighbours


def test_the_state_is_plain_data_and_restores_the_history(tmp_path):
    callback = softpruning(epochs=[1, 2], search=RandomSearch(num_candidates=2))
    fit(tmp_path, made(), callback)
    state = callback.state_dict()
    assert json.loads(json.dumps(state)) == state
    other = softpruning(epochs=[1, 2], target_sparsity=0.3)
    assert other.state_key == callback.state_key
    other.load_state_dict(json.loads(json.dumps(state)))
    assert other.results == callback.results


def test_checkpoints_load_with_weights_only(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback = softpruning()
    fit(tmp_path, made(), callback, checkpoint, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    kept = [PruningResult.from_dict(result) for result in saved["callbacks"][callback.state_key]["results"]]
    assert kept == callback.results


def test_a_nan_score_survives_json(tmp_path):
    class Nan(AutoEncoder):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val_nan", math.nan)

    callback = softpruning(monitor="val_nan", mode="min", report=True)
    with pytest.warns(UserWarning, match="nan"):
        fit(tmp_path, made(Nan), callback)
    assert json.loads(json.dumps(callback.state_dict())) == callback.state_dict()
    assert math.isnan(callback.results[0].score_before)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(vectors(24), batch_size=12)

    def val_dataloader(self):
        return DataLoader(vectors(8), batch_size=8)


@pytest.fixture
def no_arguments(monkeypatch):
    """LightningCLI warns when Python was started with arguments of its own."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


def cli_callback(*args):
    cli = LightningCLI(AutoEncoder, Data, args=list(args), run=False, save_config_callback=None)
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, SoftPruning)]
    return callback


@pytest.mark.usefixtures("no_arguments")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_command_line_builds_the_callback():
    callback = cli_callback(
        "--trainer.callbacks+=lightning_softprune.SoftPruning",
        "--trainer.callbacks.target_sparsity=0.7",
        "--trainer.callbacks.epochs=[2,4]",
        "--trainer.callbacks.search=RandomSearch",
        "--trainer.callbacks.search.num_candidates=7",
        "--trainer.logger=false",
    )
    assert callback.targets == pytest.approx(cubic_schedule(0.7, 2))
    assert callback.epochs == [2, 4]
    assert isinstance(callback.search, RandomSearch)
    assert callback.search.num_candidates == 7


@pytest.mark.usefixtures("no_arguments")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_yaml_file_builds_the_callback_with_a_nested_search(tmp_path):
    (tmp_path / "config.yaml").write_text("""
trainer:
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  max_epochs: 2
  callbacks:
    - class_path: lightning_softprune.SoftPruning
      init_args:
        monitor: val_psnr
        mode: max
        epochs: 1
        target_sparsity: [0.4]
        tolerance: 0.03
        search:
          class_path: lightning_softprune.GradientSearch
          init_args:
            steps: 3
            difference: spsa
        components: {both: [encoder, decoder]}
        ignore: [decoder.0]
        bounds: {encoder.0: [0.1, 0.9]}
        finetune_epochs: null
        report: false
        verbose: false
""")
    cli = LightningCLI(
        AutoEncoder, Data, args=["--config", str(tmp_path / "config.yaml")], run=False, save_config_callback=None
    )
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, SoftPruning)]
    assert (callback.monitor, callback.mode, callback.epochs, callback.targets) == ("val_psnr", "max", [1], [0.4])
    assert isinstance(callback.search, GradientSearch)
    assert callback.search.steps == 3
    assert callback.search.difference == "spsa"
    assert callback.components == {"both": ["encoder", "decoder"]}
    assert callback.ignore == ("decoder.0",)
    assert callback.bounds == {"encoder.0": [0.1, 0.9]}


@pytest.mark.usefixtures("no_arguments")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_command_line_takes_the_callback_as_a_group_of_its_own():
    class Own(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(SoftPruning, "softprune")

    args = ["--softprune.target_sparsity=0.6", "--softprune.search=NormBaseline", "--trainer.logger=false"]
    cli = Own(AutoEncoder, Data, args=args, run=False, save_config_callback=None)
    [callback] = [c for c in cli.trainer.callbacks if isinstance(c, SoftPruning)]
    assert callback.targets == [0.6]
    assert type(callback.search).__name__ == "NormBaseline"


def test_frozen_parameters_outside_the_optimizer_stay_outside(tmp_path):
    module = made()
    module.encoder.requires_grad_(False)
    frozen = count(module.encoder)

    class Half(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            assert not any(p.requires_grad for p in pl_module.encoder.parameters())

    module.configure_optimizers = lambda: torch.optim.Adam(module.decoder.parameters())
    trainer = fit(tmp_path, module, softpruning(), Half())
    assert count(module.encoder) < frozen
    assert_optimizers_hold_live_parameters(trainer, module)


def test_gradient_clipping_and_accumulation_go_on(tmp_path):
    module = made()
    trainer = fit(tmp_path, module, softpruning(), gradient_clip_val=0.5, accumulate_grad_batches=3)
    assert_optimizers_hold_live_parameters(trainer, module)
    assert module.decoder[2].out_features == FEATURES
