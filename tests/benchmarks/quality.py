"""What each strategy, compensation and ranking keeps of two networks on MNIST. Run by hand; it takes minutes.

    python tests/benchmarks/quality.py --data-dir DIR                      # both networks, the default table
    python tests/benchmarks/quality.py --data-dir DIR --network autoencoder --strategies sensitivity gradient \
        --compensations least_squares --importances activation reconstruction --targets 0.7 0.8 0.9

The networks:

- ``autoencoder``: 784-512-256-32-256-512-784 with ReLU and a sigmoid at the end, 1.08 M parameters; PSNR in dB.
- ``residual``: stem (Conv-BN-ReLU, 32 channels), three residual blocks (32, 64, 128 channels; two convolutions with
  BN each, the first of the last two with stride 2 and a 1x1 shortcut), mean pooling, linear head; accuracy.

Each is trained once (Adam, 1e-3). For every row a copy of it is pruned before a training epoch and then trained for
that one epoch. The search scores its trials on 1,000 images held back from the training file; the table shows the
metric on the 10,000 test images, which neither training nor search has seen. ``epochs`` is the round's time as a
multiple of an epoch's of that training, validation included. Rows go to ``--output`` as CSV and to the
terminal as a table.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from mnist_autoencoder_data import read_idx

from lightning_softprune import (
    GradientSearch,
    NormBaseline,
    RandomSearch,
    SensitivitySearch,
    SoftPruning,
    UniformBaseline,
)

STRATEGIES = {
    "uniform": lambda: UniformBaseline(),
    "norm": lambda: NormBaseline(),
    "random": lambda: RandomSearch(num_candidates=30),
    "gradient": lambda: GradientSearch(),
    "gradient-uniform": lambda: GradientSearch(start="uniform"),
    "sensitivity": lambda: SensitivitySearch(),
}


class Autoencoder(L.LightningModule):
    """784-512-256-32-256-512-784."""

    monitor, mode = "val_psnr", "max"

    def __init__(self) -> None:
        super().__init__()
        sizes = (784, 512, 256, 32)
        self.encoder = self._stack(sizes)
        self.decoder = nn.Sequential(*self._stack(sizes[::-1]), nn.Sigmoid())

    @staticmethod
    def _stack(sizes):
        layers = []
        for narrow, wide in itertools.pairwise(sizes):
            layers += [nn.Linear(narrow, wide), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def _errors(self, batch):
        x = batch[0]
        return (self.decoder(self.encoder(x)) - x).square().mean(1)

    def training_step(self, batch):
        return self._errors(batch).mean()

    def on_validation_epoch_start(self):
        self._seen = []

    def validation_step(self, batch):
        self._seen.append(self._errors(batch))

    def on_validation_epoch_end(self):
        self.log("val_psnr", -10 * torch.cat(self._seen).mean().log10())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


class Block(nn.Module):
    """Two convolutions with BN around a shortcut."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(narrow, wide, 1, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class Residual(L.LightningModule):
    """Stem, three residual blocks, head."""

    monitor, mode = "val_acc", "max"

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2))
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x.reshape(-1, 1, 28, 28))).mean((2, 3)))

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", right, batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


NETWORKS = {"autoencoder": (Autoencoder, 60_000, 10), "residual": (Residual, 20_000, 1)}


def trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the four MNIST idx files")
    parser.add_argument("--network", choices=[*NETWORKS, "both"], default="both")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--compensations", nargs="+", default=["none", "bias", "least_squares"])
    parser.add_argument("--importances", nargs="+", default=["magnitude", "activation", "reconstruction"])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--calibration-batches", type=int, help="default: the package's")
    parser.add_argument("--epochs", type=int, help="epochs of training before the prune, instead of the default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--finetune", action="store_true", help="also train for one epoch after the prune")
    parser.add_argument("--output", type=Path, default=Path("quality.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    def load(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = (
            torch.from_numpy(read_idx(next(options.data_dir.glob(f"{part}-{kind}*")), ndim).copy())
            for kind, ndim in (("images", 3), ("labels", 1))
        )
        return images.float().flatten(1) / 255, labels.long()

    train_x, train_y = load("train")
    test_x, test_y = load("t10k")
    val = DataLoader(TensorDataset(train_x[-1000:], train_y[-1000:]), batch_size=1000)
    test = DataLoader(TensorDataset(test_x, test_y), batch_size=1000)
    rows = []
    names = list(NETWORKS) if options.network == "both" else [options.network]
    for name, seed in itertools.product(names, options.seeds):
        kind, images, epochs = NETWORKS[name]
        L.seed_everything(seed, verbose=False)
        train = DataLoader(
            TensorDataset(train_x[: min(images, 59_000)], train_y[: min(images, 59_000)]), 128, shuffle=True
        )
        dense = kind()
        started = time.monotonic()
        trainer(options.epochs or epochs).fit(dense, train, val)
        epoch = (time.monotonic() - started) / (options.epochs or epochs)
        metric = trainer(1).validate(dense, test, verbose=False)[0][kind.monitor]
        parameters = sum(p.numel() for p in dense.parameters())
        print(f"{name} seed {seed}: {parameters:,} parameters, {kind.monitor} {metric:.4f} on test images, "
              f"trained in {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
        for target, importance, compensation, strategy in itertools.product(
            options.targets, options.importances, options.compensations, options.strategies
        ):
            model = copy.deepcopy(dense)
            L.seed_everything(seed, verbose=False)
            pruning = SoftPruning(
                monitor=kind.monitor, mode=kind.mode, epochs=0, target_sparsity=target, search=STRATEGIES[strategy](),
                importance=importance, compensation=compensation, verbose=False, report=False, seed=seed,
                calibration_batches=options.calibration_batches, finetune_epochs=0,
            )  # fmt: skip
            trainer(1, pruning).fit(model, train, val)
            result = pruning.results[0]
            before = trainer(1).validate(model, test, verbose=False)[0][kind.monitor]
            after = float("nan")
            if options.finetune:
                trainer(1).fit(model, train, val)
                after = trainer(1).validate(model, test, verbose=False)[0][kind.monitor]
            rows.append({
                "network": name, "seed": seed, "target": target, "importance": importance,
                "compensation": compensation, "strategy": strategy, "sparsity": round(result.sparsity, 4),
                "evaluations": result.evaluations, "seconds": round(result.seconds, 2),
                "epochs": round(result.seconds / epoch, 2), "dense": round(metric, 4),
                "before_finetuning": round(before, 4), "after_one_epoch": round(after, 4),
            })  # fmt: skip
            if len(rows) == 1:
                print("  ".join(rows[0]))
            print("  ".join(str(value).ljust(len(key)) for key, value in rows[-1].items()), flush=True)
            with options.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
