"""Small modules, probes and comparisons for tests of what runs beside a fit."""

from collections import deque
from contextlib import closing

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune.trainer.batches import FirstBatches

ORDINARY_FITS = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training.*"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
]
"""The `pytestmark` of files whose fits are as small and as careless as these modules."""

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def data(n=22, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def loader(n=22, seed=0, **kwargs):
    return DataLoader(data(n, seed), **{"batch_size": 8, **kwargs})


def first_batches(trainer, n, seed=0):
    """So many training batches, read beside the running epoch."""
    with closing(FirstBatches(trainer, seed)) as batches:
        return batches.take(n)


class Tiny(pl.LightningModule):
    """Logs in every way there is, and keeps state in every way there is."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
        self.frozen.eval()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=2)
        both = [
            torchmetrics.F1Score("multiclass", num_classes=2, average="macro"),
            torchmetrics.Recall("multiclass", num_classes=2, average="macro"),
        ]
        self.collection = torchmetrics.MetricCollection(both, prefix="val_")
        self.unlogged = torchmetrics.MeanMetric()
        self.register_buffer("seen", torch.zeros(1))
        self.plain = torch.zeros(2)
        self.outputs, self.nested, self.names, self.recent = [], {"a": [1.0]}, {"x"}, deque([1], maxlen=9)
        self.count = 0
        self.broken = False

    def on_train_epoch_start(self):
        self.frozen.eval()

    def forward(self, x):
        return self.frozen(self.net(x))

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        loss = nn.functional.cross_entropy(out, y)
        self.outputs.append(loss)
        self.nested["a"].append(batch_idx)
        self.names.add(batch_idx)
        self.recent.append(batch_idx)
        self.count += 1
        self.seen += 1
        self.plain.add_(1)
        self.accuracy(out, y)
        self.collection(out, y)
        self.unlogged.update(loss)
        x.sub_(1.0)  # a careless user: the batch changes in place
        self.log("val_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"val_max": loss, "val_sum": loss.double()}, reduce_fx="max")
        self.log("val_min", out.min(), reduce_fx="min")
        self.log("val_weighted", loss, batch_size=batch_idx + 1)
        self.log("val_noise", torch.rand(()))
        self.log("val_accuracy", self.accuracy)
        self.log_dict(self.collection)
        if self.broken and batch_idx == 1:
            raise ZeroDivisionError("the user's own")

    def on_validation_start(self):
        self.zero_grad(set_to_none=False)

    def on_validation_epoch_end(self):
        self.log("val_epoch_end", torch.stack(self.outputs).mean() + self.unlogged.compute())
        self.trainer.should_stop = True
        if self.trainer.training or self.trainer.sanity_checking:
            return
        if self.trainer.state.fn == "fit":
            for scheduler in [self.lr_schedulers()]:
                scheduler.step()
            self.optimizers().param_groups[0]["weight_decay"] = 0.5
            self.net.requires_grad_(False)
            self.net.train()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Polite(Tiny):
    """The same without hooks that change the run."""

    def on_validation_epoch_end(self):
        self.log("val_epoch_end", torch.stack(self.outputs).mean())
        self.outputs.clear()


class Probe(Callback):
    """Runs a function at the start of an epoch; counts the validation hooks it gets itself."""

    def __init__(self, function, epoch=1):
        self.function, self.epoch, self.result, self.calls = function, epoch, None, 0

    def on_train_epoch_start(self, trainer, pl_module):
        if self.epoch is None or trainer.current_epoch == self.epoch:
            self.calls = 0
            self.result = self.function(trainer, pl_module)
            assert self.calls == 0

    def _count(self, *args):
        self.calls += 1

    on_validation_start = on_validation_epoch_start = on_validation_batch_start = _count
    on_validation_batch_end = on_validation_epoch_end = on_validation_end = _count


def trainer_of(tmp_path, *callbacks, **kwargs):
    kwargs = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, **QUIET, **kwargs}
    return pl.Trainer(callbacks=list(callbacks), **kwargs)


class TwoLoaders(Polite):
    add_index = True

    def validation_step(self, batch, batch_idx, dataloader_idx):
        x, y = batch
        self.outputs.append(self.loss(batch))
        name = "val_loss" if self.add_index else f"val_loss_of_{dataloader_idx}"
        self.log(name, self.outputs[-1], add_dataloader_idx=self.add_index)
        self.accuracy(self(x), y)
        self.log("val_accuracy", self.accuracy)


class Batches:
    """Neither a DataLoader nor a list, which Lightning would take for several loaders."""

    def __init__(self, batches):
        self.batches = [tuple(batch) for batch in batches]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def assert_equal(before, after, name):
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after), name
    elif isinstance(before, np.ndarray):
        assert np.array_equal(before, after), name
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), name
        for key in before:
            assert_equal(before[key], after[key], f"{name}.{key}")
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after), name
        for index, (left, right) in enumerate(zip(before, after, strict=True)):
            assert_equal(left, right, f"{name}[{index}]")
    else:
        assert before == after, name
