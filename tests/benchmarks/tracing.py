"""How long it takes to find the groups of deep networks. Run by hand; it takes a minute.

    python tests/benchmarks/tracing.py                       # all three
    python tests/benchmarks/tracing.py --networks dense      # one of them
    python tests/benchmarks/tracing.py --profile dense       # and where the time goes

The networks, all small in width and deep in layers:

- ``dense``: blocks of 6, 12, 24 and 16 layers whose inputs are all outputs before them (DenseNet-121), growth 4.
- ``residual``: 200 convolutions with BN in residual blocks of two, of three widths.
- ``nested``: a U-shaped network whose skip connections are filled with further nodes (U-Net++), five scales.

Seconds are of this machine; the ratio to one forward pass is what compares. ``trace`` is one traced run and what
follows from it, ``find_groups`` all of it, with probes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lightning_softprune import find_groups
from lightning_softprune.graph import groups_of, trace_model

IMAGES = (2, 3, 32, 32)


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BN and ReLU."""
    kernel = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(kernel, nn.BatchNorm2d(outputs), nn.ReLU())


class DenseLayer(nn.Module):
    """Reads all that is before it, adds ``growth`` channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """The new channels."""
        y = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(y)))


class Dense(nn.Module):
    """DenseNet-121 with a growth of 4."""

    def __init__(self, growth: int = 4, blocks: tuple[int, ...] = (6, 12, 24, 16)) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = convolution(3, width)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for layers in blocks:
            self.blocks.append(nn.ModuleList(DenseLayer(width + i * growth, growth) for i in range(layers)))
            width += layers * growth
            self.transitions.append(convolution(width, width // 2, 1))
            width //= 2
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = F.avg_pool2d(transition(torch.cat(features, 1)), 2)
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.first = convolution(inputs, outputs, stride=stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum."""
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Residual(nn.Sequential):
    """A stem, 99 blocks of two convolutions, a head: 200 layers."""

    def __init__(self) -> None:
        widths = [8] * 33 + [16] * 33 + [32] * 33
        blocks = (ResidualBlock(a, b) for a, b in zip([8, *widths], widths, strict=False))
        super().__init__(convolution(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Nested(nn.Module):
    """U-Net++: node (i, j) reads all nodes before it at its scale, and the one below, enlarged."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 64, 128)) -> None:
        super().__init__()
        self.depth = len(widths)
        self.nodes = nn.ModuleDict()
        for j in range(self.depth):
            for i in range(self.depth - j):
                below = (3, *widths)[i] if j == 0 else j * widths[i] + widths[i + 1]
                node = nn.Sequential(convolution(below, widths[i]), convolution(widths[i], widths[i]))
                self.nodes[f"{i}_{j}"] = node
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A mask."""
        done: dict[tuple[int, int], torch.Tensor] = {}
        for j in range(self.depth):
            for i in range(self.depth - j):
                if j == 0:
                    given = x if i == 0 else F.max_pool2d(done[i - 1, 0], 2)
                else:
                    above = F.interpolate(done[i + 1, j - 1], scale_factor=2.0, mode="bilinear")
                    given = torch.cat([*(done[i, k] for k in range(j)), above], 1)
                done[i, j] = self.nodes[f"{i}_{j}"](given)
        return self.head(done[0, self.depth - 1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {"dense": Dense, "residual": Residual, "nested": Nested}


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """The best of some runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def measure(name: str) -> None:
    """One line of the table."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(IMAGES)
    model(x)
    forward = seconds(lambda: model(x), 3)
    trace = seconds(lambda: groups_of(trace_model(model, [lambda: model(x)])))
    found = find_groups(model, x)
    whole = seconds(lambda: find_groups(model, x))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(group.prunable for group in found)
    print(
        f"{name:10} {parameters:10,} {prunable:6} {1000 * forward:8.1f} ms "
        f"{trace:8.2f} s {trace / forward:7.0f}x {whole:8.2f} s {whole / forward:7.0f}x",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--profile", choices=list(NETWORKS), help="profile find_groups of this one instead")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.profile:
        model, x = NETWORKS[arguments.profile]().eval(), torch.randn(IMAGES)
        with cProfile.Profile() as profile:
            find_groups(model, x)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
        return
    print(f"{'network':10} {'parameters':>10} {'groups':>6} {'forward':>11} {'trace':>19} {'find_groups':>19}")
    for name in arguments.networks:
        measure(name)


if __name__ == "__main__":
    main()
