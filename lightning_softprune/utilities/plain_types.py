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
import types
import typing
from collections.abc import Mapping
from typing import Any

__all__ = ["from_plain", "to_plain"]

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
        return _decode(kind, data, "")
    except _PlainError as error:
        raise ValueError(f"not {what}: {error}") from None


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


def _decode(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _decode_fields(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, "a list", value)
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, "a dict", value)
        return {str(key): _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin is types.UnionType:  # X | None
        return None if value is None else _decode(arguments[0], value, where)
    if hint is float:
        if isinstance(value, str) and value in _NOT_IN_JSON:
            return _NOT_IN_JSON[value]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise _wrong(where, "a number", value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong(where, {int: "an integer", str: "a string", bool: "true or false"}[hint], value)
    return value


def _decode_fields(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, "a dict", value)
    arguments = {}
    for known in dataclasses.fields(cls):
        place = f"{where}.{known.name}" if where else known.name
        if known.name in value:
            arguments[known.name] = _decode(_hints(cls)[known.name], value[known.name], place)
        elif known.default is known.default_factory is dataclasses.MISSING:
            raise _PlainError(f"{place} is missing")
    return cls(**arguments)


def _wrong(where: str, expected: str, value: Any) -> _PlainError:
    return _PlainError(f"{where or 'the whole'}: {value!r:.60} is not {expected}")
