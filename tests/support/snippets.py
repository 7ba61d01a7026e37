"""What the code of the README and the guide takes for granted."""

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image import PeakSignalNoiseRatio


class SnippetAutoencoder(L.LightningModule):
    """Small, with an encoder and a decoder, and a `val_psnr`."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        self.decoder = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 12))
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, images):
        return self.decoder(self.encoder(images))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[0])

    def validation_step(self, batch, batch_idx):
        self.psnr.update(self(batch[0]), batch[0])
        self.log("val_psnr", self.psnr)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def taken_for_granted():
    """The names `model` and `datamodule`."""
    torch.manual_seed(0)
    images = torch.rand(64, 12)
    datamodule = L.LightningDataModule()
    datamodule.train_dataloader = lambda: DataLoader(TensorDataset(images), batch_size=32)
    datamodule.val_dataloader = lambda: DataLoader(TensorDataset(images), batch_size=32)
    return {"model": SnippetAutoencoder(), "datamodule": datamodule}
