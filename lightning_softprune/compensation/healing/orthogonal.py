"""Steps along orthogonalized momentum, for weights that are matrices.

A gradient is mostly in a few directions, and steps along it leave the others as they are. Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon) makes all singular values of the averaged gradient alike, so that each step
turns all directions in which the outputs are wrong; that counts where there are few steps. `torch.optim.Muon` came with
torch 2.9, takes matrices only, and multiplies in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch

MOMENTUM = 0.9

WIDEST = 1024
"""The most rows and columns of a matrix whose steps are orthogonalized: one with more of both would cost too much."""

_LINEAR, _CUBIC, _QUINTIC, _TIMES = 3.4445, -4.7750, 2.0315, 5
"""Of the odd polynomial that takes singular values towards one: steep at zero, so that five times are enough."""


def is_matrix(weight: torch.Tensor) -> bool:
    """Whether a weight, all but its first dimension taken together, is a matrix to be orthogonalized.

    Args:
        weight: Of any shape; one with a single input for each output is a vector in this sense.

    Example:
        >>> is_matrix(torch.zeros(8, 4, 3, 3)), is_matrix(torch.zeros(8)), is_matrix(torch.zeros(8, 1, 3, 3))
        (True, False, False)
    """
    if weight.ndim < 2 or min(weight.shape[:2]) < 2:
        return False
    rows = weight.shape[0]
    return min(rows, weight.numel() // rows) <= WIDEST


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same singular vectors and singular values of about one.

    Newton and Schulz's iteration, on the smaller of the two matrices of inner products.

    Args:
        matrix: Shape (m, n), in single or double precision.

    Returns:
        Shape (m, n): singular values of 0.7 to 1.15; smaller ones where they were below a thousandth of the largest.

    Example:
        >>> turned = orthogonalized(torch.diag(torch.tensor([4.0, -0.5])))
        >>> bool((turned.diagonal().abs() - 1).abs().max() < 0.35), turned.diagonal().sign().tolist()
        (True, [1.0, -1.0])
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    matrix = matrix / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    inner = matrix @ matrix.T
    turn = factor = _factor(inner)
    for _ in range(_TIMES - 1):
        inner = factor @ inner @ factor
        factor = _factor(inner)
        turn = factor @ turn
    return turn @ matrix


def _factor(inner: torch.Tensor) -> torch.Tensor:
    """What a matrix with these inner products of rows is multiplied by."""
    factor = _CUBIC * inner + _QUINTIC * (inner @ inner)
    factor.diagonal().add_(_LINEAR)
    return factor


class OrthogonalSteps(torch.optim.Optimizer):
    """Steps of a size given by the rate: the root mean square of a tensor's change.

    Args:
        groups: As of any optimizer; parameters for which `is_matrix`.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, by the gradients that are there."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1.0 - MOMENTUM)
                ahead = weight.grad.lerp(average, MOMENTUM)
                direction = orthogonalized(ahead.reshape(len(weight), -1))
                size = max(direction.shape) ** 0.5
                weight.add_(direction.reshape(weight.shape), alpha=-size * group["lr"])
        return loss
