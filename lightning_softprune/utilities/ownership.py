"""Whose code something is of: the user's, or a library's. The one place that lists libraries.

There are two questions, and a library of models, such as `transformers`, is where they differ:

- Is it of a *framework*, PyTorch, Lightning or this package (`is_of_a_framework`, `is_users_frame`)? Code that is not
  is the user's, or it is a library of models, which is as good as the user's: it may ask whether it is training, and
  a message may point to a line of it.
- Is a class the user's *own* (`is_own`)? It is neither a framework's, nor Python's, nor installed (`site-packages`):
  only then is it ours to look into its instances and to write their attributes.

Instances of some classes are *alive*: loaders, optimizers, callbacks, loggers, threads, files and their like, and
whatever inherits from them, have their own ways, and their attributes are nobody else's to write.
"""

from __future__ import annotations

import argparse
import sys
from collections import UserDict, UserList
from collections.abc import Iterable, Iterator
from functools import lru_cache
from inspect import unwrap
from pathlib import Path, PurePath
from types import CodeType, FrameType, FunctionType, MemberDescriptorType, SimpleNamespace, TracebackType
from typing import Any

FRAMEWORKS = frozenset(
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


# ----------------------------------------------------------------------------------------------- classes and functions


def package_of(thing: object) -> str:
    """The top package that a class or a function is of; empty where it does not say."""
    return str(getattr(thing, "__module__", "")).partition(".")[0]  # a hook may be anything, even None


def is_of_a_framework(thing: object) -> bool:
    """Whether a class or a function is PyTorch's, Lightning's, or of this package."""
    return package_of(thing) in FRAMEWORKS


def packages_of(kind: type) -> frozenset[str]:
    """The packages that a class and those it inherits from are of, without Python's and the frameworks'."""
    return frozenset(map(package_of, kind.__mro__)) - FRAMEWORKS - sys.stdlib_module_names


@lru_cache(maxsize=4096)
def is_alive(kind: type) -> bool:
    """Whether instances have a life of their own."""
    return any(f"{base.__module__}.".startswith(f"{name}.") for base in kind.__mro__ for name in _ALIVE)


@lru_cache(maxsize=4096)
def is_own(kind: type, packages: frozenset[str] = frozenset()) -> bool:
    """Whether a class is the user's own.

    Args:
        kind: The class.
        packages: The user's own, even where they are installed.
    """
    return issubclass(kind, _RECORDS) or package_of(kind) in packages or not _is_installed(kind)


def is_own_function(function: FunctionType, packages: frozenset[str] = frozenset()) -> bool:
    """Whether a function is the user's own; see `is_own`."""
    return package_of(function) in packages or not _is_installed(function)


@lru_cache(maxsize=4096)
def slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    """The descriptors of `__slots__`, which read and write past whatever a class has made of attribute access."""
    bases = (base for base in kind.__mro__ if not {package_of(base)} & (FRAMEWORKS | sys.stdlib_module_names))
    return tuple(item for base in bases for item in vars(base).values() if isinstance(item, MemberDescriptorType))


def _is_installed(kind: type | FunctionType) -> bool:
    if package_of(kind) in FRAMEWORKS | sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(str(kind.__module__)), "__file__", None)
    return isinstance(file, str) and not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts)


# ------------------------------------------------------------------------------------------------------ what code reads


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
    return any(name in vars(base) for base in kind.__mro__ if is_of_a_framework(base))


@lru_cache(maxsize=4096)
def names_by_function(kind: type) -> tuple[tuple[str, frozenset[str]], ...]:
    """The functions of a class and those it inherits from, without the frameworks', and what each reads by name."""
    found = []
    for base in kind.__mro__:
        own = {} if package_of(base) in FRAMEWORKS | sys.stdlib_module_names else vars(base)
        for name, function in own.items():
            names = frozenset(read for code in codes_of([function]) for read in code.co_names)
            if names:
                found.append((name, names))
    return tuple(found)


# -------------------------------------------------------------------------------------------------------------- frames


def is_users_frame(frame: FrameType) -> bool:
    """Whether a frame runs code of the user's, or of a library of models."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package not in FRAMEWORKS and package != "contextlib"  # which enters what the frameworks decorate


def line_of(frame: FrameType | None, line: int | None = None) -> str:
    """File and line, as in ``"model.py:12"``; empty without a frame."""
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{line or frame.f_lineno}"


def users_line(frame: FrameType | None) -> str:
    """The line of the user's code that led to a frame; empty where there is none."""
    while frame is not None and not is_users_frame(frame):
        frame = frame.f_back
    return line_of(frame)


def frames_of(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """The frames of an exception with the lines that they had come to, from the outermost to the innermost."""
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def is_raised_by_us(error: BaseException) -> bool:
    """Whether an exception that was caught is a check of ours that has failed, and not the user's own."""
    *_, (raised_in, _) = frames_of(error.__traceback__)
    package = str(raised_in.f_globals.get("__name__", "")).partition(".")[0]
    return isinstance(error, ValueError) and package == __name__.partition(".")[0]
