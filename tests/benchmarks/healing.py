"""What healing brings back, against as many batches of training with labels. Run by hand; it takes minutes to an hour.

    python tests/benchmarks/healing.py --data-dir DIR --networks resnet20 autoencoder vit [--seeds 0 1 2] [--batches 98]
    python tests/benchmarks/healing.py --data-dir DIR --networks resnet20 --batches 196 --teacher 0.5

``DIR`` holds the folders ``cifar10`` (``train.zip``, ``test.zip`` with files ``class/number.jpg``, and a trained
``resnet20.pt``) and ``mnist`` (the four idx files); the digits of the ViT come with scikit-learn.

- ``resnet20``: CIFAR's ResNet-20, uniform widths inside of its blocks, 64 % of the parameters gone, ranked by
  reconstruction. Plans are scored on 2,000 test images; accuracies are those of the other 8,000.
- ``resnet20-found``: the same with widths that the sensitivity search finds, also of the residual streams.
- ``autoencoder``: that of ``quality.py``, 90 % gone by the sensitivity search; PSNR in dB on the test images.
- ``residual``: the classifier of ``quality.py``, likewise; accuracy on the test images.
- ``vit``: that of ``attention.py``, half of all heads and units gone; scored by the loss, since 199 images tell
  accuracies apart by luck; accuracy on images that no plan has seen.

The plan is found once per row, and then given. Each row: dense; pruned and compensated; trained on by the network's
own loss and optimizer for so many batches; healed for as many; with ``--teacher``, healed and then trained for an epoch
with labels and teacher; seconds of labels and of healing. Rows go to ``--output`` too, and those that are there are not
measured again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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

from lightning_softprune import SensitivitySearch, SoftPruning, UniformBaseline, prune


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


def resnet20_found(data: Path, seed: int) -> Case:
    case = resnet20(data, seed)
    del case.settings["bounds"]
    case.settings["search"] = SensitivitySearch()
    return case


def mnist(name: str, data: Path, seed: int) -> Case:
    def load(part: str) -> TensorDataset:
        images, labels = (
            torch.from_numpy(read_idx(next((data / "mnist").glob(f"{part}-{kind}*")), ndim).copy())
            for kind, ndim in (("images", 3), ("labels", 1))
        )
        return TensorDataset(images.float().flatten(1) / 255, labels.long())

    train, test = load("train"), load("t10k")
    kind, images, epochs = quality.NETWORKS[name]
    seen, scored = (TensorDataset(*train[part]) for part in (slice(min(images, 59_000)), slice(-1000, None)))
    loaders = [DataLoader(seen, 128, shuffle=True), DataLoader(scored, 1000), DataLoader(test, 1000)]
    module = kind()
    quality.trainer(epochs).fit(module, *loaders[:2])
    settings = {"mode": "max", "monitor": kind.monitor, "target_sparsity": 0.9, "search": SensitivitySearch()}
    return Case(module, *loaders, kind.monitor, settings)


def vit(data: Path, seed: int) -> Case:
    train, rest, classes = attention.digits()
    scored, held = torch.utils.data.random_split(rest, [1 / 3, 2 / 3], torch.Generator().manual_seed(1))
    module = attention.trained("ViT", seed, 30, train, classes)
    loaders = [DataLoader(train, 64, shuffle=True), DataLoader(scored, 256), DataLoader(held, 256)]
    settings = {
        "monitor": "val_loss", "mode": "min", "target_sparsity": 0.35, "tolerance": 0.2, "search": UniformBaseline(),
        "importance": "reconstruction", "calibration_batches": 16,
        "bounds": {"embed": [0.0, 0.0], "blocks*": [0.5, 0.5]},
    }  # fmt: skip
    return Case(module, *loaders, "accuracy", settings)


CASES: dict[str, Callable[[Path, int], Case]] = {
    "vit": vit,
    "residual": partial(mnist, "residual"),
    "autoencoder": partial(mnist, "autoencoder"),
    "resnet20": resnet20,
    "resnet20-found": resnet20_found,
}

COLUMNS = (
    ["network", "seed", "batches", "teacher"],
    ["epoch", "removed", "dense", "compensated", "labels", "healed", "kept", "taught", "s_labels", "s_healed"],
)
"""What a row is known by, and what it holds."""


def trained_on(module: L.LightningModule, loader: DataLoader, batches: int) -> float:
    """Train with labels; the seconds it took."""
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module.train()  # a fit leaves modes as they are
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
    parser.add_argument("--teacher", type=float, default=0.0, help="weight of the teacher in an epoch after healing")
    parser.add_argument("--output", type=Path, default=Path("healing.csv"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    known = set()
    if options.output.exists():
        with options.output.open(newline="") as file:
            known = {tuple(row[name] for name in COLUMNS[0]) for row in csv.DictReader(file)}
    print("  ".join(COLUMNS[0] + COLUMNS[1]), flush=True)
    for name in options.networks:
        for seed in options.seeds:
            rows = [(name, str(seed), str(batches), str(options.teacher)) for batches in options.batches]
            if known.issuperset(rows):
                continue
            L.seed_everything(seed, verbose=False)
            case = CASES[name](options.data_dir, seed)
            for key in rows:
                if key not in known:
                    cells = [*key, *row(case, seed, int(key[2]), options.teacher)]
                    print("  ".join(cells), flush=True)
                    with options.output.open("a", newline="") as file:
                        lines = [] if known or file.tell() else [COLUMNS[0] + COLUMNS[1]]
                        csv.writer(file).writerows([*lines, cells])


def row(case: Case, seed: int, batches: int, teacher: float) -> list[str]:
    """Measure one row: what stands in it behind its key."""

    def measured(module: L.LightningModule) -> str:
        return f"{quality.trainer(1).validate(module, case.held, verbose=False)[0][case.metric]:.4f}"

    def pruned(healing: int, **settings: Any) -> tuple[L.LightningModule, Any]:
        module = copy.deepcopy(case.module)
        L.seed_everything(seed, verbose=False)
        loaders = {"train_dataloaders": case.train, "val_dataloaders": case.scored}
        more = {"healing": healing, "seed": seed, "report": False, "verbose": False}
        return module, prune(module, **loaders, **{**case.settings, **more, **settings})

    plain, before = pruned(0)
    fractions = {group.name: 1 - group.channels_after / group.channels_before for group in before.groups}
    same = {"bounds": {name: (part, part) for name, part in fractions.items()}, "search": UniformBaseline()}
    compensated = measured(plain)
    L.seed_everything(seed, verbose=False)
    seconds = trained_on(plain, case.train, batches)
    labels = measured(plain)
    healed, result = pruned(batches, **same)
    taught = "-"
    if teacher > 0.0:
        module = copy.deepcopy(case.module).train()  # a fit leaves modes as they are
        L.seed_everything(seed, verbose=False)
        more = {**case.settings, **same, "healing": batches, "seed": seed, "report": False, "verbose": False}
        pruning = SoftPruning(epochs=0, finetune_epochs=1, teacher=teacher, **more)
        quality.trainer(1, pruning).fit(module, case.train, case.scored)
        taught = measured(module)
    share, kept = f"{batches / len(case.train):.2f}", "-" if result.healing is None else str(result.healing.kept)
    return [
        share, f"{before.sparsity:.3f}", measured(case.module), compensated, labels, measured(healed), kept, taught,
        f"{seconds:.0f}", f"{result.phases['healing']:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
