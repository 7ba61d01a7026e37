"""Small LightningModules on random data, and what the tests of rounds share."""

from __future__ import annotations

import copy
import inspect
import random

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import SoftPruning, UniformBaseline

FEATURES = 12


class AutoEncoder(pl.LightningModule):
    """An MLP autoencoder: three groups, one of them the latent space that encoder and decoder share."""

    def __init__(self, hidden: int = 16, latent: int = 8, bias: bool = True, norm: bool = False):
        super().__init__()
        middle = [nn.BatchNorm1d(hidden)] if norm else []
        self.encoder = nn.Sequential(
            nn.Linear(FEATURES, hidden, bias=bias), *middle, nn.ReLU(), nn.Linear(hidden, latent, bias=bias)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, FEATURES, bias=bias)
        )
        self.mse = torchmetrics.MeanSquaredError()
        self.register_buffer("steps_seen", torch.zeros(()))
        self.losses: list[float] = []
        self.epoch_ends: list[int] = []

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def loss(self, batch):
        return F.mse_loss(self(batch[0]), batch[0])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.steps_seen += 1
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_idx):
        x = batch[0]
        out = self(x)
        self.mse.update(out, x)
        self.log("val_loss", F.mse_loss(out, x))
        self.log("val_constant", 0.0)

    def on_validation_epoch_end(self):
        self.epoch_ends.append(self.current_epoch)
        self.log("val_psnr", -10 * torch.log10(self.mse.compute()))
        self.mse.reset()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class ConvClassifier(pl.LightningModule):
    """Convolutions with BatchNorm, dropout, and a torchmetrics object that is logged."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 3))
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=3)

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        self.val_acc(out, batch[1])
        self.log("val_acc", self.val_acc)
        self.log("val_loss", F.cross_entropy(out, batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Manual(AutoEncoder):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.encoder, self.decoder)]


# ---------------------------------------------------------------------------------------------------------------- data


def vectors(n=48, seed=0):
    """Random vectors of low rank, so that there is something to compress."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(torch.randn(n, 4, generator=generator) @ basis)


def images(n=36, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.randn(n, 1, 6, 6, generator=generator) + y[:, None, None, None] - 1.0
    return TensorDataset(x, y)


def loaders(module, train=48, val=20):
    """A shuffled training loader and a validation loader whose last batch is smaller."""
    make = images if isinstance(module, ConvClassifier) else vectors
    return {
        "train_dataloaders": DataLoader(make(train, 1), batch_size=12, shuffle=True),
        "val_dataloaders": DataLoader(make(val, 2), batch_size=8),
    }


# ------------------------------------------------------------------------------------------------------------- running


def no_compensation():
    """Arguments for a round that only removes channels and changes no other weight."""
    known = inspect.signature(SoftPruning).parameters
    return {"compensation": "none"} if "compensation" in known else {}


def keeping_monitors():
    """Arguments for a round that leaves plateau schedulers and their like as they are."""
    known = inspect.signature(SoftPruning).parameters
    return {"reset_monitors": False} if "reset_monitors" in known else {}


def softpruning(**arguments):
    """A quick and quiet callback."""
    defaults = {"search": UniformBaseline(), "tolerance": 0.03, "verbose": False, "report": False}
    return SoftPruning(**{**defaults, **arguments})


def trainer_of(tmp_path, *callbacks, **arguments):
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})


def fit(tmp_path, module, *callbacks, data=None, **arguments):
    """Seed, fit, and return the trainer."""
    pl.seed_everything(7, verbose=False)
    trainer = trainer_of(tmp_path, *callbacks, **arguments)
    trainer.fit(module, **(data or loaders(module)))
    return trainer


def made(kind=AutoEncoder, seed=0, **arguments):
    """A module with reproducible weights."""
    torch.manual_seed(seed)
    return kind(**arguments)


class AtEpochStart(Callback):
    """Call a function of (trainer, module) at the start of one epoch; its place in the list says before or after."""

    def __init__(self, function, epoch=1):
        self.function, self.epoch, self.found = function, epoch, None

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.found = self.function(trainer, pl_module)


class Batches(Callback):
    """Keep the training batches of every epoch from `epoch` on."""

    def __init__(self, epoch=1):
        self.epoch, self.batches = epoch, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch >= self.epoch:
            self.batches.append([tensor.clone() for tensor in batch])


# ----------------------------------------------------------------------------------------------------------- comparing


def rng_state():
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}  # noqa: NPY002


def training_state(trainer, module):
    """All that a failed or skipped round leaves as it was: copies, and identities of what it may not replace."""
    return {
        "weights": copy.deepcopy(module.state_dict()),
        "gradients": {name: copy.deepcopy(p.grad) for name, p in module.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "modes": {name: m.training for name, m in module.named_modules()},
        "objects": {name: id(p) for name, p in module.named_parameters()},
        "sizes": {name: extra for name, m in module.named_modules() if (extra := m.extra_repr())},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in module.named_modules()},
        "lists": {name: copy.copy(v) for name, v in vars(module).items() if isinstance(v, list)},
        "held": [[id(p) for group in o.param_groups for p in group["params"]] for o in trainer.optimizers],
        "optimizers": [copy.deepcopy(o.state_dict()) for o in trainer.optimizers],
        **run_state(trainer),
    }


def run_state(trainer):
    """What even a successful round leaves alone."""
    return {
        "rng": rng_state(),
        "schedulers": [copy.deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
        "rates": [[group["lr"] for group in o.param_groups] for o in trainer.optimizers],
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "should_stop": trainer.should_stop,
        "metrics": {name: value.clone() for name, value in trainer.callback_metrics.items()},
        "logged": dict(trainer.logged_metrics),
    }


def assert_same(found, expected, path="", skip=()):
    """Bitwise equality of nested data; NaN equals NaN."""
    if path in skip:
        return
    assert type(found) is type(expected), path
    if isinstance(found, dict):
        assert list(found) == list(expected), path
        for key in found:
            assert_same(found[key], expected[key], f"{path}/{key}", skip)
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), path
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}/{index}", skip)
    elif isinstance(found, torch.Tensor):
        assert found.shape == expected.shape, path
        assert found.dtype == expected.dtype, path
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=path)
    elif isinstance(found, np.ndarray):
        assert np.array_equal(found, expected), path
    else:
        assert found == expected or (found != found and expected != expected), (path, found, expected)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def assert_optimizers_hold_live_parameters(trainer, module):
    held = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in module.parameters() if p.requires_grad}
    for optimizer in trainer.optimizers:
        assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.ndim:
                    assert value.shape == parameter.shape


def plain_validate(tmp_path, module, data, **arguments):
    """Metrics of the module as another Trainer validates it."""
    oracle = copy.deepcopy(module)
    oracle._metric_attributes = None  # Lightning's cache of the original's metrics
    for metric in oracle.modules():
        if isinstance(metric, torchmetrics.Metric):
            metric.reset()
    trainer = trainer_of(tmp_path, **arguments)
    trainer.validate(oracle, data["val_dataloaders"], verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
