"""Checkpoint callbacks beside rounds: the files they keep, against those of a run without the callback."""

import contextlib
import io
import logging
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from support.modules import AutoEncoder, count, fit, loaders, made, plain_validate, softpruning

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

STEPS = 4  # per epoch


def files_of(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*.ckpt")}


def width(path):
    return torch.load(path, weights_only=True)["state_dict"]["encoder.0.weight"].shape[0]


def run(folder, arguments, *callbacks, module=None, **trainer_arguments):
    """A fit with a ModelCheckpoint of these arguments, in a folder of its own."""
    checkpoint = ModelCheckpoint(**arguments)
    trainer_arguments = {"enable_checkpointing": True, "max_epochs": 5, **trainer_arguments}
    trainer = fit(folder, module or made(), *callbacks, checkpoint, **trainer_arguments)
    return trainer, checkpoint


WITHOUT_MONITOR = {
    "plain": {},
    "last": {"save_last": True},
    "link": {"save_last": "link"},
    "all": {"save_top_k": -1},
    "none": {"save_top_k": 0},
    "none but the last": {"save_top_k": 0, "save_last": True},
    "steps": {"every_n_train_steps": 3},
    "all steps": {"every_n_train_steps": 2, "save_top_k": -1, "save_last": True},
    "every second epoch": {"every_n_epochs": 2},
    "name of the epoch": {"filename": "{epoch}"},
    "no prefix": {"filename": "at-{epoch}", "auto_insert_metric_name": False},
    "constant name": {"filename": "model"},
    "constant name, replaced": {"filename": "model", "enable_version_counter": False},
    "after validation": {"save_on_train_epoch_end": False},
    "weights only": {"save_weights_only": True},
}


@pytest.mark.parametrize("epochs", [2, [1, 3]], ids=["one round", "two rounds"])
@pytest.mark.parametrize("kind", WITHOUT_MONITOR)
def test_without_a_monitor_the_files_are_those_of_a_run_without_the_callback(tmp_path, kind, epochs):
    arguments = WITHOUT_MONITOR[kind]
    _, plain = run(tmp_path / "plain", arguments)
    module, callback = made(), softpruning(epochs=epochs)
    trainer, pruned = run(tmp_path / "pruned", arguments, callback, module=module)
    assert all(result.applied for result in callback.results)
    assert files_of(tmp_path / "pruned") == files_of(tmp_path / "plain")

    def relative(path, folder):
        return str(Path(path).relative_to(folder)) if path else ""

    assert relative(pruned.best_model_path, tmp_path / "pruned") == relative(plain.best_model_path, tmp_path / "plain")
    assert relative(pruned.last_model_path, tmp_path / "pruned") == relative(plain.last_model_path, tmp_path / "plain")
    assert trainer.checkpoint_callback is pruned
    rows = module.encoder[0].out_features
    assert rows < 16
    for path in filter(None, (pruned.best_model_path, pruned.last_model_path)):
        assert width(path) == rows, "what is called best or last is the pruned model"


def test_the_trainers_own_checkpoint_callback_keeps_one_file_and_it_is_the_pruned_one(tmp_path):
    found = []
    for name, callbacks in (("plain", []), ("pruned", [softpruning(epochs=[1, 2])])):
        module = made()
        logger = CSVLogger(tmp_path / name, "logs")
        trainer = fit(tmp_path / name, module, *callbacks, enable_checkpointing=True, logger=logger)
        found.append(files_of(tmp_path / name))
    assert found[0] == found[1] == {f"logs/version_0/checkpoints/epoch=2-step={3 * STEPS}.ckpt"}
    data = loaders(module)
    expected = plain_validate(tmp_path, module, data)["val_loss"]
    [tested] = trainer.validate(made(seed=5), data["val_dataloaders"], ckpt_path="best", verbose=False)
    assert tested["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert width(trainer.checkpoint_callback.best_model_path) == module.encoder[0].out_features < 16


class WithTest(AutoEncoder):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))


@pytest.mark.parametrize("finetune", [None, 0, 1])
@pytest.mark.parametrize("arguments", [{}, {"filename": "model"}, {"monitor": "val_loss"}], ids=str)
def test_the_best_checkpoint_can_be_tested_with_the_callback_attached(tmp_path, arguments, finetune):
    module, callback = made(WithTest), softpruning(epochs=2, finetune_epochs=finetune)
    trainer, checkpoint = run(tmp_path, arguments, callback, module=module, max_epochs=4)
    loader = loaders(module)["val_dataloaders"]
    [best] = trainer.test(made(WithTest, seed=3), loader, ckpt_path="best", verbose=False)
    rows = module.encoder[0].out_features
    assert width(checkpoint.best_model_path) == rows < 16
    if "monitor" not in arguments:  # then it is the model as it is now
        [now] = trainer.test(module, loader, verbose=False)
        assert best == pytest.approx(now, abs=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in WITHOUT_MONITOR if not kind.startswith("none")])
def test_without_finetuning_the_pruned_model_takes_the_place_of_the_last_dense_file(tmp_path, kind):
    """The oracle is a run that ends where the round begins; the pruned model's epoch is the next, at the same step."""
    arguments = WITHOUT_MONITOR[kind]
    _, plain = run(tmp_path / "plain", arguments, max_epochs=3)
    module, callback = made(), softpruning(epochs=3, finetune_epochs=0)
    _, pruned = run(tmp_path / "pruned", arguments, callback, module=module)
    rows = module.encoder[0].out_features
    assert rows < 16
    for path in filter(None, (pruned.best_model_path, pruned.last_model_path)):
        assert width(path) == rows
    before, after = files_of(tmp_path / "plain"), files_of(tmp_path / "pruned")
    keeps_all = arguments.get("save_top_k") == -1
    assert len(after) == len(before) + keeps_all
    dense = [path for path in after if width(tmp_path / "pruned" / path) == 16]
    assert len(dense) == (len(before) - bool(arguments.get("save_last")) if keeps_all else 0)
    assert pruned.best_model_path
    if "filename" not in arguments:
        assert re.search(f"epoch=3-step={3 * STEPS}", pruned.best_model_path)
        assert plain.best_model_path not in pruned.best_model_path


def test_a_callback_that_is_to_keep_nothing_keeps_nothing(tmp_path):
    for arguments in ({"save_top_k": 0}, {"every_n_epochs": 0}):
        run(tmp_path, arguments, softpruning(epochs=1, finetune_epochs=0))
        assert files_of(tmp_path) == set()


def test_two_checkpoint_callbacks_do_not_disturb_each_other(tmp_path):
    def both():
        return (
            ModelCheckpoint(filename="newest-{epoch}"),
            ModelCheckpoint(filename="best-{epoch}", monitor="val_rising", save_top_k=1),
        )

    class Rising(AutoEncoder):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            self.log("val_rising", float(self.current_epoch))

    for name, callbacks in (("plain", []), ("pruned", [softpruning(epochs=2)])):
        newest, best = both()
        fit(tmp_path / name, made(Rising), *callbacks, newest, best, enable_checkpointing=True, max_epochs=5)
    names = {"checkpoints/newest-epoch=4.ckpt", "checkpoints/best-epoch=0.ckpt"}
    assert files_of(tmp_path / "plain") == names
    assert files_of(tmp_path / "pruned") == names | {"checkpoints/best-epoch=2.ckpt"}, "the dense best stays, one more"
    assert width(best.best_model_path) == width(newest.best_model_path) < 16


@pytest.mark.parametrize("verbose", [True, False])
def test_the_dense_best_of_a_monitor_is_named(tmp_path, caplog, verbose):
    screen = io.StringIO()

    class At2(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                self.dense = trainer.checkpoint_callback.best_model_path

    seen = At2()
    with caplog.at_level(logging.INFO), contextlib.redirect_stdout(screen):
        _, checkpoint = run(tmp_path, {"monitor": "val_loss"}, seen, softpruning(epochs=2, verbose=verbose))
    assert width(seen.dense) == 16
    said = f"The best checkpoint from before this round stays at {seen.dense}"
    logged = [record.message for record in caplog.records if said in record.message]
    assert len(logged) == 1
    assert (said in screen.getvalue()) == verbose
    assert checkpoint.best_model_path != seen.dense
    assert width(checkpoint.best_model_path) < 16


@pytest.mark.parametrize(
    ("arguments", "reset"), [({}, True), ({"monitor": "val_loss"}, False), ({"monitor": "val_loss"}, None)], ids=str
)
def test_nothing_is_named_where_nothing_is_forgotten(tmp_path, caplog, arguments, reset):
    options = {"reset_monitors": reset} if reset is not None else {"epochs": 0}  # at epoch 0 there is no best yet
    with caplog.at_level(logging.INFO):
        run(tmp_path, arguments, softpruning(**{"epochs": 2, **options}))
    assert not [record for record in caplog.records if "stays at" in record.message]


def test_early_stopping_ends_the_fit_where_it_did(tmp_path):
    """EarlyStopping waits anew after a round, whatever the checkpoint callback's monitor is."""
    ends = []
    for arguments in ({}, {"monitor": "val_loss"}):
        stopping = EarlyStopping("val_constant", patience=3)
        trainer, _ = run(tmp_path / str(len(ends)), arguments, softpruning(epochs=2), stopping, max_epochs=20)
        ends.append(trainer.current_epoch)
    assert ends == [6, 6]
    assert count(trainer.model) < count(made())
