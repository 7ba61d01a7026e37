"""Backward elimination: the channels of a group in the order in which their readers can do without them.

The channel goes next without which the readers' outputs, rebuilt by least squares from all that are left, miss least.
That is asked of a reader's inputs alone: ``P`` is the inverse of their covariance and ``G = M M^T``, with ``M`` the
weights that read them. Without the inputs B of a channel the outputs miss ``tr((P_BB)^-1 G_BB)`` of their variance;
once they are gone, the others stand for them: ``P -= A P_B`` with ``A = P_:B (P_BB)^-1``, and ``M -= A M_B``. A channel
has several inputs where it is a head, and where an output reads it at several positions (of a kernel, of a flattened
map); where these are too many, or not known, each position is an output of its own.

To look at a large matrix for every channel would take long: channels go one by one among the few that cost least, and
half of these are gone before the others are looked at again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_softprune.calibration.readers import is_mixing, is_reading, reading_weight, weight_geometry
from lightning_softprune.calibration.statistics import InputStatistics
from lightning_softprune.graph import Member, PruningGroup
from lightning_softprune.utilities.arrays import FloatArray, IntArray

_RIDGE = 0.01
"""What is added to every input's variance, as a fraction of their mean: few samples make predictions look better."""

_WIDEST = 1536
"""Inputs of a reader up to which a group's order is found this way by default: it takes as their third power."""

_WIDEST_WINDOW = 1152
"""Numbers that an output reads up to which positions are told apart: 128 channels under a kernel of 3 x 3."""

_CANDIDATES = 64
"""Channels that go one by one until half of them are left; a quarter as many where channels have several inputs."""


def is_eliminated(modules: Mapping[str, nn.Module], group: PruningGroup) -> bool:
    """Whether the group's channels are ranked by elimination where nobody says how.

    They are not where a reader is too wide, and where several layers add to the channels and several read them: in
    such a stream every layer works with what others leave in it, and no reader by itself tells what a channel is for.
    """
    readers = [member for member in group.members if is_reading(modules, member)]
    making = {member.module for member in group.members if is_mixing(modules, member)}
    reading = {member.module for member in readers}
    return max((len(member.owner) for member in readers), default=0) <= _WIDEST and min(len(making), len(reading)) < 2


def eliminate(
    modules: Mapping[str, nn.Module],
    group: PruningGroup,
    strides: Mapping[tuple[str, str], int],
    statistics: Mapping[str, InputStatistics],
) -> IntArray:
    """The group's channels in the order in which they go.

    Args:
        modules: The dense model's, by name.
        group: One of its groups.
        strides: Consecutive input indices per channel, by reader and slot.
        statistics: What its readers see.

    Returns:
        A permutation of ``range(num_channels)``; empty if nothing reads the group.
    """
    heads = _holds_heads(modules, group)
    readers = [
        _Reads.by(member, modules[member.module], strides[member.module, member.slot], known, heads)
        for member in group.members
        if is_reading(modules, member) and (known := statistics.get(member.module)) is not None
    ]
    order = np.zeros(0, dtype=np.int64)
    left = np.full(group.num_channels, bool(readers))
    few = _CANDIDATES if all(len(reader.owner) <= len(left) for reader in readers) else _CANDIDATES // 4
    while left.any():
        candidates = _cheapest(readers, left)[:few]
        going = len(candidates) if left.sum() <= few else len(candidates) // 2
        gone = _one_by_one([reader.among(candidates) for reader in readers], candidates, going, len(left))
        order, left[gone] = np.concatenate([order, gone]), False
        if left.any():
            for reader in readers:
                reader.remove(gone)
            readers = [reader.among(np.flatnonzero(left)) for reader in readers]
    return order


def _one_by_one(readers: Sequence[_Reads], candidates: IntArray, going: int, num_channels: int) -> IntArray:
    """The first candidates to go, where all are looked at anew once one is gone."""
    gone = np.zeros(going, dtype=np.int64)
    left = np.zeros(num_channels, dtype=bool)
    left[candidates] = True
    for turn in range(going):
        gone[turn : turn + 1] = _cheapest(readers, left)[:1]
        left[gone[turn]] = False
        for reader in readers:
            reader.remove(gone[turn : turn + 1])
    return gone


def _cheapest(readers: Sequence[_Reads], left: NDArray[np.bool_]) -> IntArray:
    """The channels that are left, those first without which all readers' outputs miss least."""
    costs = np.sum([reader.costs(len(left)) for reader in readers], axis=0)
    return np.argsort(np.where(left, costs, np.inf), kind="stable")[: left.sum()]


def _holds_heads(modules: Mapping[str, nn.Module], group: PruningGroup) -> bool:
    """Whether the layers that produce a channel do so at several indices; positions behind a flatten have one."""
    made = [member.owner[member.owner >= 0] for member in group.members if not is_reading(modules, member)]
    return any(len(owner) > group.num_channels for owner in made)


class _Reads:
    """How one reader's outputs depend on its inputs, of which some may be gone.

    Args:
        owner: The channel of each input.
        precision: ``P``; for inputs that are gone, one of their own that depends on no other. It is overwritten.
        gram: ``G``; zero for them. It is overwritten.
    """

    def __init__(self, owner: IntArray, precision: FloatArray, gram: FloatArray) -> None:
        self.owner, self.precision, self.gram = owner, precision, gram
        channels, counts = np.unique(owner, return_counts=True)
        order, starts = np.argsort(owner, kind="stable"), np.cumsum(counts) - counts
        self._blocks = [  # channels that have equally many inputs, and these
            (channels[counts == size], order[starts[counts == size][:, None] + np.arange(size)])
            for size in np.unique(counts)
        ]

    @classmethod
    def by(cls, member: Member, layer: nn.Module, stride: int, known: InputStatistics, heads: bool) -> _Reads:
        """How a reader depends on what it reads of a group; what it reads of other groups stays.

        Args:
            member: The reader in the group.
            layer: The reader.
            stride: Its consecutive input indices per channel.
            known: What it sees.
            heads: Whether channels are heads.
        """
        geometry, weight, owner = weight_geometry(layer), reading_weight(layer), member.owner
        told_apart = geometry.features <= _WIDEST_WINDOW or (heads and geometry.kernel is None)
        if known.unfolded is None or geometry.groups > 1 or not told_apart:
            owner = owner[::stride]
        else:
            known = known.unfolded
            if geometry.kernel is not None:
                weight = weight.flatten(2).transpose(1, 2)
                owner = np.repeat(owner, weight.shape[1])
        covariance = known.covariance
        weight = weight.reshape(len(owner), -1).to(covariance).nan_to_num(0.0, 0.0, 0.0)
        gram = weight @ weight.t()
        if geometry.groups > 1:  # no output of a grouped layer reads inputs of two parts
            part = torch.arange(len(gram), device=gram.device) // (len(gram) // geometry.groups)
            together = part[:, None] == part
            gram, covariance = gram * together, covariance * together
        covariance.diagonal().add_(max(_RIDGE * float(covariance.diagonal().mean()), 1e-12))
        precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        return cls(owner, precision.cpu().numpy(), gram.cpu().numpy()).among(np.unique(owner[owner >= 0]))

    def among(self, channels: IntArray) -> _Reads:
        """What concerns these channels alone; a copy."""
        at = self._inputs_of(channels)
        return _Reads(self.owner[at], self.precision[np.ix_(at, at)], self.gram[np.ix_(at, at)])

    def costs(self, num_channels: int) -> FloatArray:
        """Variance that the outputs miss without each channel, shape ``(num_channels,)``; 0 for those not read."""
        costs = np.zeros(num_channels)
        for channels, at in self._blocks:
            if at.shape[1] == 1:
                costs[channels] = self.gram.diagonal()[at[:, 0]] / self.precision.diagonal()[at[:, 0]]
            else:
                precision, gram = (matrix[at[:, :, None], at[:, None, :]] for matrix in (self.precision, self.gram))
                costs[channels] = np.trace(np.linalg.solve(precision, gram), axis1=1, axis2=2)
        return costs

    def remove(self, channels: IntArray) -> None:
        """Let the inputs that are left stand for those of these channels."""
        at = self._inputs_of(channels)
        columns, read = self.precision[:, at], self.gram[:, at]
        inside = columns[at]
        stands = columns / inside if len(at) == 1 else np.linalg.solve(inside, columns.T).T
        # on both sides: what would be taken off twice is given back by half on each
        read -= 0.5 * stands @ read[at]
        taken = stands @ read.T
        self.gram -= taken
        self.gram -= taken.T
        self.precision -= stands @ columns.T
        for matrix in (self.precision, self.gram):
            matrix[at], matrix[:, at] = 0.0, 0.0
        self.precision[at, at] = 1.0

    def _inputs_of(self, channels: IntArray) -> IntArray:
        if len(channels) == 1:
            return np.flatnonzero(self.owner == channels[0])
        return np.flatnonzero(np.isin(self.owner, channels))
