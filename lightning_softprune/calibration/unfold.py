"""Windows: what one output of a layer reads.

A linear layer's output reads one row of its input; a convolution's the patch under its kernel, zeros of the padding
included; a transposed convolution's the inputs that its kernel spreads there, with zeros between them where it takes
steps. Laid out as rows, ``(output positions, channels * taps)`` with the taps of a channel side by side, each such
layer is the linear layer ``rows @ matrix.T``. A linear layer behind a flatten has the flattened positions as taps.

Rows are many and overlap, so that only some are built, evenly spread; :func:`most_rows` says how many are enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

MAX_FEATURES = 4608
"""Widest rows that are built, 512 channels under a kernel of 3 x 3; their covariance takes 170 MB."""

LEAST_ROWS, MOST_ROWS, ROW_NUMBERS = 512, 4096, 2**21


def kernel_positions(layer: nn.Module, stride: int = 1) -> int:
    """Row entries per channel: positions of the kernel, or of a flattened map."""
    return math.prod(layer.kernel_size) if isinstance(layer, _ConvNd) else stride


def features_of(layer: nn.Module) -> int:
    """The width of a layer's rows."""
    if isinstance(layer, _ConvNd):
        return layer.in_channels * math.prod(layer.kernel_size)
    return layer.in_features if isinstance(layer, nn.Linear) else 0


def most_rows(features: int) -> int:
    """How many rows of this width one call is to contribute at most: fewer wide ones."""
    return min(max(ROW_NUMBERS // max(features, 1), LEAST_ROWS), MOST_ROWS)


def unfold_inputs(layer: nn.Module, source: torch.Tensor, most: int) -> torch.Tensor:
    """What the layer's outputs read, a new tensor of shape ``(rows, features)``.

    Args:
        layer: A linear layer or a convolution.
        source: Its input.
        most: How many rows to build at most.
    """
    if not isinstance(layer, _ConvNd):
        rows = source.reshape(-1, source.shape[-1])
        return rows[evenly_spaced(source.shape[:-1], most, rows.device)]
    dims = len(layer.kernel_size)
    if source.ndim == dims + 1:
        source = source[None]
    transposed = isinstance(layer, _ConvTransposeNd)
    view = _unfolded_transposed(layer, source) if isinstance(layer, _ConvTransposeNd) else _unfolded(layer, source)
    view = view.movedim(1, 1 + dims)  # (batch, *positions, channels, *kernel)
    places = view.shape[: 1 + dims]
    rows = view[torch.unravel_index(evenly_spaced(places, most, source.device), places)]
    return (rows.flip(tuple(range(2, 2 + dims))) if transposed else rows).flatten(1)


def outputs_at_rows(layer: nn.Module, output: torch.Tensor, most: int) -> torch.Tensor:
    """The layer's outputs at the positions of :func:`unfold_inputs`, a new tensor of shape ``(rows, outputs)``."""
    if isinstance(layer, _ConvNd):
        dims = len(layer.kernel_size)
        output = (output[None] if output.ndim == dims + 1 else output).movedim(1, -1)
    rows = output.reshape(-1, output.shape[-1])
    return rows[evenly_spaced(output.shape[:-1], most, rows.device)]


def evenly_spaced(places: Sequence[int], most: int, device: torch.device) -> torch.Tensor:
    """Every k-th of the flattened places, at most so many; k has no factor in common with a sample's positions."""
    total, inside = math.prod(places), math.prod(places[1:])
    step = max(-(-total // most), 1)
    while step > 1 and math.gcd(step, inside) > 1:
        step += 1
    return torch.arange(0, total, step, device=device)


def _unfolded(layer: _ConvNd, source: torch.Tensor) -> torch.Tensor:
    """A view of shape ``(batch, channels, *positions, *kernel)``."""
    around: Any = layer._reversed_padding_repeated_twice
    if any(around):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        source = F.pad(source, around, mode=mode)
    return _sliding(source, layer.kernel_size, layer.stride, layer.dilation)


def _unfolded_transposed(layer: _ConvTransposeNd, source: torch.Tensor) -> torch.Tensor:
    """The same, its kernel backwards: a transposed convolution is one over an input that its steps spread out."""
    dims = len(layer.kernel_size)
    sizes = [(size - 1) * step + 1 for size, step in zip(source.shape[2:], layer.stride, strict=True)]
    stretched = source.new_zeros(*source.shape[:2], *sizes)
    every: Any = (..., *(slice(None, None, step) for step in layer.stride))
    stretched[every] = source
    around: list[int] = []
    for dim in reversed(range(dims)):
        before = layer.dilation[dim] * (layer.kernel_size[dim] - 1) - int(layer.padding[dim])
        around += [before, before + layer.output_padding[dim]]
    return _sliding(F.pad(stretched, around), layer.kernel_size, (1,) * dims, layer.dilation)


def _sliding(
    source: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> torch.Tensor:
    for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        source = source.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    return source
