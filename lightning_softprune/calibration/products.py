"""Sums of products over observations: products in single precision, their sums in double.

Double-precision products take twice the time of single ones, on most GPUs thirty times, and the regressions have no
use for the digits: their ridge is 1e-4 of the variance. So observations in single precision or less are multiplied in
single precision, :data:`BLOCK_ROWS` at a time, and the blocks are added up in double. Those in double stay in double.

A product of two columns over a block of ``b`` rows is off by at most ``b u |x| |y|``, with ``u = 2^-24`` and the
columns' norms (Higham 2002, section 3.1). Over all blocks that adds up, by Cauchy-Schwarz, to :data:`PRODUCT_ERROR`
``sqrt(S_xx S_yy)``, whatever the number of observations; in practice to a hundredth of it. Columns are centred first,
so that ``S`` is their variance and no mean drowns it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_softprune.utilities.distributed import device_of_doubles

BLOCK_ROWS = 1024
"""Observations whose products are summed in single precision."""

PRODUCT_ERROR = 2.0**-14
"""Bound of the error of a sum of products, relative to the root of the product of both columns' sums of squares."""

LARGEST = 2.0**53
"""What is larger counts as broken: the squares of a block of it are to be finite in single precision."""

_EXACT_ROWS = 256
"""Observations that are held in double precision at a time."""

_PANEL = 256
"""Columns of a symmetric matrix that are computed at a time, from the diagonal on."""


def observations(rows: torch.Tensor) -> torch.Tensor:
    """Observations in single precision, or double where they are; zero where they are not finite or above `LARGEST`."""
    rows = rows.detach()
    if rows.dtype != torch.float64:
        rows = rows.float()
    if rows.device.type == "cpu" and rows.numel():  # elsewhere, to ask would be to wait for the device
        least, most = rows.aminmax()
        if least >= -LARGEST and most <= LARGEST:  # nor is any not a number
            return rows
    return torch.where(rows.abs() <= LARGEST, rows, 0.0)


def sums_device(rows: torch.Tensor) -> torch.device:
    """Where sums in double precision are held: beside the observations, where there is double precision."""
    return device_of_doubles(rows.device)


def mean_of(rows: torch.Tensor) -> torch.Tensor:
    """The mean of observations, in double precision."""
    if rows.device.type == "mps":
        rows = rows.cpu()
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    exact = total.new_empty(min(_EXACT_ROWS, len(rows)), rows.shape[1])
    ones = total.new_ones(len(exact))
    for start in range(0, len(rows), _EXACT_ROWS):  # a product takes half the time of a mean in another precision
        block = rows[start : start + _EXACT_ROWS]
        total += ones[: len(block)] @ exact[: len(block)].copy_(block)
    return total / len(rows)


def centred(rows: torch.Tensor, mean: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Observations about a mean in double precision; what its rounding leaves is taken off as well.

    Args:
        rows: The observations.
        mean: Theirs.
        out: Where to write, which may be the observations themselves; default: a new tensor.
    """
    rounded = mean.to(rows.device, rows.dtype)
    left = mean - rounded.to(mean)
    return torch.sub(rows, rounded, out=out).sub_(left.to(rows.device, rows.dtype))


def add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor | None = None) -> None:
    """Add ``left.T @ right`` to a matrix in double precision.

    Args:
        total: Is added to, shape ``(columns of left, columns of right)``.
        left: Shape ``(observations, columns)``.
        right: The same; without it, the observations themselves, and only the upper triangle of `total` is right: see
            :func:`mirror`.
    """
    with _full_precision(left.device):
        for start in range(0, len(left), BLOCK_ROWS):
            x = left[start : start + BLOCK_ROWS]
            if right is not None:
                total += (x.t() @ right[start : start + BLOCK_ROWS]).to(total.device)
                continue
            for first in range(0, x.shape[1], _PANEL):
                total[first : first + _PANEL, first:] += (x[:, first : first + _PANEL].t() @ x[:, first:]).to(
                    total.device
                )


def mirror(upper: torch.Tensor) -> torch.Tensor:
    """Make a matrix symmetric by what is above its diagonal, in its own memory; returned for convenience."""
    for first in range(0, len(upper), _PANEL):  # block by block: whole triangles are walked through four times
        after = first + _PANEL
        block = upper[first:after, first:after]
        block.copy_(block.triu() + block.triu(1).t())
        upper[after:, first:after] = upper[first:after, after:].t()
    return upper


def cross_products(left: torch.Tensor, right: torch.Tensor | None = None) -> torch.Tensor:
    """``left.T @ right`` in double precision; without `right`, ``left.T @ left``."""
    columns = left.shape[1] if right is None else right.shape[1]
    total = torch.zeros(left.shape[1], columns, dtype=torch.float64, device=sums_device(left))
    add_products(total, left, right)
    return mirror(total) if right is None else total


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products of single precision are ones, whatever the user allows in their own model."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        try:
            if before != "highest":
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            if before != "highest":
                torch.set_float32_matmul_precision(before)
