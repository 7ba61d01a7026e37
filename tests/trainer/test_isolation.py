"""What is put back: random states, and everything around the parameters."""

import random

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_softprune.trainer.isolation import is_fresh, isolated_rng, untouched
from lightning_softprune.trainer.scorer import ValidationScorer
from support.fits import ORDINARY_FITS, Polite, Probe, loader, trainer_of

pytestmark = ORDINARY_FITS


def test_isolated_rng_restores_after_an_exception_and_seeds_everything():
    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    with isolated_rng():
        expected = draw()

    def fail():
        with isolated_rng(3):
            drawn.append(draw())
            raise KeyError

    drawn = []
    with pytest.raises(KeyError):
        fail()
    with isolated_rng(3):
        assert [draw()] == drawn
    assert draw() == expected


def test_untouched_copes_with_odd_objects(tmp_path):
    class Meter:
        def __init__(self):
            self.total, self.history = 0, []

    def function(trainer, module):
        module.meter, module.hidden = Meter(), [nn.BatchNorm1d(2)]
        module.register_buffer("expanded", torch.zeros(1).expand(5))
        module.array, module.generator = np.zeros(3), torch.Generator()
        module.replaced, module.loop = torch.zeros(3), [1]
        module.loop.append(module.loop)
        state, buffer = module.generator.get_state(), module.replaced
        with untouched(trainer, module):
            module.meter.total += 1
            module.meter.history.append(1)
            module.hidden[0](torch.randn(4, 2))
            module.array += 1
            torch.rand(1, generator=module.generator)
            module.replaced.data = torch.ones(7)
            module.replaced = None
            module.added = 1
            module.register_buffer("new", torch.zeros(1))
            module.register_forward_hook(lambda *_: None)
            module.expanded = torch.ones(5)
        assert module.meter.total == 0
        assert module.meter.history == []
        assert module.hidden[0].num_batches_tracked == 0
        assert module.array.sum() == 0
        assert torch.equal(module.generator.get_state(), state)
        assert module.replaced is buffer
        assert torch.equal(buffer, torch.zeros(3))
        assert not hasattr(module, "added")
        assert not hasattr(module, "new")
        assert not module._forward_hooks
        assert module.expanded.sum() == 0
        return True

    probe = Probe(function, 0)
    trainer_of(tmp_path, probe, max_epochs=1).fit(Polite(), loader(drop_last=True), loader())
    assert probe.result


def test_a_graph_from_before_a_pass_can_still_be_differentiated(tmp_path):
    def function(trainer, module):
        module.frozen.train()
        loss = module.loss(next(iter(loader())))
        with ValidationScorer(trainer, module) as scorer:
            scorer.metrics()
        loss.backward()
        module.zero_grad()
        return True

    probe = Probe(function, 1)
    trainer_of(tmp_path, probe).fit(Polite(), loader(drop_last=True), loader())
    assert probe.result


def test_a_module_is_fresh_without_metrics_and_tensors_of_a_validation():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert is_fresh(module)
    assert not is_fresh(nn.Sequential(module, torchmetrics.SumMetric()))
    with torch.inference_mode():
        module[1].running_mean = torch.zeros(2)
    assert not is_fresh(module)
