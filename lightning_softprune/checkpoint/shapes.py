"""The sizes and shapes of a module: all that a plan changes but the values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_softprune.graph import Shape, Sizes, layer_type
from lightning_softprune.utilities.plain_types import LARGEST_INTEGER, shown

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
    def from_dict(cls, data: Any, where: str = "") -> ModelShapes:
        """The form that :meth:`to_dict` described.

        Args:
            data: What `to_dict` returned, also after a round trip through a file.
            where: What stands before its fields in messages.

        Raises:
            ValueError: It did not; the message names the field.
        """
        if not isinstance(data, Mapping):
            raise damaged(f"{where.rstrip('.')}{': ' if where else ''}{shown(data)} is not a dict")
        layers = {}
        for name, sizes in _items(data, "layers", where):
            place = f"{where}layers[{shown(name)}]"
            if not isinstance(sizes, Mapping) or not sizes:
                raise damaged(f"{place}: {shown(sizes)} is not a dict of slot sizes")
            layers[name] = {_name(slot, place): _count(n, f"{place}[{shown(slot)}]") for slot, n in sizes.items()}
        shapes = {}
        for name, shape in _items(data, "shapes", where):
            place = f"{where}shapes[{shown(name)}]"
            if not isinstance(shape, (list, tuple)) or len(shape) > _MOST_DIMENSIONS:
                raise damaged(f"{place}: {shown(shape)} is not a list of at most {_MOST_DIMENSIONS} dimensions")
            shapes[name] = tuple(_count(n, f"{place}[{dim}]") for dim, n in enumerate(shape))
            if number_of_elements(shapes[name]) > LARGEST_INTEGER:
                raise damaged(f"{place}: {shown(shape)} is larger than any tensor")
        return cls(layers, shapes)

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


def damaged(problem: str) -> ValueError:
    """The error for a record that cannot be right.

    Args:
        problem: The field, and what is wrong with it.
    """
    return ValueError(f"the {RECORD!r} record is damaged: {problem}")


def number_of_elements(shape: Shape) -> int:
    """How many a tensor has; an empty dimension counts as one (PyTorch computes strides with the others)."""
    return math.prod(max(n, 1) for n in shape)


_MOST_DIMENSIONS = 64  # PyTorch's own limit


def _items(data: Mapping[str, Any], field: str, where: str) -> list[tuple[str, Any]]:
    if field not in data:
        raise damaged(f"{where}{field}: it is missing")
    if not isinstance(data[field], Mapping):
        raise damaged(f"{where}{field}: {shown(data[field])} is not a dict")
    return [(_name(name, f"{where}{field}"), value) for name, value in data[field].items()]


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise damaged(f"{where}: the key {shown(name)} is not a string")
    return name


def _count(value: Any, where: str) -> int:
    """A size; widths that a user computed with NumPy are whole numbers too."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise damaged(f"{where}: {shown(value)} is not a whole number")
    number = int(value)
    if not 0 <= number <= LARGEST_INTEGER:
        raise damaged(f"{where}: {shown(number)} is {'less than 0' if number < 0 else 'larger than any tensor'}")
    return number


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
