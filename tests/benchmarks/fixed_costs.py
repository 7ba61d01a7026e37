"""What a round costs besides its trials, in dense passes over the 512 validation images. Run by hand.

    python tests/benchmarks/fixed_costs.py [--repeats 3] [--threads 2] [--clock wall] [--compensations none ...]

A slim ResNet-18 (2.8 M parameters, 12 groups, inputs of 32 x 32) and one candidate. In one process, in turn: dense
passes (eval mode, no gradients, batches of 64) and a round with each compensation. Medians over the repeats; the time
of a phase is without that of the phases within it. ``fixed`` is everything but the passes that score: those of the
dense model, of the candidate and of the refitted model. Where others use the machine, ``--clock cpu --threads 1``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import time
import warnings
from collections import defaultdict

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_softprune.callback.rounds as callback
import lightning_softprune.round.preparing.prepare as prepare
import lightning_softprune.round.preparing.problem as problem
import lightning_softprune.round.preparing.tracing as tracing
import lightning_softprune.round.rehearsal as rehearsal
from lightning_softprune import SoftPruning, UniformBaseline
from lightning_softprune.trainer import ModuleRunner

IMAGES, BATCH, SIZE = 512, 64, 32

SCORING = "scoring: dense, candidate, refitted"

PHASES = {
    "tracing": [(tracing, "trace_model")],
    "grouping": [(tracing, "groups_of"), (tracing, "refuse_unjudged"), (tracing, "refuse_unseen_readers")],
    "probing": [(tracing, "probe_with_counts"), (ModuleRunner, "probing")],
    "statistics": [(prepare, "_measured")],
    "expected errors": [(problem.PruningProblem, "expected_errors")],
    "ranking": [(prepare, "rank")],
    "intercepts": [(prepare, "find_intercepts")],
    "regressions": [(prepare, "Compensation")],
    "costs": [(problem.CostModel, "build"), (problem, "norms")],
    SCORING: [(ModuleRunner, "metrics")],
    "applying plans": [(problem.PruningProblem, "prune")],
    "refit: dense run": [(rehearsal, "run_dense")],
    "refit: readers": [(rehearsal, "refit_readers")],
    "rehearsal": [(ModuleRunner, "rehearse")],
    "latency": [(ModuleRunner, "time")],
    "the rest": [(callback, "run_round")],
}


class Block(nn.Module):
    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.shortcut = nn.Sequential()
        if stride > 1 or narrow != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class SlimResNet18(L.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks, narrow = [], width
        for stage in range(4):
            for number in range(2):
                wide = width * 2**stage
                blocks.append(Block(narrow, wide, 2 if stage and not number else 1))
                narrow = wide
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(narrow, 10)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Phases:
    """Seconds by phase, each without those within it."""

    def __init__(self, clock, phases=PHASES) -> None:
        self.clock, self.phases = clock, phases
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[tuple[str, float]] = []

    def _switch(self, entering: str | None) -> None:
        now = self.clock()
        if self._running:
            name, since = self._running[-1]
            self.seconds[name] += now - since
        if entering is not None:
            self._running.append((entering, now))
            return
        self._running.pop()
        if self._running:
            self._running[-1] = (self._running[-1][0], now)

    def _timed(self, phase, function):
        def run(*args, **kwargs):
            self._switch(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(None)

        return run

    @contextlib.contextmanager
    def measured(self):
        """While this lasts, the phases of rounds are timed."""
        before = [(owner, name, owner.__dict__[name]) for places in self.phases.values() for owner, name in places]
        phase_of = {(id(owner), name): phase for phase, places in self.phases.items() for owner, name in places}
        try:
            for owner, name, _ in before:
                setattr(owner, name, self._timed(phase_of[id(owner), name], getattr(owner, name)))
            yield self
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


def pruned(compensation: str, loader: DataLoader, clock) -> dict[str, float]:
    """Seconds by phase of a round with one candidate."""
    torch.manual_seed(0)
    model = SlimResNet18()
    with torch.no_grad():  # running statistics that fit the weights
        model.train()(torch.cat([x for x, _ in loader]))
    pruning = SoftPruning(
        monitor="val_loss", epochs=0, target_sparsity=0.5, search=UniformBaseline(), compensation=compensation,
        calibration_batches=IMAGES // BATCH, finetune_epochs=0, verbose=False, report=False,
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[pruning],
    )  # fmt: skip
    with Phases(clock).measured() as phases:
        trainer.fit(model, loader, loader)
    assert pruning.results[0].applied, pruning.results[0].reason
    assert len(pruning.results[0].groups) == 12
    return phases.seconds


def dense_pass(loader: DataLoader, clock) -> float:
    model = SlimResNet18().eval()
    batches = [x for x, _ in loader]
    with torch.no_grad():
        model(batches[0])
        started = clock()
        for x in batches:
            model(x)
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compensations", nargs="+", default=["least_squares", "none"])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    maps = F.interpolate(torch.randn(IMAGES, 3, 8, 8), SIZE, mode="bilinear")  # neighbours alike, as in images
    data = TensorDataset(maps + 0.1 * torch.randn_like(maps), torch.randint(10, (IMAGES,)))
    loader = DataLoader(data, batch_size=BATCH)
    dense: list[float] = []
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(options.repeats):
        for compensation in options.compensations:
            before = dense_pass(loader, clock)
            seconds = pruned(compensation, loader, clock)
            dense += [before, dense_pass(loader, clock)]
            found[compensation].append(seconds)
    unit = statistics.median(dense)
    print(f"one dense pass over {IMAGES} images: {1000 * unit:.0f} ms ({min(dense):.3f} to {max(dense):.3f} s)")
    print(f"{'in dense passes':40}" + "".join(f"{name:>16}" for name in found))

    def row(name: str, of) -> None:
        print(f"{name:40}" + "".join(f"{statistics.median(map(of, runs)) / unit:16.2f}" for runs in found.values()))

    for phase in PHASES:
        row(phase, lambda run, phase=phase: run.get(phase, 0.0))
    row("whole round", lambda run: sum(run.values()))
    row("fixed", lambda run: sum(run.values()) - run[SCORING])


if __name__ == "__main__":
    main()
