"""Lightning under its two names: what is said of one library holds for the other.

A *library* is `lightning.pytorch` (with `lightning.fabric`), or `pytorch_lightning` (with `lightning_fabric`): two
packages with the same files, whose classes have nothing to do with each other. This package is written with the names
of the first. The *counterpart* of such a name is the same name in the other library.

Nothing is imported for this: a library that the user has not imported has no objects to be told apart. Both, and torch,
take seconds to import; packages of ours that are of use without them hand out such names *lazily*.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

Value = TypeVar("Value")
Class = TypeVar("Class", bound=type)

LIBRARY, OTHER = "lightning.pytorch", "pytorch_lightning"

_PACKAGES = {LIBRARY: OTHER, "lightning.fabric": "lightning_fabric"}
_OWNERS = ("Trainer", "LightningModule", "LightningDataModule")


def library_of(owner: object) -> str:
    """The library of a trainer, a module or a data module: `lightning.pytorch` if it is of neither."""
    other = sys.modules.get(OTHER)
    kinds = tuple(getattr(other, name) for name in _OWNERS if hasattr(other, name))
    return OTHER if isinstance(owner, kinds) else LIBRARY


def counterpart(value: Value, owner: object) -> Value:
    """A class, function or module of Lightning, from the library of a trainer, a module or a data module."""
    return value if library_of(owner) == LIBRARY else _in_other(value)


def counterparts(kind: type[Value]) -> tuple[type[Value], ...]:
    """A class of Lightning in every library that is imported, as `isinstance` takes it."""
    name = _name_in_other(kind.__module__)
    other = getattr(sys.modules.get(name or ""), kind.__name__, None)  # the two may be of different releases
    return (kind,) if other is None else (kind, other)


def of_both_libraries(cls: Class) -> Class:
    """Class decorator: where a base is Lightning's, its counterpart is a base too, from when it is imported.

    The other library may well be imported after this package. It then asks `isinstance` and `issubclass` of its own
    classes, and users catch its own exceptions.
    """

    def join(module: ModuleType, name: str) -> None:
        cls.__bases__ = (*cls.__bases__, getattr(module, name))

    for base in cls.__bases__:
        if other := _name_in_other(base.__module__):
            _once_imported(other, lambda module, name=base.__name__: join(module, name))  # type: ignore[misc]
    return cls


def in_both_libraries(kind: Class, then: Callable[[Class], None]) -> None:
    """Do something to a class of Lightning now, and to its counterpart when that is imported."""
    then(kind)
    if other := _name_in_other(kind.__module__):
        _once_imported(other, lambda module: then(getattr(module, kind.__name__)))


def _name_in_other(module: str) -> str | None:
    """The name that a file of one library has in the other; `None` for files of anybody else."""
    for package, other in _PACKAGES.items():
        if f"{module}.".startswith(f"{package}."):
            return other + module.removeprefix(package)
    return None


def _in_other(value: Any) -> Any:
    path = value.__name__ if isinstance(value, ModuleType) else value.__module__
    module = import_module(_name_in_other(path) or path)
    return module if isinstance(value, ModuleType) else getattr(module, value.__name__)


class _Watch(MetaPathFinder):
    """Waits for one import, and is gone."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, fullname: str, *_: Any, **__: Any) -> ModuleSpec | None:
        """What the other finders find, with the call after the module's own code."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            own = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                loader.exec_module = own
                own(module)
                self._then(module)

            loader.exec_module = exec_module
        return spec


def _once_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, then))


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """Make a package's `__getattr__`.

    Args:
        package: Its name.
        homes: Name -> the module below the package that has it, and after a colon its name there if it is another one.

    >>> lazily("lightning_softprune", {"as_array": "utilities.arrays:FloatArray"})("missing")
    Traceback (most recent call last):
        ...
    AttributeError: module 'lightning_softprune' has no attribute 'missing'
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place, _, there = homes[name].partition(":")
        try:
            home = import_module(f"{package}.{place}")
        except AttributeError as error:  # of a library that is broken; it would read as if there were no such name
            raise ImportError(f"{package}.{place} cannot be imported: {error}") from error
        value = getattr(home, there or name)
        setattr(sys.modules[package], name, value)  # from now on it is there
        return value

    return get
