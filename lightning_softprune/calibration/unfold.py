"""Unfolded inputs: all that one output of a layer reads, as one row.

A linear layer's output reads one row of its input; a convolution's the patch under its kernel, zeros of the padding
included; a transposed convolution's the inputs that its kernel spreads there, with zeros between them where it takes
steps. Laid out as rows, ``(places, channels * positions)`` with the kernel positions of a channel side by side, each
such layer is the linear layer ``rows @ matrix.T``. A linear layer behind a flatten has the flattened positions of the
map there.

Rows are many and overlap, so that only some are built, evenly spread; :func:`rows_per_call` says how many are enough.
The same goes for the rows of channels (:func:`sampled_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from lightning_softprune.graph import Kernel, WeightGeometry

MAX_FEATURES = 4608
"""Widest rows that are built, 512 channels under a kernel of 3 x 3; their covariance takes 170 MB."""

ROWS_PER_FEATURE, LEAST_ROWS = 16, 2**14
"""Rows of a round for each of their numbers, and at least. A regression on p numbers, fitted on n rows, errs by about
p / n more than it has to: 6 % with these, of the share of the outputs' variance that cannot be predicted at all."""

MOST_ROWS, ROW_NUMBERS, LEAST_WIDE_ROWS = 4096, 2**21, 512
"""One call gives at most so many rows; wide ones so many numbers, but not fewer rows than the last."""

_SPARSE = 4
"""A tensor with so many times the numbers that are wanted of it is not laid out anew for them."""


def rows_per_call(features: int, calls: int = 1) -> int:
    """How many rows of this width one call is to contribute at most.

    Args:
        features: Numbers in a row.
        calls: How many calls there will be.
    """
    enough = -(-max(ROWS_PER_FEATURE * features, LEAST_ROWS) // max(calls, 1))
    return min(enough, MOST_ROWS, max(ROW_NUMBERS // max(features, 1), LEAST_WIDE_ROWS))


def sampled_rows(geometry: WeightGeometry, source: torch.Tensor, most: int) -> torch.Tensor:
    """Rows of a layer's input, evenly spread, a new tensor of shape ``(rows, inputs)``."""
    if geometry.kernel is not None:
        source = source.movedim(source.ndim - len(geometry.kernel.size) - 1, -1)
        source = source if source.ndim > len(geometry.kernel.size) + 1 else source[None]
    places = source.shape[:-1]
    chosen = evenly_spaced(places, most, source.device)
    return source.detach()[torch.unravel_index(chosen, places)] if places else source.detach().clone()[None]


class Scratch:
    """Memory for what is built, used and built anew, call after call: to get it from the system takes longer."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def array(self, use: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """An array for one use, of whatever content; the last one of the same use is overwritten."""
        key, size = (use, like.dtype, like.device), math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = like.new_empty(size)
        return held[:size].view(tuple(shape))


def unfold_inputs(
    geometry: WeightGeometry, source: torch.Tensor, most: int, scratch: Scratch | None = None
) -> torch.Tensor:
    """What a layer's outputs read, a tensor of shape ``(rows, features)``.

    Args:
        geometry: Of the layer.
        source: Its input.
        most: How many rows to build at most.
        scratch: Where to build them; they are valid until it is used again. Default: in memory of their own.
    """
    return rows_of_inputs(geometry, source, most, scratch).flatten(1)


def rows_of_inputs(
    geometry: WeightGeometry, source: torch.Tensor, most: int, scratch: Scratch | None = None
) -> torch.Tensor:
    """The same, of shape ``(rows, channels, *kernel)`` and not laid out in this order."""
    kernel, scratch, source = geometry.kernel, scratch or Scratch(), source.detach()
    if kernel is None:
        rows = source.reshape(-1, source.shape[-1])
        return rows[evenly_spaced(source.shape[:-1], most, rows.device)]
    dims = len(kernel.size)
    if source.ndim == dims + 1:
        source = source[None]
    if not kernel.transposed:
        return _rows_under(_padded(kernel, source, scratch), kernel, kernel.stride, most, scratch)
    stretched = _stretched(kernel, source)
    rows = _rows_under(_laid_out(stretched, (0,) * 2 * dims, scratch), kernel, (1,) * dims, most, scratch)
    return rows.flip(tuple(range(2, 2 + dims)))  # its kernel goes backwards


def outputs_at_rows(geometry: WeightGeometry, output: torch.Tensor, most: int) -> torch.Tensor:
    """A layer's outputs at the places of :func:`unfold_inputs`, a new tensor of shape ``(rows, outputs)``."""
    if geometry.kernel is not None:
        dims = len(geometry.kernel.size)
        output = (output[None] if output.ndim == dims + 1 else output).movedim(1, -1)
    places = output.shape[:-1]
    chosen = evenly_spaced(places, most, output.device)
    if math.prod(places) > _SPARSE * len(chosen):
        return output[torch.unravel_index(chosen, places)]
    return output.reshape(-1, output.shape[-1])[chosen]


def evenly_spaced(places: Sequence[int], most: int, device: torch.device) -> torch.Tensor:
    """Every k-th of the flattened places, at most so many; k has no factor in common with a sample's positions."""
    total, inside = math.prod(places), math.prod(places[1:])
    step = max(-(-total // most), 1)
    while step > 1 and math.gcd(step, inside) > 1:
        step += 1
    return torch.arange(0, total, step, device=device)


def _padded(kernel: Kernel, source: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """A convolution's input with what is around it, channels last."""
    if kernel.padding_mode == "zeros":
        return _laid_out(source, kernel.around, scratch)
    return _laid_out(F.pad(source, kernel.around, mode=kernel.padding_mode), (0,) * len(kernel.around), scratch)


def _laid_out(source: torch.Tensor, around: Sequence[int], scratch: Scratch) -> torch.Tensor:
    """A tensor with its channels last, so that whole channels can be copied at a time, and zeros around it.

    Elements one by one take five times as long.
    """
    source = source.movedim(1, -1)
    inner, shape = [slice(None)], [len(source)]
    for dim, size in enumerate(source.shape[1:-1]):
        before, after = around[-2 * dim - 2 :][:2]  # of the last dimension first
        inner.append(slice(before, before + size))
        shape.append(before + size + after)
    laid_out = scratch.array("inputs", (*shape, source.shape[-1]), source)
    if any(around):
        laid_out.zero_()
    laid_out[tuple(inner)] = source
    return laid_out


def _stretched(kernel: Kernel, source: torch.Tensor) -> torch.Tensor:
    """A transposed convolution is one over an input that its steps spread out."""
    sizes = [(size - 1) * step + 1 for size, step in zip(source.shape[2:], kernel.stride, strict=True)]
    stretched = source.new_zeros(*source.shape[:2], *sizes)
    every: Any = (..., *(slice(None, None, step) for step in kernel.stride))
    stretched[every] = source
    around: list[int] = []
    for dim in reversed(range(len(kernel.size))):
        before = kernel.dilation[dim] * (kernel.size[dim] - 1) - int(kernel.padding[dim])
        around += [before, before + kernel.output_padding[dim]]
    return F.pad(stretched, around)


def _rows_under(
    source: torch.Tensor, kernel: Kernel, stride: Sequence[int], most: int, scratch: Scratch
) -> torch.Tensor:
    """What is under a kernel that moves over an input, whose channels are last; shape ``(rows, channels, *kernel)``."""
    sizes = source.shape[1:-1]
    spans = [apart * (size - 1) + 1 for size, apart in zip(kernel.size, kernel.dilation, strict=True)]
    places = [(size - span) // step + 1 for size, span, step in zip(sizes, spans, stride, strict=True)]
    places = [source.shape[0], *places]
    chosen = evenly_spaced(places, most, source.device)
    if not len(chosen):
        return source.new_zeros(0, source.shape[-1], *kernel.size)
    dims = len(sizes)
    first, *moved = torch.unravel_index(chosen, places)
    where = first.reshape(-1, *[1] * dims)
    for dim, along in enumerate(moved):
        offsets = torch.arange(kernel.size[dim], device=source.device) * kernel.dilation[dim]
        here = along[:, None] * stride[dim] + offsets
        where = where * sizes[dim] + here.reshape(-1, *(kernel.size[dim] if one == dim else 1 for one in range(dims)))
    rows = scratch.array("rows", (where.numel(), source.shape[-1]), source)
    torch.index_select(source.flatten(0, -2), 0, where.flatten(), out=rows)
    return rows.view(*where.shape, source.shape[-1]).movedim(-1, 1)
