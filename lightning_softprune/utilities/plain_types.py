"""Frozen dataclasses as plain types, for files and checkpoints, and back.

Plain are `dict`, `list`, `str`, `int`, `float`, `bool` and `None`, which both `json` and
`torch.load(weights_only=True)` take. JSON has no NaN and no infinity: in that form they are the strings `"nan"`,
`"inf"` and `"-inf"`.

The dataclasses' type hints are the schema: reading and writing follow them, so a new field needs no code here. Hints
are those four types, `X | None`, `tuple[X, ...]`, `dict[str, X]`, and other dataclasses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

__all__ = ["LARGEST_INTEGER", "from_plain", "shown", "to_plain"]

LARGEST_INTEGER = 2**63 - 1
"""No count of anything is larger; beyond it, a file is damaged (Python's integers have no end, its floats have)."""

_SCALARS = (int, float, str, bool)

_NOT_IN_JSON = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_plain(value: Any) -> dict[str, Any]:
    """A dataclass in plain types; NumPy and torch scalars become Python's numbers."""
    encoded: dict[str, Any] = _encode(type(value), value)
    return encoded


def from_plain(kind: type, data: Any, what: str) -> Any:
    """The dataclass that :func:`to_plain` described; keys it does not know (a newer version's) are ignored.

    Args:
        kind: The dataclass.
        data: What `to_plain` returned, also after a round trip through a JSON file or a checkpoint.
        what: What it is, for messages.

    Raises:
        ValueError: Something is missing or of the wrong type; the message says where.
    """
    try:
        return _Decoder().decode(kind, data, "")
    except _PlainError as error:
        raise ValueError(f"not {what}: {error}") from None


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002 - the base class's signature
        digits = int(x.bit_length() * math.log10(2)) + 1
        return repr(x) if digits <= 40 else f"an integer of about {digits} digits"  # Python refuses more than 4300


_SHORT = _Short()


def shown(value: object) -> str:
    """A value that a file holds, for messages: short whatever it is, and on one line.

    >>> shown("x"), shown([1, 2]), shown(10**5000)
    ("'x'", '[1, 2]', 'an integer of about 5001 digits')
    """
    text = _SHORT.repr(value).replace("\n", " ")
    return text if len(text) <= 200 else f"{text[:197]}..."


class _PlainError(Exception):
    """Something in the data is missing or of the wrong type."""


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _encode(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return {name: _encode(kind, getattr(value, name)) for name, kind in _hints(typing.cast(type, hint)).items()}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return [_encode(arguments[0], item) for item in value]
    if origin is dict:
        return {str(key): _encode(arguments[1], item) for key, item in value.items()}
    if origin is types.UnionType:  # X | None
        return None if value is None else _encode(arguments[0], value)
    if hint is float:
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if hint is int:
        return operator.index(value)
    return hint(value)  # str, bool


class _Decoder:
    """Reads one value.

    A pickled file may hold one list in a thousand places (JSON cannot): it is read once, so that what is read is never
    much larger than what is in the file.
    """

    def __init__(self) -> None:
        self._read: dict[tuple[int, Any], Any] = {}

    def decode(self, hint: Any, value: Any, where: str) -> Any:
        if hint in _SCALARS:
            return _scalar(hint, value, where)
        key = (id(value), hint)
        if key not in self._read:
            self._read[key] = self._container(hint, value, where)
        return self._read[key]

    def _container(self, hint: Any, value: Any, where: str) -> Any:
        if dataclasses.is_dataclass(hint):
            return self._fields(typing.cast(type, hint), value, where)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is types.UnionType:  # X | None
            return None if value is None else self.decode(arguments[0], value, where)
        if origin is tuple:
            if not isinstance(value, (list, tuple)):
                raise _wrong(where, "a list", value)
            return tuple(self.decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        if not isinstance(value, Mapping):
            raise _wrong(where, "a dict", value)
        for key in value:
            if not isinstance(key, str):
                raise _wrong(f"a key of {where}", "a string", key)
        return {key: self.decode(arguments[1], item, f"{where}[{shown(key)}]") for key, item in value.items()}

    def _fields(self, cls: type, value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise _wrong(where, "a dict", value)
        arguments = {}
        for known in dataclasses.fields(cls):
            place = f"{where}.{known.name}" if where else known.name
            if known.name in value:
                arguments[known.name] = self.decode(_hints(cls)[known.name], value[known.name], place)
            elif known.default is known.default_factory is dataclasses.MISSING:
                raise _PlainError(f"{place} is missing")
        return cls(**arguments)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float:
        if isinstance(value, str) and value in _NOT_IN_JSON:
            return _NOT_IN_JSON[value]
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise _wrong(where, "a number", value)
        try:
            return float(value)
        except OverflowError:
            raise _wrong(where, "a number that a float can hold", value) from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong(where, {int: "an integer", str: "a string", bool: "true or false"}[hint], value)
    if hint is int and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        raise _wrong(where, "an integer of 64 bits", value)
    return value


def _wrong(where: str, expected: str, value: Any) -> _PlainError:
    return _PlainError(f"{where or 'the whole'}: {shown(value)} is not {expected}")
