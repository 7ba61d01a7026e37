"""What the scripts of the gallery share: options, data, a quiet Trainer, and the look of tables and pictures."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import PruningResult

BLUE, GREY, PALE, ORANGE, GREEN = "#0a6cab", "#818b96", "#e3e6ea", "#c04f00", "#007a58"


def start(script: str, doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads `--out` and `--quick`, seeds everything, and silences what would bury the table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "output" / "gallery"
    parser.add_argument("--out", type=Path, default=default, help="folder of the picture (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few batches per epoch: to see that it runs")
    args = parser.parse_args(argv)
    args.name = Path(script).stem
    args.out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # networks this small gain nothing from more
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's own
    return args


def trainer(args: argparse.Namespace, epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """A Trainer on the CPU without files and bars of its own; reports of rounds go below the folder of the picture."""
    return L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_train_batches=2 if args.quick else 1.0,
        limit_val_batches=1 if args.quick else 1.0,
        default_root_dir=args.out / args.name,
    )


class Digits(L.LightningDataModule):
    """scikit-learn's 8x8 digits, `(batch, 1, 8, 8)`, and their classes: 1,300 to train on, 497 to validate.

    Args:
        noise: Deviation of the noise on pixels between 0 and 1; without any, the digits are too easy for a classifier.
    """

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        from sklearn.datasets import load_digits

        pixels, classes = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(pixels))
        self.images = torch.from_numpy(pixels[order]).float().reshape(-1, 1, 8, 8) / 16
        self.images += noise * torch.randn(self.images.shape, generator=torch.Generator().manual_seed(0))
        self.classes = torch.from_numpy(classes[order])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        data = TensorDataset(self.images[:1300], self.classes[:1300])
        return DataLoader(data, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.images[1300:], self.classes[1300:]), batch_size=250)


class History(L.Callback):
    """What every epoch ended with: its metrics, and how many parameters the module had."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({**metrics, "params": count(pl_module)})

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def count(module: torch.nn.Module) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def print_table(*rows: Sequence[object]) -> None:
    """Prints rows of cells below each other; the first row is the heading."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))


def figure(columns: int = 1, rows: int = 1, size: tuple[float, float] = (7.2, 3.0), **options: Any) -> tuple[Any, Any]:
    """An empty picture in the style of the gallery, and its axes."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def save(picture: Any, args: argparse.Namespace) -> None:
    """Writes the picture under the name of the script, and says where."""
    path = args.out / f"{args.name}.png"
    picture.savefig(path, dpi=100)
    plt.close(picture)
    print(f"\nPicture: {path}")


def draw_mosaic(axes: Any, rows: Sequence[Tensor], names: Sequence[str]) -> None:
    """Rows of small images, `(images, height, width)` each, with a name for each row."""
    framed = [torch.nn.functional.pad(row.clamp(0, 1), (1, 1, 1, 1), value=1.0) for row in rows]
    axes.imshow(torch.cat([torch.cat(list(row), dim=1) for row in framed]).numpy(), cmap="gray", vmin=0, vmax=1)
    height = framed[0].shape[1]
    axes.set_yticks([height * (row + 0.5) for row in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_channels(axes: Any, result: PruningResult) -> None:
    """A bar per group: the channels it had, and those it keeps."""
    names = [group.name.removeprefix("network.") for group in result.groups]
    before = [group.channels_before for group in result.groups]
    after = [group.channels_after for group in result.groups]
    axes.barh(names, before, color=PALE)
    axes.barh(names, after, color=BLUE)
    for place, (kept, of) in enumerate(zip(after, before, strict=True)):
        axes.annotate(f"{kept} of {of}", (of, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.35 * max(before))
    axes.invert_yaxis()
    axes.set_title("channels kept")
