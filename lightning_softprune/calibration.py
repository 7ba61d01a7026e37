"""Calibration: what the layers that read a group's channels see, as means and covariances.

A *reader* is a linear, convolution or attention layer with a group's channels at its input. Its statistics are taken
while the dense model runs on a few training batches, streamed in double precision: one mean per input index and one
covariance per channel pair, whatever the number of samples. Positions of a convolution are observations. A linear
layer behind a flatten has ``stride`` input indices per channel; they keep their own means and share one covariance.
Where an output reads several positions of a channel, those of its windows are taken as well (``windows.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_softprune.graph import Member, PruningGroup
from lightning_softprune.windows import MAX_FEATURES, features_of, most_rows, windows

__all__ = [
    "InputStatistics",
    "Reader",
    "Taps",
    "as_rows",
    "collect_statistics",
    "find_readers",
    "has_windows",
    "in_double",
    "reading_weight",
    "reads_one_row",
    "taps_of",
    "watch_calls",
    "watch_inputs",
]

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels of prunable groups.

    Attributes:
        name: Module name.
        slot: Its input slot.
        stride: Consecutive input indices per channel (behind a flatten), else 1.
    """

    name: str
    slot: str
    stride: int


@dataclass(frozen=True)
class Taps:
    """How many taps of a convolution's kernel fall on the input, at one output position and another.

    At the borders some fall on the padding; where a transposed convolution takes steps, most fall between the inputs.

    Attributes:
        share: The mean number, as a fraction of the kernel's taps.
        unevenness: Variance of the number over its mean; 0 if it is the same at every output position.
    """

    share: float = 1.0
    unevenness: float = 0.0

    def mixed(self, other: Taps, weight: float) -> Taps:
        """The average, with this weight on the other."""
        return Taps(
            self.share + weight * (other.share - self.share),
            self.unevenness + weight * (other.unevenness - self.unevenness),
        )


class InputStatistics:
    """Streaming mean and covariance of a layer's input (Chan et al. 1979), in double precision.

    Attributes:
        count: Observations so far.
        mean: Mean of each input index, shape ``(channels * stride,)``.
        taps: How many of a kernel's taps fall on the input and not beside it (:func:`taps_of`), averaged.
        windows: The same of all that one output reads, for layers whose outputs read more than one row of channels
            and not too many numbers.
    """

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride
        self.count = 0
        self.taps = Taps()
        self.windows: InputStatistics | None = None
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: torch.Tensor, taps: Taps | None = None) -> None:
        """Add observations; what is not finite in single precision counts as zero.

        Args:
            rows: Shape ``(observations, channels * stride)``.
            taps: For a convolution, what its kernel met; default: every tap fell on the input.
        """
        rows = in_double(rows)
        n = len(rows)
        if n == 0:
            return
        self.taps = self.taps.mixed(taps or Taps(), n / (self.count + n))
        mean = rows.mean(0)
        products = self._pooled(rows - mean)
        if self.count == 0:
            self.count, self.mean, self._products = n, mean, products
            return
        total, delta = self.count + n, mean - self.mean
        self.mean = self.mean + delta * (n / total)
        self._products += products + self._pooled(delta[None]) * (self.count * n / total)
        self.count = total

    def all_reduce(self) -> None:
        """Merge the observations of all processes of the default process group, so that every one has the same."""
        if self.windows is not None:
            self.windows.all_reduce()
        if self.count == 0:
            return
        device = self.mean.device
        known = torch.tensor([1.0, self.taps.share, self.taps.unevenness], dtype=torch.float64, device=device)
        moments = self.count * torch.cat([known, self.mean])
        torch.distributed.all_reduce(moments)
        total, mean = int(moments[0].item()), moments[3:] / moments[0]
        share, unevenness = (moments[1:3] / moments[0]).tolist()
        products = self._products + self._pooled((self.mean - mean)[None]) * self.count
        torch.distributed.all_reduce(products)
        self.count, self.mean, self._products = total, mean, products
        self.taps = Taps(share, unevenness)

    def _pooled(self, rows: torch.Tensor) -> torch.Tensor:
        by_channel = rows.reshape(len(rows), -1, self.stride).transpose(1, 2).flatten(0, 1)
        return by_channel.t() @ by_channel

    @property
    def covariance(self) -> torch.Tensor:
        """Population covariance of the channels, shape ``(channels, channels)``."""
        return self._products / max(self.count * self.stride, 1)

    @property
    def variance(self) -> torch.Tensor:
        """Population variance of each input index, shape ``(channels * stride,)``."""
        return self.covariance.diagonal().repeat_interleave(self.stride)


def find_readers(model: nn.Module, groups: Sequence[PruningGroup]) -> list[Reader]:
    """The readers of the given groups, each once."""
    modules = dict(model.named_modules())
    owners: dict[tuple[str, str], IntArray] = {}
    first = 0
    for group in groups:
        for member in group.members:
            if is_reading(modules, member):
                ids = owners.setdefault((member.module, member.slot), np.full(len(member.owner), -1, dtype=np.int64))
                ids[member.owner >= 0] = member.owner[member.owner >= 0] + first
        first += group.num_channels
    return [
        Reader(name, slot, _stride(ids) if isinstance(modules[name], nn.Linear) else 1)
        for (name, slot), ids in owners.items()
    ]


def _stride(ids: IntArray) -> int:
    """Length of the equal blocks of one channel that a slot consists of."""
    changes = np.flatnonzero(np.diff(ids)) + 1
    return int(np.gcd.reduce(np.append(changes, len(ids))))


def is_reading(modules: Mapping[str, nn.Module], member: Member) -> bool:
    """Whether the member is the input of a layer that mixes channels."""
    module = modules.get(member.module)
    return isinstance(module, nn.MultiheadAttention) or (
        isinstance(module, (nn.Linear, _ConvNd)) and member.slot == "in"
    )


def collect_statistics(
    model: nn.Module, readers: Sequence[Reader], steps: Sequence[Callable[[], Any]], *, with_windows: bool = True
) -> dict[str, InputStatistics]:
    """Run the model on the calibration batches and record what its readers see.

    Args:
        model: The model.
        readers: Layers to watch.
        steps: One function per batch that runs the model on it.
        with_windows: Whether anybody will want the statistics of windows.

    Returns:
        Statistics by module name, over all processes; readers that did not run are missing.
    """
    found: dict[str, InputStatistics] = {}
    strides = {reader.name: reader.stride for reader in readers}

    def add(name: str, source: torch.Tensor) -> None:
        module = model.get_submodule(name)
        known = found.setdefault(name, InputStatistics(strides[name]))
        known.add(as_rows(module, source), taps_of(module, source))
        if with_windows and has_windows(module, strides[name]):
            known.windows = known.windows or InputStatistics()
            known.windows.add(windows(module, source, most_rows(features_of(module))))

    with watch_inputs(model, list(strides), add), torch.no_grad():
        for step in steps:
            step()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for name in sorted(found):
            found[name].all_reduce()
    return found


def reads_one_row(module: nn.Module, stride: int = 1) -> bool:
    """Whether each output of the layer reads one row of its input, as :func:`as_rows` gives them, and all are read."""
    if not isinstance(module, _ConvNd):
        return stride == 1
    around: Any = module.padding  # a word pads a kernel of one tap by nothing
    padded = isinstance(around, tuple) and any(around)
    return not padded and math.prod(module.kernel_size) == math.prod(module.stride) == 1


def has_windows(module: nn.Module, stride: int = 1) -> bool:
    """Whether the layer's outputs read more than one row each, and not too much to take its covariance."""
    if not isinstance(module, (nn.Linear, _ConvNd)) or reads_one_row(module, stride):
        return False
    if isinstance(module, _ConvNd) and module.groups == module.in_channels > 1:
        return False  # an output reads one channel: there is nothing to predict it from
    return features_of(module) <= MAX_FEATURES


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor, in place, over the processes of the default group; alone, it stays as it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


@contextmanager
def watch_inputs(model: nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``see(name, source)`` for each input of the named layers while the block runs the model."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_calls(
    model: nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, source, output)`` after each call of the named layers while the block runs the model."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_rows(module: nn.Module, source: torch.Tensor) -> torch.Tensor:
    """Lay a layer's input out as ``(observations, channels)``: positions of a convolution are observations."""
    if isinstance(module, _ConvNd):
        channel = source.ndim - len(module.kernel_size) - 1
        return source.movedim(channel, -1).reshape(-1, module.in_channels)
    return source.reshape(-1, source.shape[-1])


def taps_of(module: nn.Module, source: torch.Tensor) -> Taps:
    """Count the taps of a convolution's kernel that fall on an input of this size; other layers have one."""
    if not isinstance(module, _ConvNd) or module.padding_mode != "zeros":
        return Taps()
    dims = len(module.kernel_size)
    ones = torch.ones(1, 1, *source.shape[-dims:])
    kernel = torch.ones(1, 1, *module.kernel_size)
    stride, dilation = module.stride, module.dilation
    padding: Any = module.padding  # also "same"
    if isinstance(module, _ConvTransposeNd):
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        fallen = transposed(ones, kernel, None, stride, padding, module.output_padding, 1, dilation)
    else:
        fallen = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](ones, kernel, None, stride, padding, dilation)
    mean = float(fallen.mean())
    return Taps(mean / kernel.numel(), float(fallen.var(correction=0)) / mean) if mean else Taps()


def in_double(rows: torch.Tensor) -> torch.Tensor:
    """Observations in double precision, with zeros for what is not finite in single precision: squares are then."""
    device = rows.device if rows.device.type != "mps" else torch.device("cpu")  # no double precision there
    rows = rows.detach().to(device, torch.float64)
    return torch.where(rows.abs() <= torch.finfo(torch.float32).max, rows, 0.0)


def reading_weight(module: nn.Module) -> torch.Tensor:
    """The weights that read each input channel, shape ``(channels, ...)``."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight.detach().t()
    weight = module.get_parameter("weight").detach()
    if isinstance(module, _ConvTransposeNd):
        return weight
    if isinstance(module, _ConvNd) and module.groups > 1:
        grouped = weight.reshape(module.groups, -1, *weight.shape[1:])  # (groups, out / groups, in / groups, ...)
        return grouped.transpose(1, 2).flatten(0, 1)
    return weight.transpose(0, 1)
