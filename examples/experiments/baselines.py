"""The literature's ways to prune a trained network without training it again, beside this package's.

Two networks: the residual classifier of `promise_networks.py` on MNIST, trained here once per seed; and a trained
ResNet-20 on CIFAR-10 as JPEG, for which seeds are those of calibration data and search. Every method removes about 36,
51, 64 and 75 % of the parameters; what each really reaches is in the table, and within 1 % of that. `baseline_methods/`
has the methods; all of those may look at the same 1,024 training images as the package does, and none at labels.
Searches score plans on images that are neither trained on nor in the table: 2,000 of the training images of MNIST, and
2,000 of the 10,000 test images of CIFAR-10, whose training images the network has all seen.

    python examples/experiments/baselines.py --data-dir DIR                      # hours; goes on where it was stopped
    python examples/experiments/baselines.py --data-dir DIR --networks residual  # half an hour
    python examples/experiments/baselines.py --quick                             # minutes, made-up images, no meaning

`DIR` has the folders `mnist` and `cifar10`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from baseline_methods.channels import inner_groups, prune_by_norm, uniform_widths
from baseline_methods.folding import fold
from baseline_methods.grail import gram_matrices, prune_and_rebuild
from baseline_methods.repair import channel_moments, repair
from baseline_methods.threshold import ThresholdSearch
from baseline_methods.torch_pruning_modes import MODES, pruned_by_mode
from promise_networks import NETWORKS as SMALL
from shared.cifar import load_cifar, trained_resnet20
from shared.mnist import Images, load_images
from shared.results import Results, Row, arguments, folders, markdown, trainer_settings
from torch import Tensor

from lightning_softprune import PruningGroup, PruningResult, UniformBaseline, find_groups, prune
from lightning_softprune.search import SensitivityCurve

SPARSITIES = (0.36, 0.51, 0.64, 0.75)
TOLERANCE = 0.005
BATCH_SIZE = 128
CALIBRATION_BATCHES = 8  # the package's default


@dataclass(frozen=True)
class Subject:
    """A trained network that is to be pruned, with its data.

    Attributes:
        name: The network's.
        network: In eval mode; every method works on a copy.
        images: To calibrate with, to search with, and to test on.
        calibration: The images that the literature's methods look at.
        all_groups: Its groups.
        seed: Of calibration and search.
    """

    name: str
    network: L.LightningModule
    images: Images
    calibration: Tensor
    all_groups: list[PruningGroup]
    seed: int

    @property
    def groups(self) -> list[PruningGroup]:
        """Channels inside of blocks, which the literature's methods prune."""
        return inner_groups(self.all_groups)

    @property
    def ignored(self) -> list[str]:
        """The layers whose outputs torch-pruning leaves alone.

        Residual streams of ResNet-20 are among them: it does not follow channels through a padded shortcut.
        """
        left = [group for group in self.all_groups if not group.prunable]
        if self.name == "resnet20":
            left = [group for group in self.all_groups if group not in self.groups]
        return [member.module for group in left for member in group.members if member.slot == "out"]


Pruned = tuple[L.LightningModule, Row]
Method = Callable[[Subject, float], Pruned]


# --------------------------------------------------------------------------------------------------------- methods


def by_norm(subject: Subject, removed: float, *, repaired: bool) -> Pruned:
    """L1 and uniform widths, with or without REPAIR."""
    network = copy.deepcopy(subject.network)
    widths = uniform_widths(network, subject.groups, removed)
    kept = prune_by_norm(network, subject.groups, widths)
    return (_repaired(subject, network, kept) if repaired else network), {}


def by_folding(subject: Subject, removed: float) -> Pruned:
    """Folding, uniform widths, and REPAIR."""
    network = copy.deepcopy(subject.network)
    means = fold(network, subject.groups, uniform_widths(network, subject.groups, removed), subject.seed)
    return _repaired(subject, network, means), {}


def by_rebuilding(subject: Subject, removed: float) -> Pruned:
    """GRAIL, uniform widths."""
    network = copy.deepcopy(subject.network)
    grams = gram_matrices(network, subject.groups, subject.calibration)
    prune_and_rebuild(network, subject.groups, uniform_widths(network, subject.groups, removed), grams)
    return network, {}


def by_torch_pruning(subject: Subject, removed: float, *, mode: str) -> Pruned:
    """One of torch-pruning's modes."""
    return pruned_by_mode(subject.network, mode, removed, subject.calibration[:1], subject.ignored), {}


def by_threshold(subject: Subject, removed: float, *, cache: Path) -> Pruned:
    """FastNAS's rule in this package's loop; the scores of single widths serve every target."""
    path = cache / f"scores of {subject.name} {subject.seed}.json"
    curves: list[SensitivityCurve] = []
    if path.is_file():
        pairs = json.loads(path.read_text())
        curves = [SensitivityCurve(i, tuple(points), tuple(losses)) for i, (points, losses) in enumerate(pairs)]
    network, result = _round(subject, removed, search=ThresholdSearch(curves=curves))
    if not curves:
        found = [(one.coefficients, [-score for score in one.scores]) for one in result.sensitivity]
        path.write_text(json.dumps(found))
    return network, _found(result)


def by_this_package(subject: Subject, removed: float, **more: Any) -> Pruned:
    """A round with its defaults, or what else is given."""
    network, result = _round(subject, removed, **more)
    return network, _found(result)


def by_healing(subject: Subject, removed: float, *, rows: Mapping[str, Row], healing: int) -> Pruned:
    """The plan that a round has found before, healed; where there is none, it is searched for."""
    found = rows.get(f"{subject.name} ours {removed:.0%} {subject.seed}", {}).get("channels")
    if found is None:
        return by_this_package(subject, removed, healing=healing)
    fractions = {name: 1 - after / before for name, (before, after) in found.items()}
    bounds = {name: (fraction, fraction) for name, fraction in fractions.items()}
    return by_this_package(subject, removed, healing=healing, bounds=bounds, search=UniformBaseline())


def methods(cache: Path, healing: int, rows: Mapping[str, Row]) -> dict[str, Method]:
    """All of them, by the names in the table.

    Args:
        cache: A folder for scores that several targets share.
        healing: Batches of a quarter of a training epoch.
        rows: What is known already.
    """
    return {
        "L1": partial(by_norm, repaired=False),
        **{f"torch-pruning, {mode}": partial(by_torch_pruning, mode=mode) for mode in MODES},
        "L1 + REPAIR": partial(by_norm, repaired=True),
        "folding + REPAIR": by_folding,
        "GRAIL": by_rebuilding,
        "FastNAS's rule": partial(by_threshold, cache=cache),
        "ours": by_this_package,
        "ours, healed": partial(by_healing, rows=rows, healing=healing),
    }


SEEDLESS = ("L1", *(f"torch-pruning, {mode}" for mode in MODES))
"""They look at weights alone: on one trained network, seeds make no difference."""


def _repaired(subject: Subject, network: L.LightningModule, produced: Sequence[Tensor]) -> L.LightningModule:
    targets = channel_moments(subject.network, subject.calibration)
    for group, matrix in zip(subject.groups, produced, strict=True):
        for member in group.members:
            if member.module in targets:
                targets[member.module] = targets[member.module].mapped(matrix)
    repair(network, targets, subject.calibration)
    return network


def _round(subject: Subject, removed: float, **more: Any) -> tuple[L.LightningModule, PruningResult]:
    network = copy.deepcopy(subject.network)
    L.seed_everything(subject.seed, verbose=False)  # the order of the training images
    result = prune(
        network,
        train_dataloaders=subject.images.training(BATCH_SIZE),
        val_dataloaders=subject.images.validation(),
        trainer=L.Trainer(max_epochs=1, **trainer_settings(Path.cwd())),
        monitor="val_acc",
        mode="max",
        target_sparsity=removed,
        tolerance=TOLERANCE,
        seed=subject.seed,
        report=False,
        verbose=False,
        **more,
    )
    return network, result


def _found(result: PruningResult) -> Row:
    return {
        "searched": result.score_after,
        "evaluations": result.evaluations,
        "round_seconds": round(result.seconds, 1),
        "healing_seconds": round(result.phases.get("healing", 0.0), 1),
        "channels": {group.name: [group.channels_before, group.channels_after] for group in result.groups},
    }


# -------------------------------------------------------------------------------------------------------- subjects


def residual(images: Images, cache: Path, seed: int, args: argparse.Namespace) -> Subject:
    """The residual classifier of the ten small networks, trained with this seed."""
    L.seed_everything(seed, verbose=False)
    network, path = SMALL["residual"](), cache / f"residual-{seed}.pt"
    if not path.is_file():
        trainer = L.Trainer(
            max_epochs=1 if args.quick else network.epochs, limit_val_batches=0, **trainer_settings(cache)
        )
        trainer.fit(network, images.training(BATCH_SIZE), images.validation())
        torch.save(network.state_dict(), path)
    network.load_state_dict(torch.load(path, weights_only=True))
    return subject_of("residual", network, images, seed)


def resnet20(images: Images, _: Path, seed: int, args: argparse.Namespace) -> Subject:
    """The trained ResNet-20."""
    network = trained_resnet20(args.data_dir and args.data_dir / "cifar10")
    return subject_of("resnet20", network, images, seed)


def subject_of(name: str, network: L.LightningModule, images: Images, seed: int) -> Subject:
    """A trained network with its groups and its calibration images.

    Args:
        name: The network's.
        network: Trained.
        images: Its data.
        seed: Of the choice of calibration images.
    """
    network.eval()
    few = images.val[0][:8], images.val[1][:8]
    groups = list(find_groups(network, few))
    chosen = torch.randperm(len(images.train[0]), generator=torch.Generator().manual_seed(seed))
    calibration = images.train[0][chosen[: CALIBRATION_BATCHES * BATCH_SIZE]]
    return Subject(name, network, images, calibration, groups, seed)


SUBJECTS: dict[str, Callable[[Images, Path, int, argparse.Namespace], Subject]] = {
    "residual": residual,
    "resnet20": resnet20,
}


def images_of(name: str, args: argparse.Namespace) -> Images:
    """The data of one of the networks."""
    folder = args.data_dir
    if name == "residual":
        return load_images(folder and folder / "mnist", *((500, 2000) if args.quick else (2000, None)))
    return load_cifar(folder and folder / "cifar10", *((128,) if args.quick else ()))


# ---------------------------------------------------------------------------------------------------------- results


def accuracy(network: L.LightningModule, images: Images) -> float:
    """On the images that no search has seen."""
    (metrics,) = L.Trainer(**trainer_settings(Path.cwd())).validate(network, images.testing(), verbose=False)
    return metrics["val_acc"]


def measured(about: Row, subject: Subject, method: Method, path: Path) -> Row:
    """One row; the pruned network is kept for fine-tuning.

    Args:
        about: What the row is of; `target` is the fraction of the parameters that should go.
        subject: What to prune.
        method: How to prune.
        path: Where to keep what is left.
    """
    network, found = method(subject, about["target"])
    sizes = [sum(p.numel() for p in one.parameters()) for one in (subject.network, network)]
    torch.save(network, path)
    reached = {"parameters": sizes, "sparsity": 1 - sizes[1] / sizes[0]}
    return about | reached | {"accuracy": accuracy(network, subject.images)} | found


def finetuned(before: Row, subject: Subject, path: Path) -> Row:
    """The row of a pruned network that was kept, after an epoch with labels."""
    network = torch.load(path, weights_only=False).train()
    L.seed_everything(subject.seed, verbose=False)
    trainer = L.Trainer(max_epochs=1, limit_val_batches=0, **trainer_settings(path.parent))
    trainer.fit(network, subject.images.training(BATCH_SIZE), subject.images.validation())
    kept = {key: before[key] for key in ("network", "seed", "method", "target", "parameters", "sparsity")}
    return kept | {"epochs": 1, "accuracy": accuracy(network, subject.images)}


def of_dense(about: Row, subject: Subject) -> Row:
    """The row of the network as it was."""
    return about | {"method": "dense", "accuracy": accuracy(subject.network, subject.images)}


def cells(rows: dict[str, Row], name: str, epochs: int) -> dict[tuple[str, float], list[Row]]:
    """The rows of all seeds by method and target.

    Args:
        rows: All rows of a network.
        name: The network's.
        epochs: Of fine-tuning.
    """
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows.values():
        if row["network"] == name and row["epochs"] == epochs and row["method"] != "dense":
            found.setdefault((row["method"], row["target"]), []).append(row)
    return found


def table(rows: dict[str, Row]) -> str:
    """One Markdown table for every network and number of epochs: accuracies in %, mean ± spread of the seeds."""
    parts = []
    for name, epochs in dict.fromkeys((row["network"], row["epochs"]) for row in rows.values()):
        found = cells(rows, name, epochs)
        dense = [row["accuracy"] for row in rows.values() if row["network"] == name and row["method"] == "dense"]
        names = list(dict.fromkeys(method for method, _ in found))
        lines = [[one, *(_cell(found.get((one, target), [])) for target in SPARSITIES)] for one in names]
        after = f", after {epochs} epoch of fine-tuning" if epochs else ", nothing trained after the prune"
        title = f"**{name}**: {_spread(dense)} dense{after}; in brackets what was removed, if not as the column says"
        header = ["method", *(f"{target:.0%}" for target in SPARSITIES)]
        parts.append(f"{title}\n\n{markdown(header, lines)}\n")
    return "\n".join(parts)


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "-"
    sparsity = statistics.fmean(row["sparsity"] for row in rows)
    off = abs(sparsity - rows[0]["target"]) > 0.01
    return _spread([row["accuracy"] for row in rows]) + (f" ({sparsity:.1%})" if off else "")


def _spread(accuracies: list[float]) -> str:
    values = [100 * value for value in accuracies]
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def draw(rows: dict[str, Row], path: Path) -> None:
    """Accuracy without fine-tuning against what was removed, one line per method."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(row["network"] for row in rows.values()))
    colours = {method: f"C{number}" for number, method in enumerate(methods(Path(), 0, {}))}
    figure = Figure(figsize=(6 * len(names) + 2, 4.5), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        found = cells(rows, name, 0)
        dense = [row["accuracy"] for row in rows.values() if row["network"] == name and row["method"] == "dense"]
        axis.axhline(100 * statistics.fmean(dense), color="black", lw=0.6, ls=":")
        for method in dict.fromkeys(method for method, _ in found):
            points = [found[method, target] for target in SPARSITIES if (method, target) in found]
            x = [100 * statistics.fmean(row["sparsity"] for row in point) for point in points]
            y = [100 * statistics.fmean(row["accuracy"] for row in point) for point in points]
            axis.plot(x, y, marker="o", ms=4, lw=1.2 + method.startswith("ours"), color=colours[method])
        axis.set_title(f"{name}; dotted: dense")
        axis.set_xlabel("parameters removed, %")
        axis.set_ylabel("accuracy on unseen images, %")
    handles = [Line2D([], [], color=colour, marker="o", ms=4, label=method) for method, colour in colours.items()]
    shown = {row["method"] for row in rows.values()}
    figure.legend(handles=[one for one in handles if one.get_label() in shown], loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=100)


def run(name: str, results: Results, cache: Path, args: argparse.Namespace) -> Iterator[None]:
    """Fill in the rows of one network, and pause after each.

    Args:
        name: The network's.
        results: Where rows go.
        cache: Where networks are kept.
        args: The command line's.
    """
    images = images_of(name, args)
    known = methods(cache, len(images.training(BATCH_SIZE)) // 4, results.rows)
    for seed in range(args.seed, args.seed + args.seeds):
        subject = SUBJECTS[name](images, cache, seed, args)
        about: Row = {"network": name, "seed": seed, "epochs": 0}
        repeated = name == "resnet20" and seed > 0  # the same trained network again
        if not repeated:
            results.row(f"{name} dense {seed}", partial(of_dense, about, subject))
        for method, removed in itertools.product(args.methods or known, args.sparsities):
            if repeated and method in SEEDLESS:
                continue
            row = f"{name} {method} {removed:.0%} {seed}"
            wanted, path = about | {"method": method, "target": removed}, cache / f"{row}.pt"
            found = results.row(row, partial(measured, wanted, subject, known[method], path))
            if args.finetune:
                results.row(f"{row} + 1", partial(finetuned, found, subject, path))
            yield


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.
    """
    parser = arguments("baselines", __doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with `mnist` and `cifar10`")
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", choices=methods(Path(), 0, {}), help="default: all")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    parser.add_argument("--finetune", action="store_true", help="also train each pruned network for one epoch")
    args = parser.parse_args(argv)
    if args.data_dir is None and not args.quick:
        parser.error("--data-dir is missing; only --quick does without it")
    if args.quick:
        args.seeds, args.sparsities = 1, args.sparsities[:1]
    output, cache = folders("baselines", args)
    torch.set_num_threads(1)
    results = {name: Results(output, {"quick": args.quick}, f"results-{name}") for name in SUBJECTS}
    for name in args.networks:
        for _ in run(name, results[name], cache, args):
            (output / "table.md").write_text(table(_together(results)))
    rows = _together(results)
    draw(rows, output / "figure.png")
    print(table(rows))
    return 0


def _together(results: Mapping[str, Results]) -> dict[str, Row]:
    return {name: row for one in results.values() for name, row in one.rows.items()}


if __name__ == "__main__":
    sys.exit(main())
