"""One step by itself gets what Lightning would give it."""

import pytest
import torch

from lightning_softprune.trainer.isolation import untouched
from lightning_softprune.trainer.scorer import ValidationScorer
from lightning_softprune.trainer.steps import run_step
from support.fits import ORDINARY_FITS, Probe, TwoLoaders, loader, trainer_of

pytestmark = ORDINARY_FITS


def test_run_step_gives_each_step_the_arguments_lightning_gives_it(tmp_path):
    def function(trainer, module):
        with ValidationScorer(trainer, module) as scorer:
            batch = scorer.first_batch()
        before = dict(trainer.callback_metrics)
        for autocast in (False, True):
            with untouched(trainer, module):
                module.dtypes = []
                run_step(trainer, module, "validation_step", batch, autocast=autocast)
                run_step(trainer, module, "training_step", batch, autocast=autocast)
                assert module.dtypes == [torch.bfloat16 if autocast else torch.float32] * 2
        with pytest.raises(ValueError, match="step"):
            run_step(trainer, module, "test_step", batch)
        assert trainer.callback_metrics == before
        assert module._current_fx_name == "on_train_epoch_start"
        return True

    class Typed(TwoLoaders):
        def forward(self, x):
            out = super().forward(x)
            self.dtypes = [*getattr(self, "dtypes", []), out.dtype]
            return out.float()

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.outputs.append(self.loss(batch))
            self.log("val_loss", self.outputs[-1])

    probe = Probe(function, 0)
    val = [loader(), loader()]
    trainer_of(tmp_path, probe, precision="bf16-mixed", max_epochs=1).fit(Typed(), loader(drop_last=True), val)
    assert probe.result
