"""The sizes and shapes of a module: all that a plan changes but the values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_softprune.graph import Shape, Sizes, layer_type
from lightning_softprune.utilities.names import joined
from lightning_softprune.utilities.nested import integer_of, laid_out_like
from lightning_softprune.utilities.plain_types import LARGEST_INTEGER, shown

RECORD = "softprune"
"""Key of the record in a checkpoint."""


@dataclass(frozen=True)
class ModelShapes:
    """The sizes and shapes of a module: all that a plan changes but the values.

    Attributes:
        layers: Module name -> slot sizes. A layer has an entry under each of its names.
        shapes: Parameter or buffer name -> shape. A tied tensor has an entry under each of its names.
        counts: Name of an attribute that counts pruned channels (``"attention.num_heads"``) -> its value.
        unsaved: Name of a pruned tensor that no state dict has (a plain attribute, a buffer that is not persistent) ->
            its value. The one exception: these values are nowhere else. They are not compared.
        left_out: The same of parameters and buffers that a state dict would have, and that the module's own leaves out.
    """

    layers: Mapping[str, Sizes]
    shapes: Mapping[str, Shape]
    counts: Mapping[str, int] = field(default_factory=dict)
    unsaved: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    left_out: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What 0.1.0 has pickled lacks the fields that came later."""
        self.__dict__.update({"counts": {}, "unsaved": {}, "left_out": {}, **state})

    @classmethod
    def of(cls, model: nn.Module, like: ModelShapes | None = None) -> ModelShapes:
        """Read the form off a live module.

        Args:
            model: The module.
            like: An earlier form of it: which attributes and tensors to read, beside layers, parameters and buffers.
                What the module has no longer is left out.
        """
        layers = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if sizes := recorded_sizes(module):
                layers[name] = sizes
        shapes = {place.name: tuple(place.tensor.shape) for place in tensor_sites(model) if not place.lazy}
        if like is None:
            return cls(layers, shapes)
        counts = counts_of(model, like.counts)
        tensors = {
            place.name: place.tensor for place in tensor_sites(model, like.unsaved) if place.name in like.unsaved
        }
        return cls(layers, shapes, counts, copied(tensors))

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
        counts = {}
        for name, value in _items(data, "counts", where) if "counts" in data else ():
            counts[name] = _count(value, f"{where}counts[{shown(name)}]", least=1)
        values: dict[str, dict[str, torch.Tensor]] = {"unsaved": {}, "left_out": {}}
        for kind, found in values.items():
            for name, value in _items(data, kind, where) if kind in data else ():
                place = f"{where}{kind}[{shown(name)}]"
                found[name] = _values(value, place)
                if shapes.get(name, value.shape) != value.shape:
                    raise damaged(f"{place}: a tensor of shape {tuple(value.shape)}, in shapes it is {shapes[name]}")
        return cls(layers, shapes, counts, **values)

    def to_dict(self) -> dict[str, Any]:
        """The form in plain types, and tensors; the later fields only where there is something in them."""
        later = {"counts": dict(self.counts), "unsaved": dict(self.unsaved), "left_out": dict(self.left_out)}
        return {
            "layers": {name: dict(sizes) for name, sizes in self.layers.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            **{field: items for field, items in later.items() if items},
        }

    def completed(self, other: ModelShapes) -> ModelShapes:
        """This form, with the counts and tensors that only another form of the model knows and that fit here."""
        fitting = {
            name: value
            for name, value in other.unsaved.items()
            if self.shapes.get(name, value.shape) == tuple(value.shape)
        }
        return replace(self, counts={**other.counts, **self.counts}, unsaved={**fitting, **self.unsaved})

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


def stored_elements(tensors: Iterable[Any]) -> int:
    """How many numbers tensors hold: a few that are expanded to a large shape are a few.

    What shares its memory counts once, and what has none to look at (sparse, not initialised) not at all.
    """
    found: dict[tuple[str, int], int] = {}
    for value in tensors:
        if isinstance(value, torch.Tensor):
            try:
                storage = value.untyped_storage()
                place = id(value) if value.is_meta else storage.data_ptr()
                found[str(value.device), place] = storage.nbytes() // value.element_size()
            except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
                continue
    return sum(found.values())


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the memory of the host that hold no more than themselves; what is one tensor stays one."""
    with torch.inference_mode(False), torch.no_grad():
        made = {id(tensor): tensor.detach().cpu().clone() for tensor in tensors.values()}
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


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


def _values(value: Any, where: str) -> torch.Tensor:
    """A tensor that a file has in full; what it claims to be large is large there."""
    if not isinstance(value, torch.Tensor) or is_lazy(value):
        raise damaged(f"{where}: {shown(value)} is not a tensor")
    if value.layout is not torch.strided or value.is_meta or value.is_nested or value.is_quantized:
        raise damaged(f"{where}: this is no dense tensor with values")
    if value.numel() > (stored := stored_elements([value])):
        raise damaged(f"{where}: a tensor of shape {tuple(value.shape)} with {stored} numbers in the file")
    return value


def _count(value: Any, where: str, least: int = 0) -> int:
    """A size; widths that a user computed with NumPy are whole numbers too."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise damaged(f"{where}: {shown(value)} is not a whole number")
    number = int(value)
    if not least <= number <= LARGEST_INTEGER:
        problem = f"less than {least}" if number < least else "larger than any tensor"
        raise damaged(f"{where}: {shown(number)} is {problem}")
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
        return is_lazy(self.tensor)

    @property
    def container(self) -> dict[str, Any]:
        """The dictionary that holds it."""
        if self.attribute in self.module._buffers:
            return self.module._buffers
        return self.module._parameters if self.is_parameter else self.module.__dict__


def tensor_sites(model: nn.Module, plain: Container[str] = ()) -> Iterator[TensorSite]:
    """All parameters and buffers, under each of their names.

    Args:
        model: The model.
        plain: Names of tensors that are plain attributes, and are to be among them.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for attribute, tensor in tensors.items():
                if tensor is not None:
                    name = joined(prefix, attribute)
                    yield TensorSite(name, module, attribute, tensor, is_parameter)
        for attribute, tensor in list(vars(module).items()) if plain else ():
            name = joined(prefix, attribute)
            if isinstance(tensor, torch.Tensor) and name in plain:
                yield TensorSite(name, module, attribute, tensor, is_parameter=False)


def tensor_sites_by_name(model: nn.Module) -> dict[str, TensorSite]:
    """The sites by name."""
    return {place.name: place for place in tensor_sites(model)}


def of_shape(tensor: torch.Tensor, shape: Shape, values: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor of this shape like the given one: with these values, or its own as far as they go, and zeros beyond."""
    new = laid_out_like(tensor.detach().new_zeros(shape), tensor)
    if values is None:
        common = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
        new[common].copy_(tensor.detach()[common])
    else:
        new.copy_(values)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        new.__dict__.update(tensor.__dict__)
        return new
    return new.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def write_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Write values into parameters and buffers of these names, in place, where they have the same shape."""
    with torch.inference_mode(False), torch.no_grad():
        for place in tensor_sites(model) if values else ():
            if place.name in values and not place.lazy and place.tensor.shape == values[place.name].shape:
                place.tensor.copy_(values[place.name])


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The module that has the tensor or attribute of this name, if there is one, and the name's last part."""
    path, _, attribute = name.rpartition(".")
    try:
        return model.get_submodule(path), attribute
    except AttributeError:
        return None, attribute


def counts_of(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The integer attributes of these names that a module has, and their values."""
    found = {name: integer_of(*owner_of(model, name)) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def untold_sizes(model: nn.Module, inside: bool = True) -> dict[str, int]:
    """The sizes of layers that have no tensors to tell them, as norms without weights, by layer and slot.

    Args:
        model: The model.
        inside: Whether layers inside of it are looked at too.
    """
    found = {}
    for name, module in model.named_modules() if inside else [("", model)]:
        if next(itertools.chain(module.parameters(), module.buffers()), None) is None:
            found.update({joined(name, slot): size for slot, size in recorded_sizes(module).items()})
    return found


def recorded_sizes(module: nn.Module) -> Sizes:
    """The sizes that a checkpoint records of a layer; nothing for other modules, and where weights are computed."""
    entry = layer_type(module)
    return {} if entry is None else entry.recorded_sizes(module)
