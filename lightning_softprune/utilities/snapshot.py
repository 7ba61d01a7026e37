"""Remembers what mutable objects hold, and puts it back.

Rollback is built on it, and so is scoring that leaves nothing behind. It knows data, modules and metrics; what else has
a life of its own is told by the caller.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Values that cannot change, or that nobody changes: never looked into.
ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type, range, slice, torch.dtype, torch.device}
    | {torch.Size, FunctionType, MethodType, BuiltinFunctionType, ModuleType}
)

RNGS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

_DATA = (Tensor, np.ndarray, list, dict, set, deque, tuple, frozenset, *RNGS)


class Snapshot:
    """Remembers mutable objects by identity and puts their contents back, so that every reference to them stays valid.

    Args:
        opaque: Types of objects with a life of their own: kept by reference, their insides are left alone.
        values: Whether parameters keep their values and their gradients' values too, not only flags and references.

    Looked into, however deeply nested: modules (with their metrics' states, hooks and `training` flags), dicts, lists,
    sets, deques, tuples, tensors, arrays, random generators, and objects that hold nothing but such data. Parameters
    keep their flags and gradients; their values only if asked for. Any other object is kept by reference.
    """

    def __init__(self, opaque: tuple[type, ...] = (), *, values: bool = False) -> None:
        self._opaque = opaque
        self._values = values
        self._seen: dict[int, object] = {}  # holds on to the objects, so that no id is used twice
        self._undo: list[Callable[[], None]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._tensors: list[tuple[Tensor, torch.Size, Tensor]] = []
        self._parameters: list[tuple[nn.Parameter, bool, Tensor | None]] = []

    def ignore(self, value: object) -> None:
        """Leaves this object's contents alone, wherever it turns up."""
        self._seen[id(value)] = value

    def attribute(self, owner: object, name: str) -> None:
        """Remembers which value an attribute has, without looking into the value."""
        if hasattr(owner, name):
            value = getattr(owner, name)
            self._undo.append(lambda: setattr(owner, name, value))

    def attributes(self, owner: object) -> None:
        """Remembers which values an object's attributes have, without looking into the values."""
        if isinstance(mapping := getattr(owner, "__dict__", None), dict) and id(mapping) not in self._seen:
            self._seen[id(mapping)] = mapping
            self._dicts.append((mapping, dict(mapping)))

    @torch.no_grad()
    def contents(self, *roots: object) -> None:
        """Remembers the contents of these values and of all they hold."""
        stack = list(roots)  # not recursive: deep networks would exceed Python's recursion limit
        with torch.inference_mode(False):
            while stack:
                value = stack.pop()
                if type(value) in ATOMS or id(value) in self._seen:
                    continue
                self._seen[id(value)] = value
                if isinstance(value, dict):
                    self._dicts.append((value, dict(value)))
                    stack.extend(value.values())
                elif isinstance(value, list):
                    self._lists.append((value, list(value)))
                    stack.extend(value)
                elif isinstance(value, tuple):
                    stack.extend(value)
                elif isinstance(value, nn.Parameter):
                    self._parameters.append((value, value.requires_grad, value.grad))
                    if self._values:
                        self._tensor(value)
                        if value.grad is not None:
                            self._tensor(value.grad)
                elif isinstance(value, Tensor):
                    self._tensor(value)
                elif isinstance(value, nn.Module) or _is_scheduler(value) or self._is_plain(value):
                    stack.append(vars(value))
                else:
                    self._other(value)

    def _tensor(self, value: Tensor) -> None:
        if value.layout is torch.strided and not value.is_meta:
            self._tensors.append((value, value.shape, _distinct(value.detach()).clone()))

    def _is_plain(self, value: object) -> bool:
        """Whether an object is a mere record (an average meter, a dataclass): data, nothing with a life of its own."""
        mapping = getattr(value, "__dict__", None)
        if isinstance(value, (*self._opaque, *_DATA)) or not isinstance(mapping, dict):
            return False
        return all(type(item) in ATOMS or isinstance(item, _DATA) for item in mapping.values())

    def _other(self, value: Any) -> None:
        if isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: _refill(value, members, set.update))
        elif isinstance(value, deque):
            items = list(value)
            self._undo.append(lambda: _refill(value, items, deque.extend))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                array = value.copy()
                self._undo.append(lambda: np.copyto(value, array))
        elif isinstance(value, torch.Generator):
            generator_state = value.get_state()
            self._undo.append(lambda: _discard(value.set_state(generator_state)))
        elif isinstance(value, np.random.Generator):
            bit_state = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", bit_state))
        elif isinstance(value, np.random.RandomState):
            legacy_state = value.get_state()
            self._undo.append(lambda: value.set_state(legacy_state))
        elif isinstance(value, random.Random):
            python_state = value.getstate()
            self._undo.append(lambda: value.setstate(python_state))

    def take_gradients(self) -> None:
        """Takes the parameters' pending gradients away: what nobody can reach, nobody can zero."""
        for parameter, _, gradient in self._parameters:
            if gradient is not None:
                parameter.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for mapping, items in self._dicts:
            if not (_same(mapping.values(), items.values()) and _same(mapping, items)):
                mapping.clear()
                mapping.update(items)
        for values, elements in self._lists:
            if not _same(values, elements):
                values[:] = elements
        for tensor, shape, saved in self._tensors:
            # `.data` leaves the version counter alone: a graph that holds this tensor can still be differentiated.
            # Comparing versions first would save little and miss BatchNorm, whose kernels do not raise the counter.
            with torch.inference_mode(tensor.is_inference()):
                if tensor.shape == shape and tensor.dtype == saved.dtype and tensor.device == saved.device:
                    _distinct(tensor.data).copy_(saved)
                else:
                    tensor.data = saved.expand(shape)
        for parameter, requires_grad, gradient in self._parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for undo in reversed(self._undo):
            undo()


def _refill(value: Any, items: Any, add: Callable[[Any, Any], None]) -> None:
    value.clear()
    add(value, items)


def _discard(result: object) -> None:
    """For calls that return something where nothing is wanted."""


def _same(left: Iterable[object], right: Iterable[object]) -> bool:
    nothing = object()
    return all(a is b for a, b in itertools.zip_longest(left, right, fillvalue=nothing))


def _distinct(tensor: Tensor) -> Tensor:
    """A view without repeated elements: an expanded tensor cannot be written to as a whole."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _is_scheduler(value: object) -> bool:
    return isinstance(value, torch.optim.lr_scheduler.LRScheduler)
