"""Compensation: what the readers of removed channels do to make up for them, in closed form.

Each layer that reads channels of a group predicts the removed ones from those it keeps, by a linear regression on
calibration data, and takes the prediction into its own weights and bias (``regression.py``). ``"bias"`` replaces
removed channels by their means. Queries make up for lost dimensions of heads (``logits.py``). Nothing is trained. The
committed plan is refitted once more (``refit.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_softprune.calibration import InputStatistics, Reader, ReadPositions, find_readers
from lightning_softprune.compensation.intercepts import Intercepts
from lightning_softprune.compensation.logits import LogitFits
from lightning_softprune.compensation.regression import ChannelRegression, FeatureRegression, Moments
from lightning_softprune.compensation.weights import PrunedWeight
from lightning_softprune.graph import (
    PruningGroup,
    WeightGeometry,
    computed_of,
    geometry_of,
    layer_type,
    takes_bias,
    weight_of,
    write_weight,
)
from lightning_softprune.surgery import Surgery
from lightning_softprune.utilities.arrays import IntArray

COMPENSATIONS = ("none", "bias", "least_squares")


class Compensation:
    """Folds predictions of removed channels into their readers.

    Args:
        mode: One of :data:`COMPENSATIONS`.
        model: The dense model.
        groups: Its prunable groups.
        rankings: The order in which each group's channels go; the first is removed first.
        statistics: What the readers see, by module name.
        intercepts: Which readers without a bias are to get none.

    Attributes:
        logits: What queries do to make up for lost dimensions of heads; nothing until it is set.
        positions: Where readers are fitted; everywhere until it is set.
    """

    def __init__(
        self,
        mode: str,
        model: nn.Module,
        groups: Sequence[PruningGroup],
        rankings: Sequence[IntArray],
        statistics: Mapping[str, InputStatistics],
        intercepts: Intercepts = Intercepts(),  # noqa: B008 - frozen
    ) -> None:
        self.mode = mode
        self.logits = LogitFits()
        self.positions = ReadPositions()
        self._regressions: dict[str, FeatureRegression | ChannelRegression] = {}
        self._readers: dict[str, Reader] = {}
        self._without_bias: list[str] = []
        self._intercepts = intercepts
        if mode == "none":
            return
        shared = _shared_parameters(model)
        made: dict[tuple[Any, ...], FeatureRegression | ChannelRegression] = {}
        for reader in find_readers(model, groups):
            layer, known = model.get_submodule(reader.name), statistics.get(reader.name)
            geometry = _changeable_weight(layer, shared)
            if known is None or geometry is None:
                continue
            order = _keep_order(reader, groups, rankings) if geometry.groups == 1 else None
            self._readers[reader.name] = reader
            lacks = layer._parameters.get(geometry.bias) is None and reader.name not in intercepts.norms
            centred = reader.name not in intercepts.refused and (takes_bias(layer) or not lacks)
            ways = (geometry.positions(reader.stride), geometry.reads_one_row(reader.stride), centred)
            key = (id(known), *ways, None if order is None else order.tobytes())
            if key not in made:  # queries, keys and values have one
                moments = Moments(known.unfolded or known, centred)
                made[key] = _regression(mode, geometry, known, moments, order)
            self._regressions[reader.name] = made[key]
            if lacks and centred:
                self._without_bias.append(reader.name)

    @property
    def readers(self) -> list[str]:
        """Names of the layers that are compensated for."""
        return list(self._readers)

    @property
    def new_biases(self) -> list[str]:
        """Those among them that get a bias with the first channel that their input loses."""
        return list(self._without_bias)

    def regression(self, name: str) -> FeatureRegression | ChannelRegression:
        """The regression of one of them."""
        return self._regressions[name]

    def stride(self, name: str) -> int:
        """Consecutive input indices per channel of one of them."""
        return self._readers[name].stride

    def apply(self, model: nn.Module, surgery: Surgery) -> None:
        """Fold the predictions into the pruned model's readers, in place.

        Args:
            model: The model after ``surgery``.
            surgery: What was removed. Biases that had to be created are added to its record.
        """
        for name, regression in self._regressions.items():
            layer = model.get_submodule(name)
            pruned = PrunedWeight.of(layer, name, self.stride(name), surgery)
            if pruned is None:
                continue
            with torch.no_grad():
                rows = pruned.rows().to(regression.mean.device, torch.float64)
                folded, shift = regression.fold(rows, pruned.kept_inputs().to(rows.device))
                weight = weight_of(layer, pruned.geometry.weight)
                write_weight(layer, pruned.geometry.weight, pruned.geometry.from_rows(folded).to(weight))
                if name in self._intercepts.norms:
                    _take_from_mean(model.get_submodule(self._intercepts.norms[name]), name, shift, surgery)
                elif regression.centred:
                    _add_to_bias(layer, name, pruned.geometry, shift.to(weight.device), surgery)
        self.logits.apply(model, surgery)
        if surgery.created:
            surgery.order = list(model.parameters())


def kinds_of_readers(model: nn.Module, readers: Sequence[Reader], unfolded: Collection[str]) -> dict[str, bool]:
    """Readers that can be compensated for -> whether each output has a regression of its own.

    Args:
        model: The model.
        readers: Its readers.
        unfolded: Names of those that have statistics of all that an output reads.
    """
    shared, kinds = _shared_parameters(model), {}
    for reader in readers:
        geometry = _changeable_weight(model.get_submodule(reader.name), shared)
        if geometry is not None:
            kinds[reader.name] = reader.name in unfolded or geometry.reads_one_row(reader.stride)
    return kinds


def _changeable_weight(layer: nn.Module, shared: set[int]) -> WeightGeometry | None:
    """Of a layer whose weight can be made to predict; ``None`` for others."""
    geometry, computed = geometry_of(layer), computed_of(layer)
    if geometry is None or not geometry.is_whole or _ids(layer) & shared:
        return None
    return None if computed is not None and not computed.takes_any else geometry


def _regression(
    mode: str, geometry: WeightGeometry, known: InputStatistics, moments: Moments, order: IntArray | None
) -> FeatureRegression | ChannelRegression:
    exact = mode == "least_squares"
    kept_order = None if order is None else torch.from_numpy(order).to(known.mean.device)
    if known.unfolded is not None:
        return FeatureRegression(moments, geometry.positions(known.stride), kept_order, exact)
    if geometry.reads_one_row(known.stride):
        return FeatureRegression(moments, 1, kept_order, exact)
    return ChannelRegression(moments, known.coverage, kept_order, exact)


def _keep_order(reader: Reader, groups: Sequence[PruningGroup], rankings: Sequence[IntArray]) -> IntArray | None:
    """The reader's channels, the last to go first, if its plans are nested; ``None`` for readers of several groups."""
    feeding = [
        (member, ranking)
        for group, ranking in zip(groups, rankings, strict=True)
        for member in group.members
        if (member.module, member.slot) == (reader.name, reader.slot)
    ]
    if len(feeding) != 1:
        return None
    member, ranking = feeding[0]
    owner = member.owner[:: reader.stride]
    place = np.empty(len(ranking) + 1, dtype=np.int64)
    place[ranking] = np.arange(len(ranking))
    place[-1] = len(ranking)  # channels of no group stay
    return np.argsort(-place[owner], kind="stable").astype(np.int64)


def _add_to_bias(layer: nn.Module, name: str, geometry: WeightGeometry, shift: torch.Tensor, surgery: Surgery) -> None:
    bias = layer._parameters.get(geometry.bias)
    if bias is None:
        weight = layer.get_parameter(geometry.weight)
        created = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        layer._parameters["bias"] = created
        surgery.created.append((f"{name}.bias", weight, created))
    else:
        if surgery.before(bias) is None:
            old, bias = bias, nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            bias.__dict__.update(old.__dict__)
            bias.grad = None if old.grad is None else old.grad.detach().clone()
            surgery.replace(layer, geometry.bias, f"{name}.{geometry.bias}", bias)
        bias.copy_((bias.double() + shift.to(bias.device)).to(bias.dtype))


def _take_from_mean(norm: nn.Module, name: str, shift: torch.Tensor, surgery: Surgery) -> None:
    """Add a constant to the outputs of a reader, by the running mean of the BatchNorm behind it."""
    entry = layer_type(norm)
    buffer = None if entry is None else entry.mean_buffer(norm)
    if buffer is None:
        raise ValueError(f"{name}: the {type(norm).__name__} behind it has lost its running mean since the calibration")
    before = norm.get_buffer(buffer)
    surgery.remember(norm)
    mean = (before.double() - shift.to(before.device)).to(before.dtype)  # a new tensor: the old one has to survive
    norm._buffers[buffer] = mean
    surgery.shifted[name] = (mean, before)


def _ids(layer: nn.Module) -> set[int]:
    return {id(parameter) for parameter in layer.parameters(recurse=False)}


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that several modules hold: changing them for one reader would change them for all."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
