"""Make an autoencoder 70 % smaller while it trains, and look at what is left of its pictures.

The same autoencoder (`mnist_autoencoder_model.py`) is trained three times from the same seed:

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
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from mnist_autoencoder_data import DataError, ImageData, load_digits_data, load_mnist_data
from mnist_autoencoder_model import Autoencoder
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import GradientSearch, SearchStrategy, SoftPruning, UniformBaseline

OUTPUT = Path(__file__).parent / "output" / "mnist_autoencoder.png"
VAL_BATCH_SIZE = 500


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
