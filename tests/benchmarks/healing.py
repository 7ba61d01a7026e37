"""What healing brings back, against as many batches of training with labels. Run by hand; it takes minutes to an hour.

    python tests/benchmarks/healing.py --data-dir DIR --networks resnet20 autoencoder vit [--seeds 3] [--batches 98]

``DIR`` holds the folders ``cifar10`` (``train.zip``, ``test.zip`` with files ``class/number.jpg``, and a trained
``resnet20.pt``) and ``mnist`` (the four idx files); the digits of the ViT come with scikit-learn.

- ``resnet20``: CIFAR's ResNet-20, uniform widths inside of its blocks, 64 % of the parameters gone, ranked by
  reconstruction. Plans are scored on 2,000 test images; accuracies are those of the other 8,000.
- ``autoencoder``: that of ``quality.py``, 90 % gone by the default search; PSNR in dB on the test images.
- ``vit``: that of ``attention.py``, half of all heads and units gone; accuracy on images that no plan has seen.

Each row: dense; pruned and compensated; trained on by the network's own loss and optimizer for so many batches;
healed for as many; both times in seconds, and what a training epoch takes.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attention
import lightning as L
import quality
import torch
from mnist_autoencoder_data import read_idx
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
from shared.cifar import load_cifar, trained_resnet20

from lightning_softprune import SensitivitySearch, UniformBaseline, prune


@dataclass(frozen=True)
class Case:
    """A trained network, its data, the round, and the metric of a row."""

    module: L.LightningModule
    train: DataLoader
    scored: DataLoader
    held: DataLoader
    metric: str
    settings: dict[str, Any] = field(default_factory=dict)


def resnet20(data: Path, seed: int) -> Case:
    module, images = trained_resnet20(data / "cifar10"), load_cifar(data / "cifar10")
    settings = {
        "monitor": "val_acc", "mode": "max", "target_sparsity": 0.64, "importance": "reconstruction",
        "calibration_batches": 16, "search": UniformBaseline(),
        "bounds": {"conv1": [0.0, 0.0]},
    }  # fmt: skip
    return Case(
        module,
        DataLoader(TensorDataset(*images.train), 128, shuffle=True),
        DataLoader(TensorDataset(*images.val), 500),
        DataLoader(TensorDataset(*images.test), 500),
        "val_acc",
        settings,
    )


def autoencoder(data: Path, seed: int) -> Case:
    def load(part: str) -> torch.Tensor:
        path = next((data / "mnist").glob(f"{part}-images*"))
        return torch.from_numpy(read_idx(path, 3).copy()).float().flatten(1) / 255

    train, test = load("train"), load("t10k")
    loaders = [DataLoader(TensorDataset(train[:-1000]), 128, shuffle=True)]
    loaders += [DataLoader(TensorDataset(part), 1000) for part in (train[-1000:], test)]
    module = quality.Autoencoder()
    quality.trainer(10).fit(module, *loaders[:2])
    settings = {"mode": "max", "monitor": "val_psnr", "target_sparsity": 0.9, "search": SensitivitySearch()}
    return Case(module, *loaders, "val_psnr", settings)


def vit(data: Path, seed: int) -> Case:
    train, rest, classes = attention.digits()
    scored, held = torch.utils.data.random_split(rest, [1 / 3, 2 / 3], torch.Generator().manual_seed(1))
    module = attention.trained("ViT", seed, 30, train, classes)
    loaders = [DataLoader(train, 64, shuffle=True), DataLoader(scored, 256), DataLoader(held, 256)]
    settings = {
        "monitor": "accuracy", "mode": "max", "target_sparsity": 0.35, "tolerance": 0.2, "search": UniformBaseline(),
        "importance": "reconstruction", "calibration_batches": 16,
        "bounds": {"embed": [0.0, 0.0], "blocks*": [0.5, 0.5]},
    }  # fmt: skip
    return Case(module, *loaders, "accuracy", settings)


CASES: dict[str, Callable[[Path, int], Case]] = {"resnet20": resnet20, "autoencoder": autoencoder, "vit": vit}


def trained_on(module: L.LightningModule, loader: DataLoader, batches: int) -> float:
    """Train with labels; the seconds it took."""
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_steps=batches, max_epochs=-1, enable_model_summary=False, accelerator="cpu", **options)
    started = time.monotonic()
    trainer.fit(module, loader)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[98])
    options = parser.parse_args()
    torch.set_num_threads(2)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print("network  seed  batches  epoch%  removed  dense  compensated  labels  healed  s_labels  s_healed", flush=True)
    for name in options.networks:
        for seed in options.seeds:
            L.seed_everything(seed, verbose=False)
            case = CASES[name](options.data_dir, seed)
            for batches in options.batches:
                row(name, seed, case, batches)


def row(name: str, seed: int, case: Case, batches: int) -> None:
    def measured(module: L.LightningModule) -> str:
        return f"{quality.trainer(1).validate(module, case.held, verbose=False)[0][case.metric]:.4f}"

    def pruned(healing: int) -> tuple[L.LightningModule, Any]:
        module = copy.deepcopy(case.module)
        L.seed_everything(seed, verbose=False)
        result = prune(
            module, train_dataloaders=case.train, val_dataloaders=case.scored, healing=healing, seed=seed,
            report=False, verbose=False, **case.settings,
        )  # fmt: skip
        return module, result

    plain, before = pruned(0)
    compensated = measured(plain)
    L.seed_everything(seed, verbose=False)
    seconds = trained_on(plain, case.train, batches)
    healed, result = pruned(batches)
    cells = [
        name, seed, batches, f"{batches / len(case.train):.0%}", f"{before.sparsity:.3f}", measured(case.module),
        compensated, measured(plain), measured(healed), f"{seconds:.0f}", f"{result.phases['healing']:.0f}",
    ]  # fmt: skip
    print("  ".join(map(str, cells)), flush=True)


if __name__ == "__main__":
    main()
