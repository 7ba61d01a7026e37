"""Regressions: how one reader's removed inputs are predicted from its kept ones, and folded into its weights.

A reader computes ``W x + b``. With the features R of its input removed and K kept, the removed ones are predicted from
the kept ones by linear regression on calibration data (mean ``m``, covariance ``S``, ridge ``r``),

    x_R = m_R + B (x_K - m_K),    B = S_RK (S_KK + r I)^-1,

and the prediction is folded into the reader: ``W_K + W_R B`` and ``b + W_R (m_R - B m_K)``.

:class:`FeatureRegression` regresses all that an output reads (``calibration/unfold.py``): for a convolution every
channel at every position of the kernel, behind a flatten every channel at every position. No other linear map of what
is kept has a smaller error on the calibration data, up to the ridge. A grouped convolution has one regression per
group.

:class:`ChannelRegression` serves layers whose unfolded inputs are too wide for that: one regression over channels for
all positions. Where positions of the kernel fall beside the input (on zero padding; between the inputs of a transposed
convolution with steps), what the bias has to make up for differs from output to output. The bias gets the mean: its
term times the share of the positions that fall on the input, ``E n / positions``. The rest is an error of variance
``var n (m_R - B m_K)^2``, so the regression minimises it too: ``S`` becomes ``S + (var n / E n) m m^T``.

Plans of one ranking are nested. So ``S + r I = L L^T`` is factorised once per reader and round, with the most important
channels first: for a plan that keeps the first k features of them, ``B = L_RK L_KK^-1`` by blocks of that one factor.
Readers of several groups (behind a concatenation) are factorised per plan.

A reader that can have no bias has no intercept either: its moments are those about zero, ``m = 0`` and ``S = E x x^T``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_softprune.calibration import InputStatistics, KernelCoverage

RIDGE = 1e-4
"""Ridge of the regressions, as a fraction of the mean variance of a reader's inputs."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a reader's inputs; or, without `centred`, what they are about zero.

    Attributes:
        known: What was observed.
        centred: Whether the regressions have an intercept.
    """

    known: InputStatistics
    centred: bool

    @property
    def stride(self) -> int:
        """Consecutive input indices per channel."""
        return self.known.stride

    @property
    def mean(self) -> torch.Tensor:
        """Shape ``(channels * stride,)``; zeros about zero."""
        return self.known.mean if self.centred else torch.zeros_like(self.known.mean)

    @property
    def covariance(self) -> torch.Tensor:
        """Shape ``(channels, channels)``, made anew each time: it may be large."""
        covariance = self.known.covariance
        if not self.centred:
            means = self.known.mean.reshape(-1, self.stride)
            covariance.addmm_(means, means.t(), alpha=1 / self.stride)
        return covariance


def ridge_of(covariance: torch.Tensor, fraction: float = RIDGE) -> float:
    """The ridge for a covariance matrix; positive even if every channel is constant."""
    return max(fraction * float(covariance.diagonal().mean()), 1e-12)


def cholesky(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """Factorise ``matrix + ridge I``, with more ridge where rounding has made the matrix indefinite.

    The ridge is put into the matrix while it is factorised, and taken out again: a copy may be a gigabyte.
    """
    diagonal = matrix.diagonal().clone()
    try:
        while True:
            matrix.diagonal().copy_(diagonal + ridge)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                found: torch.Tensor = factor
                return found
            ridge = 10.0 * ridge or ridge_of(matrix, 1e-12)
    finally:
        matrix.diagonal().copy_(diagonal)


class OrderedCovariance:
    """A covariance matrix with its ridge, from which regressions of any part on any other part are solved.

    With an order, it is held as its one factor; without, as it is.
    """

    def __init__(self, covariance: torch.Tensor, order: torch.Tensor | None) -> None:
        self.ridge = ridge_of(covariance)
        self.order = order
        self.matrix = covariance
        if order is not None:
            self.matrix = cholesky(covariance[order[:, None], order], self.ridge)
            self.place = order.argsort()

    def predicted(self, left: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
        """``left S_RK (S_KK + r I)^-1``, shape ``(rows of left, kept)``; both index vectors are sorted."""
        if self.order is None:
            factor = cholesky(self.matrix[kept][:, kept], self.ridge)
            return torch.cholesky_solve((left @ self.matrix[removed][:, kept]).t(), factor).t()
        k = len(kept)
        first, last = self.order[:k], self.order[k:]
        if torch.equal(first.sort().values, kept):
            known = left[:, torch.searchsorted(removed, last)] @ self.matrix[k:, :k]
            solved: torch.Tensor = torch.linalg.solve_triangular(self.matrix[:k, :k], known, upper=False, left=False)
            return solved[:, self.place[kept]]
        rows, columns = self.matrix[self.place[removed]], self.matrix[self.place[kept]]
        covariance = columns @ columns.t()  # with the ridge
        return torch.cholesky_solve((left @ (rows @ columns.t())).t(), cholesky(covariance, 0.0)).t()


class FeatureRegression:
    """One regression of everything an output reads.

    Args:
        known: Moments of the reader's unfolded inputs; of its inputs, where an output reads one row of them.
        positions: Features per channel.
        order: Its channels, the last to go first, if its plans are nested.
        exact: Whether to predict; otherwise removed features are replaced by their means.
    """

    def __init__(self, known: Moments, positions: int, order: torch.Tensor | None, exact: bool) -> None:
        self.mean, self.centred = known.mean, known.centred
        self.covariance: OrderedCovariance | None = None
        if exact:
            if order is not None:
                order = (order[:, None] * positions + torch.arange(positions, device=order.device)).flatten()
            self.covariance = OrderedCovariance(known.covariance, order)

    def fold(self, weight: torch.Tensor, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold the removed inputs into the kept ones.

        Args:
            weight: Shape ``(groups, outputs per group, channels per group, positions)``, with the outputs pruned.
            stays: Which channels are kept, a mask of shape ``(groups * channels per group,)``.

        Returns:
            The weight for the kept inputs, and what to add to the bias, shape ``(outputs,)``.
        """
        groups, outputs, channels, positions = weight.shape
        of_groups = stays.reshape(groups, channels)
        folded, shifts = [], []
        for group, (rows, mask) in enumerate(
            zip(weight.flatten(2), of_groups.repeat_interleave(positions, 1), strict=True)
        ):
            inside = torch.arange(channels * positions, device=mask.device) + group * channels * positions
            kept, removed = inside[mask], inside[~mask]
            lost = rows[:, ~mask]
            shift = lost @ self.mean[removed]
            part = rows[:, mask]
            if self.covariance is not None and len(removed):
                added = self.covariance.predicted(lost, kept, removed)
                part, shift = part + added, shift - added @ self.mean[kept]
            folded.append(part.reshape(outputs, -1, positions))
            shifts.append(shift)
        return torch.stack(folded), torch.cat(shifts)


class ChannelRegression:
    """One regression over channels, for all positions of a kernel or of a flattened map.

    Args:
        known: Moments of the reader's inputs.
        coverage: How many of the kernel's positions fall on them.
        order: Its channels, the last to go first, if its plans are nested.
        exact: Whether to predict; otherwise removed channels are replaced by their means.
    """

    def __init__(self, known: Moments, coverage: KernelCoverage, order: torch.Tensor | None, exact: bool) -> None:
        self.coverage, self.centred = coverage, known.centred
        self.mean = known.mean.reshape(-1, known.stride)
        self.covariance: OrderedCovariance | None = None
        if exact:
            covariance = self.with_borders(known.covariance, known.mean, known.mean)
            self.covariance = OrderedCovariance(covariance, order)

    def with_borders(self, covariance: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Add to a covariance what the means contribute where a kernel's positions fall on the input unevenly."""
        if not self.coverage.unevenness:
            return covariance
        return covariance + self.coverage.unevenness * torch.outer(left, right)

    def coefficients(self, kept: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
        """``B``, shape ``(removed, kept)``; sorted indices of channels."""
        if self.covariance is None or not len(removed):
            return self.mean.new_zeros(len(removed), len(kept))
        one = torch.eye(len(removed), dtype=self.mean.dtype, device=self.mean.device)
        return self.covariance.predicted(one, kept, removed)

    def fold(self, weight: torch.Tensor, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`FeatureRegression.fold`."""
        groups, _, channels, _ = weight.shape
        folded, shifts = [], []
        for group, (part, mask) in enumerate(zip(weight, stays.reshape(groups, channels), strict=True)):
            inside = torch.arange(channels, device=mask.device) + group * channels
            kept, removed = inside[mask], inside[~mask]
            solution = self.coefficients(kept, removed)
            folded.append(part[:, mask] + torch.einsum("ort,rk->okt", part[:, ~mask], solution))
            missing = self.mean[removed] - solution @ self.mean[kept]
            shifts.append((part[:, ~mask] * missing).sum((1, 2)) * self.coverage.share)
        return torch.stack(folded), torch.cat(shifts)
