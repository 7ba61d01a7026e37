"""Calibration: what the layers that read a group's channels see, as means and covariances.

A *reader* is a linear, convolution or attention layer with a group's channels at its input. Its statistics are taken
while the dense model runs on a few training batches, streamed in double precision: one mean per input index and one
covariance per channel pair, whatever the number of samples. Positions of a convolution are observations. A linear
layer behind a flatten has ``stride`` input indices per channel; they keep their own means and share one covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_softprune.groups import Member, PruningGroup

__all__ = [
    "InputStatistics",
    "Reader",
    "as_rows",
    "collect_statistics",
    "find_readers",
    "in_double",
    "reading_weight",
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


class InputStatistics:
    """Streaming mean and covariance of a layer's input (Chan et al. 1979), in double precision.

    Attributes:
        count: Observations so far.
        mean: Mean of each input index, shape ``(channels * stride,)``.
    """

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Add observations; what is not finite in single precision counts as zero.

        Args:
            rows: Shape ``(observations, channels * stride)``.
        """
        rows = in_double(rows)
        n = len(rows)
        if n == 0:
            return
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
        if self.count == 0:
            return
        device = self.mean.device
        moments = torch.cat(
            [torch.tensor([float(self.count)], dtype=torch.float64, device=device), self.count * self.mean]
        )
        torch.distributed.all_reduce(moments)
        total, mean = int(moments[0].item()), moments[1:] / moments[0]
        products = self._products + self._pooled((self.mean - mean)[None]) * self.count
        torch.distributed.all_reduce(products)
        self.count, self.mean, self._products = total, mean, products

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
    model: nn.Module, readers: Sequence[Reader], steps: Sequence[Callable[[], Any]]
) -> dict[str, InputStatistics]:
    """Run the model on the calibration batches and record what its readers see.

    Args:
        model: The model.
        readers: Layers to watch.
        steps: One function per batch that runs the model on it.

    Returns:
        Statistics by module name, over all processes; readers that did not run are missing.
    """
    found: dict[str, InputStatistics] = {}
    strides = {reader.name: reader.stride for reader in readers}

    def add(name: str, rows: torch.Tensor) -> None:
        found.setdefault(name, InputStatistics(strides[name])).add(rows)

    with watch_inputs(model, list(strides), add), torch.no_grad():
        for step in steps:
            step()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for name in sorted(found):
            found[name].all_reduce()
    return found


@contextmanager
def watch_inputs(model: nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``see(name, rows)`` for each input of the named layers while the block runs the model."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            source = args[0] if args else next(iter(kwargs.values()))
            see(name, as_rows(module, source))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in names]
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
