"""Latency: the dense and the pruned model are timed in turns, and how far their ratio scatters is told."""

from types import SimpleNamespace

import pytest

import lightning_softprune.round.latency as latency
from lightning_softprune.round.latency import Stopwatch
from lightning_softprune.search import Plan

PLAN = Plan(((0,),))


class Clock:
    """Stands in for the runner and the problem: times that were written down, dense and pruned in turns."""

    def __init__(self, dense, pruned):
        self.dense, self.pruned = iter(dense), iter(pruned)
        self.is_pruned, self.module, self.order = False, None, []

    def time(self, *, runs, seconds):
        self.order.append(self.is_pruned)
        return next(self.pruned if self.is_pruned else self.dense)

    def prune(self, module, plan):
        self.is_pruned = True
        return SimpleNamespace(undo=self.undo)

    def undo(self):
        self.is_pruned = False


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
