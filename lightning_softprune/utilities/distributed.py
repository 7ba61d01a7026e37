"""The processes of the default group, if there are several."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def in_process_group() -> bool:
    """Whether this process belongs to a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def device_of_doubles(device: torch.device) -> torch.device:
    """Where double precision is held of what is on a device: there, if it has any."""
    return device if device.type != "mps" else torch.device("cpu")


def sum_numbers_over_processes(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sum of each of several numbers over the processes of the default group; alone, they stay as they are."""
    if not numbers or not in_process_group():
        return [float(number) for number in numbers]
    return sum_over_processes(torch.tensor(numbers, dtype=torch.float64, device=device_of_doubles(device))).tolist()


def sum_number_over_processes(number: float, device: torch.device) -> float:
    """The sum of one number over the processes of the default group."""
    return sum_numbers_over_processes([float(number)], device)[0]


def same_over_processes(numbers: Sequence[int], device: torch.device) -> list[bool]:
    """Whether each of several whole numbers is the same in all processes of the default group, which have as many."""
    sums = [(1.0, float(number), float(number) ** 2) for number in numbers]
    flat = sum_numbers_over_processes([number for three in sums for number in three], device)
    return [square * count == total**2 for count, total, square in zip(*[iter(flat)] * 3, strict=True)]  # no variance


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor, in place, over the processes of the default group; alone, it stays as it is."""
    if in_process_group():
        torch.distributed.all_reduce(tensor)
    return tensor
