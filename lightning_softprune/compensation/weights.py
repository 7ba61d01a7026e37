"""A reader's weight before and after a plan that removed some of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lightning_softprune.graph import WeightGeometry, computed_of, geometry_of
from lightning_softprune.surgery import Surgery


@dataclass(frozen=True)
class PrunedWeight:
    """What a plan left of a reader's weight.

    Attributes:
        geometry: How the weight reads its inputs.
        before: The weight from before the plan.
        by_dim: Its kept indices by dimension; those of the inputs are among them.
        stride: Consecutive input indices per channel.
    """

    geometry: WeightGeometry
    before: torch.Tensor
    by_dim: Mapping[int, torch.Tensor]
    stride: int

    @classmethod
    def of(cls, layer: nn.Module, name: str, stride: int, surgery: Surgery) -> PrunedWeight | None:
        """Look a reader up in the record of a surgery; ``None`` where it has lost none of its inputs."""
        geometry = geometry_of(layer)
        if geometry is None:
            return None
        before: torch.Tensor | None
        if computed_of(layer) is not None:
            before, by_dim = surgery.computed.get(f"{name}.{geometry.weight}", (None, {}))
        else:
            by_dim = surgery.kept.get(f"{name}.{geometry.weight}", {})
            before = surgery.before(layer.get_parameter(geometry.weight))
        if before is None or geometry.input_dim not in by_dim:
            return None
        return cls(geometry, before.detach(), by_dim, stride)

    def kept_inputs(self) -> torch.Tensor:
        """Mask of the input channels that stay, shape ``(channels,)``."""
        return self.geometry.kept_inputs(self.before.shape[self.geometry.input_dim], self.by_dim, self.stride)

    def kept_outputs(self) -> torch.Tensor | None:
        """Indices of the outputs that stay; ``None`` for all of them."""
        return self.geometry.kept_outputs(self.before.shape[self.geometry.output_dim], self.by_dim)

    def rows(self) -> torch.Tensor:
        """The weight from before, for the outputs that stay, as :meth:`WeightGeometry.to_rows` lays it out."""
        return self.geometry.to_rows(self.geometry.with_kept_outputs(self.before, self.by_dim), self.stride)
