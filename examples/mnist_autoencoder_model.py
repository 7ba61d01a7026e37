"""The network of `mnist_autoencoder.py`: an ordinary LightningModule, which knows nothing of pruning."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Autoencoder(L.LightningModule):
    """A fully connected autoencoder that logs `val_loss` and `val_psnr`.

    Args:
        sizes: Layer sizes of the encoder, pixels first, latent last; the decoder mirrors them.
        lr: Adam's learning rate.
    """

    def __init__(self, sizes: Sequence[int], lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])
        # Sums the squared errors of all batches before it takes the logarithm: the PSNR of the whole validation set.
        self.val_psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions of `images`, both `(batch, pixels)`."""
        reconstructions: Tensor = self.decoder(self.encoder(images))
        return reconstructions

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of the batch."""
        (images,) = batch
        return nn.functional.mse_loss(self(images), images)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs `val_loss` and `val_psnr`."""
        (images,) = batch
        reconstructions = self(images)
        self.val_psnr.update(reconstructions, images)
        self.log("val_loss", nn.functional.mse_loss(reconstructions, images), batch_size=len(images))
        self.log("val_psnr", self.val_psnr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)
