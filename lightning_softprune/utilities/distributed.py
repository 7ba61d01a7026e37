"""The processes of the default group, if there are several."""

from __future__ import annotations

import torch


def in_process_group() -> bool:
    """Whether this process belongs to a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_number_over_processes(number: float, device: torch.device) -> float:
    """The sum of one number over the processes of the default group."""
    return float(sum_over_processes(torch.tensor(float(number), dtype=torch.float64, device=device)))


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor, in place, over the processes of the default group; alone, it stays as it is."""
    if in_process_group():
        torch.distributed.all_reduce(tensor)
    return tensor
