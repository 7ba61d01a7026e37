"""Means and covariances of what readers see, streamed while the dense model runs; sums are in double precision.

There is one mean per input index and one covariance per channel pair, whatever the number of samples. Positions of a
convolution are observations; where there are more than a regression can use, evenly spread ones (`unfold`). A linear
layer behind a flatten has ``stride`` input indices per channel; they keep their own means and share one covariance.
Where an output reads several positions of a channel, those of unfolded inputs are taken as well (`unfold`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_softprune.calibration.memory import unfolded_within
from lightning_softprune.calibration.positions import ReadPositions
from lightning_softprune.calibration.products import (
    BLOCK_ROWS,
    add_products,
    centred,
    mean_of,
    mirror,
    observations,
    sums_device,
)
from lightning_softprune.calibration.readers import Reader, watch_inputs, weight_geometry
from lightning_softprune.calibration.unfold import MAX_FEATURES, Scratch, rows_per_call, sampled_rows, unfold_inputs
from lightning_softprune.graph import Kernel
from lightning_softprune.utilities.distributed import (
    device_of_doubles,
    in_process_group,
    sum_numbers_over_processes,
    sum_over_processes,
)
from lightning_softprune.utilities.hooks import unwatched


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


@dataclass(frozen=True)
class Wanted:
    """What of the statistics somebody will want, besides means and variances.

    Attributes:
        unfolded: Those of all that one output reads.
        covariances: What the regressions and rankings by reconstruction are made of.
    """

    unfolded: bool = True
    covariances: bool = True

    @classmethod
    def by(cls, importance: object, compensation: str) -> Wanted | None:
        """What a ranking and a compensation want; `None`: nothing at all."""
        reconstructs, solves = importance == "reconstruction", compensation == "least_squares"
        if compensation == "none" and importance != "activation" and not reconstructs:
            return None
        return cls(unfolded=compensation != "none", covariances=reconstructs or solves)


class InputStatistics:
    """Streaming mean and covariance of a layer's input (Chan et al. 1979), summed in double precision (`products`).

    Attributes:
        count: Observations so far.
        mean: Mean of each input index, shape ``(channels * stride,)``.
        coverage: How many of a kernel's positions fall on the input and not beside it, averaged.
        unfolded: The same of all that one output reads, for layers whose outputs read more than one row of channels
            and not too many numbers.

    Args:
        stride: Consecutive input indices per channel.
        covariances: Whether to know more than variances: a matrix of channels by channels.
    """

    def __init__(self, stride: int = 1, *, covariances: bool = True) -> None:
        self.stride, self._with_covariances = stride, covariances
        self.count = 0
        self.coverage = KernelCoverage()
        self.unfolded: InputStatistics | None = None
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: torch.Tensor, positions: KernelCoverage | None = None) -> None:
        """Add observations; what is not finite, or beyond `products.LARGEST`, counts as zero.

        Args:
            rows: Shape ``(observations, channels * stride)``.
            positions: For a convolution, what its kernel met; default: every position fell on the input.
        """
        if not len(rows):
            return
        self.coverage = self.coverage.mixed(positions or KernelCoverage(), len(rows) / (self.count + len(rows)))
        rows = observations(rows)
        for start in range(0, len(rows), BLOCK_ROWS):
            self._add_block(rows[start : start + BLOCK_ROWS])

    def _add_block(self, rows: torch.Tensor) -> None:
        n, mean = len(rows), mean_of(rows)
        if self.count == 0:
            self._begin(mean)
        total, delta = self.count + n, mean - self.mean
        about = rows.new_empty(n + 1, rows.shape[1])
        centred(rows, mean, out=about[:n])
        # what the distance between the means adds is one observation more, not one more walk through the matrix
        about[n] = (delta * (self.count * n / total) ** 0.5).to(rows)
        observed = self._pooled_rows(about)
        if self._with_covariances:
            add_products(self._products, observed)
        else:
            self._products += observed.to(self._products).square_().sum(0)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    def _begin(self, mean: torch.Tensor) -> None:
        self.mean = mean
        width = len(mean) // self.stride
        self._products = mean.new_zeros([width] * (2 if self._with_covariances else 1))

    def widen(self, width: int, device: torch.device) -> None:
        """Get ready to be merged with those of other processes, which have observations of so many numbers."""
        if not len(self.mean):
            self._begin(torch.zeros(width, dtype=torch.float64, device=device_of_doubles(device)))

    def all_reduce(self) -> None:
        """Merge the observations of all processes of the default process group, so that every one has the same.

        Where this process has none, and others do, see :meth:`widen`.
        """
        if self.unfolded is not None:
            self.unfolded.all_reduce()
        if not len(self.mean):
            return
        device = self.mean.device
        known = torch.tensor([1.0, self.coverage.share, self.coverage.unevenness], dtype=torch.float64, device=device)
        moments = self.count * torch.cat([known, self.mean])
        sum_over_processes(moments)
        total, mean = int(moments[0].item()), moments[3:] / moments[0]
        share, unevenness = (moments[1:3] / moments[0]).tolist()
        between = self._pooled_rows((self.mean - mean)[None])
        product = between.t() @ between if self._with_covariances else between.square().sum(0)
        products = self._products + self.count * product
        sum_over_processes(products)
        self.count, self.mean, self._products = total, mean, products
        self.coverage = KernelCoverage(share, unevenness)

    def _pooled_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Every position of a channel is an observation of it."""
        if self.stride == 1:
            return rows
        return rows.reshape(len(rows), -1, self.stride).transpose(1, 2).flatten(0, 1)

    @property
    def covariance(self) -> torch.Tensor:
        """Population covariance of the channels, shape ``(channels, channels)``, made anew each time."""
        if not self._with_covariances:
            raise RuntimeError("of these statistics, nobody wanted the covariances")
        return mirror(self._products.clone()).div_(max(self.count * self.stride, 1))

    @property
    def variance(self) -> torch.Tensor:
        """Population variance of each input index, shape ``(channels * stride,)``."""
        sums = self._products.diagonal() if self._with_covariances else self._products
        variance = sums / max(self.count * self.stride, 1)
        return variance.repeat_interleave(self.stride)


def collect_statistics(
    model: nn.Module,
    readers: Sequence[Reader],
    steps: Sequence[Callable[[], Any]],
    *,
    wanted: Wanted = Wanted(),
    budget: float | None = None,
    positions: ReadPositions = ReadPositions(),  # noqa: B008 - nobody writes it
) -> dict[str, InputStatistics]:
    """Run the model on the calibration batches and record what its readers see.

    Args:
        model: The model.
        readers: Layers to watch.
        steps: One function per batch that runs the model on it.
        wanted: What anybody will want of them.
        budget: Bytes that statistics and the regressions made of them may take (`memory`); `None`: no limit.
        positions: Where observations count.

    Returns:
        Statistics by module name, over all processes; readers that ran on none of them are missing.
    """
    wide = unfolded_readers(model, readers, wanted, budget)

    def fresh() -> dict[str, InputStatistics]:
        made = {reader.name: InputStatistics(reader.stride, covariances=wanted.covariances) for reader in readers}
        for name in wide:
            made[name].unfolded = InputStatistics(covariances=wanted.covariances)
        return made

    if in_process_group():  # nor are there shared ones: which would share could differ from process to process
        _collected(model, made := fresh(), steps, positions, alike=None)
        return _merged(made, next(model.parameters()).device)
    try:
        return _collected(model, fresh(), steps, positions, alike=_Alike())
    except _NoLongerAlikeError:
        return _collected(model, fresh(), steps, positions, alike=None)


def _merged(own: Mapping[str, InputStatistics], device: torch.device) -> dict[str, InputStatistics]:
    """Those of all processes together, of the readers that ran on any of them."""
    parts = [part for known in own.values() for part in (known, known.unfolded) if part is not None]
    told = [number for part in parts for number in (float(part.count > 0), float(len(part.mean)))]
    totals = iter(sum_numbers_over_processes(told, device))
    for part, ran, width in zip(parts, totals, totals, strict=True):
        if ran:
            part.widen(round(width / ran), device)
    for name in sorted(own):
        own[name].all_reduce()
    return {name: known for name, known in own.items() if known.count}


def unfolded_readers(
    model: nn.Module, readers: Sequence[Reader], wanted: Wanted = Wanted(), budget: float | None = None
) -> list[str]:
    """Names of those of whose unfolded inputs there will be statistics; see :func:`collect_statistics`."""
    wide = [reader.name for reader in readers if has_unfolded_rows(model.get_submodule(reader.name), reader.stride)]
    return unfolded_within(model, readers, wide if wanted.unfolded else [], budget if wanted.covariances else None)


def seen_by_twins(statistics: Mapping[str, InputStatistics], twins: Mapping[str, str]) -> dict[str, InputStatistics]:
    """The statistics, with those of twins: one that did not run sees what its original sees.

    Args:
        statistics: By module name.
        twins: Module name -> the module that it mirrors.
    """
    found = dict(statistics)
    for twin, original in twins.items():
        inside = {name: known for name, known in found.items() if name.startswith(f"{original}.")}
        found = {twin + name[len(original) :]: known for name, known in inside.items()} | found
    return found


def _collected(
    model: nn.Module,
    fresh: Mapping[str, InputStatistics],
    steps: Sequence[Callable[[], Any]],
    positions: ReadPositions,
    *,
    alike: _Alike | None,
) -> dict[str, InputStatistics]:
    """Those of the readers that ran, or of readers that were given the same."""
    found: dict[str, InputStatistics] = {}
    calls, scratch = len(steps), Scratch()

    @unwatched()
    def add(name: str, source: torch.Tensor) -> None:
        geometry = weight_geometry(model.get_submodule(name))
        known = fresh[name]
        what = (geometry.inputs, geometry.kernel, known.stride, known.unfolded is not None, positions.key(name))
        if alike is not None and alike.is_known(name, source, what):
            return
        source = positions.of(name, source)
        found[name] = known
        rows = sampled_rows(geometry, source, rows_per_call(geometry.inputs, calls))
        known.add(rows, kernel_coverage(geometry.kernel, source))
        if known.unfolded is not None:
            known.unfolded.add(unfold_inputs(geometry, source, rows_per_call(geometry.features, calls), scratch))

    with watch_inputs(model, list(fresh), add), torch.no_grad():
        for step in steps:
            step()
    return found if alike is None else found | alike.shared(found)


class _NoLongerAlikeError(Exception):
    """Layers that read the same tensors in their first calls do not in later ones."""


class _Alike:
    """Layers that are given the same tensors in the same way: queries, keys and values share their statistics."""

    def __init__(self) -> None:
        self.last: dict[Any, tuple[weakref.ref[torch.Tensor], int, str]] = {}
        self.leader: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    def is_known(self, name: str, source: torch.Tensor, what: Any) -> bool:
        """Whether another layer has seen this input of this layer, as it has all inputs before."""
        self.calls[name] += 1
        version = None if source.is_inference() else source._version
        seen, version_seen, leader = self.last.get(what, (None, None, ""))
        same = (
            seen is not None
            and version is not None
            and seen() is source
            and version == version_seen
            and leader != name
            and self.calls[leader] == self.calls[name]
        )
        if name in self.leader:
            if not same or self.leader[name] != leader:
                raise _NoLongerAlikeError
            return True
        if same and self.calls[name] == 1:
            self.leader[name] = leader
            return True
        if version is not None:
            self.last[what] = (weakref.ref(source), version, name)
        return False

    def shared(self, found: dict[str, InputStatistics]) -> dict[str, InputStatistics]:
        """The statistics of those that have none of their own."""
        if any(self.calls[name] != self.calls[leader] for name, leader in self.leader.items()):
            raise _NoLongerAlikeError
        return {name: found[leader] for name, leader in self.leader.items()}


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
    rows = rows.detach().to(sums_device(rows), torch.float64)
    return torch.where(rows.abs() <= torch.finfo(torch.float32).max, rows, 0.0)
