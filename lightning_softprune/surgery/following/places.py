"""What functions and objects hold beside a `__dict__`: variables of closures, default arguments, `__slots__`.

Those of the user's own are looked into, and not those of libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch.optim import Optimizer

from lightning_softprune.utilities.ownership import FRAMEWORKS, is_own_function, package_of, slots


@dataclass(frozen=True)
class Place:
    """Where a value is held.

    Attributes:
        name: What it is called there.
        value: What is held.
        put: Writes something else in its place; it may raise `AttributeError` or `TypeError`.
    """

    name: str
    value: Any
    put: Callable[[Any], None]


def hidden_places(holder: object, packages: frozenset[str]) -> Iterator[Place]:
    """The places that no `__dict__` has.

    Args:
        holder: A function, a method, a partial function, or any object.
        packages: The user's own, even where they are installed.
    """
    if isinstance(holder, FunctionType):
        if is_own_function(holder, packages):
            yield from _of_function(holder)
    elif isinstance(holder, MethodType):
        for name in ("__self__", "__func__"):
            yield Place(name, getattr(holder, name), functools.partial(setattr, holder, name))
    elif isinstance(holder, functools.partial):
        yield Place("func", holder.func, lambda after: _refill(holder, after, holder.args))
        for number, value in enumerate(holder.args):
            yield Place(f"args[{number}]", value, functools.partial(_put_argument, holder, number))
    else:
        kind: type = type(holder)
        for slot in slots(kind):
            try:
                value = slot.__get__(holder, kind)
            except AttributeError:  # empty
                continue
            yield Place(slot.__name__, value, functools.partial(slot.__set__, holder))


def _of_function(function: FunctionType) -> Iterator[Place]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            continue
        yield Place(name, value, functools.partial(setattr, cell, "cell_contents"))
    for number, value in enumerate(function.__defaults__ or ()):
        yield Place(f"__defaults__[{number}]", value, functools.partial(_put_default, function, number))
    by_keyword = function.__kwdefaults__ or {}
    for name, value in list(by_keyword.items()):
        yield Place(name, value, functools.partial(by_keyword.__setitem__, name))


def _put_default(function: FunctionType, number: int, value: Any) -> None:
    function.__defaults__ = _with(function.__defaults__ or (), number, value)


def _put_argument(partial: functools.partial[Any], number: int, value: Any) -> None:
    _refill(partial, partial.func, _with(partial.args, number, value))


def _refill(partial: functools.partial[Any], func: Any, args: tuple[Any, ...]) -> None:
    partial.__setstate__((func, args, partial.keywords, partial.__dict__))  # type: ignore[attr-defined]


def _with(items: tuple[Any, ...], number: int, value: Any) -> tuple[Any, ...]:
    return (*items[:number], value, *items[number + 1 :])


_WITHOUT_PARAMETERS = (FRAMEWORKS - {"torch"}) | {
    *("argparse", "builtins", "datetime", "functools", "io", "logging", "pathlib", "random", "threading", "types"),
    "weakref",
}
"""Packages whose objects are not looked into. Not torch, whose averaged models and wrappers hold parameters, and not
all of Python's, whose containers and threads of work may."""


def is_foreign(value: object) -> bool:
    """Whether an object is of the standard library or of a framework: it keeps no parameters of ours by itself."""
    return package_of(type(value)) in _WITHOUT_PARAMETERS and not isinstance(value, Optimizer)
