"""The refit within a round: what it is fitted to, and that it stays."""

from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_softprune.round.rehearsal as rehearsal
from lightning_softprune.calibration import ReadPositions
from lightning_softprune.compensation import DenseRun
from lightning_softprune.round.trials import ScoredPlan
from lightning_softprune.trainer import ModuleRunner
from support.modules import FEATURES, assert_same, fit, softpruning

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(pl.LightningModule):
    """Layers without a bias, whose constants go to the BatchNorm behind them; a sum; a buffer that counts steps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU())
        self.inner = nn.Sequential(nn.Linear(24, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU())
        self.last = nn.Sequential(nn.Linear(20, 24, bias=False), nn.BatchNorm1d(24))
        self.head = nn.Linear(24, FEATURES)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        x = self.first(x)
        return self.head(F.relu(x + self.last(self.inner(x))))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.fixture(autouse=True)
def refit_is_kept(monkeypatch):
    monkeypatch.setattr(ScoredPlan, "is_better_than", lambda *_: True)


def pruned(tmp_path):
    """The state after a round that keeps the refit, with nothing trained since; and the round's result."""
    pl.seed_everything(0, verbose=False)
    module = Residual()
    callback = softpruning(monitor="val_loss", target_sparsity=0.5, epochs=1, finetune_epochs=0)
    fit(tmp_path, module, callback, max_epochs=2)
    return dict(module.state_dict()), callback.results[0]


def test_what_the_refit_moves_is_not_put_back_with_what_steps_change(tmp_path, monkeypatch):
    """The oracle: steps each of which remembers the module as it is then."""
    state, result = pruned(tmp_path)

    @contextmanager
    def anew(_):
        yield lambda tensor: None

    refitted = []
    real = rehearsal.refit_readers
    monkeypatch.setattr(rehearsal, "refit_readers", lambda *args: refitted.append(args[1]) or real(*args))
    monkeypatch.setattr(ModuleRunner, "steady", anew)
    expected, _ = pruned(tmp_path)
    assert result.applied
    assert refitted[0].shifted, "constants in running means, which are buffers"
    assert_same(state, expected)


def test_the_dense_network_is_watched_while_it_is_measured_if_there_is_room(tmp_path, monkeypatch):
    runs, real = [], rehearsal.run_dense
    monkeypatch.setattr(rehearsal, "run_dense", lambda *args: runs.append(args) or real(*args))
    state, result = pruned(tmp_path)
    assert result.applied
    assert not runs, "the pass of the statistics has been enough"
    monkeypatch.setattr(DenseRun, "that_fits", lambda *_: None)
    expected, _ = pruned(tmp_path)
    assert len(runs) == 1
    assert_same(state, expected)


def test_observations_beside_statistics_keep_within_their_room():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(50, 4)
    kinds, steps = {"0": True, "2": False}, [lambda: model(x), lambda: model(x + 1)]
    size = 4 * 2 * (6 + 6)  # of one row of each, in both steps: outputs of the first, inputs of the second
    assert DenseRun.that_fits(model, kinds, steps, ReadPositions(), 4096 * size - 1) is None
    dense = DenseRun.that_fits(model, kinds, steps, ReadPositions(), 4096 * size)
    for _ in range(2):  # whoever starts again, starts afresh
        with torch.no_grad():
            for step in dense.watched():
                step()
    dense.finish()
    assert dense.bytes_taken == 50 * size
    torch.testing.assert_close(dense.rows["0"], [model[0](x), model[0](x + 1)])
    torch.testing.assert_close(dense.rows["2"], [F.relu(model[0](x)), F.relu(model[0](x + 1))])
    assert dense.fit_into(4096.0 * size, dense.steady).room == 4046 * size
    assert list(dense.fit_into(4096.0 * size - 1, dense.steady).rows) == ["0"], "both are as large, and one fits"
