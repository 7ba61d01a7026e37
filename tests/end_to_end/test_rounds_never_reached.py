"""Training that ends before a round: the fit says so, with the epochs, the reason and what became of the model."""

import warnings
from datetime import timedelta

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from torch.utils.data import DataLoader

from support.modules import count, fit, loaders, made, softpruning, trainer_of, vectors

pytestmark = pytest.mark.usefixtures("one_thread")


def said_about_rounds(record):
    return [str(warning.message) for warning in record if "did not run" in str(warning.message)]


def fit_and_hear(tmp_path, *callbacks, module=None, **arguments):
    """What the fit says about rounds, and the trainer."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer = fit(tmp_path, module or made(), *callbacks, **arguments)
    return said_about_rounds(record), trainer


class StopsAt(Callback):
    """Ends training in one epoch in some way of its own."""

    def __init__(self, way, epoch=2):
        self.way, self.epoch = way, epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.way(trainer)


def set_should_stop(trainer):
    trainer.should_stop = True


def raise_stop_iteration(trainer):
    raise StopIteration


class Constant(EarlyStopping):
    """A subclass with a name of its own."""


ENDINGS = {
    "max_steps": ([], {"max_steps": 9, "max_epochs": -1}, 3, "max_steps=9 was reached"),
    "early stopping": ([EarlyStopping("val_constant", patience=1)], {}, 2, "EarlyStopping(monitor='val_constant')"),
    "a subclass of it": ([Constant("val_constant", patience=2)], {}, 3, "Constant(monitor='val_constant')"),
    "early stopping that had to wait": (
        [EarlyStopping("val_constant", patience=1)], {"min_epochs": 4}, 4, "EarlyStopping(monitor='val_constant')",
    ),
    "max_time": ([], {"max_time": timedelta(microseconds=1)}, 1, "max_time=0:00:00"),
    "a timer that looks once an epoch": ([Timer({"microseconds": 1}, interval="epoch")], {}, 1, "max_time=0:00:00"),
    "should_stop": ([StopsAt(set_should_stop)], {}, 3, "`trainer.should_stop` was set"),
    "should_stop beside an idle EarlyStopping": (
        [StopsAt(set_should_stop), EarlyStopping("val_constant", patience=99), Timer("01:00:00:00")], {}, 3,
        "`trainer.should_stop` was set",
    ),
    "a hook": ([StopsAt(raise_stop_iteration)], {}, 2, "StopIteration"),
    "no batches": ([], {"limit_train_batches": 0}, 0, "limit_train_batches=0"),
}  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_fit_that_ends_before_its_round_names_the_epoch_and_what_ended_it(tmp_path, ending):
    callbacks, arguments, trained, why = ENDINGS[ending]
    module, callback = made(), softpruning(epochs=7)
    dense = count(module)
    said, trainer = fit_and_hear(tmp_path, callback, *callbacks, module=module, **{"max_epochs": 20, **arguments})
    assert trainer.current_epoch == trained
    assert (callback.results, count(module)) == ([], dense)
    [message] = said
    assert "epochs=7 did not run" in message
    assert why in message
    assert "dense" in message
    assert "prune(" in message
    advised = f"epochs={trained - 1} or earlier"
    assert (advised in message) == (trained > 0)
    if trained:
        again = softpruning(epochs=trained - 1)
        heard, _ = fit_and_hear(tmp_path, again, max_epochs=trained)
        assert (heard, again.results[0].applied) == ([], True), "what it advises would have been reached"


def test_loaders_without_a_batch_are_named(tmp_path):
    data = {**loaders(made()), "train_dataloaders": DataLoader(vectors(0), batch_size=4)}
    said, _ = fit_and_hear(tmp_path, softpruning(epochs=1), data=data)
    assert "no training batch" in said[0]


def test_rounds_that_ran_are_told_from_those_that_did_not(tmp_path):
    callback = softpruning(epochs=[1, 5, 6], target_sparsity=[0.3, 0.4, 0.6], finetune_epochs=1)
    said, _ = fit_and_hear(tmp_path, callback, max_steps=12, max_epochs=20)
    [done] = callback.results
    assert done.applied
    assert "rounds at epochs=5 and 6 did not run" in said[0]
    assert f"pruned by the round at epochs=1 alone, to a sparsity of {done.sparsity:.4g}" in said[0]
    assert "dense" not in said[0]


def test_after_a_round_that_was_skipped_the_model_is_still_dense(tmp_path):
    callback = softpruning(epochs=[1, 6], constraints=["val_loss < 0"])
    said, _ = fit_and_hear(tmp_path, callback, max_steps=12, max_epochs=20)
    assert [result.applied for result in callback.results] == [False]
    assert "epochs=6 did not run" in said[0]
    assert "dense" in said[0]


def test_a_fit_that_reached_all_of_its_rounds_says_nothing(tmp_path):
    for arguments in ({"max_steps": 12, "max_epochs": -1}, {"max_epochs": 9}):
        stopping = EarlyStopping("val_constant", patience=1)
        said, trainer = fit_and_hear(tmp_path, softpruning(epochs=1, finetune_epochs=5), stopping, **arguments)
        assert trainer.current_epoch <= 3
        assert said == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_fit_that_ends_by_an_exception_says_nothing_more(tmp_path, error):
    def fail(_):
        raise error

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        with pytest.raises((error, SystemExit)):
            fit(tmp_path, made(), softpruning(epochs=7), StopsAt(fail), max_epochs=20)
    assert said_about_rounds(record) == []


def test_validation_alone_says_nothing(tmp_path):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trainer_of(tmp_path, softpruning(epochs=7)).validate(made(), loaders(made())["val_dataloaders"], verbose=False)
    assert said_about_rounds(record) == []


def test_a_fit_that_goes_on_says_it_again_until_the_round_has_run(tmp_path):
    def run(ckpt_path=None, **arguments):
        callback = softpruning(epochs=3)
        files = ModelCheckpoint(tmp_path / "files", "last", save_top_k=1, enable_version_counter=False)
        trainer = trainer_of(tmp_path, callback, files, enable_checkpointing=True, **arguments)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            trainer.fit(made(), **loaders(made()), ckpt_path=ckpt_path)
        return said_about_rounds(record), callback.results

    first, none = run(max_steps=4, max_epochs=-1)
    second, still_none = run(tmp_path / "files" / "last.ckpt", max_steps=8, max_epochs=-1)
    third, [result] = run(tmp_path / "files" / "last.ckpt", max_epochs=5)
    assert (none, still_none, third) == ([], [], [])
    assert "after 1 epoch (max_steps=4" in first[0]
    assert "after 2 epochs (max_steps=8" in second[0]
    assert result.applied


def test_an_early_stopping_that_ended_the_fit_before_is_not_blamed_for_this_one(tmp_path):
    stopping = EarlyStopping("val_constant", patience=1)
    said, _ = fit_and_hear(tmp_path, softpruning(epochs=8), stopping, max_epochs=20)
    assert "EarlyStopping" in said[0]
    stopping.patience = 99  # its record of the end at epoch 1 stays
    said, _ = fit_and_hear(tmp_path, softpruning(epochs=8), stopping, StopsAt(set_should_stop, 3), max_epochs=20)
    assert "EarlyStopping" not in said[0]
    assert "`trainer.should_stop` was set" in said[0]
