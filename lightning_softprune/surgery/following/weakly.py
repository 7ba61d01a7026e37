"""What points to a parameter: itself, or a weak reference, which dies with the parameter that a plan replaces."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

_CONTAINERS = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)


def of_weak_container(value: object) -> Any:
    """The set or dictionary of weak references in a container of the standard library's; `None` for what is none."""
    return value.data if isinstance(value, _CONTAINERS) else None  # type: ignore[union-attr]


def pointed_to(value: object) -> object:
    """What a weak reference points to; any other value itself."""
    return value() if isinstance(value, weakref.ref) else value


def in_place_of(value: Any, new: Mapping[int, nn.Parameter]) -> Any:
    """What takes the place of a parameter, or of a weak reference to one: the new one, or a reference of its class.

    Any other value, and a weak reference to a method, is returned as it is.

    Args:
        value: Any value.
        new: What has taken the place of parameters, by the identities of these.
    """
    after = new.get(id(pointed_to(value))) if isinstance(value, (nn.Parameter, weakref.ref)) else None
    if after is None or isinstance(value, nn.Parameter):
        return value if after is None else after
    key = (value.key,) if isinstance(value, weakref.KeyedRef) else ()
    return type(value)(after, value.__callback__, *key)
