"""An autoencoder of scikit-learn's handwritten digits, and their data: nothing here knows of pruning or of files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image import PeakSignalNoiseRatio


class DigitsAutoencoder(L.LightningModule):
    """A fully connected autoencoder of 8x8 images that logs `val_loss` and `val_psnr`.

    Args:
        hidden: Sizes of the encoder's hidden layers; the decoder mirrors them.
        latent: Size of the code between encoder and decoder.
        lr: Adam's learning rate.
    """

    def __init__(self, hidden: tuple[int, ...] = (256, 128), latent: int = 16, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = (64, *hidden, latent)
        self.lr = lr
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])
        self.val_psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.test_psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions of `images`, both `(batch, 64)`."""
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
        self.log("val_loss", nn.functional.mse_loss(reconstructions, images), prog_bar=True, batch_size=len(images))
        self.log("val_psnr", self.val_psnr, prog_bar=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs `test_psnr`."""
        (images,) = batch
        self.test_psnr.update(self(images), images)
        self.log("test_psnr", self.test_psnr)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Reconstructions of a batch, `(batch, 64)`."""
        (images,) = batch
        reconstructions: Tensor = self(images)
        return reconstructions

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DigitsData(L.LightningDataModule):
    """The 1,797 digits that come with scikit-learn: 1,300 to train on, 250 to validate, 247 to test.

    Args:
        batch_size: Training images per batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Reads the images as rows of 64 pixels in [0, 1]; the split is always the same."""
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().data).float() / 16
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
        self.train, self.val, self.test = (
            TensorDataset(images[part]) for part in torch.tensor_split(order, [1300, 1550])
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches of training images."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The validation images: plans are scored on these."""
        return DataLoader(self.val, batch_size=250)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test images, which no search has seen."""
        return DataLoader(self.test, batch_size=250)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test images again."""
        return self.test_dataloader()
