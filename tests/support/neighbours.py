"""Modules and trainers for tests of what stands beside a round."""

import lightning as L
import torch
from torch import nn

from lightning_softprune import SoftPruning, UniformBaseline


class Regressor(L.LightningModule):
    """Learns a fixed linear map; `offset` is added to the logged loss, to steer what others see."""

    def __init__(self, plateau=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
        self.head = nn.Linear(12, 3)
        self.plateau = plateau
        self.offset = 0.0

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]) + self.offset)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        if not self.plateau:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e-9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def pruning(**arguments):
    return SoftPruning(search=UniformBaseline(), verbose=False, report=False, tolerance=0.05, **arguments)
