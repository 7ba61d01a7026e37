"""Remembers what mutable objects hold, and puts it back.

Rollback is built on it, and so is scoring that leaves nothing behind. It knows data, modules, metrics and the user's
own objects; what else has a life of its own is told by the caller.
"""

from __future__ import annotations

import operator
import random
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from lightning_softprune.utilities.hooks import unwatched
from lightning_softprune.utilities.ownership import is_alive, is_own, packages_of, slots

# Values that cannot change, or that nobody changes: never looked into.
ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type, range, slice, torch.dtype, torch.device}
    | {torch.Size, FunctionType, MethodType, BuiltinFunctionType, ModuleType}
)

RNGS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

ROOM = 2**27
"""Bytes that copies of what objects hold may take."""

MOST_VALUES = 2**16
"""Values that objects hold, numbers and strings not counted, that are looked into."""

_CONSTANTS = ATOMS - {MethodType}
_DATA = (Tensor, np.ndarray, list, dict, set, deque, tuple, frozenset, bytearray, array, *RNGS)
_HAVE_ATTRIBUTES = (nn.Module, LRScheduler)
_KNOWN = (*_DATA, *_HAVE_ATTRIBUTES)
_EXACT = frozenset({dict, list, set, tuple, deque, OrderedDict, Tensor, nn.Parameter, np.ndarray})


class Snapshot:
    """Remembers mutable objects by identity and puts their contents back, so that every reference to them stays valid.

    Looked into, however deeply nested: modules (with their metrics' states, hooks and `training` flags), dicts, lists,
    sets, deques, tuples, tensors, arrays, random generators; and objects. Of an object of the user's own class that is
    its `__dict__` and `__slots__`, whatever else lies beside the data there, and the data that its class holds as
    attributes (their contents: which values a class's attributes have is not put back). An object of any other class is
    looked into where it holds nothing but data, and kept by reference where not. Bound methods and partial functions
    lead to what they are bound to. Classes, functions, and what is alive (see `utilities.ownership`) stay as they are.

    Parameters keep their flags and gradients; their values only if asked for.

    Objects come last, and what they hold is limited, since one may hold a whole dataset: a container or tensor of
    theirs for which there is no room any more (`ROOM`) is kept by reference, and so is what is in it; of a container
    with too many values to look into (`MOST_VALUES`) only itself is put back. What modules hold themselves is not
    limited.

    Args:
        opaque: Types of further objects with a life of their own: kept by reference, their insides are left alone.
        values: Whether parameters keep their values and their gradients' values too, not only flags and references.
    """

    def __init__(self, opaque: tuple[type, ...] = (), *, values: bool = False) -> None:
        self._opaque = opaque
        self._values = values
        self._packages: frozenset[str] = frozenset()  # of the modules' classes
        self._room, self._values_left = ROOM, MOST_VALUES
        self._seen: dict[int, object] = {}  # holds on to the objects, so that no id is used twice
        self._undo: list[Callable[[], None]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._empty: list[dict[Any, Any]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._tensors: list[tuple[Tensor, torch.Size, Tensor]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
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
        self._packages = self._packages.union(*(packages_of(type(root)) for root in roots if _is(root, nn.Module)))
        objects: deque[Any] = deque()
        # Not recursive: deep networks would exceed Python's recursion limit. Level by level: what is near comes first.
        with unwatched(), torch.inference_mode(False):
            for queue in (deque[Any](roots), objects):
                while queue:
                    value = queue.popleft()
                    kind = type(value)
                    if kind in _CONSTANTS or id(value) in self._seen:
                        continue
                    if queue is not objects and (kind is dict or kind is OrderedDict):  # by far the most: modules' own
                        self._seen[id(value)] = value
                        items = dict(value)
                        self._dicts.append((value, items))
                        for item in items.values():
                            if (type(item) is OrderedDict or type(item) is dict) and not item:  # no hooks
                                self._empty.append(item)
                            elif type(item) not in _CONSTANTS:
                                queue.append(item)
                        continue
                    if issubclass(kind, _KNOWN):
                        self._seen[id(value)] = value
                        if issubclass(kind, LazyModuleMixin) and value.has_uninitialized_params():
                            continue  # what it makes of itself when it first runs is there to stay
                        inner = self._known(value, kind, limited=queue is objects)
                        if issubclass(kind, torch.jit.ScriptModule):  # keeps its mode where nobody else does
                            for part in value.modules():
                                self.attribute(part, "training")
                        if issubclass(kind, nn.Module) or (kind not in _EXACT and self._is_open(kind)):
                            objects.extend(self._of_classes(kind))
                            if not issubclass(kind, _HAVE_ATTRIBUTES):
                                objects.extend(self._of_object(value, kind))
                        queue.extend(inner)
                    elif queue is not objects:
                        objects.append(value)
                    else:
                        self._seen[id(value)] = value
                        objects.extend(self._of_object(value, kind))
                        if self._is_open(kind):
                            objects.extend(self._of_classes(kind))

    # ------------------------------------------------------------------------------------------------------- objects

    def _is_open(self, kind: type) -> bool:
        return is_own(kind, self._packages) and not is_alive(kind) and not issubclass(kind, self._opaque)

    def _of_object(self, value: Any, kind: type) -> list[Any]:
        """Remember slots; what else is to be looked into: the `__dict__`, and what slots hold."""
        if kind is MethodType:
            return [value.__self__]
        if kind is partial:
            return [value.func, value.args, value.keywords]
        mapping = _attributes_of(value)
        if self._is_open(kind):
            return [*(() if mapping is None else (mapping,)), *self._of_slots(value, kind)]
        if mapping is None or is_alive(kind) or issubclass(kind, (type, *self._opaque)):
            return []
        return [mapping] if all(type(item) in ATOMS or _is(item, _DATA) for item in mapping.values()) else []

    def _of_slots(self, value: Any, kind: type) -> list[Any]:
        held = {slot: _in_slot(slot, value) for slot in slots(kind)}
        if held:
            self._undo.append(lambda: _fill_slots(value, held))
        return [item for item in held.values() if type(item) not in _CONSTANTS]

    def _of_classes(self, kind: type) -> list[Any]:
        """The data that the user's own classes among these hold, and objects of the user's own."""
        found = []
        for base in kind.__mro__:
            if id(base) not in self._seen:
                self._seen[id(base)] = base
                if is_own(base, self._packages):
                    items = [item for name, item in vars(base).items() if name[:2] != "__" and type(item) not in ATOMS]
                    found += [item for item in items if _is(item, _KNOWN) or self._is_open(type(item))]
        return found

    # ---------------------------------------------------------------------------------------------------------- data

    def _known(self, value: Any, kind: type, *, limited: bool) -> list[Any]:
        """Remember a value of known type; what else is to be looked into."""
        inner: list[Any] = []
        if issubclass(kind, dict):
            if self._has_room(16 * dict.__len__(value), limited):
                items = _copy(value)
                self._dicts.append((value, items))
                inner = [item for item in items.values() if type(item) not in _CONSTANTS]
        elif issubclass(kind, list):
            if self._has_room(8 * list.__len__(value), limited):
                values = list.copy(value)
                self._lists.append((value, values))
                inner = [item for item in values if type(item) not in _CONSTANTS]
        elif issubclass(kind, (tuple, frozenset)):
            inner = [item for item in elements_of(value) if type(item) not in _CONSTANTS]
        elif issubclass(kind, Tensor):
            if isinstance(value, nn.Parameter):
                self._parameters.append((value, value.requires_grad, value.grad))
                if self._values:
                    self._tensor(value, limited)
                    if value.grad is not None:
                        self._tensor(value.grad, limited)
            else:
                self._tensor(value, limited)
        elif issubclass(kind, _HAVE_ATTRIBUTES):
            inner = [vars(value)]
            if issubclass(kind, nn.Module):
                self._classes.append((value, kind))
        elif issubclass(kind, RNGS):
            self._generator(value)
        elif self._has_room(value.nbytes if issubclass(kind, np.ndarray) else 32 * len(value), limited):
            inner = self._rest(value, kind)
        if limited:
            if len(inner) > self._values_left:
                return []
            self._values_left -= len(inner)
        return inner

    def _has_room(self, size: int, limited: bool) -> bool:
        if not limited:
            return True
        if size > self._room:
            return False
        self._room -= size
        return True

    def _tensor(self, value: Tensor, limited: bool) -> None:
        if value.layout is torch.strided and not value.is_meta and not is_lazy(value):
            distinct = _distinct(value.detach())
            if self._has_room(distinct.numel() * distinct.element_size(), limited):
                self._tensors.append((value, value.shape, distinct.clone()))

    def _rest(self, value: Any, kind: type) -> list[Any]:
        """Remember a set, a deque, an array or bytes; the values in it."""
        if issubclass(kind, set):
            members = set(value)
            self._undo.append(lambda: _refill_set(value, members))
            return [item for item in members if type(item) not in _CONSTANTS]
        if issubclass(kind, deque):
            items = list(deque.__iter__(value))
            self._undo.append(lambda: _refill_deque(value, items))
            return [item for item in items if type(item) not in _CONSTANTS]
        if issubclass(kind, np.ndarray):
            if value.flags.writeable:
                values = value.copy()
                self._undo.append(lambda: _fill_array(value, values))
        else:  # a bytearray, an array of Python's
            buffer = value[:]
            self._undo.append(lambda: operator.setitem(value, slice(None), buffer))
        return []

    def _generator(self, value: Any) -> None:
        if isinstance(value, torch.Generator):
            generator_state = value.get_state()
            self._undo.append(lambda: _discard(value.set_state(generator_state)))
        elif isinstance(value, np.random.Generator):
            bit_state = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", bit_state))
        elif isinstance(value, np.random.RandomState):
            legacy_state = value.get_state()
            self._undo.append(lambda: value.set_state(legacy_state))
        else:
            python_state = value.getstate()
            self._undo.append(lambda: value.setstate(python_state))

    def take_gradients(self) -> None:
        """Takes the parameters' pending gradients away: what nobody can reach, nobody can zero."""
        for parameter, _, gradient in self._parameters:
            if gradient is not None:
                parameter.grad = None

    @contextmanager
    def around(self) -> Iterator[None]:
        """While this lasts, pending gradients are set aside; everything is put back at its end."""
        try:
            self.take_gradients()
            yield
        finally:
            self.restore()

    def accept(self, tensor: Tensor) -> None:
        """What a tensor is now, and not what it was, is put back from now on."""
        with unwatched(), torch.no_grad():
            for held, _, saved in self._tensors:
                if held is tensor:
                    saved.copy_(_distinct(tensor.detach()))

    def restore(self) -> None:
        """Puts everything back."""
        with unwatched(), torch.no_grad():
            self._restore()

    def _restore(self) -> None:
        for mapping, items in self._dicts:
            if items or dict.__len__(mapping):
                _restore_dict(mapping, items)
        for empty in self._empty:
            if empty:
                empty.clear()
        for module, kind in self._classes:
            if type(module) is not kind:
                module.__class__ = kind
        for values, elements in self._lists:
            if not _same(list.copy(values), elements):
                list.__setitem__(values, slice(None), elements)
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


# Contents are read and written by the methods of Python's own types: users' subclasses may have changed them.


def elements_of(value: Any) -> list[Any]:
    """What a sequence or a set holds.

    >>> elements_of((1, 2)), elements_of({3})
    ([1, 2], [3])
    """
    kind = next(kind for kind in (tuple, frozenset, list, deque, set) if issubclass(type(value), kind))
    return [*kind.__iter__(value)]


def _copy(mapping: dict[Any, Any]) -> dict[Any, Any]:
    if isinstance(mapping, OrderedDict):  # has an order of its own
        return dict(OrderedDict.items(mapping)) if dict.__len__(mapping) else {}
    return dict.copy(mapping)


def _restore_dict(mapping: dict[Any, Any], items: dict[Any, Any]) -> None:
    kind = OrderedDict if isinstance(mapping, OrderedDict) else dict
    if dict.__len__(mapping) == len(items) and all(map(operator.is_, kind.keys(mapping), items)):
        if all(map(operator.is_, kind.values(mapping), items.values())):
            return
    else:
        kind.clear(mapping)
    for key, value in items.items():
        kind.__setitem__(mapping, key, value)


def _refill_set(value: set[Any], members: set[Any]) -> None:
    if set(map(id, set(value))) != set(map(id, members)):  # filled anew, it might be in another order
        set.clear(value)
        set.update(value, members)


def _refill_deque(value: deque[Any], items: list[Any]) -> None:
    if not _same(list(deque.__iter__(value)), items):
        deque.clear(value)
        deque.extend(value, items)


def _fill_array(value: Any, values: Any) -> None:
    if value.shape != values.shape:
        value.resize(values.shape, refcheck=False)
    np.copyto(value, values)


def _discard(result: object) -> None:
    """For calls that return something where nothing is wanted."""


def _same(left: list[Any], right: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _is(value: object, kinds: type | tuple[type, ...]) -> bool:
    """What `isinstance` says where nobody pretends: proxies answer with the class of something else."""
    return issubclass(type(value), kinds)


def _attributes_of(value: object) -> dict[str, Any] | None:
    """The `__dict__`, past whatever a class has made of attribute access."""
    try:
        mapping = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return mapping if isinstance(mapping, dict) else None


_EMPTY = object()  # a slot that holds nothing


def _in_slot(slot: MemberDescriptorType, value: object) -> object:
    try:
        return slot.__get__(value, type(value))
    except AttributeError:
        return _EMPTY


def _fill_slots(value: object, held: Mapping[MemberDescriptorType, object]) -> None:
    for slot, item in held.items():
        if _in_slot(slot, value) is not item:
            with suppress(AttributeError, TypeError):  # one that can only be read
                if item is _EMPTY:
                    slot.__delete__(value)
                else:
                    slot.__set__(value, item)


def _distinct(tensor: Tensor) -> Tensor:
    """A view without repeated elements: an expanded tensor cannot be written to as a whole."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
