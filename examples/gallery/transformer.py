"""A vision transformer loses whole attention heads, and channels of its MLPs.

Images of digits are cut into 16 patches, which four layers of `nn.TransformerEncoder` with eight heads each look at.
Two groups of every layer can be pruned: its heads, and the hidden channels of its MLP; the width of the embedding is
one group for all layers. A head goes as a whole, and `num_heads` follows.

In the picture: a square per head of each layer, as many of them blue as are kept; beside them, the channels that the
MLPs keep. Early layers keep their heads, late ones can spare most of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from classifier import Classifier
from common import BLUE, PALE, Digits, figure, print_table, save, start, trainer
from torch import Tensor, nn

from lightning_softprune import SensitivitySearch, SoftPruning

LAYERS, HEADS, WIDTH = 4, 8, 64


class VisionTransformer(nn.Module):
    """Sixteen patches of 2x2 pixels, learned positions, a mean over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.encoder(x).mean(dim=1))
        return logits


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    model = Classifier(VisionTransformer())
    pruning = SoftPruning(
        monitor="val_acc",
        mode="max",
        epochs=12,
        target_sparsity=0.6,
        search=SensitivitySearch(),
    )
    fit = trainer(args, 15, pruning)
    fit.fit(model, datamodule=Digits())

    (result,) = pruning.results
    heads = [group.channels_after for group in result.groups if group.name.endswith("heads")]
    channels = [group.channels_after for group in result.groups if group.name.endswith("linear1")]
    accuracy = float(fit.callback_metrics["val_acc"])
    print_table(
        ("network", "parameters", "accuracy", "heads", "MLP channels"),
        ("dense", result.costs_before.params, f"{result.score_before:.1%}", LAYERS * HEADS, LAYERS * 2 * WIDTH),
        ("pruned", result.costs_after.params, f"{result.score_after:.1%}", sum(heads), sum(channels)),
        ("after fine-tuning", result.costs_after.params, f"{accuracy:.1%}", sum(heads), sum(channels)),
    )

    picture, (left, right) = figure(columns=2, size=(7.2, 2.2))
    layers = range(LAYERS)
    for layer in layers:
        colours = [BLUE if head < heads[layer] else PALE for head in range(HEADS)]
        left.scatter(range(HEADS), [layer] * HEADS, s=150, marker="s", color=colours)
        left.annotate(f"{heads[layer]} of {HEADS}", (HEADS - 0.3, layer), va="center")
    left.set(title="attention heads", yticks=layers, ylim=(LAYERS - 0.5, -0.5), xlim=(-0.6, HEADS + 1.2), xticks=[])
    left.set_yticks(layers, [f"layer {layer}" for layer in layers])
    right.barh(layers, [2 * WIDTH] * LAYERS, color=PALE)
    right.bar_label(right.barh(layers, channels, color=BLUE), padding=4)
    right.set(title=f"MLP channels, of {2 * WIDTH}", yticks=[], ylim=(LAYERS - 0.5, -0.5))
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    save(picture, args)


if __name__ == "__main__":
    main()
