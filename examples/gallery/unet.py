"""A small U-Net that segments shapes loses 70 % of its parameters while it trains.

The skip connections of a U-Net concatenate channels of the encoder with those of the decoder. Which channels depend on
each other is found by following a batch through the module: nothing is declared.

In the picture: images with noise, the true masks, and those that the pruned network finds. On the right,
the channels kept per group; those of the encoder are read both by the next level and across the skip connection.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from common import count, draw_channels, draw_mosaic, figure, print_table, save, start, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.segmentation import MeanIoU

from lightning_softprune import SensitivitySearch, SoftPruning


def shapes(number: int, seed: int) -> TensorDataset:
    """Noisy images of 32x32 pixels with a dim disc (1) and a bright square (2), and their masks."""
    random = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    places = torch.randint(6, 26, (number, 4, 1, 1), generator=random)
    sizes = torch.randint(3, 8, (number, 2, 1, 1), generator=random)
    masks = ((x - places[:, 0]) ** 2 + (y - places[:, 1]) ** 2 <= sizes[:, 0] ** 2).long()
    masks[torch.maximum((x - places[:, 2]).abs(), (y - places[:, 3]).abs()) <= sizes[:, 1]] = 2
    return TensorDataset(masks[:, None] / 2 + 0.3 * torch.randn(number, 1, 32, 32, generator=random), masks)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(L.LightningModule):
    """Three levels; logs `val_iou`, the overlap of true and predicted shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(1, 16), block(16, 32)])
        self.bottom = block(32, 64)
        self.up = nn.ModuleList([block(64 + 32, 32), block(32 + 16, 16)])
        self.head = nn.Conv2d(16, 3, 1)
        self.iou = MeanIoU(num_classes=3, include_background=False, input_format="index")

    def forward(self, images: Tensor) -> Tensor:
        x, skips = images, []
        for level in self.down:
            skips.append(level(x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for level in self.up:
            x = level(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skips.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        return nn.functional.cross_entropy(self(images), masks)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, masks = batch
        self.iou(self(images).argmax(1), masks)
        self.log("val_iou", self.iou)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    train, val = shapes(800, seed=1), shapes(100, seed=2)
    loaders = DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=100)
    model = UNet()
    pruning = SoftPruning(monitor="val_iou", mode="max", epochs=4, target_sparsity=0.7, search=SensitivitySearch())
    fit = trainer(args, 6, pruning)
    fit.fit(model, *loaders)
    (result,) = pruning.results
    print_table(
        ("network", "parameters", "IoU"),
        ("dense", result.costs_before.params, f"{result.score_before:.3f}"),
        ("pruned", result.costs_after.params, f"{result.score_after:.3f}"),
        ("after fine-tuning", count(model), f"{fit.callback_metrics['val_iou']:.3f}"),
    )

    images, masks = val[:5]
    with torch.no_grad():
        found = model.eval()(images).argmax(1)
    picture, (left, right) = figure(columns=2, size=(8.2, 2.7), width_ratios=[1.7, 1])
    draw_mosaic(left, [images[:, 0], masks / 2, found / 2], ["image", "true mask", "pruned\nnetwork"])
    draw_channels(right, result)
    save(picture, args)


if __name__ == "__main__":
    main()
