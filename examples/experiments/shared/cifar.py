"""CIFAR-10 as JPEG, and the ResNet-20 that was trained on it; or noise in its shape, for trying things out."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from shared.mnist import Images

Batch = tuple[Tensor, Tensor]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions around a shortcut without parameters: every second pixel, and zeros for the new channels."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, width - inputs
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to its input."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(y + x)


class ResNet20(L.LightningModule):
    """CIFAR's ResNet-20 (He et al. 2016, arXiv 1512.03385), with shortcuts of option A."""

    monitor = "val_acc"

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Batch) -> None:
        """Logs loss and accuracy."""
        out = self(batch[0])
        self.log("val_loss", F.cross_entropy(out, batch[1]), batch_size=len(out))
        self.log("val_acc", (out.argmax(1) == batch[1]).float().mean(), batch_size=len(out))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD, its learning rate falling linearly."""
        optimizer = torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained_resnet20(folder: Path | None) -> ResNet20:
    """The trained network; without a folder, an untrained one.

    Args:
        folder: Where `resnet20.pt` is.
    """
    network = ResNet20()
    if folder is not None:
        network.load_state_dict(torch.load(folder / "resnet20.pt", weights_only=True))
    return network.eval()


def load_cifar(folder: Path | None, scored: int = 2000) -> Images:
    """The images; those that plans are scored on are some of the test images, since training has seen all others.

    Args:
        folder: Where `train.zip` and `test.zip` are; `None`: noise.
        scored: How many test images to search with; the table shows the rest.
    """
    train, test = dict(_noise()).values() if folder is None else (_unzipped(folder, part) for part in ("train", "test"))
    order = torch.randperm(len(test[1]), generator=torch.Generator().manual_seed(0))  # files come class by class
    searched, shown = ((test[0][part], test[1][part]) for part in (order[:scored], order[scored:]))
    return Images(train, searched, shown)


def _unzipped(folder: Path, part: str) -> Batch:
    from PIL import Image

    with zipfile.ZipFile(folder / f"{part}.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
    kinds = sorted({Path(name).parent.name for name in names})
    labels = torch.tensor([kinds.index(Path(name).parent.name) for name in names])
    images = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return images.permute(0, 3, 1, 2).contiguous(), labels


def _noise() -> Iterator[tuple[str, Batch]]:
    random = torch.Generator().manual_seed(0)
    for name, count in (("train", 256), ("test", 256)):
        yield name, (torch.randn(count, 3, 32, 32, generator=random), torch.randint(10, (count,), generator=random))
