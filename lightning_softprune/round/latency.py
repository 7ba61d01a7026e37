"""What plans make of the module: how long it takes then, and the shapes of its layers; of a few finalists only."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.results import LayerShapes
from lightning_softprune.round.preparing import PruningProblem
from lightning_softprune.round.trials import ScoredPlan
from lightning_softprune.search import Plan
from lightning_softprune.trainer import ModuleRunner
from lightning_softprune.utilities.wording import counted

_TURNS, _LEAST_TURNS, _ENOUGH = 3, 2, 0.5
"""Turns, and how many are enough once they have taken so many seconds: what is slow scatters less."""


_MOST_TIMED = 6


def worth_timing(ranked: Iterable[ScoredPlan], problem: PruningProblem) -> Iterator[ScoredPlan]:
    """What a latency limit chooses from: the best plan, then those better than all others with fewer MACs; at most 6.

    Args:
        ranked: Plans, best first.
        problem: Knows what they cost.
    """
    fewest, timed = math.inf, 0
    for scored in ranked:
        macs = problem.costs_of(scored.plan).macs
        if macs < fewest:
            fewest, timed = macs, timed + 1
            yield scored
        if timed == _MOST_TIMED:
            return


def seconds_to_compare(step: float) -> float:
    """About what it takes to time a plan beside the module as it is, whose step takes so long."""
    return max(2 * _LEAST_TURNS * step, _ENOUGH)


class Stopwatch:
    """Times the validation step of plans against that of the module as it is.

    Latency is no function of counts, and measuring is noisy: both are timed in turns, on the first validation batch (or
    one of as many samples as were asked for, made of it), in eval mode after a warm-up, on the training device. A
    turn's figure is the median of repeated steps; what is reported is the best of the turns for each, with the
    *spread*: the distance between the largest and the smallest of their ratios. Only plans that are about to be chosen
    are timed, each once: what is reported is what was decided on.

    Args:
        runner: Runs the module.
        problem: What plans do to it.
        dense_latency_ratio: How many times as long as the module now is the first dense model takes.
        samples: How many samples the batch is to have; `None`: as many as the first validation batch.

    Attributes:
        device: What is measured on, as text.
        batch: Samples of the batch that is measured with.
        layers: Plan -> the layers that it changes, of the plans that were timed.
    """

    def __init__(
        self, runner: ModuleRunner, problem: PruningProblem, dense_latency_ratio: float, samples: int | None = None
    ) -> None:
        self.runner, self.problem, self.dense_latency_ratio = runner, problem, dense_latency_ratio
        self.known: dict[Plan, tuple[float, float, float]] = {}
        self.layers: dict[Plan, tuple[LayerShapes, ...]] = {}
        self.device = device_name(runner.module.device)
        if samples is not None and not runner.takes_batch_of(samples):
            rank_zero_warn(
                f"latency_batch: {samples} samples cannot be made of the first validation batch, which does not consist"
                " of tensors of one length; latency is measured with the batch as it is"
            )
            samples = None
        self._samples, self.batch = samples, samples or runner.batch_size
        if samples is not None:
            self._time(runs=1, seconds=0.0)  # what the user's code says to this batch is said before the search

    def compare(self, plan: Plan, runs: int = 5, seconds: float = 0.06) -> tuple[float, float, float]:
        """Seconds of the module as it is and as this plan would make it, and the spread of their ratio."""
        if plan not in self.known:
            self.known[plan] = self._compare(plan, runs, seconds)
        return self.known[plan]

    def share_of_dense(self, plan: Plan, runs: int = 5, seconds: float = 0.06) -> float:
        """The fraction of the first dense model's time that the plan takes."""
        before, after, _ = self.compare(plan, runs, seconds)
        return after / before / self.dense_latency_ratio

    def _time(self, runs: int, seconds: float) -> float:
        return self.runner.time(runs=runs, seconds=seconds, samples=self._samples)

    def _compare(self, plan: Plan, runs: int, seconds: float) -> tuple[float, float, float]:
        before: list[float] = []
        after: list[float] = []
        shapes = shapes_of(self.runner.module)
        started = time.monotonic()
        while len(before) < _TURNS:  # what else the machine does meanwhile disturbs both
            if len(before) >= _LEAST_TURNS and time.monotonic() - started > _ENOUGH:
                break
            before.append(self._time(runs, seconds))
            surgery = self.problem.prune(self.runner.module, plan)
            try:
                after.append(self._time(runs, seconds))
                self.layers[plan] = changed_layers(shapes, shapes_of(self.runner.module))
            finally:
                surgery.undo()
        ratios = [pruned / dense for dense, pruned in zip(before, after, strict=True)]
        return min(before), min(after), max(ratios) - min(ratios)


Shapes = dict[str, tuple[str, dict[str, tuple[int, ...]]]]
"""Layer -> its class, and the shapes of its own parameters."""


def shapes_of(module: nn.Module) -> Shapes:
    """The layers that have parameters of their own."""
    found: Shapes = {}
    for name, layer in module.named_modules():
        sized = ((key, value) for key, value in layer.named_parameters(recurse=False) if not is_lazy(value))
        own = {key: tuple(value.shape) for key, value in sized}
        if own:
            found[name] = type(layer).__name__, own
    return found


def changed_layers(before: Shapes, after: Shapes) -> tuple[LayerShapes, ...]:
    """The layers whose shapes are not the same any more, in the module's order."""
    return tuple(
        LayerShapes(name, kind, shapes, after[name][1])
        for name, (kind, shapes) in before.items()
        if name in after and after[name][1] != shapes
    )


def device_name(device: torch.device) -> str:
    """What a time was measured on: the accelerator by name, or the CPU with its threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({counted(threads, 'thread')})" if device.type == "cpu" else str(device)
