"""The shapes of weights: rows of outputs, and which of their inputs and outputs a plan keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def input_dim(layer: nn.Module) -> int:
    """The dimension of a layer's weight that reads its inputs."""
    return 0 if isinstance(layer, _ConvTransposeNd) else 1


def kept_channels(
    layer: nn.Module, before: torch.Tensor, by_dim: Mapping[int, torch.Tensor], stride: int
) -> torch.Tensor:
    """Mask of the input channels that stay; a grouped weight holds the indices of its first group only."""
    kept = by_dim[input_dim(layer)]
    groups, transposed = getattr(layer, "groups", 1), isinstance(layer, _ConvTransposeNd)
    width = before.shape[input_dim(layer)]
    parts = 1 if transposed else groups
    mask = torch.zeros(parts, width, dtype=torch.bool)
    mask[:, kept.cpu()] = True
    return mask.flatten()[::stride]


def kept_outputs(layer: nn.Module, before: torch.Tensor, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    """Indices of the outputs that stay; ``None`` for all of them."""
    kept = by_dim.get(1 - input_dim(layer))
    groups = getattr(layer, "groups", 1)
    if kept is None or groups == 1 or not isinstance(layer, _ConvTransposeNd):
        return kept
    return torch.cat([kept + group * before.shape[1] for group in range(groups)])  # the weight holds one group's


def weight_to_rows(layer: nn.Module, weight: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Bring a weight into ``(groups, outputs per group, channels per group, positions)``."""
    if isinstance(layer, nn.Linear):
        return weight.reshape(1, len(weight), -1, stride)
    groups = getattr(layer, "groups", 1)
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    return (blocks.transpose(1, 2) if isinstance(layer, _ConvTransposeNd) else blocks).flatten(3)


def rows_to_weight(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The way back from :func:`weight_to_rows`."""
    if isinstance(layer, nn.Linear):
        return rows[0].flatten(1)
    kernel = tuple(layer.kernel_size) if isinstance(layer, _ConvNd) else ()
    if isinstance(layer, _ConvTransposeNd):
        rows = rows.transpose(1, 2)
    return rows.flatten(0, 1).reshape(-1, rows.shape[2], *kernel)


def outputs_kept(layer: nn.Module, weight: torch.Tensor, by_dim: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A weight from before a plan, without the outputs that the plan removes."""
    dim = 1 - input_dim(layer)
    return weight.index_select(dim, by_dim[dim].to(weight.device)) if dim in by_dim else weight
