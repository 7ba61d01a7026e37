"""The images of `mnist_autoencoder.py`: scikit-learn's digits, or MNIST from its idx files."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class DataError(Exception):
    """A data file that is missing, damaged or not what its name says; the message is one line for the user."""


@dataclass(frozen=True)
class ImageData:
    """Images as rows of pixels in [0, 1], and how to train on them.

    Attributes:
        train: Training images, `(images, pixels)`.
        val: Validation images, `(images, pixels)`.
        val_labels: Class of each validation image, `(images,)`.
        shape: Height and width of an image.
        sizes: Layer sizes of an encoder that suits the images, pixels first, latent last.
        batch_size: Training images per batch.
        max_epochs: Epochs that are enough for the table to make sense.
    """

    train: Tensor
    val: Tensor
    val_labels: Tensor
    shape: tuple[int, int]
    sizes: tuple[int, ...]
    batch_size: int
    max_epochs: int


def load_digits_data() -> ImageData:
    """The 1,797 handwritten 8x8 digits that come with scikit-learn: 1,500 to train on, 297 to validate."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))  # the split is fixed, whatever --seed says
    images = torch.from_numpy(digits.data[order]).float() / 16
    labels = torch.from_numpy(digits.target[order])
    return ImageData(
        train=images[:1500],
        val=images[1500:],
        val_labels=labels[1500:],
        shape=(8, 8),
        sizes=(64, 256, 128, 16),
        batch_size=32,
        max_epochs=30,
    )


def load_mnist_data(folder: Path) -> ImageData:
    """MNIST from its four idx files in `folder`; the test images serve as validation images.

    Raises:
        DataError: If a file is missing, damaged, or does not fit the others.
    """
    train, _ = _read_pair(folder, "train")
    val, val_labels = _read_pair(folder, "t10k")
    if train.shape[1:] != val.shape[1:]:
        sizes = ["x".join(map(str, images.shape[1:])) for images in (train, val)]
        raise DataError(
            f"{folder}: training images are {sizes[0]} pixels, test images {sizes[1]}, expected the same size"
        )
    height, width = val.shape[1:]
    return ImageData(
        train=torch.from_numpy(train).flatten(1).float() / 255,
        val=torch.from_numpy(val).flatten(1).float() / 255,
        val_labels=torch.from_numpy(val_labels).long(),
        shape=(height, width),
        sizes=(height * width, 512, 256, 32),
        batch_size=128,
        max_epochs=6,
    )


def _read_pair(folder: Path, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    images_path = find_idx(folder, f"{split}-images-idx3-ubyte")
    labels_path = find_idx(folder, f"{split}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels)} labels, expected {len(images)}: one per image of {images_path}")
    return images, labels


def find_idx(folder: Path, name: str) -> Path:
    """The file `name` or `name.gz` in `folder`.

    Raises:
        DataError: If there is neither.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with MNIST's four idx files")
    raise DataError(f"{folder / name}: no such file, nor {name}.gz beside it; expected MNIST's four idx files")


def read_idx(path: Path, ndim: int) -> npt.NDArray[np.uint8]:
    """The array of unsigned bytes in an idx file, compressed by gzip or not.

    An idx file is two zero bytes, the type (8: unsigned byte), the number of dimensions, one big-endian 32-bit size per
    dimension, and the data.

    Args:
        path: The file. Its first bytes tell whether it is compressed, not its name.
        ndim: Number of dimensions it must have: 3 for images, 1 for labels.

    Raises:
        DataError: If the file cannot be read, is not such an idx file, or is shorter or longer than its header says.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, expected an idx file, plain or gzip ({error})") from error
    magic = bytes([0, 0, 8, ndim])
    if content[:4] != magic:
        raise DataError(
            f"{path}: starts with {content[:4].hex() or 'nothing'}, expected {magic.hex()}: "
            f"an idx file of unsigned bytes in {ndim} dimension{'s' if ndim > 1 else ''}"
        )
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(f"{path}: ends within its header, after {len(content)} bytes, expected at least {start}")
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=ndim, offset=4))
    if 0 in shape:
        raise DataError(f"{path}: holds no data (sizes {shape}), expected at least one element")
    expected = start + math.prod(shape)
    if len(content) != expected:
        kind = "truncated" if len(content) < expected else "too long"
        raise DataError(f"{path}: {kind}: {len(content)} bytes, expected {expected} for its sizes {shape}")
    elements: npt.NDArray[np.uint8] = np.frombuffer(bytearray(content), dtype=np.uint8, offset=start)  # writable
    return elements.reshape(shape)
