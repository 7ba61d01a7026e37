"""One step by itself gets what Lightning would give it."""

import pytest
import torch

from lightning_softprune.trainer import scorer as scorer_module
from lightning_softprune.trainer.isolation import untouched
from lightning_softprune.trainer.scorer import ValidationScorer, time_validation_step
from lightning_softprune.trainer.steps import run_step
from support.fits import ORDINARY_FITS, Polite, Probe, TwoLoaders, loader, trainer_of

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


@pytest.mark.parametrize(("samples", "wanted"), [(None, 1), (4, 2)])
def test_a_slow_step_is_timed_once_and_without_what_its_epoch_begins_with(tmp_path, monkeypatch, samples, wanted):
    """By a clock that the module moves: its hook takes an hour, its step a second. A batch of another size is cold."""

    class Slow(Polite):
        now, steps = 0.0, 0

        def on_validation_epoch_start(self):
            type(self).now += 3600.0

        def validation_step(self, batch, batch_idx):
            type(self).now += 1.0
            type(self).steps += 1
            self.outputs.append(torch.zeros(()))
            self.unlogged.update(0.0)

    class Clock:
        @staticmethod
        def perf_counter():
            return Slow.now

    def function(trainer, module):
        with ValidationScorer(trainer, module) as scorer:
            monkeypatch.setattr(scorer_module, "time", Clock)
            before = Slow.steps
            how = {"runs": 5, "seconds": 0.5, "samples": samples}
            return time_validation_step(trainer, module, scorer, **how), Slow.steps - before

    probe = Probe(function, 0)
    trainer_of(tmp_path, probe, max_epochs=1, limit_val_batches=1).fit(Slow(), loader(), loader())
    assert probe.result == (1.0, wanted)
