"""Training batches are read beside the running epoch, which notices nothing."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from support.fits import ORDINARY_FITS, Batches, Polite, Probe, assert_equal, first_batches, loader, trainer_of

pytestmark = ORDINARY_FITS


def test_training_batches_in_mid_epoch_leave_the_training_order_alone(tmp_path):
    def order(read):
        seen = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                seen.append(batch[0].clone())
                if read and batch_idx == 1:
                    batches.append(first_batches(trainer, 2, seed=7))

        torch.manual_seed(0)
        trainer_of(tmp_path, Watch(), limit_val_batches=0).fit(Polite(), loader(64, shuffle=True))
        return seen

    batches = []
    assert_equal(order(False), order(True), "order")
    assert len(batches) == 2
    assert_equal(batches[0], batches[1], "the same seed, the same batches")
    assert [len(x) for x, _ in batches[0]] == [8, 8]


def test_training_batches_have_the_structure_training_step_gets(tmp_path):
    class Dicted(Polite):
        def training_step(self, batch, batch_idx):
            assert batch.keys() == {"a", "b"}
            return self.loss(batch["a"]) + self.loss(batch["b"])

    probe = Probe(lambda trainer, module: first_batches(trainer, 99), 0)
    train = {"a": loader(24, shuffle=True), "b": Batches(loader(10))}
    trainer_of(tmp_path, probe, limit_val_batches=0, limit_train_batches=2).fit(Dicted(), train)
    assert [batch.keys() for batch in probe.result] == [{"a", "b"}] * 2


def test_training_batches_from_a_generator_are_refused(tmp_path):
    def attempt(trainer, module):
        with pytest.raises(MisconfigurationException, match="train_dataloaders"):
            first_batches(trainer, 1)

    train = (tuple(batch) for batch in loader())
    trainer_of(tmp_path, Probe(attempt, 0), limit_val_batches=0, max_epochs=1).fit(Polite(), train)
