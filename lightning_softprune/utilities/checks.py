"""Checks of users' arguments, all in one wording: the argument, the value given, what is allowed.

Each function returns the value that it was given, checked. A wrong type is a TypeError, a value out of range a
ValueError; the message begins with the argument's name.

>>> whole_number("epochs", -1, least=0)
Traceback (most recent call last):
    ...
ValueError: epochs: -1 is less than 0
>>> one_of("cost", "flops", ("params", "macs"))
Traceback (most recent call last):
    ...
ValueError: cost: 'flops' is not one of 'params', 'macs'
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

import numpy as np

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def is_number(value: object) -> bool:
    """Whether a value is a number, Python's or NumPy's; true and false are none.

    >>> is_number(np.float32(0.5)), is_number(3), is_number(True), is_number("3")
    (True, True, False, False)
    """
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_whole_number(value: object) -> bool:
    """Whether a value is an integer, Python's or NumPy's; true and false are none.

    >>> is_whole_number(np.int64(3)), is_whole_number(3.0), is_whole_number(True)
    (True, False, False)
    """
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def instance_of(name: str, value: object, kind: type[Value]) -> Value:
    """`value` if it is of a type.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}: {value!r} is not a {kind.__name__}")
    return value


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """`value` if it is one of those allowed.

    Raises:
        ValueError: It is not.
    """
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, allowed))}{near_miss(value, allowed)}")
    return allowed[allowed.index(value)]


def near_miss(given: object, names: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """The end of a message that names what was meant; empty where nothing is near.

    Args:
        given: What was given.
        names: What it may be.
        most: How many names are offered.
        cutoff: How near they have to be, from 0 to 1.

    >>> near_miss("target_sparsty", ["monitor", "target_sparsity"])
    "; did you mean 'target_sparsity'?"
    """
    near = get_close_matches(given, sorted(names), n=most, cutoff=cutoff) if isinstance(given, str) else []
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_names(caller: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that are not known, and name what was meant.

    Raises:
        TypeError: One is not.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            hint = near_miss(name, known) or f"; it takes {', '.join(known)}"
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{hint}")


def suggesting(function: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Decorator: a misspelt keyword argument is answered with what was meant. The signature stays as it is.

    >>> @suggesting
    ... def fit(*, epochs=1): ...
    >>> fit(epoch=2)
    Traceback (most recent call last):
        ...
    TypeError: fit() got an unexpected keyword argument 'epoch'; did you mean 'epochs'?
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        check_names(function.__qualname__.removesuffix(".__init__"), kwargs, known)
        return function(*args, **kwargs)

    return checked


def whole_number(name: str, value: Any, least: int | None = 1) -> int:
    """`value` as an int, if it is a whole number, and of at least `least` where there is a least one.

    Raises:
        TypeError: It is not a whole number.
        ValueError: It is too small.
    """
    if not is_whole_number(value):
        raise TypeError(f"{name}: {value!r} is not a whole number")
    if least is not None and value < least:
        raise ValueError(f"{name}: {value} is less than {least}")
    return int(value)


def optional_whole_number(name: str, value: Any, least: int = 1) -> int | None:
    """The same, or ``None``."""
    return None if value is None else whole_number(name, value, least)


def number(name: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        TypeError: It is not a number.
    """
    if not is_number(value):
        raise TypeError(f"{name}: {value!r} is not a number")
    return float(value)


def number_between(name: str, value: Any, low: float, high: float, *, low_included: bool = False) -> float:
    """`value` as a float, if it lies between two others.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range.
    """
    found = number(name, value)
    if not (low < found < high or (low_included and found == low)):
        excluded = "upper end" if low_included else "both"
        raise ValueError(f"{name}: {value} is not between {low:g} and {high:g} ({excluded} excluded)")
    return found


def optional_positive(name: str, value: Any) -> float | None:
    """`value` as a float above 0, or ``None``.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above 0, or not finite.
    """
    if value is None:
        return None
    found = number(name, value)
    if not 0.0 < found < float("inf"):
        raise ValueError(f"{name}: {value} is not a positive, finite number")
    return found


def fraction(name: str, value: Any, of: str = "") -> float:
    """`value` as a float, if it lies in (0, 1].

    Args:
        name: The argument.
        value: What was given.
        of: What it is a fraction of, for the message.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range.
    """
    found = number(name, value)
    if not 0.0 < found <= 1.0:
        raise ValueError(f"{name}: {value} is not a fraction{f' of {of}' if of else ''} in (0, 1]")
    return found


def ordered_pair(name: str, value: Any) -> list[float]:
    """`value` as two floats, if they are a pair ``0 <= low <= high <= 1``.

    Raises:
        TypeError: The two are not numbers.
        ValueError: There are not two, or they are out of order or range.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{name}: {value!r} is not a pair [low, high]")
    if not all(is_number(end) and not math.isnan(end) for end in value):
        raise TypeError(f"{name}: {value!r} is not a pair of numbers")
    low, high = (float(end) for end in value)
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"{name}: {value!r} is not 0 <= low <= high <= 1")
    return [low, high]


def strings(name: str, value: Any) -> list[str]:
    """`value` as a list of strings; ``None`` is an empty one.

    Raises:
        TypeError: It is neither.
    """
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name}: {value!r} is not a list of strings")
    return list(value)


def mapping(name: str, value: Any, check: Callable[[str, Any], Any]) -> dict[str, Any] | None:
    """`value` as a dictionary whose values have passed a check of their own; ``None`` stays ``None``.

    Raises:
        TypeError: It is neither.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}: {value!r} is not a dictionary with string keys")
    return {key: check(f"{name}[{key!r}]", item) for key, item in value.items()}
