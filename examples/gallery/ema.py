"""A moving average of the weights lives inside the module, and is pruned as its twin.

The average is what will be used in the end, so it is what validation scores. `twins={"average": "network"}` says that
it mirrors the network that is trained: both lose the same channels and the average has no coefficients of its own, so
that it can go on following the network. Target networks and momentum encoders are declared in the same way.

In the picture: the accuracy of the network and of its average from epoch to epoch. Both go through the prune together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from classifier import convnet
from common import BLUE, GREEN, ORANGE, Digits, History, count, figure, print_table, save, start, trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_softprune import SensitivitySearch, SoftPruning


class AveragedClassifier(L.LightningModule):
    """A classifier and the moving average of its weights; logs `val_acc` (the average's) and `val_acc_network`."""

    def __init__(self, decay: float = 0.98) -> None:
        super().__init__()
        self.network = convnet(32, 64, 64, 128)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.decay = decay
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.accuracy_network = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, classes = batch
        return nn.functional.cross_entropy(self.network(images), classes)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for averaged, trained in zip(self.average.parameters(), self.network.parameters(), strict=True):
            averaged.lerp_(trained, 1 - self.decay)
        for followed, buffer in zip(self.average.buffers(), self.network.buffers(), strict=True):
            followed.copy_(buffer)  # statistics of BatchNorm

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, classes = batch
        self.accuracy(self.average(images), classes)
        self.accuracy_network(self.network(images), classes)
        self.log("val_acc", self.accuracy)
        self.log("val_acc_network", self.accuracy_network)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=2e-3)


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    model, history = AveragedClassifier(), History()
    pruning = SoftPruning(
        monitor="val_acc",
        mode="max",
        epochs=8,
        target_sparsity=0.8,
        twins={"average": "network"},
        search=SensitivitySearch(),
    )
    trainer(args, 14, pruning, history).fit(model, datamodule=Digits(noise=0.3))

    (result,) = pruning.results
    names = ("average", "val_acc", model.average, GREEN), ("network", "val_acc_network", model.network, BLUE)
    rows: list[tuple[object, ...]] = []
    for name, key, module, _ in names:
        scores = result.metrics_before[key], result.metrics_after[key], history[key][-1]
        rows.append((name, count(module), *(f"{score:.1%}" for score in scores)))
    print_table(("", "parameters", "dense", "pruned", "after fine-tuning"), *rows)

    picture, axes = figure(size=(6.0, 3.2))
    for name, key, _, colour in names:
        axes.plot(range(1, len(history.rows) + 1), history[key], color=colour, marker="o", markersize=3, label=name)
    axes.axvline(8, color=ORANGE, linestyle="--", linewidth=1)
    axes.annotate(" 80 % of both removed", (8, 0.81), color=ORANGE)
    axes.set(xlabel="epochs trained", ylabel="accuracy", ylim=(0.8, None))
    axes.legend(frameon=False, loc="upper left")
    save(picture, args)


if __name__ == "__main__":
    main()
