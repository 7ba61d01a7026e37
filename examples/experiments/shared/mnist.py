"""MNIST from its idx files, or made-up pictures for trying things out; as loaders of whole batches."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Images:
    """Pictures `(images, 1, 28, 28)` in [0, 1] with their classes: to train on, to search with, to test on."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def training(self, batch_size: int) -> Loader:
        """Shuffled batches."""
        data = TensorDataset(*self.train)
        return DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), batch_size, drop_last=True))

    def validation(self, batch_size: int = 250) -> Loader:
        """What a search may see."""
        return _in_order(self.val, batch_size)

    def testing(self) -> Loader:
        """What no search has seen."""
        return _in_order(self.test)


def load_images(folder: Path | None, held_out: int = 2000, train: int | None = None) -> Images:
    """MNIST, with the last training images held out for the search; without a folder, patterns in noise.

    Args:
        folder: Where the four idx files are, gzipped or not.
        held_out: How many images to search with.
        train: How many images to train on at most; `None`: all that are left.
    """
    if folder is None:
        parts = dict(_patterns(train or 256, held_out))
        return Images(parts["train"], parts["val"], parts["test"])
    images, labels = (_idx(folder, f"train-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    test = _pair(*(_idx(folder, f"t10k-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte")))
    first = slice(0, min(train or len(images), len(images) - held_out))
    return Images(_pair(images[first], labels[first]), _pair(images[-held_out:], labels[-held_out:]), test)


def _in_order(pair: tuple[Tensor, Tensor], batch_size: int = 250) -> Loader:
    data = TensorDataset(*pair)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), batch_size, drop_last=False))


def _pair(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images).float().div(255)[:, None], torch.from_numpy(labels).long()


def _idx(folder: Path, name: str) -> np.ndarray:
    """The bytes of an idx file in their shape; `mnist_autoencoder_data.py` has a reader that explains itself."""
    path = folder / name
    content = path.read_bytes() if path.is_file() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, 4)
    return np.frombuffer(bytearray(content), np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _patterns(train: int, held_out: int) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    random = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 1, 28, 28, generator=random)
    for name, count in (("train", train), ("val", held_out), ("test", held_out)):
        labels = torch.randint(10, (count,), generator=random)
        noise = torch.rand(count, 1, 28, 28, generator=random)
        yield name, (0.8 * patterns[labels] + 0.2 * noise, labels)
