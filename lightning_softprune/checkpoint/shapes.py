"""The sizes and shapes of a module: all that a plan changes but the values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_softprune.graph import Shape, Sizes, layer_type

RECORD = "softprune"
"""Key of the record in a checkpoint."""


@dataclass(frozen=True)
class ModelShapes:
    """The sizes and shapes of a module: all that a plan changes but the values.

    Attributes:
        layers: Module name -> slot sizes. A layer has an entry under each of its names.
        shapes: Parameter or buffer name -> shape. A tied tensor has an entry under each of its names.
    """

    layers: Mapping[str, Sizes]
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, model: nn.Module) -> ModelShapes:
        """Read the form off a live module."""
        layers = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if sizes := recorded_sizes(module):
                layers[name] = sizes
        return cls(layers, {place.name: tuple(place.tensor.shape) for place in tensor_sites(model) if not place.lazy})

    @classmethod
    def from_dict(cls, data: Any) -> ModelShapes:
        """The form that :meth:`to_dict` described.

        Raises:
            ValueError: It did not.
        """
        try:
            layers = {
                str(name): {str(slot): int(n) for slot, n in sizes.items()} for name, sizes in data["layers"].items()
            }
            return cls(layers, {str(name): tuple(int(n) for n in shape) for name, shape in data["shapes"].items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the {RECORD!r} record is damaged: {type(error).__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The form in plain types."""
        return {
            "layers": {name: dict(sizes) for name, sizes in self.layers.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    def has(self, state: Mapping[str, Shape]) -> bool:
        """Whether a state dict of these shapes is of this form, as far as both name the same tensors."""
        common = [name for name in state if name in self.shapes]
        return bool(common) and all(state[name] == self.shapes[name] for name in common)


@dataclass(frozen=True)
class TensorSite:
    """A tensor where a module holds it."""

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor
    is_parameter: bool

    @property
    def lazy(self) -> bool:
        """Whether it has no shape yet."""
        return isinstance(self.tensor, (UninitializedParameter, UninitializedBuffer))

    @property
    def container(self) -> dict[str, Any]:
        """The dictionary that holds it."""
        return self.module._parameters if self.is_parameter else self.module._buffers


def tensor_sites(model: nn.Module) -> Iterator[TensorSite]:
    """All parameters and buffers, under each of their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for attribute, tensor in tensors.items():
                if tensor is not None:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    yield TensorSite(name, module, attribute, tensor, is_parameter)


def tensor_sites_by_name(model: nn.Module) -> dict[str, TensorSite]:
    """The sites by name."""
    return {place.name: place for place in tensor_sites(model)}


def recorded_sizes(module: nn.Module) -> Sizes:
    """The sizes that a checkpoint records of a layer; nothing for other modules, and where weights are computed."""
    entry = layer_type(module)
    return {} if entry is None else entry.recorded_sizes(module)
