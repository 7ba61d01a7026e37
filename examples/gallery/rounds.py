"""Little by little: the same target in one round, and in three with training between them.

`epochs=[10, 15, 20]` makes three rounds. Early ones remove most, as they follow a cubic schedule up to the target, and
after each the network has time to settle before the next one chooses again.

In the picture: the number of parameters and the PSNR of an autoencoder from epoch to epoch, in one round and in three.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from autoencoder import Autoencoder
from common import BLUE, GREY, Digits, History, figure, print_table, save, start, trainer

from lightning_softprune import SensitivitySearch, SoftPruning

SCHEDULES = {"one round": [10], "three rounds": [10, 15, 20]}


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    histories = {name: History() for name in SCHEDULES}
    table: list[tuple[object, ...]] = [("PSNR in dB", "round", "parameters", "before", "after", "at the end")]
    for name, epochs in SCHEDULES.items():
        L.seed_everything(0, verbose=False)
        pruning = SoftPruning(
            monitor="val_psnr",
            mode="max",
            epochs=epochs,
            target_sparsity=0.9,  # of the last round
            search=SensitivitySearch(),
        )
        model = Autoencoder()
        trainer(args, 30, pruning, histories[name]).fit(model, datamodule=Digits())
        for number, result in enumerate(pruning.results, start=1):
            end = f"{histories[name]['val_psnr'][-1]:.2f}" if result is pruning.results[-1] else ""
            scores = f"{result.score_before:.2f}", f"{result.score_after:.2f}"
            table.append((name, number, result.costs_after.params, *scores, end))
    print_table(*table)

    picture, (left, right) = figure(columns=2)
    for (name, history), colour in zip(histories.items(), (GREY, BLUE), strict=True):
        trained = range(1, len(history.rows) + 1)
        left.step(trained, history["params"], where="mid", color=colour, label=name)
        right.plot(trained, history["val_psnr"], color=colour, marker="o", markersize=3, label=name)
    left.set(xlabel="epochs trained", ylabel="parameters", ylim=(0, None))
    left.legend(frameon=False)
    left.yaxis.set_major_formatter("{x:,.0f}")
    right.set(xlabel="epochs trained", ylabel="PSNR in dB", ylim=(14, None))
    save(picture, args)


if __name__ == "__main__":
    main()
