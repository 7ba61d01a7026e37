"""The paper's own experiment (arXiv 2507.14882): autoencoders on MNIST, with coefficients from eight sources.

A fully connected and a convolutional autoencoder are trained (and cached). Copies of them lose 50, 70, 80 and 90 % of
their parameters, with and without compensation, by random, norm-based, uniform and searched coefficients, the default
also healed for a quarter of an epoch; then some are trained on for one epoch. Both networks have five groups of
channels. Plans are scored on 1,000 images held out of the training images; the table shows PSNR on the 10,000 test
images and SSIM on the first 1,000 of them. Seconds are those of the processor, one thread, from the first look at the
network to the pruned one.

The grid has eleven levels per group. All its points on target are evaluated for seed 0 at 70 % with least squares;
elsewhere `GRID_CAP` of them, drawn at random.

    python examples/experiments/mnist_autoencoders.py --data-dir DIR   # an hour of one core; goes on where it stopped
    python examples/experiments/mnist_autoencoders.py --quick          # minutes, made-up pictures, no meaning
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from autoencoder_figures import draw_latents, draw_lines, draw_pictures, promises, table
from shared.mnist import Images, load_images
from shared.results import Results, Row, arguments, folders, trainer_settings
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from lightning_softprune import (
    GradientSearch,
    GridSearch,
    NormBaseline,
    PruningResult,
    RandomSearch,
    SensitivitySearch,
    UniformBaseline,
    prune,
)

FIRST = 0.7  # the sparsity that the paper looks at, measured first
SPARSITIES = (FIRST, 0.5, 0.9, 0.8)
TOLERANCE = 0.01
COMPENSATIONS = ("least_squares", "none")
GRID_CAP = 150
HEALED = 0.25  # of a training epoch
DRAWS = 10  # random plans, each pruned and tested by itself
METHODS: dict[str, dict[str, Any]] = {
    "gradient from curves (default)": {},
    "gradient from uniform": {"search": GradientSearch(start="uniform", max_evaluations=45)},
    "curves alone": {"search": SensitivitySearch()},
    "uniform": {"search": UniformBaseline()},
    "norm-based": {"search": NormBaseline()},
    "random": {"search": RandomSearch(num_candidates=1)},
    "default, healed": {"healing": HEALED},
    "default, reconstruction, 64 batches": {"importance": "reconstruction", "calibration_batches": 64},
    "grid": {"search": GridSearch(max_evaluations=GRID_CAP)},
}
SLOW = ("random", "grid")  # come last
UNCOMPENSATED = [name for name in METHODS if not name.startswith("default,")]  # those are to compensate better


class Autoencoder(L.LightningModule):
    """An encoder and a decoder of pictures, judged by `val_psnr`."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, epochs: int, lr: float = 1e-3) -> None:
        super().__init__()
        self.encoder, self.decoder, self.epochs, self.lr = encoder, decoder, epochs, lr
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions."""
        pictures: Tensor = self.decoder(self.encoder(images))
        return pictures

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The squared error."""
        return F.mse_loss(self(batch[0]), batch[0])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs `val_psnr`, that of all images at once."""
        self.psnr.update(self(batch[0]), batch[0])
        self.log("val_psnr", self.psnr, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def perceptron() -> Autoencoder:
    """784-512-256-32-256-512-784, 1.08 M parameters."""
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 32)
    )
    decoder = [nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784), nn.Sigmoid()]
    return Autoencoder(encoder, nn.Sequential(*decoder, nn.Unflatten(1, (1, 28, 28))), epochs=4)


def convolutional() -> Autoencoder:
    """24, 48 and 4 channels at 14, 7 and 4 pixels a side, and back: 64 numbers in the middle, 33 k parameters."""

    def layers(convolution: nn.Module, channels: int) -> list[nn.Module]:
        return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]

    encoder = [*layers(nn.Conv2d(1, 24, 3, 2, 1), 24), *layers(nn.Conv2d(24, 48, 3, 2, 1), 48)]
    decoder = [
        *layers(nn.ConvTranspose2d(4, 48, 3, 2, 1), 48),
        *layers(nn.ConvTranspose2d(48, 24, 4, 2, 1), 24),
        nn.ConvTranspose2d(24, 1, 4, 2, 1),
        nn.Sigmoid(),
    ]
    middle = nn.Conv2d(48, 4, 3, 2, 1)
    return Autoencoder(nn.Sequential(*encoder, middle), nn.Sequential(*decoder), epochs=2, lr=3e-3)


NETWORKS = {"MLP": perceptron, "convolutional": convolutional}


class Case(NamedTuple):
    """What one row is about."""

    network: str
    seed: int
    target: float
    compensation: str
    method: str
    epochs: int = 0  # of training after the prune

    @property
    def name(self) -> str:
        """The row's."""
        name = f"{self.network}, seed {self.seed}, {self.target:.0%}, {self.compensation}, {self.method}"
        return f"{name}, one epoch" if self.epochs else name


class Bench:
    """Trains, prunes and judges; what is trained or pruned once is kept in the cache.

    Args:
        data: The images.
        cache: A folder.
        quick: Whether to train for one epoch only.
    """

    def __init__(self, data: Images, cache: Path, quick: bool) -> None:
        self.data, self.cache, self.quick = data, cache, quick

    def dense(self, network: str, seed: int) -> Autoencoder:
        """The trained network."""
        L.seed_everything(seed, verbose=False)
        model, path = NETWORKS[network](), self.cache / f"{network}-{seed}.pt"
        if not path.is_file():
            self._fit(model, 1 if self.quick else model.epochs)
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def pruned(self, case: Case) -> Autoencoder:
        """The network that a row of `row_of` is about."""
        model: Autoencoder = torch.load(self.cache / f"{case.name}.pt", weights_only=False)
        return model

    def row_of(self, case: Case) -> Row:
        """The network pruned as the case says, and what the test images say of it."""
        if case.epochs:
            return self.tuned(case)
        draws = DRAWS if case.method == "random" else 1
        found = []
        for draw in range(draws):
            model = self.dense(case.network, case.seed)
            result, seconds = self._prune(model, case, case.seed * DRAWS + draw)
            found.append({"sparsity": result.sparsity, "seconds": round(seconds, 2)} | self.judged(model))
        torch.save(model, self.cache / f"{case.name}.pt")
        row: Row = {key: statistics.mean(one[key] for one in found) for key in found[0]}
        if draws > 1:
            row |= {"psnrs": [one["psnr"] for one in found], "spread": statistics.stdev(one["psnr"] for one in found)}
        else:
            row |= {"channels": {g.name: [g.channels_before, g.channels_after] for g in result.groups}}
        searched = {"before": result.score_before, "after": result.score_after}
        row |= {"searched": searched, "evaluations": result.evaluations, "stop_reason": result.stop_reason}
        return case._asdict() | row

    def tuned(self, case: Case) -> Row:
        """The same network after one epoch of training, by a new optimizer."""
        model = self.pruned(case._replace(epochs=0))
        L.seed_everything(case.seed, verbose=False)
        self._fit(model, case.epochs)
        return case._asdict() | self.judged(model)

    @torch.no_grad()
    def judged(self, model: Autoencoder) -> Row:
        """PSNR and SSIM on test images."""
        model.eval()
        psnr = PeakSignalNoiseRatio(data_range=1.0)
        ssim: Metric = StructuralSimilarityIndexMeasure(data_range=1.0)
        for number, (images, _) in enumerate(self.data.testing()):
            pictures = model(images)
            psnr.update(pictures, images)
            if number < 4:
                ssim.update(pictures, images)
        parameters = sum(p.numel() for p in model.parameters())
        return {"psnr": psnr.compute().item(), "ssim": ssim.compute().item(), "parameters": parameters}

    def _prune(self, model: Autoencoder, case: Case, seed: int) -> tuple[PruningResult, float]:
        settings = dict(METHODS[case.method])
        if case[1:] == (0, FIRST, "least_squares", "grid", 0) and not self.quick:
            settings["search"] = GridSearch()
        if "healing" in settings:
            settings["healing"] = round(settings["healing"] * len(self.data.training(128)))
        started = time.process_time()
        result = prune(
            model,
            train_dataloaders=self.data.training(128),
            val_dataloaders=self.data.validation(),
            trainer=L.Trainer(max_epochs=1, **trainer_settings(self.cache)),
            monitor="val_psnr",
            mode="max",
            target_sparsity=case.target,
            tolerance=TOLERANCE,
            compensation=case.compensation,
            seed=seed,
            report=False,
            verbose=False,
            **settings,
        )
        return result, time.process_time() - started

    def _fit(self, model: Autoencoder, epochs: int) -> None:
        trainer = L.Trainer(max_epochs=epochs, limit_val_batches=0, **trainer_settings(self.cache))
        trainer.fit(model.train(), self.data.training(128), self.data.validation())


def cases(networks: list[str], seeds: list[int], sparsities: tuple[float, ...]) -> Iterator[Case]:
    """Every case, the most telling first: 70 %, an epoch more for some, grids, other sparsities, an epoch more."""
    for seed in seeds:
        first = list(_cases(networks, seed, FIRST))
        tuned = [case._replace(epochs=1) for case in first if case.method != "random" and seed == seeds[0]]
        yield from (case for case in first if case.method not in SLOW)
        yield from (case for case in first if case.method == "random")
        yield from (case for case in tuned if case.method in (next(iter(METHODS)), "uniform"))
        yield from (case for case in first if case.method == "grid")
        for target in sparsities:
            if target != FIRST:
                yield from _cases(networks, seed, target)
        yield from tuned


def _cases(networks: list[str], seed: int, target: float) -> Iterator[Case]:
    for network, compensation, method in itertools.product(networks, COMPENSATIONS, METHODS):
        if compensation != "none" or method in UNCOMPENSATED:
            yield Case(network, seed, target, compensation, method)


def write_table(rows: dict[str, Row], output: Path) -> None:
    """The table, and what became of what was asked for."""
    (output / "table.md").write_text(f"{table(rows)}\n\n" + "".join(f"- {line}\n" for line in promises(rows)))


def illustrate(bench: Bench, rows: dict[str, Row], output: Path, networks: list[str]) -> None:
    """Every figure there are rows for."""
    draw_lines(rows, list(METHODS), output / "figure.png")
    shown: dict[str, dict[str, Autoencoder]] = {}
    for network in networks:
        kept = {
            "same fraction everywhere,\nno compensation": Case(network, 0, FIRST, "none", "uniform"),
            "found,\nleast squares": Case(network, 0, FIRST, "least_squares", next(iter(METHODS))),
        }
        if all(case.name in rows and (bench.cache / f"{case.name}.pt").is_file() for case in kept.values()):
            shown[network] = {"dense": bench.dense(network, 0)} | {
                text: bench.pruned(case) for text, case in kept.items()
            }
    if shown:
        draw_pictures(shown, bench.data.test, output / "pictures.png")
        draw_latents(shown, bench.data.test, output / "latents.png")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default: those of the process.
    """
    parser = arguments("mnist_autoencoders", __doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's four idx files")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.data_dir is None and not args.quick:
        parser.error("--data-dir is missing; only --quick does without it")
    output, cache = folders("mnist_autoencoders", args)
    torch.set_num_threads(1)
    measure(args, output, cache)
    return 0


def measure(args: argparse.Namespace, output: Path, cache: Path) -> None:
    """Every row that is not there yet, and the table and figures of all."""
    bench = Bench(load_images(args.data_dir, *((500, 2000) if args.quick else (1000, None))), cache, args.quick)
    results = Results(output, {"quick": args.quick})
    seeds = list(range(args.seed, args.seed + (1 if args.quick else args.seeds)))

    def dense_row(network: str, seed: int) -> Row:
        case = Case(network, seed, 0.0, "none", "dense")
        return case._asdict() | {"sparsity": 0.0} | bench.judged(bench.dense(network, seed))

    for case in cases(args.networks, seeds, SPARSITIES[:1] if args.quick else SPARSITIES):
        results.row(f"{case.network}, seed {case.seed}, dense", partial(dense_row, case.network, case.seed))
        fresh = case.name not in results.rows
        results.row(case.name, partial(bench.row_of, case))
        if fresh:
            write_table(results.rows, output)
    write_table(results.rows, output)
    illustrate(bench, results.rows, output, args.networks)
    print((output / "table.md").read_text())


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    sys.exit(main())
