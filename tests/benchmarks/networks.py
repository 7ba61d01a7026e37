"""Networks of the benchmarks, from a perceptron to a ResNet-50, each with synthetic data that it can learn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
from fixed_costs import SlimResNet18
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Network(L.LightningModule):
    """A body that is trained to name one of ten patterns, or to rebuild its input."""

    def __init__(self, body: nn.Module, rebuilds: bool = False) -> None:
        super().__init__()
        self.body, self.rebuilds = body, rebuilds

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, _):
        return F.mse_loss(self(batch[0]), batch[0]) if self.rebuilds else F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", self.training_step(batch, _))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def perceptron(*widths: int, rebuilds: bool = False) -> Network:
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return Network(nn.Sequential(*layers[:-1], nn.Sigmoid() if rebuilds else nn.Identity()), rebuilds)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = normed(inputs, width, 1), normed(width, width, 3, stride)
        self.third = normed(width, 4 * width, 1)
        self.shortcut = normed(inputs, 4 * width, 1, stride) if inputs != 4 * width else nn.Identity()

    def forward(self, x):
        return F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))) + self.shortcut(x))


def normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def resnet50() -> Network:
    """23.5 M parameters."""
    parts, inputs = [normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for number in range(depth):
            parts.append(Bottleneck(inputs, 64 * 2**stage, 2 if stage and not number else 1))
            inputs = 256 * 2**stage
    return Network(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 4 x 4 of images of 32 x 32; 2.7 M parameters."""

    def __init__(self, width: int = 192, heads: int = 6, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


@dataclass(frozen=True)
class Case:
    """A network with the shape and the number of its validation images."""

    build: Callable[[], L.LightningModule]
    shape: tuple[int, ...]
    images: int
    batch: int = 64

    def model(self) -> L.LightningModule:
        torch.manual_seed(0)
        return self.build()

    def loader(self, times: int = 1, workers: int = 0) -> DataLoader:
        """Images that are one of ten patterns, and noise."""
        random = torch.Generator().manual_seed(times)
        labels = torch.randint(10, (times * self.images,), generator=random)
        patterns = torch.rand(10, *self.shape, generator=torch.Generator().manual_seed(0))
        noise = torch.rand(len(labels), *self.shape, generator=random)
        data = TensorDataset(0.7 * patterns[labels] + 0.3 * noise, labels)
        return DataLoader(data, self.batch, num_workers=workers)


NETWORKS = {
    "autoencoder": Case(lambda: perceptron(784, 512, 256, 32, 256, 512, 784, rebuilds=True), (784,), 1000, 100),
    "resnet18": Case(SlimResNet18, (3, 32, 32), 512),
    "resnet50": Case(resnet50, (3, 64, 64), 256),
    "vit": Case(lambda: Network(ViT()), (3, 32, 32), 256),
    "mlp4096": Case(lambda: perceptron(1024, 4096, 4096, 10), (1024,), 256),
    "vit_b": Case(lambda: Network(ViT(768, 12, depth=4)), (3, 32, 32), 64),  # as wide as a ViT-B, a third as deep
}
