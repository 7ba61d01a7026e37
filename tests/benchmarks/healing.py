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

Each row: dense; pruned and compensated; trained on by the network's own loss and optimizer for so many batches;
healed for as many; with ``--teacher``, healed and then trained for an epoch with labels and teacher; seconds of labels
and of healing. Rows go to ``--output`` too, and those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import logging
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import attention
import lightning as L
import numpy as np
import quality
import torch
from mnist_autoencoder_data import read_idx
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_softprune import SensitivitySearch, SoftPruning, UniformBaseline, prune


class Block(nn.Module):
    """Two convolutions around a shortcut without parameters: every second pixel, and zeros for the new channels."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, width - inputs
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(y + x)


class ResNet20(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        out = self(batch[0])
        self.log("val_loss", F.cross_entropy(out, batch[1]), batch_size=len(out))
        self.log("val_acc", (out.argmax(1) == batch[1]).float().mean(), batch_size=len(out))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cifar(folder: Path, part: str) -> TensorDataset:
    from PIL import Image

    with zipfile.ZipFile(folder / f"{part}.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
    kinds = sorted({Path(name).parent.name for name in names})
    labels = torch.tensor([kinds.index(Path(name).parent.name) for name in names])
    mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    images = ((torch.from_numpy(pixels).float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images, labels)


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
    module = ResNet20()
    module.load_state_dict(torch.load(data / "cifar10" / "resnet20.pt", weights_only=True))
    train, test = (cifar(data / "cifar10", part) for part in ("train", "test"))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))  # files come class by class
    scored, held = (TensorDataset(*(t[part] for t in test.tensors)) for part in (order[:2000], order[2000:]))
    settings = {
        "monitor": "val_acc", "mode": "max", "target_sparsity": 0.64, "importance": "reconstruction",
        "calibration_batches": 16, "search": UniformBaseline(),
        "bounds": {"conv1": [0.0, 0.0]},
    }  # fmt: skip
    return Case(
        module,
        DataLoader(train, 128, shuffle=True),
        DataLoader(scored, 500),
        DataLoader(held, 500),
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

    def pruned(healing: int) -> tuple[L.LightningModule, Any]:
        module = copy.deepcopy(case.module)
        L.seed_everything(seed, verbose=False)
        loaders = {"train_dataloaders": case.train, "val_dataloaders": case.scored}
        more = {**case.settings, "healing": healing, "seed": seed, "report": False, "verbose": False}
        return module, prune(module, **loaders, **more)

    plain, before = pruned(0)
    compensated = measured(plain)
    L.seed_everything(seed, verbose=False)
    seconds = trained_on(plain, case.train, batches)
    labels = measured(plain)
    healed, result = pruned(batches)
    taught = "-"
    if teacher > 0.0:
        module = copy.deepcopy(case.module)
        L.seed_everything(seed, verbose=False)
        more = {**case.settings, "healing": batches, "seed": seed, "report": False, "verbose": False}
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
