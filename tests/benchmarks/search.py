"""What a search costs beside the forward passes of its plans. Run by hand; in full it takes hours, `--quick` minutes.

    python tests/benchmarks/search.py [--sections ratios growth memory] [--networks vit] [--repeats 7] [--quick]

In one process, in turn, medians of the repeats. A search is ``RandomSearch(num_candidates=30)`` with
``compensation="none"``: 31 evaluations, those of 30 plans and of the dense model. The columns of ``ratios``:

- ``bare``: forward passes of the dense model and of the same 30 plans over batches that are in memory; no loader, no
  loss, no metrics, the surgery not counted. All else is a multiple of it, repeat by repeat.
- ``trials``: our 30 trials, over the bare passes of their plans: surgery, validation, metrics, and undoing it.
- ``round``: our round, from the first line of ``run_round`` to its last, tracing to rehearsal.
- ``copies``: ``deepcopy``, torch-pruning with the same ratio in each layer, ``Trainer.validate``, for each plan and,
  without the pruning, for the dense model. Attention heads are left whole in this column, so that it has more to run.
- ``masks``: the plans as zeros in the weights of the full-size model, and bare passes of it.
- ``default round / epoch``: a round with all defaults over the training epoch before it, on five times the images of
  the validation data, validation not counted; measured 3 times, with ``--quick`` once.

``growth`` shows a round of perceptrons and of the autoencoder by phase; ``memory`` the resident memory of processes of
their own (Linux). Phases are told apart as in ``fixed_costs.py``. Others on the machine disturb all of this: the load
is printed at the start and at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import logging
import multiprocessing
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from fixed_costs import PHASES, SCORING, Phases
from networks import NETWORKS, Case, perceptron
from torch import nn

import lightning_softprune.callback.rounds as callback
import lightning_softprune.round.run as run
from lightning_softprune import RandomSearch, SoftPruning
from lightning_softprune.round.preparing import PruningProblem
from lightning_softprune.surgery import Surgery, apply_plan

CANDIDATES = 30
TRAINING = 5  # times the images of the validation data
APPLYING = "applying plans"
OURS = {**PHASES, APPLYING: [*PHASES[APPLYING], (Surgery, "undo")], "search": [(run, "search")]}
COLUMNS = ("tracing", "grouping", "probing", "statistics", "ranking", "costs", "search", SCORING, APPLYING, "rehearsal")


def trainer_with(callbacks: list[L.Callback], epochs: int = 1, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=callbacks, **options,
    )  # fmt: skip


def searched(case: Case, workers: int = 0) -> tuple[Any, dict[str, float]]:
    """The result of a round of 31 evaluations, and its seconds by phase."""
    pruning = SoftPruning(
        epochs=0, finetune_epochs=0, search=RandomSearch(num_candidates=CANDIDATES), compensation="none",
        verbose=False, report=False,
    )  # fmt: skip
    loader = case.loader(workers=workers)
    with Phases(time.perf_counter, OURS).measured() as phases:
        trainer_with([pruning]).fit(case.model(), loader, loader)
    assert pruning.results[0].applied, pruning.results[0].reason
    return pruning.results[0], phases.seconds


class EpochClock(L.Callback):
    """Seconds of the first training epoch, up to its validation."""

    def on_train_epoch_start(self, trainer, pl_module):
        if not trainer.current_epoch:
            self.started = time.perf_counter()

    def on_validation_start(self, trainer, pl_module):
        if not trainer.current_epoch:
            self.seconds = time.perf_counter() - self.started


def default_round_per_epoch(case: Case) -> float:
    clock, pruning = EpochClock(), SoftPruning(finetune_epochs=0, verbose=False, report=False)
    trainer_with([pruning, clock], 2).fit(case.model(), case.loader(TRAINING), case.loader())
    return pruning.results[0].seconds / clock.seconds


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[list[Any], Any]]]:
    """Groups and plan of whatever is pruned while this lasts."""
    found, prune = [], PruningProblem.prune

    def note(self, module, plan):
        found.append((self.groups, plan))
        return prune(self, module, plan)

    PruningProblem.prune = note
    try:
        yield found
    finally:
        PruningProblem.prune = prune


def forward(model: nn.Module, batches: list[torch.Tensor]) -> float:
    """Seconds of a bare pass."""
    started = time.perf_counter()
    with torch.no_grad():
        for x in batches:
            model(x)
    return time.perf_counter() - started


class Contest:
    """One network, the plans of its search, and the ways to score them."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model().eval()
        self.batches = [x for x, _ in case.loader()]
        with recorded() as found:  # which also warms everything up
            result, _ = searched(case)
        assert all(trial.share == 1.0 for trial in result.trials)
        self.groups = found[0][0]
        self.plans = [plan for _, plan in found[: len(result.trials)]]

    def bare(self) -> tuple[float, float]:
        """Seconds of the dense model's pass, and of the plans'."""
        seconds = 0.0
        for plan in self.plans:
            surgery = apply_plan(self.model, self.groups, plan)
            seconds += forward(self.model, self.batches)
            surgery.undo()
        return forward(self.model, self.batches), seconds

    def masks(self) -> float:
        started = time.perf_counter()
        forward(self.model, self.batches)
        tensors = dict(self.model.named_parameters())
        for plan in self.plans:
            kept = {}
            for group, gone in zip(self.groups, plan.removed, strict=True):
                for member in group.members:
                    lost = torch.isin(torch.as_tensor(member.owner), torch.tensor(gone, dtype=torch.long))
                    names = (member.module, f"{member.module}.weight", f"{member.module}.bias")
                    for name in names if member.slot != "in" else ():
                        if name in tensors and len(tensors[name]) == len(lost):
                            kept.setdefault(name, tensors[name].detach().clone())
                            tensors[name].data[lost] = 0.0
            forward(self.model, self.batches)
            for name, before in kept.items():
                tensors[name].data.copy_(before)
        return time.perf_counter() - started

    def copies(self, workers: int) -> float:
        import torch_pruning as tp

        loader, trainer = self.case.loader(workers=workers), trainer_with([])
        started = time.perf_counter()
        trainer.validate(copy.deepcopy(self.model), loader, verbose=False)
        for plan in self.plans:
            model = copy.deepcopy(self.model)
            layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
            ratios = {
                layers[member.module]: len(gone) / group.num_channels
                for group, gone in zip(self.groups, plan.removed, strict=True)
                if not group.counts  # heads
                for member in group.members
                if member.slot == "out" and member.module in layers
            }
            pruner = tp.pruner.BasePruner(
                model,
                self.batches[0][:1],
                tp.importance.MagnitudeImportance(p=2),
                pruning_ratio_dict=ratios,
                ignored_layers=[layer for layer in layers.values() if layer not in ratios],
            )
            pruner.step()
            trainer.validate(model, loader, verbose=False)
        return time.perf_counter() - started


def shown(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def phases_row(runs: list[dict[str, float]]) -> list[str]:
    """Median seconds of a round and of its phases."""
    whole = [sum(seconds.values()) for seconds in runs]
    rest = [sum(v for name, v in seconds.items() if name not in COLUMNS) for seconds in runs]
    named = [[seconds.get(name, 0.0) for seconds in runs] for name in COLUMNS]
    return [f"{statistics.median(values):.3f}" for values in (whole, *named, rest)]


PHASES_HEAD = ["round", *(name.split(":")[0] for name in COLUMNS), "the rest"]


def ratios(options: argparse.Namespace, cases: dict[str, Case]) -> None:
    try:
        import torch_pruning  # noqa: F401

        with_copies = True
    except ImportError:
        print("torch-pruning is not installed: no column `copies`\n")
        with_copies = False
    for name, case in cases.items():
        rows, split, contest = [], [], Contest(case)
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        runs: dict[int, list[dict[str, float]]] = defaultdict(list)
        for _ in range(options.repeats):
            dense, plans = contest.bare()
            bare = dense + plans
            found["bare", 0].append(bare)
            found["masks", 0].append(contest.masks() / bare)
            for workers in options.workers:
                gc.collect()
                result, seconds = searched(case, workers)
                runs[workers].append(seconds)
                found["trials", workers].append(sum(trial.seconds for trial in result.trials) / plans)
                found["round", workers].append(sum(seconds.values()) / bare)
                if with_copies:
                    found["copies", workers].append(contest.copies(workers) / bare)
                    found["copies/round", workers].append(found["copies", workers][-1] / found["round", workers][-1])
        found["epoch", 0] = [default_round_per_epoch(case) for _ in range(1 if options.quick else 3)]
        for workers in options.workers:
            of_both, own = ("bare", "masks"), ("trials", "round", "copies", "copies/round", "epoch")
            cells = {key: shown(found[key, 0]) for key in of_both} | {key: shown(found[key, workers]) for key in own}
            order = ("bare", "trials", "round", "copies", "masks", "copies/round", "epoch")
            rows.append([name, str(workers), *(cells[key] for key in order)])
            split.append([name, str(workers), *phases_row(runs[workers])])
        print(f"### {name}: multiples of the bare passes, median (least to most)\n")
        head = ["bare, s", "trials", "round", "copies", "masks", "copies / round", "default round / epoch"]
        table(["network", "workers", *head], rows)
        print(f"### {name}: seconds of the round by phase\n")
        table(["network", "workers", *PHASES_HEAD], split)


def growth(options: argparse.Namespace, _: dict[str, Case]) -> None:
    groups, channels, times = [4, 8, 16, 32, 64], [64, 256, 1024, 4096], [1, 2, 4, 8]
    if options.quick:
        groups, channels, times = [4, 16, 64], [64, 256, 1024], [1, 4]
    cases = {f"{n} groups of 64": Case(lambda n=n: perceptron(64, *[64] * n, 10), (64,), 512) for n in groups}
    cases |= {f"4 groups of {n}": Case(lambda n=n: perceptron(64, n, n, n, n, 10), (64,), 512) for n in channels}
    auto = NETWORKS["autoencoder"]
    cases |= {f"autoencoder, {n} x 1,000 images": replace(auto, images=n * auto.images) for n in times}
    rows = []
    for name, case in cases.items():
        runs, bare, passes = [], [], []
        batches = [x for x, _ in case.loader()]
        for _ in range(options.repeats):
            bare.append(forward(case.model().eval(), batches))
            result, seconds = searched(case)
            runs.append(seconds)
            passes.append(result.passes)
        rows.append([name, f"{statistics.median(bare):.4f}", f"{statistics.median(passes):.1f}", *phases_row(runs)])
    print("### Growth: seconds of the round by phase\n")
    table(["network", "dense pass, s", "passes", *PHASES_HEAD], rows)


def _resident(which: str) -> float:
    """MiB of this process now (VmRSS), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def _peak(case: str, what: str, images: int, connection: Any) -> None:
    """In a process of its own: MiB before, and at most while it lasts."""
    quiet()
    mine = replace(NETWORKS[case], images=images)
    model, loader, ends = mine.model(), mine.loader(), []

    def watched(*args):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        before = _resident("VmRSS")
        result = function(*args)
        ends.append((before, _resident("VmHWM")))
        return result

    if what == "validation":
        function = trainer_with([]).validate
        watched(model, loader, None, False)
    elif what == "training epoch":
        function = trainer_with([], limit_val_batches=0).fit
        watched(model, loader)
    else:
        own = ROUNDS[what]
        function, callback.run_round = callback.run_round, watched
        search = RandomSearch(3)  # one plan after the other: more of them take no more
        pruning = SoftPruning(epochs=0, finetune_epochs=0, search=search, verbose=False, report=False, **own)
        trainer_with([pruning]).fit(model, loader, loader)
    connection.send(ends[0])


ROUNDS = {
    "round": {"compensation": "none"},
    "round with refit": {},
    "the same, memory_limit=0.25": {"memory_limit": 0.25},
}


def memory(_: argparse.Namespace, cases: dict[str, Case]) -> None:
    whats = ("validation", "training epoch", *ROUNDS)
    context = multiprocessing.get_context("spawn")  # a forked one would hold what this one holds
    rows = []
    for name, case in cases.items():
        size = sum(p.numel() * p.element_size() for p in case.model().parameters()) / 2**20
        found = {}
        for what in whats:
            here, there = context.Pipe(False)
            process = context.Process(target=_peak, args=(name, what, case.images, there))
            process.start()
            there.close()
            found[what] = here.recv()
            process.join()
        before = statistics.median(start for start, _ in found.values())
        cells = [f"{peak - start:.0f}" for start, peak in found.values()]
        shares = [f"{found[what][1] / found['training epoch'][1]:.2f}" for what in whats[2:]]
        rows.append([name, f"{size:.1f}", f"{before:.0f}", *cells, *shares])
    print("### Peak resident memory, MiB: before, and what is added at most; peaks over that of the training epoch\n")
    head = [
        "network",
        "weights",
        "before",
        *(f"+ {what}" for what in whats),
        *(f"{what} / epoch" for what in ROUNDS),
    ]
    table(head, rows)


def quiet(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


SECTIONS = {"ratios": ratios, "growth": growth, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=None)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--repeats", type=int, default=None, help="7; with --quick 3")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two networks, 3 repeats, a sixteenth of the images for all but the autoencoder",
    )
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 7)
    names = options.networks or (["autoencoder", "resnet18"] if options.quick else list(NETWORKS))
    cases = {name: NETWORKS[name] for name in names}
    if options.quick:
        cases = {
            name: replace(case, images=case.images // (1 if name == "autoencoder" else 16))
            for name, case in cases.items()
        }
    quiet(options.threads)
    print(f"{options.repeats} repeats, {options.threads} threads of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}\n")
    for section in options.sections:
        SECTIONS[section](options, cases)
    print(f"load at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
