"""Smaller is not faster by itself: the same network pruned for size, for operations, and for time.

Most parameters of this network are in a linear layer, and most of its time goes into convolutions. Removing 60 % of the
parameters takes them where they are, and saves little time. `cost="macs"` measures sparsity in multiply-accumulate
operations instead; `limits={"latency": 0.7}` allows, besides, at most 70 % of the time, which is measured here on the
best plans of the search; and `round_to=8` keeps widths that vector units like.

In the picture: what remains of the dense network's parameters, operations and time, for each wish.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from classifier import Classifier, convnet
from common import BLUE, GREEN, GREY, ORANGE, Digits, figure, print_table, save, start, trainer

from lightning_softprune import PruningResult, SensitivitySearch, prune

WISHES: dict[str, dict[str, Any]] = {
    "60 % of the parameters": {"target_sparsity": 0.6},
    "60 % of the MACs": {"target_sparsity": 0.6, "cost": "macs"},
    "30 % of the time": {"target_sparsity": 0.6, "cost": "macs", "limits": {"latency": 0.7}, "round_to": 8},
}


def shares(result: PruningResult) -> tuple[float, float, float]:
    """What remains of the dense network's parameters, operations and time."""
    return result.shares["params"], result.shares["macs"], (result.latency_after or 0) / (result.latency_before or 1)


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    model, data = Classifier(convnet(64, 128, 64, 1024)), Digits(noise=0.3)
    trainer(args, 6).fit(model, datamodule=data)

    results = {
        wish: prune(
            copy.deepcopy(model),
            data,
            monitor="val_acc",
            mode="max",
            search=SensitivitySearch(),
            on_violation="prune",  # a busy machine may not get there: then the nearest plan
            trainer=trainer(args, 1),
            **arguments,
        )
        for wish, arguments in WISHES.items()
    }

    print_table(
        ("removed", "parameters left", "MACs left", "time left", "accuracy"),
        *(
            (wish, *(f"{share:.0%}" for share in shares(result)), f"{result.score_after:.1%}")
            for wish, result in results.items()
        ),
    )

    picture, axes = figure(size=(6.4, 3.0))
    for number, (name, colour) in enumerate({"parameters": BLUE, "MACs": GREEN, "time": ORANGE}.items()):
        left = [100 * shares(result)[number] for result in results.values()]
        bars = axes.bar(
            [place + 0.27 * (number - 1) for place in range(len(results))], left, 0.25, color=colour, label=name
        )
        axes.bar_label(bars, fmt="%.0f %%", fontsize=8)
    axes.axhline(100, color=GREY, linestyle=":", linewidth=1)
    axes.set_xticks(range(len(results)), results)
    axes.set(ylabel="% of the dense network")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(picture, args)


if __name__ == "__main__":
    main()
