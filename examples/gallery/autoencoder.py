"""An autoencoder loses three quarters of its parameters without training, and gets back what that cost in five epochs.

`prune()` takes a trained module and its data. What is removed is compensated for in closed form: the pruned network
works before it has seen a gradient. Any fit that follows is an ordinary one, of a smaller network.

In the picture: digits, and what the dense network, the pruned one, and the fine-tuned one make of them. On the right,
the channels kept; `encoder.4` is the latent code, which couples encoder and decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import lightning as L
import torch
from common import Digits, count, draw_channels, draw_mosaic, figure, print_table, save, start, trainer
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_softprune import SensitivitySearch, prune


class Autoencoder(L.LightningModule):
    """Fully connected, 64-256-128-16-128-256-64; logs `val_psnr`, in dB."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 16)
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)
        )  # fmt: skip
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, images: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.encoder(images.flatten(1)))
        return pixels.view_as(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        return nn.functional.mse_loss(self(images), images)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, _ = batch
        self.psnr(self(images), images)
        self.log("val_psnr", self.psnr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    model, data = Autoencoder(), Digits()
    training = trainer(args, 25)
    training.fit(model, datamodule=data)
    dense = copy.deepcopy(model)

    result = prune(
        model,
        data,
        monitor="val_psnr",
        mode="max",
        target_sparsity=0.75,
        search=SensitivitySearch(),
        trainer=trainer(args, 1),
    )
    pruned = copy.deepcopy(model)

    tuning = trainer(args, 5)
    tuning.fit(model, datamodule=data)
    scores = result.score_before, result.score_after, float(tuning.callback_metrics["val_psnr"])
    networks = {"dense": dense, "pruned": pruned, "after fine-tuning": model}
    rows = [
        (*row, f"{score:.2f} dB") for *row, score in zip(networks, map(count, networks.values()), scores, strict=True)
    ]
    print_table(("network", "parameters", "PSNR"), *rows)

    images = data.images[1300:1310]  # of the validation images
    with torch.no_grad():
        pictures = [images, *(network.eval()(images) for network in networks.values())]
    names = ["original", *(f"{name}\n{score:.2f} dB" for name, score in zip(networks, scores, strict=True))]
    picture, (left, right) = figure(columns=2, size=(9.0, 3.0), width_ratios=[1.7, 1])
    draw_mosaic(left, [row[:, 0] for row in pictures], names)
    draw_channels(right, result)
    save(picture, args)


if __name__ == "__main__":
    main()
