"""Sums over processes, where there are some, and of numbers that a device may have no precision for."""

import torch

from lightning_softprune.utilities.distributed import (
    same_over_processes,
    sum_number_over_processes,
    sum_numbers_over_processes,
)
from support.processes import run_as_processes

MPS = torch.device("mps")  # has no double precision, and is not there at all


def test_alone_numbers_are_their_own_sums_and_need_no_device():
    assert sum_number_over_processes(3, MPS) == 3.0
    assert sum_numbers_over_processes([], MPS) == []
    assert sum_numbers_over_processes([1, 2.5], MPS) == [1.0, 2.5]
    assert same_over_processes([4, -1, 2**20 + 1], MPS) == [True, True, True]


def test_processes_sum_numbers_and_find_out_which_are_the_same(monkeypatch):
    numbers = [[4, -1, 2**20 + 1, 0], [4, 1, 2**20, 0], [4, -1, 2**20 + 1, 1]]

    def process(own):
        return lambda: (sum_numbers_over_processes(own, MPS), same_over_processes(own, MPS))

    for sums, same in run_as_processes(monkeypatch, [process(own) for own in numbers]):
        assert sums == [12.0, -1.0, 3 * 2.0**20 + 2, 1.0]
        assert same == [True, False, False, False]
