"""Compensation: what the readers of removed channels do to make up for them, in closed form.

Each layer that reads channels of a group predicts the removed ones from those it keeps, by a linear regression on
calibration data, and takes the prediction into its own weights and bias (``regression.py``). ``"bias"`` replaces
removed channels by their means. Nothing is trained. The committed plan is refitted once more (``refit.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_softprune.calibration import InputStatistics, Reader, find_readers, kernel_positions, reads_one_row
from lightning_softprune.compensation.regression import ChannelRegression, FeatureRegression
from lightning_softprune.compensation.weights import (
    input_dim,
    kept_channels,
    outputs_kept,
    rows_to_weight,
    weight_to_rows,
)
from lightning_softprune.graph import PruningGroup
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
    """

    def __init__(
        self,
        mode: str,
        model: nn.Module,
        groups: Sequence[PruningGroup],
        rankings: Sequence[IntArray],
        statistics: Mapping[str, InputStatistics],
    ) -> None:
        self.mode = mode
        self._regressions: dict[str, FeatureRegression | ChannelRegression] = {}
        self._readers: dict[str, Reader] = {}
        self._without_bias: list[str] = []
        if mode == "none":
            return
        shared = _shared_parameters(model)
        for reader in find_readers(model, groups):
            layer = model.get_submodule(reader.name)
            known = statistics.get(reader.name)
            if known is None or not isinstance(layer, (nn.Linear, _ConvNd)) or _ids(layer) & shared:
                continue
            self._readers[reader.name] = reader
            self._regressions[reader.name] = _regression(mode, reader, layer, known, groups, rankings)
            if layer.bias is None:
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
        old = {id(new): before for before, new, _ in surgery.parameters}
        for name, regression in self._regressions.items():
            layer = model.get_submodule(name)
            weight = layer.get_parameter("weight")
            by_dim = surgery.kept.get(f"{name}.weight", {})
            before = old.get(id(weight))
            if before is None or input_dim(layer) not in by_dim:
                continue
            stays = kept_channels(layer, before, by_dim, self.stride(name))
            with torch.no_grad():
                rows = weight_to_rows(layer, outputs_kept(layer, before.detach(), by_dim), self.stride(name))
                rows = rows.to(regression.mean.device, torch.float64)
                folded, shift = regression.fold(rows, stays.to(rows.device))
                weight.copy_(rows_to_weight(layer, folded).to(weight.device, weight.dtype))
                _add_to_bias(layer, name, shift.to(weight.device), surgery)


def _regression(
    mode: str,
    reader: Reader,
    layer: nn.Module,
    known: InputStatistics,
    groups: Sequence[PruningGroup],
    rankings: Sequence[IntArray],
) -> FeatureRegression | ChannelRegression:
    exact = mode == "least_squares"
    nested = _keep_order(reader, groups, rankings, layer)
    order = None if nested is None else torch.from_numpy(nested).to(known.mean.device)
    if known.unfolded is not None:
        return FeatureRegression(known.unfolded, kernel_positions(layer, reader.stride), order, exact)
    if reads_one_row(layer, reader.stride):
        return FeatureRegression(known, 1, order, exact)
    return ChannelRegression(known, order, exact)


def _keep_order(
    reader: Reader, groups: Sequence[PruningGroup], rankings: Sequence[IntArray], layer: nn.Module
) -> IntArray | None:
    """The reader's channels, the last to go first, if its plans are nested; ``None`` for readers of several groups."""
    feeding = [
        (member, ranking)
        for group, ranking in zip(groups, rankings, strict=True)
        for member in group.members
        if (member.module, member.slot) == (reader.name, reader.slot)
    ]
    if len(feeding) != 1 or getattr(layer, "groups", 1) > 1:
        return None
    member, ranking = feeding[0]
    owner = member.owner[:: reader.stride]
    place = np.empty(len(ranking) + 1, dtype=np.int64)
    place[ranking] = np.arange(len(ranking))
    place[-1] = len(ranking)  # channels of no group stay
    return np.argsort(-place[owner], kind="stable").astype(np.int64)


def _add_to_bias(layer: nn.Module, name: str, shift: torch.Tensor, surgery: Surgery) -> None:
    weight = layer.get_parameter("weight")
    bias = layer._parameters.get("bias")
    if bias is None:
        created = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
        layer._parameters["bias"] = created
        surgery.created.append((f"{name}.bias", weight, created))
    else:
        if not any(bias is new for _, new, _ in surgery.parameters):
            old, bias = bias, nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            bias.__dict__.update(old.__dict__)
            bias.grad = None if old.grad is None else old.grad.detach().clone()
            surgery.replace(layer, "bias", f"{name}.bias", bias)
        bias.copy_((bias.double() + shift.to(bias.device)).to(bias.dtype))


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
