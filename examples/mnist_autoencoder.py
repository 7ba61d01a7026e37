"""Make an autoencoder 70 % smaller while it trains, and look at what is left of its pictures.

The same autoencoder is trained three times from the same seed:

- `dense`: never pruned;
- `uniform`: pruned in mid-fit by the same fraction in every layer, the usual rule of thumb;
- `found`: pruned in mid-fit by the fractions that a search finds best for the validation PSNR.

Each of the last two is one `trainer.fit` with one callback: it trains, searches, prunes and fine-tunes. The script
prints PSNR and parameter counts of the three networks and draws their reconstructions of one image per class. The
search and the table use the same validation images; no weight is trained on them.

    python examples/mnist_autoencoder.py                     # scikit-learn's 8x8 digits: nothing to download
    python examples/mnist_autoencoder.py --data-dir DIR      # MNIST, from its four idx files in DIR
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import logging
import math
import sys
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image import PeakSignalNoiseRatio

from lightning_softprune import GradientSearch, SearchStrategy, SoftPruning, UniformBaseline

OUTPUT = Path(__file__).parent / "output" / "mnist_autoencoder.png"
VAL_BATCH_SIZE = 500


# ---------------------------------------------------------------------------------------------------------------- data


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


# --------------------------------------------------------------------------------------------------------------- model


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Autoencoder(L.LightningModule):
    """A fully connected autoencoder that logs `val_loss` and `val_psnr`.

    Args:
        sizes: Layer sizes of the encoder, pixels first, latent last; the decoder mirrors them.
        lr: Adam's learning rate.
    """

    def __init__(self, sizes: Sequence[int], lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])
        # Sums the squared errors of all batches before it takes the logarithm: the PSNR of the whole validation set.
        self.val_psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions of `images`, both `(batch, pixels)`."""
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
        self.log("val_loss", nn.functional.mse_loss(reconstructions, images), batch_size=len(images))
        self.log("val_psnr", self.val_psnr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Run:
    """One trained network and its figures; PSNR in dB, on the whole validation set.

    Attributes:
        name: What was done to the network.
        model: The trained network.
        parameters: How many parameters it has.
        pruned_psnr: PSNR right after pruning, before fine-tuning; None for a network that was not pruned.
        psnr: PSNR at the end.
    """

    name: str
    model: Autoencoder
    parameters: int
    pruned_psnr: float | None
    psnr: float


class PrintProgress(L.Callback):
    """Prints the validation PSNR about five times per fit: enough to follow three fits on one screen."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints one line every few epochs, and after the last."""
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if epoch % max(1, epochs // 5) == 0 or epoch == epochs:
            print(f"{self.name:>8}  epoch {epoch:>3}/{epochs}  val_psnr {trainer.callback_metrics['val_psnr']:.2f} dB")


def train(name: str, data: ImageData, search: SearchStrategy | None, args: argparse.Namespace) -> Run:
    """Trains one network, pruning it in mid-fit if there is a `search`.

    Args:
        name: The network's name in the table.
        data: What it is trained on.
        search: How the pruning callback looks for the coefficients; None trains the dense network.
        args: The command line's options.
    """
    L.seed_everything(args.seed, verbose=False)  # every run: same initial weights, same batches until the prune
    model = Autoencoder(data.sizes)
    callbacks: list[L.Callback] = [PrintProgress(name)]
    pruning: SoftPruning | None = None
    if search is not None:
        pruning = SoftPruning(
            monitor="val_psnr",
            mode="max",
            epochs=args.prune_epoch,
            target_sparsity=args.target_sparsity,
            tolerance=0.005,  # tighter than the default: networks of one size are compared
            search=search,
            seed=args.seed,
        )
        callbacks.append(pruning)
    settings: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": args.output.parent / name,  # the callback writes its report there
    }
    train_loader = DataLoader(TensorDataset(data.train), batch_size=data.batch_size, shuffle=True)
    val_loader = DataLoader(TensorDataset(data.val), batch_size=VAL_BATCH_SIZE)
    L.Trainer(max_epochs=args.max_epochs, callbacks=callbacks, **settings).fit(model, train_loader, val_loader)
    # The figure for the table comes from a Trainer that knows nothing of pruning.
    (metrics,) = L.Trainer(**settings).validate(model, val_loader, verbose=False)
    return Run(
        name=name,
        model=model,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pruned_psnr=pruning.results[0].score_after if pruning is not None else None,
        psnr=metrics["val_psnr"],
    )


# ------------------------------------------------------------------------------------------------------------- results


def format_table(runs: Sequence[Run]) -> str:
    """A text table of the runs; the first one is what the others' parameters are compared with."""
    lines = [f"{'network':<9}{'parameters':>12}{'removed':>10}{'PSNR after pruning':>21}{'PSNR at the end':>18}"]
    for run in runs:
        removed = "-" if run.pruned_psnr is None else f"{1 - run.parameters / runs[0].parameters:.1%}"
        pruned = "-" if run.pruned_psnr is None else f"{run.pruned_psnr:.2f} dB"
        lines.append(f"{run.name:<9}{run.parameters:>12,}{removed:>10}{pruned:>21}{f'{run.psnr:.2f} dB':>18}")
    return "\n".join(lines)


@torch.no_grad()
def draw(runs: Sequence[Run], data: ImageData, path: Path) -> None:
    """Draws one validation image of up to ten classes, and below each what every network makes of it.

    Args:
        runs: The networks, one row each.
        data: The images; the first of each class is drawn.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    labels = data.val_labels.numpy()
    images = data.val[[int(np.argmax(labels == label)) for label in np.unique(labels)[:10]]]
    rows = [("original", images)]
    for run in runs:
        text = f"{run.name}\n{run.psnr:.2f} dB\n{run.parameters:,} parameters"
        rows.append((text, run.model.eval().cpu()(images).clamp(0, 1)))
    figure = Figure(figsize=(0.9 * len(images) + 1.8, 0.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (text, pictures) in enumerate(rows):
        for column, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.imshow(picture.reshape(data.shape).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------------------------- command line


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} does not end in .png")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Prune an autoencoder in mid-fit and compare its reconstructions.")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with MNIST's four idx files, .gz or plain (default: scikit-learn's 8x8 digits)",
    )
    parser.add_argument(
        "--target-sparsity",
        type=_fraction,
        default=0.7,
        metavar="S",
        help="fraction of the parameters to remove, between 0 and 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-epochs", type=int, metavar="N", help="epochs of every fit (default: 30 for the digits, 6 for MNIST)"
    )
    parser.add_argument(
        "--prune-epoch",
        type=int,
        metavar="E",
        help="epoch at whose start the network is pruned, counted from 0; the rest is fine-tuning (default: half of "
        "--max-epochs)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, batches and search (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=_png,
        default=OUTPUT,
        metavar="PNG",
        help=f"the picture; the pruning reports go beside it (default: output/{OUTPUT.name} next to this script)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code: 0, or 2 for options or data files that cannot be used."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        data = load_digits_data() if args.data_dir is None else load_mnist_data(args.data_dir)
        args.output.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
    except (DataError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    args.max_epochs = data.max_epochs if args.max_epochs is None else args.max_epochs
    args.prune_epoch = args.max_epochs // 2 if args.prune_epoch is None else args.prune_epoch
    if args.max_epochs < 2:
        parser.error(f"--max-epochs {args.max_epochs} leaves no epoch to prune between, give at least 2")
    if not 0 < args.prune_epoch < args.max_epochs:
        parser.error(f"--prune-epoch {args.prune_epoch} is not between 1 and --max-epochs - 1 ({args.max_epochs - 1})")

    runs = [
        train("dense", data, None, args),
        train("uniform", data, UniformBaseline(), args),
        train("found", data, GradientSearch(), args),
    ]
    print(f"\n{format_table(runs)}\n")
    draw(runs, data, args.output)
    print(f"Reconstructions: {args.output}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))  # matrices this small gain nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's own
    sys.exit(main())
