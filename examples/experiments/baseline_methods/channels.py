"""Channels inside of a network's blocks, and what every method does with them: map them to fewer ones.

A group has layers that *produce* its channels and layers that *read* them. A method replaces ``n`` channels by ``k``
with two matrices: the producers' outputs become ``P y`` with ``P`` of shape ``(k, n)``, and the readers' weights
``W R`` with ``R`` of shape ``(n, k)``. Pruning is a selection, and ``R`` its transpose; merging has means in ``P``;
compensation has more in ``R``.

The channels of residual streams, which many layers share, are left alone. So have the papers' tables it, or most do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_softprune import PruningGroup


def inner_groups(groups: Sequence[PruningGroup]) -> list[PruningGroup]:
    """Those that can be pruned and that one layer produces: no residual streams."""
    return [group for group in groups if group.prunable and len(_layers(group, "out")) == 1]


def producer(network: nn.Module, group: PruningGroup) -> nn.Conv2d | nn.Linear:
    """The layer that produces a group's channels."""
    (name,) = _layers(group, "out")
    return _weighted(network, name)


def reader_names(group: PruningGroup) -> list[str]:
    """The layers that read a group's channels."""
    return _layers(group, "in")


def selection(kept: Tensor, channels: int) -> Tensor:
    """The matrix ``(k, n)`` that keeps some channels."""
    return torch.eye(channels)[kept.sort().values]


def largest(scores: Tensor, width: int) -> Tensor:
    """The channels with the largest scores, in their order."""
    return scores.topk(width).indices.sort().values


def l1_norms(network: nn.Module, group: PruningGroup) -> Tensor:
    """The L1 norm of every channel's filter (arXiv 1608.08710)."""
    return producer(network, group).weight.detach().abs().flatten(1).sum(1)


@torch.no_grad()
def map_channels(network: nn.Module, group: PruningGroup, produce: Tensor, read: Tensor) -> None:
    """Replace a group's channels by others, in place.

    Args:
        network: The network.
        group: Its `n` channels.
        produce: ``P``, shape ``(k, n)``.
        read: ``R``, shape ``(n, k)``.
    """
    modules = dict(network.named_modules())
    for member in group.members:
        module = modules[member.module]
        if member.slot == "in":
            layer = _weighted(network, member.module)
            layer.weight = nn.Parameter(torch.einsum("oi...,ik->ok...", layer.weight, read))
        else:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.ndim > 0:
                    mapped = torch.tensordot(produce, tensor, dims=1)
                    setattr(module, name, nn.Parameter(mapped) if isinstance(tensor, nn.Parameter) else mapped)
        _resize(module, member.slot, len(produce))


def uniform_widths(network: nn.Module, groups: Sequence[PruningGroup], removed: float) -> list[int]:
    """The same fraction of every group's channels, so that this fraction of all parameters goes, as nearly as can be.

    Groups must not share a layer's weight, so that what a channel costs depends on no other group.
    """
    total = sum(p.numel() for p in network.parameters())
    costs = [_elements_per_channel(network, group) for group in groups]
    candidates = []
    for step in range(1, 1000):
        widths = [max(1, round(group.num_channels * (1 - step / 1000))) for group in groups]
        gone = sum(c * (g.num_channels - width) for c, g, width in zip(costs, groups, widths, strict=True))
        candidates.append((abs(gone / total - removed), widths))
    return min(candidates)[1]


def prune_by_norm(network: nn.Module, groups: Sequence[PruningGroup], widths: Sequence[int]) -> list[Tensor]:
    """Keep the channels with the largest L1 norms (arXiv 1608.08710), in place.

    Returns:
        For each group the matrix ``(k, n)`` that keeps them.
    """
    found = []
    for group, width in zip(groups, widths, strict=True):
        keep = selection(largest(l1_norms(network, group), width), group.num_channels)
        map_channels(network, group, keep, keep.t())
        found.append(keep)
    return found


def _layers(group: PruningGroup, slot: str) -> list[str]:
    return [member.module for member in group.members if member.slot == slot]


def _weighted(network: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    layer = network.get_submodule(name)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        raise TypeError(f"{name}: {type(layer).__name__} is neither Conv2d nor Linear")
    return layer


def _resize(module: nn.Module, slot: str, width: int) -> None:
    for name in {"in": ("in_channels", "in_features"), "out": ("out_channels", "out_features")}.get(
        slot, ("num_features",)
    ):
        if hasattr(module, name):
            setattr(module, name, width)


def _elements_per_channel(network: nn.Module, group: PruningGroup) -> int:
    total = 0
    for member in group.members:
        for parameter in network.get_submodule(member.module).parameters(recurse=False):
            if member.slot != "in" or parameter.ndim > 1:
                total += parameter.numel() // group.num_channels
    return total
