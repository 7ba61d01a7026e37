"""Runs that save, and what is compared of them."""

import itertools

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from support.modules import (
    AutoEncoder,
    loaders,
    trainer_of,
)


def mlp(*widths, **arguments):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, **arguments), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Scheduled(AutoEncoder):
    """No biases (compensation creates them), two parameter groups, Adam with a scheduler, LayerNorm without affine."""

    def __init__(self, hidden: int = 16, latent: int = 8):
        super().__init__(hidden, latent, bias=False)
        self.save_hyperparameters()
        self.norm = nn.LayerNorm(latent, elementwise_affine=False)
        self.loaded = []

    def forward(self, x):
        return self.decoder(self.norm(self.encoder(x)))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def on_load_checkpoint(self, checkpoint):
        self.loaded.append(tuple(self.encoder[0].weight.shape))

    def configure_optimizers(self):
        thin = [p for p in self.parameters() if p.ndim < 2]
        wide = [p for p in self.parameters() if p.ndim >= 2]
        optimizer = torch.optim.Adam([{"params": wide}, {"params": thin, "lr": 2e-2}], lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)]


class Stateful(DataLoader):
    """A loader that knows where it was."""

    position = start = 0

    def __iter__(self):
        self.position, start, self.start = self.start, self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.position = number + 1
                yield batch

    def state_dict(self):
        return {"position": self.position % len(self)}

    def load_state_dict(self, state):
        self.start = state["position"]


def data(module=None):
    plain = loaders(module)
    return plain | {"train_dataloaders": Stateful(plain["train_dataloaders"].dataset, batch_size=8)}


def keep_all(folder, **when):
    return ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **when)


def run(tmp_path, module, *callbacks, ckpt_path=None, seed=7, **arguments):
    pl.seed_everything(seed, verbose=False)
    has_checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = trainer_of(
        tmp_path, *callbacks, **{"max_epochs": 5, "enable_checkpointing": has_checkpoints, **arguments}
    )
    trainer.fit(module, **data(module), ckpt_path=ckpt_path)
    return trainer


ROUNDS = {"epochs": [1, 3], "target_sparsity": 0.5}


def file_of(folder, kind, **at):
    (found,) = (folder / kind).glob("-".join(f"{name}={value}" for name, value in at.items()) + "*.ckpt")
    return found


def sizes(module):
    return [tuple(p.shape) for p in module.parameters()]
