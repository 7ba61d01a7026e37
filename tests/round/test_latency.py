"""Latency: the dense and the pruned model are timed in turns, and how far their ratio scatters is told."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_softprune.round.latency as latency
from lightning_softprune.results import LayerShapes
from lightning_softprune.round.latency import Stopwatch
from lightning_softprune.search import Plan

PLAN = Plan(((0,),))


class Clock:
    """Stands in for the runner and the problem: times that were written down, dense and pruned in turns."""

    def __init__(self, dense, pruned):
        self.dense, self.pruned = iter(dense), iter(pruned)
        self.is_pruned, self.order, self.batch_size, self.asked = False, [], 32, set()
        self.module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        self.module.device = torch.device("cpu")

    def time(self, *, runs, seconds, samples):
        self.order.append(self.is_pruned)
        self.asked.add(samples)
        return next(self.pruned if self.is_pruned else self.dense)

    def prune(self, module, plan):
        self.is_pruned = True
        whole, module[0] = module[0], nn.Linear(3, 5)
        return SimpleNamespace(undo=partial(self.undo, whole))

    def undo(self, whole):
        self.is_pruned, self.module[0] = False, whole

    def takes_batch_of(self, samples):
        return samples < 1000


def test_the_best_of_the_turns_is_reported_with_the_distance_of_their_ratios():
    clock = Clock([1.0, 2.0, 1.25], [0.5, 1.6, 0.4])
    before, after, spread = Stopwatch(clock, clock, 1.0).compare(PLAN)
    assert (before, after) == (1.0, 0.4)
    assert spread == pytest.approx(0.8 - 0.32)
    assert clock.order == [False, True] * 3


def test_two_turns_are_enough_of_what_is_slow(monkeypatch):
    monkeypatch.setattr(latency, "_ENOUGH", 0.0)
    clock = Clock([1.0, 2.0], [0.5, 1.6])
    assert Stopwatch(clock, clock, 1.0).compare(PLAN) == (1.0, 0.5, pytest.approx(0.3))
    assert clock.order == [False, True] * 2


def test_a_plan_is_timed_once_and_compared_with_the_first_dense_model():
    clock = Clock([1.0] * 3, [0.5] * 3)
    stopwatch = Stopwatch(clock, clock, dense_latency_ratio=2.0)
    assert stopwatch.compare(PLAN) == (1.0, 0.5, 0.0)
    assert stopwatch.share_of_dense(PLAN) == 0.25
    assert (stopwatch.batch, clock.asked) == (32, {None})
    assert stopwatch.device == f"cpu ({torch.get_num_threads()} threads)".replace("(1 threads)", "(1 thread)")
    shapes = [{"weight": (n, 3), "bias": (n,)} for n in (8, 5)]
    assert stopwatch.layers == {PLAN: (LayerShapes("0", "Linear", *shapes),)}


def test_the_batch_has_the_samples_that_were_asked_for_and_is_tried_before_anything_else():
    clock = Clock([9.0, 1.0, 1.0, 1.0], [0.5] * 3)
    stopwatch = Stopwatch(clock, clock, 1.0, samples=256)
    assert clock.order == [False]
    assert stopwatch.compare(PLAN) == (1.0, 0.5, 0.0)
    assert (stopwatch.batch, clock.asked) == (256, {256})


def test_a_batch_that_cannot_be_made_is_a_warning_and_the_batch_as_it_is():
    clock = Clock([1.0] * 3, [0.5] * 3)
    with pytest.warns(UserWarning, match="latency_batch: 1000 samples cannot be made"):
        stopwatch = Stopwatch(clock, clock, 1.0, samples=1000)
    stopwatch.compare(PLAN)
    assert (stopwatch.batch, clock.asked) == (32, {None})
