"""Readers: the layers that have a group's channels at their input, and how they are watched while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_softprune.graph import (
    Member,
    PruningGroup,
    WeightGeometry,
    geometry_of,
    parts_called,
    tensor_at,
    weight_of,
)
from lightning_softprune.utilities.arrays import FloatArray, IntArray
from lightning_softprune.utilities.hooks import registered


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
    owners: dict[tuple[str, str], list[IntArray]] = {}
    for group in groups:
        for member in group.members:
            if is_reading(modules, member):
                owners.setdefault((member.module, member.slot), []).append(member.owner)
    return [Reader(name, slot, _stride(ids, weight_geometry(modules[name]))) for (name, slot), ids in owners.items()]


def readers_that_lose(model: nn.Module, groups: Sequence[PruningGroup], high: FloatArray) -> list[Reader]:
    """Readers of groups that can lose channels; the bounds of some are 0."""
    if (high > 0).all():
        return find_readers(model, groups)
    shrinking = [group for group, most in zip(groups, high, strict=True) if most > 0]
    names = {reader.name for reader in find_readers(model, shrinking)}
    return [reader for reader in find_readers(model, groups) if reader.name in names]  # strides depend on all groups


def _stride(owners: Sequence[IntArray], geometry: WeightGeometry) -> int:
    """Length of the equal blocks of one channel that a slot consists of."""
    if geometry.kernel is not None or not geometry.is_whole:
        return 1
    changes = [np.flatnonzero(np.diff(owner)) + 1 for owner in owners]
    return int(np.gcd.reduce(np.concatenate([*changes, [len(owners[0])]])))


def is_reading(modules: Mapping[str, nn.Module], member: Member) -> bool:
    """Whether the member is the input of a layer that mixes channels, and has any outputs."""
    module = modules.get(member.module)
    geometry = None if module is None else geometry_of(module)
    if module is None or geometry is None or member.slot != geometry.slot:
        return False
    weight = tensor_at(module, geometry.weight)
    return weight is None or weight.numel() > 0  # a layer without outputs mixes nothing


def is_mixing(modules: Mapping[str, nn.Module], member: Member) -> bool:
    """Whether the member is the output of a layer that mixes channels."""
    module = modules.get(member.module)
    geometry = None if module is None else geometry_of(module)
    return geometry is not None and member.slot not in (geometry.slot, "both")


def weight_geometry(layer: nn.Module) -> WeightGeometry:
    """How a reader's weight reads its inputs.

    Raises:
        TypeError: The layer is no reader.
    """
    geometry = geometry_of(layer)
    if geometry is None:
        raise TypeError(f"{type(layer).__name__} does not mix channels by a weight")
    return geometry


def reading_weight(layer: nn.Module) -> torch.Tensor:
    """The weights that read each input channel, shape ``(channels, ...)``."""
    geometry = weight_geometry(layer)
    return geometry.by_input(weight_of(layer, geometry.weight))


@contextmanager
def watch_inputs(model: nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``see(name, source)`` for each input of the named layers while the block runs the model."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    layers = {name: model.get_submodule(name) for name in names}
    hooks = (layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items())
    with parts_called(model), registered(hooks):
        yield


@contextmanager
def watch_calls(
    model: nn.Module, names: Sequence[str], see: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, source, output)`` after each call of the named layers while the block runs the model."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    layers = {name: model.get_submodule(name) for name in names}
    hooks = (layer.register_forward_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items())
    with parts_called(model), registered(hooks):
        yield
