"""How small can it get? The smallest network that still meets a bound on its accuracy.

`target_sparsity=None` asks for the highest sparsity that meets every constraint: here, at most one point of accuracy
less than the trained network. Constraints may name any metric that the module logs while validating.

In the picture: every plan that the search has scored, as accuracy against the share of parameters removed. The dashed
line is the constraint; plans below it do not count. The diamond is the plan that was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from classifier import Classifier, convnet
from common import BLUE, GREY, ORANGE, Digits, figure, print_table, save, start, trainer

from lightning_softprune import SensitivitySearch, prune


def main(argv: Sequence[str] | None = None) -> None:
    args = start(__file__, __doc__, argv)
    model, data = Classifier(convnet(32, 64, 64, 128)), Digits(noise=0.3)
    training = trainer(args, 8)
    training.fit(model, datamodule=data)
    least = float(training.callback_metrics["val_acc"]) - 0.01

    result = prune(
        model,
        data,
        monitor="val_acc",
        mode="max",
        target_sparsity=None,  # as far as the constraint allows
        constraints=[f"val_acc >= {least:.4f}"],
        on_violation="prune",
        search=SensitivitySearch(),
        trainer=trainer(args, 1),
    )
    print_table(
        ("network", "parameters", "accuracy"),
        ("dense", result.costs_before.params, f"{result.score_before:.1%}"),
        ("smallest", result.costs_after.params, f"{result.score_after:.1%}"),
        ("asked for", "-", f">= {least:.1%}"),
    )

    picture, axes = figure(size=(6.0, 3.4))
    for feasible, colour, label in ((False, GREY, "other plans"), (True, BLUE, "plans that meet the constraint")):
        trials = [trial for trial in result.trials if trial.feasible == feasible]
        axes.scatter([t.sparsity for t in trials], [t.score for t in trials], s=18, color=colour, label=label)
    axes.scatter([result.sparsity], [result.score_after], s=80, marker="D", color=ORANGE, label="chosen")
    axes.axhline(least, color=ORANGE, linestyle="--", linewidth=1)
    axes.annotate(f"accuracy >= {least:.1%}", (0, least), (0, -11), textcoords="offset points", color=ORANGE)
    axes.set(xlabel="parameters removed", ylabel="accuracy", ylim=(least - 0.1, result.score_before + 0.02))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, loc="lower left")
    save(picture, args)


if __name__ == "__main__":
    main()
