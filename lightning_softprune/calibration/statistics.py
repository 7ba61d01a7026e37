"""Means and covariances of what readers see, streamed in double precision while the dense model runs.

There is one mean per input index and one covariance per channel pair, whatever the number of samples. Positions of a
convolution are observations. A linear layer behind a flatten has ``stride`` input indices per channel; they keep their
own means and share one covariance. Where an output reads several positions of a channel, those of unfolded inputs are
taken as well (`unfold`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_softprune.calibration.readers import Reader, watch_inputs, weight_geometry
from lightning_softprune.calibration.unfold import MAX_FEATURES, most_rows, unfold_inputs
from lightning_softprune.graph import Kernel
from lightning_softprune.utilities.distributed import in_process_group, sum_over_processes


@dataclass(frozen=True)
class KernelCoverage:
    """How many positions of a convolution's kernel fall on the input, at one output position and another.

    At the borders some fall on the padding; where a transposed convolution takes steps, most fall between the inputs.

    Attributes:
        share: The mean number, as a fraction of the kernel's positions.
        unevenness: Variance of the number over its mean; 0 if it is the same at every output position.
    """

    share: float = 1.0
    unevenness: float = 0.0

    def mixed(self, other: KernelCoverage, weight: float) -> KernelCoverage:
        """The average, with this weight on the other."""
        return KernelCoverage(
            self.share + weight * (other.share - self.share),
            self.unevenness + weight * (other.unevenness - self.unevenness),
        )


class InputStatistics:
    """Streaming mean and covariance of a layer's input (Chan et al. 1979), in double precision.

    Attributes:
        count: Observations so far.
        mean: Mean of each input index, shape ``(channels * stride,)``.
        coverage: How many of a kernel's positions fall on the input and not beside it, averaged.
        unfolded: The same of all that one output reads, for layers whose outputs read more than one row of channels
            and not too many numbers.
    """

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride
        self.count = 0
        self.coverage = KernelCoverage()
        self.unfolded: InputStatistics | None = None
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: torch.Tensor, positions: KernelCoverage | None = None) -> None:
        """Add observations; what is not finite in single precision counts as zero.

        Args:
            rows: Shape ``(observations, channels * stride)``.
            positions: For a convolution, what its kernel met; default: every position fell on the input.
        """
        rows = in_double(rows)
        n = len(rows)
        if n == 0:
            return
        self.coverage = self.coverage.mixed(positions or KernelCoverage(), n / (self.count + n))
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
        if self.unfolded is not None:
            self.unfolded.all_reduce()
        if self.count == 0:
            return
        device = self.mean.device
        known = torch.tensor([1.0, self.coverage.share, self.coverage.unevenness], dtype=torch.float64, device=device)
        moments = self.count * torch.cat([known, self.mean])
        sum_over_processes(moments)
        total, mean = int(moments[0].item()), moments[3:] / moments[0]
        share, unevenness = (moments[1:3] / moments[0]).tolist()
        products = self._products + self._pooled((self.mean - mean)[None]) * self.count
        sum_over_processes(products)
        self.count, self.mean, self._products = total, mean, products
        self.coverage = KernelCoverage(share, unevenness)

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


def collect_statistics(
    model: nn.Module, readers: Sequence[Reader], steps: Sequence[Callable[[], Any]], *, with_unfolded: bool = True
) -> dict[str, InputStatistics]:
    """Run the model on the calibration batches and record what its readers see.

    Args:
        model: The model.
        readers: Layers to watch.
        steps: One function per batch that runs the model on it.
        with_unfolded: Whether anybody will want the statistics of unfolded inputs.

    Returns:
        Statistics by module name, over all processes; readers that did not run are missing.
    """
    found: dict[str, InputStatistics] = {}
    strides = {reader.name: reader.stride for reader in readers}

    def add(name: str, source: torch.Tensor) -> None:
        layer = model.get_submodule(name)
        geometry = weight_geometry(layer)
        known = found.setdefault(name, InputStatistics(strides[name]))
        known.add(geometry.as_rows(source), kernel_coverage(geometry.kernel, source))
        if with_unfolded and has_unfolded_rows(layer, strides[name]):
            known.unfolded = known.unfolded or InputStatistics()
            known.unfolded.add(unfold_inputs(geometry, source, most_rows(geometry.features)))

    with watch_inputs(model, list(strides), add), torch.no_grad():
        for step in steps:
            step()
    if in_process_group():
        for name in sorted(found):
            found[name].all_reduce()
    return found


def has_unfolded_rows(layer: nn.Module, stride: int = 1) -> bool:
    """Whether the layer's outputs read more than one row each, and not too much to take its covariance."""
    geometry = weight_geometry(layer)
    if not geometry.is_whole or geometry.reads_one_row(stride):
        return False
    if geometry.groups == geometry.inputs > 1:
        return False  # an output reads one channel: there is nothing to predict it from
    return geometry.features <= MAX_FEATURES


def kernel_coverage(kernel: Kernel | None, source: torch.Tensor) -> KernelCoverage:
    """Count the positions of a kernel that fall on an input of this size; without one it is always one position."""
    if kernel is None or kernel.padding_mode != "zeros":
        return KernelCoverage()
    dims = len(kernel.size)
    ones, weight = torch.ones(1, 1, *source.shape[-dims:]), torch.ones(1, 1, *kernel.size)
    stride, dilation = kernel.stride, kernel.dilation
    padding: Any = kernel.padding  # also "same"
    if kernel.transposed:
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        fallen = transposed(ones, weight, None, stride, padding, kernel.output_padding, 1, dilation)
    else:
        fallen = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](ones, weight, None, stride, padding, dilation)
    mean = float(fallen.mean())
    return KernelCoverage(mean / weight.numel(), float(fallen.var(correction=0)) / mean) if mean else KernelCoverage()


def in_double(rows: torch.Tensor) -> torch.Tensor:
    """Observations in double precision, with zeros for what is not finite in single precision: squares are then."""
    device = rows.device if rows.device.type != "mps" else torch.device("cpu")  # no double precision there
    rows = rows.detach().to(device, torch.float64)
    return torch.where(rows.abs() <= torch.finfo(torch.float32).max, rows, 0.0)
