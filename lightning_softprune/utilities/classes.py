"""Whose class an object is of, and what its instances hold beside a `__dict__`.

A class is the *user's own* unless it belongs to Python, to torch or Lightning, or to a library that is installed
(`site-packages`). Instances of some classes are *alive*: loaders, optimizers, callbacks, loggers, threads, files and
their like, and whatever inherits from them, have their own ways, and their attributes are nobody else's to write.
"""

from __future__ import annotations

import argparse
import sys
from collections import UserDict, UserList
from collections.abc import Iterable, Iterator
from functools import lru_cache
from inspect import unwrap
from pathlib import PurePath
from types import CodeType, FunctionType, MemberDescriptorType, SimpleNamespace
from typing import Any

_FRAMEWORKS = frozenset(
    {"lightning", "lightning_fabric", "lightning_softprune", "lightning_utilities", "numpy", "pytorch_lightning"}
    | {"torch", "torchmetrics"}
)

_ALIVE = (
    *("lightning", "lightning_fabric", "lightning_softprune", "pytorch_lightning"),
    *("torch.optim", "torch.profiler", "torch.utils.data", "torch.utils.tensorboard"),
    *("_io", "_thread", "asyncio", "concurrent", "enum", "io", "logging", "multiprocessing", "queue", "socket"),
    *("sqlite3", "subprocess", "tempfile", "threading"),
)

_RECORDS = (SimpleNamespace, argparse.Namespace, UserDict, UserList)  # Python's, but data are all they are for


def packages_of(kind: type) -> frozenset[str]:
    """The packages that a class and those it inherits from are of, without Python's and the frameworks'."""
    return frozenset(map(_package, kind.__mro__)) - _FRAMEWORKS - sys.stdlib_module_names


@lru_cache(maxsize=4096)
def is_alive(kind: type) -> bool:
    """Whether instances have a life of their own."""
    return any(f"{base.__module__}.".startswith(f"{name}.") for base in kind.__mro__ for name in _ALIVE)


@lru_cache(maxsize=4096)
def is_own(kind: type, packages: frozenset[str] = frozenset()) -> bool:
    """Whether a class is the user's.

    Args:
        kind: The class.
        packages: The user's own, even where they are installed.
    """
    return issubclass(kind, _RECORDS) or _package(kind) in packages or not _is_installed(kind)


def is_own_function(function: FunctionType, packages: frozenset[str] = frozenset()) -> bool:
    """Whether a function is the user's; see `is_own`."""
    return _package(function) in packages or not _is_installed(function)


@lru_cache(maxsize=4096)
def slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    """The descriptors of `__slots__`, which read and write past whatever a class has made of attribute access."""
    bases = (base for base in kind.__mro__ if not {_package(base)} & (_FRAMEWORKS | sys.stdlib_module_names))
    return tuple(item for base in bases for item in vars(base).values() if isinstance(item, MemberDescriptorType))


def _package(kind: type | FunctionType) -> str:
    return str(kind.__module__).partition(".")[0]


def _is_installed(kind: type | FunctionType) -> bool:
    if _package(kind) in _FRAMEWORKS | sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(str(kind.__module__)), "__file__", None)
    return isinstance(file, str) and not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts)


def codes_of(functions: Iterable[Any]) -> Iterator[CodeType]:
    """The code of functions, and of what is defined inside of them."""
    codes = [code for function in functions if (code := getattr(unwrap(function), "__code__", None)) is not None]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        yield code


def is_framework_name(kind: type, name: str) -> bool:
    """Whether a framework's class, which this one inherits from, has a function of this name: `forward`, steps, hooks.

    >>> import torch
    >>> is_framework_name(torch.nn.Linear, "forward"), is_framework_name(torch.nn.Linear, "merged")
    (True, False)
    """
    return any(name in vars(base) for base in kind.__mro__ if _package(base) in _FRAMEWORKS)


def names_by_function(kind: type) -> Iterator[tuple[str, set[str]]]:
    """The functions of a class and those it inherits from, without the frameworks', and what each reads by name."""
    for base in kind.__mro__:
        own = {} if _package(base) in _FRAMEWORKS | sys.stdlib_module_names else vars(base)
        for name, function in own.items():
            names = {read for code in codes_of([function]) for read in code.co_names}
            if names:
                yield name, names
