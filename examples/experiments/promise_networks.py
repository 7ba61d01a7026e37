"""Ten small networks of the kinds that people prune, for pictures of 28 x 28: eight name a digit, two rebuild it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.image import PeakSignalNoiseRatio

Batch = tuple[Tensor, Tensor]


class Network(L.LightningModule):
    """A body with a task: to name the digit (`val_acc`), or to rebuild the picture from a noisy one (`val_psnr`)."""

    def __init__(self, body: nn.Module, rebuilds: bool, noise: float = 0.0, lr: float = 3e-3, epochs: int = 2) -> None:
        super().__init__()
        self.body, self.rebuilds, self.noise, self.lr, self.epochs = body, rebuilds, noise, lr, epochs
        self.monitor = "val_psnr" if rebuilds else "val_acc"
        self.metric: Metric = (
            PeakSignalNoiseRatio(data_range=1.0) if rebuilds else MulticlassAccuracy(10, average="micro")
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, or pictures."""
        outputs: Tensor = self.body(images)
        return outputs

    def _noisy(self, images: Tensor, batch_idx: int) -> Tensor:
        """The same noise whenever a batch comes round."""
        random = torch.Generator().manual_seed(batch_idx)
        return images + self.noise * torch.randn(images.shape, generator=random)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy, or the squared error."""
        images, labels = batch
        if self.rebuilds:
            return F.mse_loss(self(self._noisy(images, batch_idx)), images)
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the metric."""
        images, labels = batch
        if self.rebuilds:
            self.metric.update(self(self._noisy(images, batch_idx)), images)
        else:
            self.metric.update(self(images), labels)
        self.log(self.monitor, self.metric, batch_size=len(images))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, one cycle of its learning rate."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def _classify(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


class Residual(nn.Module):
    """Adds its input, or a projection of it, to what its branch makes of it."""

    def __init__(self, *branch: nn.Module, shortcut: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = nn.Sequential(*branch), shortcut or nn.Identity()
        self.last = last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        summed: Tensor = self.last(self.shortcut(x) + self.branch(x))
        return summed


def residual() -> nn.Sequential:
    """A ResNet of three blocks."""

    def block(inputs: int, outputs: int, stride: int) -> Residual:
        branch = [*_conv(inputs, outputs, stride=stride), *_conv(outputs, outputs)[:2]]
        shortcut = None if stride == 1 else nn.Sequential(*_conv(inputs, outputs, 1, stride)[:2])
        return Residual(*branch, shortcut=shortcut, last=nn.ReLU())

    return nn.Sequential(*_conv(1, 16, stride=2), block(16, 16, 1), block(16, 32, 2), block(32, 64, 2), *_classify(64))


def vgg() -> nn.Sequential:
    """Convolutions and pooling, then linear layers behind a flatten."""
    parts: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        parts += [*_conv(inputs, outputs), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 10))


def mobilenet() -> nn.Sequential:
    """Inverted residuals with depthwise convolutions."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        wide = 4 * inputs
        branch = [*_conv(inputs, wide, 1), *_conv(wide, wide, 3, stride, wide), *_conv(wide, outputs, 1)[:2]]
        return Residual(*branch) if stride == 1 else nn.Sequential(*branch)

    blocks = [block(16, 16, 1), block(16, 32, 2), block(32, 32, 1), block(32, 64, 2), block(64, 64, 1)]
    return nn.Sequential(*_conv(1, 16, stride=2), *blocks, *_classify(64))


class Dense(nn.Module):
    """Appends what its bottleneck makes of all features so far."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_conv(inputs, 2 * growth, 1), *_conv(2 * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        """The features, and some more."""
        return torch.cat([x, self.layers(x)], dim=1)


def densenet() -> nn.Sequential:
    """Two dense blocks with a transition."""
    first, second = [Dense(16 + 8 * i, 8) for i in range(4)], [Dense(24 + 16 * i, 16) for i in range(4)]
    return nn.Sequential(*_conv(1, 16, stride=2), *first, *_conv(48, 24, 1), nn.AvgPool2d(2), *second, *_classify(88))


class ConvNeXtBlock(nn.Module):
    """A large depthwise convolution and a two-layer perceptron per position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to its input."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        summed: Tensor = x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return summed


def convnext() -> nn.Sequential:
    """Two stages."""
    stages = [nn.Conv2d(1, 32, 4, 4), ConvNeXtBlock(32), ConvNeXtBlock(32), nn.Conv2d(32, 64, 2, 2)]
    return nn.Sequential(*stages, ConvNeXtBlock(64), ConvNeXtBlock(64), *_classify(64))


class Attention(nn.Module):
    """Self-attention over tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, tokens, width)`, as its input."""
        parts = (layer(x).unflatten(-1, (self.heads, self.head_width)) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        outputs: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return outputs


class Patches(nn.Module):
    """Sixteen patches of 7 x 7 as tokens, with their positions, and the mean of the tokens at the end."""

    def __init__(self, width: int, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.position = nn.Conv2d(1, width, 7, 7), nn.Parameter(0.02 * torch.randn(16, width))
        self.layers, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return logits


def _feed_forward(width: int, hidden: int) -> list[nn.Module]:
    return [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)]


def vit() -> Patches:
    """A Vision Transformer of three layers."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers.append(Residual(nn.LayerNorm(64), Attention(64, 4)))
        layers.append(Residual(nn.LayerNorm(64), *_feed_forward(64, 256)))
    return Patches(64, *layers)


class Transposed(nn.Module):
    """Tokens as channels, for layers that mix tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """The last two dimensions exchanged."""
        return x.transpose(1, 2)


def mixer() -> Patches:
    """An MLP-Mixer of three layers."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers.append(Residual(nn.LayerNorm(64), Transposed(), *_feed_forward(16, 64), Transposed()))
        layers.append(Residual(nn.LayerNorm(64), *_feed_forward(64, 256)))
    return Patches(64, *layers)


class UNet(nn.Module):
    """Two steps down and up again, with skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(*_conv(1, 8)), nn.Sequential(*_conv(8, 24, stride=2))
        self.middle = nn.Sequential(*_conv(24, 48, stride=2), *_conv(48, 48))
        self.up1, self.join1 = nn.ConvTranspose2d(48, 24, 2, 2), nn.Sequential(*_conv(48, 24))
        self.up2, self.join2 = nn.ConvTranspose2d(24, 8, 2, 2), nn.Sequential(*_conv(16, 8))
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures."""
        first = self.first(images)
        second = self.second(first)
        x = self.join1(torch.cat([second, self.up1(self.middle(second))], dim=1))
        pictures: Tensor = self.last(self.join2(torch.cat([first, self.up2(x)], dim=1)))
        return pictures


def autoencoder() -> nn.Sequential:
    """Linear layers down to 32 numbers, and up again."""
    return nn.Sequential(perceptron(784, 512, 256, 32, 256, 512, 784), nn.Unflatten(1, (1, 28, 28)))


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP": lambda: Network(perceptron(784, 256, 256, 10), rebuilds=False, epochs=4),
    "autoencoder": lambda: Network(autoencoder(), rebuilds=True, epochs=10),
    "residual": lambda: Network(residual(), rebuilds=False),
    "VGG": lambda: Network(vgg(), rebuilds=False),
    "MobileNetV2": lambda: Network(mobilenet(), rebuilds=False, epochs=1),
    "DenseNet": lambda: Network(densenet(), rebuilds=False, epochs=1),
    "ConvNeXt": lambda: Network(convnext(), rebuilds=False, lr=2e-3, epochs=1),
    "ViT": lambda: Network(vit(), rebuilds=False, lr=1e-3, epochs=6),
    "U-Net": lambda: Network(UNet(), rebuilds=True, noise=0.5),
    "mixer": lambda: Network(mixer(), rebuilds=False, lr=2e-3),
}
