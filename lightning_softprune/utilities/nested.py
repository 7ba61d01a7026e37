"""Nested data: dotted attributes, integers in containers, batches, and the containers that they are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_softprune.utilities.snapshot import ATOMS

__all__ = [
    "attribute_at",
    "copy_batch",
    "innermost",
    "integer_of",
    "integers_in",
    "is_container",
    "is_transformed",
    "laid_out_like",
    "map_tensors",
    "rebuild",
    "tensors_in",
    "with_integer",
]


def attribute_at(owner: Any, path: str) -> Any:
    """The attribute at a dotted path; ``None`` where there is none.

    >>> attribute_at(torch.nn.Linear(2, 3), "weight.data.ndim")
    2
    """
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner


def integer_of(owner: object, name: str) -> int | None:
    """An integer that an object or its class has as this attribute; ``None`` for anything else, also if computed.

    It may lie in a container: a name says where, as :func:`integers_in` does.

    >>> integer_of(torch.nn.Linear(2, 3), "in_features"), integer_of(torch.nn.Linear(2, 3), "training")
    (2, None)
    >>> integer_of(torch.nn.Conv2d(2, 3, 5), "kernel_size[1]")
    5
    """
    attribute, *keys = _path(name)
    value = inspect.getattr_static(owner, attribute, None)  # a property computes, and takes no new value
    for key in keys:
        items = _items(value)
        if key not in items:
            return None
        value = items[key]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def integers_in(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """The integers in an attribute's value, with a name for each: also in plain containers, small ones in small ones.

    >>> dict(integers_in("heads", 8)), dict(integers_in("sizes", {"heads": 8, "window": (2, 3)}))
    ({'heads': 8}, {'sizes[heads]': 8, 'sizes[window][0]': 2, 'sizes[window][1]': 3})
    """
    if type(value) is int:
        yield name, value
    if name.count("[") < _MOST_LEVELS:
        for key, item in _items(value).items():
            yield from integers_in(f"{name}[{key}]", item)


def with_integer(value: Any, name: str, number: int) -> Any:
    """An attribute's value, with another number in the place that a name says; containers are copied.

    >>> with_integer(8, "heads", 7), with_integer({"heads": 8}, "sizes[heads]", 7)
    (7, {'heads': 7})
    >>> with_integer((("heads", 8), ("window", 2)), "sizes[heads]", 7)
    (('heads', 7), ('window', 2))
    """
    _, *keys = _path(name)
    if not keys:
        return number
    items = _items(value)
    items[keys[0]] = with_integer(items[keys[0]], "[".join(keys), number)
    if type(value) is dict:
        return items
    return type(value)(items.items() if _are_named(value) else items.values())


def _path(name: str) -> list[str]:
    """An attribute and keys in its value, of a name such as ``sizes[window][0]``."""
    return name.replace("]", "").split("[")


def _items(value: Any) -> dict[str, Any]:
    """What is in a plain container, by its key or place; nothing for large ones, and where keys are no words."""
    if type(value) not in (dict, list, tuple) or len(value) > _MOST_ITEMS:
        return {}
    named = type(value) is dict or _are_named(value)
    items = dict(value if named else ((str(place), item) for place, item in enumerate(value)))
    return items if all(isinstance(key, str) and key.replace("_", "").isalnum() for key in items) else {}


def _are_named(value: Any) -> bool:
    """Whether these are the pairs of a dictionary, which can be hashed."""
    pairs = [item for item in value if type(item) is tuple and len(item) == 2 and isinstance(item[0], str)]
    return 0 < len(value) == len(dict(pairs)) == len(pairs)


_MOST_LEVELS, _MOST_ITEMS = 2, 16
"""A table of words, or a list of all samples, holds no sizes."""


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for others inside of a transformation of ``torch.func``: it has no memory or values."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def innermost(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that is computed with: itself, or inside of transformations of ``torch.func`` what it stands for."""
    while is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def laid_out_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor in the memory format of another of as many dimensions: channels last, or as it is."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(other.ndim)
    if last is not None and not other.is_contiguous() and other.is_contiguous(memory_format=last):
        return tensor.contiguous(memory_format=last)
    return tensor


def is_container(value: Any) -> bool:
    """Whether :func:`rebuild` looks into a value."""
    return isinstance(value, (Mapping, tuple, list))


def rebuild(value: Any, function: Callable[[Any], Any]) -> Any:
    """A container like this one, of what a function makes of its items; one level deep.

    Dictionaries, lists and tuples keep their type and what else they hold (a default factory, attributes): no
    constructor is called, which may want anything. Other mappings become dictionaries.

    >>> rebuild({"a": 1, "b": 2}, lambda n: 10 * n), rebuild((1, 2), str)
    ({'a': 10, 'b': 20}, ('1', '2'))
    """
    if isinstance(value, dict):
        result = copy(value)
        for key, item in value.items():
            result[key] = function(item)
        return result
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, list):
        items = copy(value)
        items[:] = map(function, value)
        return items
    if isinstance(value, tuple):
        return _tuple_like(value, [function(item) for item in value])
    raise TypeError(f"{type(value).__name__} is no container")


def _tuple_like(value: tuple[Any, ...], items: list[Any]) -> Any:
    try:
        result = tuple.__new__(type(value), items)
    except TypeError:  # Python refuses it for types that are made in C: sizes, the named results of PyTorch
        return type(value)(items)
    if hasattr(result, "__dict__"):
        vars(result).update(vars(value))
    return result


def map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nested data, of what a function makes of each tensor."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, nn.utils.rnn.PackedSequence):  # its other tensors are lengths and orders
        return tree._replace(data=function(tree.data))
    return rebuild(tree, lambda item: map_tensors(item, function)) if is_container(tree) else tree


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """All tensors of nested data, in order, of which nothing is made anew."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, nn.utils.rnn.PackedSequence):
        return [tree.data]
    if not is_container(tree):
        return []
    items = tree.values() if isinstance(tree, Mapping) else tree
    return [tensor for item in items for tensor in tensors_in(item)]


def copy_batch(batch: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a batch: what a step does in place (`x.sub_(mean)`, `batch.pop("y")`) does not reach the original.

    `copy.deepcopy` would copy the whole storage behind a view, so only objects of unknown type are left to it.
    """
    memo = {} if memo is None else memo
    if type(batch) in ATOMS:
        return batch
    if id(batch) in memo:  # an input that is also the target stays one tensor
        return memo[id(batch)]
    result: Any
    if isinstance(batch, Tensor):
        result = batch.detach().clone().requires_grad_(batch.requires_grad)
    elif isinstance(batch, np.ndarray):
        result = batch.copy()
    elif type(batch) in (list, tuple):
        result = type(batch)([copy_batch(item, memo) for item in batch])
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        result = type(batch)(*(copy_batch(item, memo) for item in batch))
    elif isinstance(batch, dict):
        result = copy(batch)  # keeps the type and its extras (a default factory)
        for key, value in batch.items():
            result[key] = copy_batch(value, memo)
    elif is_dataclass(batch) and not isinstance(batch, type):
        result = copy(batch)
        for field in fields(batch):
            if hasattr(batch, field.name):  # past a frozen dataclass's guard
                object.__setattr__(result, field.name, copy_batch(getattr(batch, field.name), memo))
    else:
        try:
            result = deepcopy(batch)
        except Exception:  # a handle or another thing that cannot be copied: as it is
            result = batch
    memo[id(batch)] = result
    return result
