"""The promise "70/1/0" on ten small networks: 70 % of the parameters gone, 1 % of the metric at most, 0 labels.

Every network of `promise_networks.py` is trained on MNIST and pruned once, by `prune` with its defaults. It keeps the
promise if at least 70 % of its parameters are gone, its metric on the test images is at most 1 % (relative) below what
it was, nothing was trained on labels after the prune, and the whole round took no longer than half a training epoch.
Times are processor seconds of one thread, since machines are shared. The networks are trained on 58,000 images, and
the search scores plans on 1,000 others; the test images are seen by no search.

    python examples/experiments/promise.py --data-dir DIR                  # a quarter of an hour
    python examples/experiments/promise.py --data-dir DIR --healing 0.175  # with so many epochs of healing
    python examples/experiments/promise.py --quick                         # two minutes, made-up pictures, no meaning
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
from promise_networks import NETWORKS, Network
from shared.mnist import Images, load_images
from shared.results import Results, Row, arguments, folders, markdown, trainer_settings

from lightning_softprune import prune

PROMISED = 0.7
BATCH_SIZE = 128


class EpochTimes(L.Callback):
    """Processor seconds of every training epoch, validation excluded."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the watch."""
        self._started = time.process_time()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops it."""
        self.seconds.append(time.process_time() - self._started)


def trained(name: str, data: Images, cache: Path, args: argparse.Namespace) -> tuple[Network, float]:
    """The trained network, from the cache where it is there, and the processor seconds of a training epoch."""
    L.seed_everything(args.seed, verbose=False)
    network, path, times = NETWORKS[name](), cache / f"{name}-{args.seed}.pt", EpochTimes()
    if not path.is_file():
        trainer = L.Trainer(
            max_epochs=1 if args.quick else network.epochs,
            callbacks=[times],
            limit_val_batches=0,
            **trainer_settings(cache),
        )
        trainer.fit(network, data.training(BATCH_SIZE), data.validation())
        torch.save({"state": network.state_dict(), "seconds": sum(times.seconds) / len(times.seconds)}, path)
    stored = torch.load(path, weights_only=True)
    network.load_state_dict(stored["state"])
    return network, stored["seconds"]


def measure(name: str, data: Images, cache: Path, args: argparse.Namespace) -> Row:
    """One network's row: trained, pruned, and judged on the test images before and after."""
    network, epoch = trained(name, data, cache, args)
    before, dense = _tested(network, data, cache), sum(p.numel() for p in network.parameters())
    healing = {"healing": round(args.healing * len(data.training(BATCH_SIZE)))} if args.healing else {}
    started = time.process_time()
    result = prune(
        network,
        train_dataloaders=data.training(BATCH_SIZE),
        val_dataloaders=data.validation(125),
        trainer=L.Trainer(max_epochs=1, **trainer_settings(cache)),
        monitor=network.monitor,
        mode="max",
        target_sparsity=PROMISED,
        seed=args.seed,
        report=False,
        verbose=False,
        **healing,
    )
    spent, after = time.process_time() - started, _tested(network, data, cache)
    return {
        "metric": network.monitor.removeprefix("val_"),
        "parameters": [dense, sum(p.numel() for p in network.parameters())],
        "sparsity": result.sparsity,
        "dense": before,
        "pruned": after,
        "lost": 1 - after / before,
        "lost_in_search": 1 - result.score_after / result.score_before,
        "epoch_seconds": epoch,
        "round_seconds": spent,
        "round_in_epochs": spent / epoch,
        "phases_wall_seconds": result.phases,
        "evaluations": result.evaluations,
        "passes": result.passes,
        "left_out": {left.name: left.reason for left in result.left_out},
        "channels": {group.name: [group.channels_before, group.channels_after] for group in result.groups},
    }


def misses(row: Row) -> list[str]:
    """What of the promise a row does not keep."""
    broken = {
        f"{row['sparsity']:.1%} removed": row["sparsity"] < PROMISED,
        f"{row['lost']:.1%} lost": row["lost"] > 0.01,
        f"{row['round_in_epochs']:.2f} epochs": row["round_in_epochs"] > 0.5,
    }
    return [text for text, is_broken in broken.items() if is_broken]


def table(rows: dict[str, Row]) -> str:
    """The Markdown table, and the number of promises kept."""
    header = ["network", "parameters", "removed", "metric", "dense", "pruned", "lost", "round, in epochs", "misses"]
    lines = []
    for name, row in rows.items():
        digits = 2 if row["metric"] == "psnr" else 4
        before, after = row["parameters"]
        values = [f"{row[key]:.{digits}f}" for key in ("dense", "pruned")]
        shares = [f"{row['lost']:.2%}", f"{row['round_in_epochs']:.2f}", ", ".join(misses(row)) or "none"]
        lines.append([name, f"{before:,} to {after:,}", f"{row['sparsity']:.1%}", row["metric"], *values, *shares])
    kept = sum(not misses(row) for row in rows.values())
    metric_kept = sum(row["lost"] <= 0.01 for row in rows.values())
    summary = f"{kept} of {len(rows)} keep the whole promise, {metric_kept} lose at most 1 %."
    return f"{markdown(header, lines)}\n\n{summary}\n"


def draw(rows: dict[str, Row], path: Path) -> None:
    """What is lost against what the round took, one point per network, with the promise as a corner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.axhspan(-0.5, 1, xmax=1, color="tab:green", alpha=0.08)
    axis.axvline(0.5, color="tab:green", lw=1)
    axis.axhline(1, color="tab:green", lw=1)
    for name, row in rows.items():
        x, y = row["round_in_epochs"], 100 * max(row["lost"], 1e-4)
        axis.plot(x, y, "o", color="tab:red" if misses(row) else "tab:green")
        axis.annotate(name, (x, y), textcoords="offset points", xytext=(5, 3), fontsize=8)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=-0.5)
    axis.set_xlabel("the whole round, in training epochs")
    axis.set_ylabel("lost, % of the dense network's metric")
    axis.set_title("70 % of the parameters removed; promised: left of and below the lines")
    figure.savefig(path, dpi=100)


def _tested(network: Network, data: Images, folder: Path) -> float:
    (metrics,) = L.Trainer(**trainer_settings(folder)).validate(network, data.testing(), verbose=False)
    return metrics[network.monitor]


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.
    """
    parser = arguments("promise", __doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's four idx files")
    parser.add_argument("--healing", type=float, default=0.0, metavar="EPOCHS", help="training epochs of healing")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = parser.parse_args(argv)
    if args.data_dir is None and not args.quick:
        parser.error("--data-dir is missing; only --quick does without it")
    output, cache = folders("promise", args)
    torch.set_num_threads(1)
    data = load_images(args.data_dir, *((500, 2000) if args.quick else (1000, 58_000)))
    suffix = f"-healing-{args.healing:g}" if args.healing else ""
    results = Results(output, {"seed": args.seed, "healing": args.healing, "quick": args.quick}, f"results{suffix}")
    for name in args.networks:
        results.row(name, partial(measure, name, data, cache, args))
        rows = {known: results.rows[known] for known in NETWORKS if known in results.rows}
        (output / f"table{suffix}.md").write_text(table(rows))
    draw(rows, output / f"figure{suffix}.png")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
