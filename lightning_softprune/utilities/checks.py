"""Checks of users' arguments, all in one wording: the argument, the value given, what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def _typed(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: {value!r} is not a {kind.__name__}")
    return value


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, allowed))}")
    return value


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {value!r} is not a whole number")
    if value < least:
        raise ValueError(f"{name}: {value} is less than {least}")
    return value


def _number(name: str, value: Any, low: float, high: float, low_included: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {value!r} is not a number")
    if not (low < value < high or (low_included and value == low)):
        raise ValueError(
            f"{name}: {value} is not between {low:g} and {high:g} ({'upper end' if low_included else 'both'} excluded)"
        )
    return float(value)


def _strings(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name}: {value!r} is not a list of strings")
    return list(value)


def _mapping(name: str, value: Any, read: Callable[[str, Any], Any]) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}: {value!r} is not a dictionary with string keys")
    return {key: read(f"{name}[{key!r}]", item) for key, item in value.items()}


def whole_number(name: str, value: int, least: int = 1) -> int:
    """`value` if it is a whole number of at least `least`.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return int(value)


def budget(value: int | None) -> int | None:
    """`value` if it can be a `max_evaluations`: None or a positive whole number."""
    return None if value is None else whole_number("max_evaluations", value)


def fraction(name: str, value: float) -> float:
    """`value` if it lies in (0, 1].

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}.")
    return float(value)


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is one of `allowed`.

    Raises:
        ValueError: If it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value
