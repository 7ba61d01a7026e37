"""A classifier of digits is pruned in the middle of its fit: one callback, one `trainer.fit`.

It trains for eight epochs, then `SoftPruning` searches which layers can spare how many channels, removes 70 % of the
parameters, and the same fit trains on with what remains.

In the picture: on the left, accuracy from epoch to epoch; the dashed line is the prune, and the orange dot the accuracy
right after it, before a step of training. On the right, the channels that every layer keeps: the first one can spare
none, as the search found, and the others more than half or a third.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from common import BLUE, ORANGE, Digits, History, draw_channels, figure, print_table, save, start, trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_softprune import SensitivitySearch, SoftPruning


def convnet(*widths: int) -> nn.Sequential:
    """Three convolutions and two linear layers for images of 8x8 pixels."""
    a, b, c, d = widths
    return nn.Sequential(
        *(nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU()),
        *(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(b, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4 * c, d), nn.ReLU(), nn.Linear(d, 10)),
    )


class Classifier(L.LightningModule):
    """Trains any network to tell ten classes apart; logs `val_loss` and `val_acc`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, classes = batch
        return nn.functional.cross_entropy(self(images), classes)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, classes = batch
        logits = self(images)
        self.accuracy(logits, classes)
        self.log("val_loss", nn.functional.cross_entropy(logits, classes))
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    history = History()
    pruning = SoftPruning(
        monitor="val_acc",
        mode="max",
        epochs=8,
        target_sparsity=0.7,
        search=SensitivitySearch(),
    )
    trainer(args, 12, pruning, history).fit(Classifier(convnet(32, 64, 64, 128)), datamodule=Digits(noise=0.3))

    (result,) = pruning.results
    accuracy = history["val_acc"]
    print_table(
        ("network", "parameters", "accuracy"),
        ("dense", result.costs_before.params, f"{result.score_before:.1%}"),
        ("pruned", result.costs_after.params, f"{result.score_after:.1%}"),
        ("after fine-tuning", result.costs_after.params, f"{accuracy[-1]:.1%}"),
    )

    picture, (left, right) = figure(columns=2)
    left.plot(range(1, len(accuracy) + 1), accuracy, color=BLUE, marker="o", markersize=3)
    left.plot([8], [result.score_after], color=ORANGE, marker="o", linestyle="none")
    left.axvline(8, color=ORANGE, linestyle="--", linewidth=1)
    left.annotate(" 70 % removed", (8, min(accuracy)), color=ORANGE)
    left.set(xlabel="epochs trained", ylabel="accuracy")
    draw_channels(right, result)
    save(picture, args)


if __name__ == "__main__":
    main()
