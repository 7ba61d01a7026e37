"""Readers: the layers that have a group's channels at their input, and how they are watched while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_softprune.graph import Member, PruningGroup
from lightning_softprune.utilities.arrays import IntArray


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


@contextmanager
def watch_inputs(model: nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``see(name, source)`` for each input of the named layers while the block runs the model."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_calls(
    model: nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, source, output)`` after each call of the named layers while the block runs the model."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name), with_kwargs=True) for name in names]
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
