"""Dotted names of modules and tensors: what lies inside of what, and which a user's pattern may mean."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def is_inside(name: str, module: str) -> bool:
    """Whether a module or a tensor lies inside a module, or is it.

    >>> is_inside("encoder.0", "encoder"), is_inside("encoder", "encoder"), is_inside("encoder2", "encoder")
    (True, True, False)
    """
    return name == module or name.startswith(f"{module}.")


def joined(module: str, name: str) -> str:
    """The full name of what a module calls `name`; the outermost module's name is empty.

    >>> joined("encoder.0", "weight"), joined("", "weight")
    ('encoder.0.weight', 'weight')
    """
    return f"{module}.{name}" if module else name


def without_digits(name: str) -> str:
    """What the names of blocks alike have in common.

    >>> without_digits("layers.10.mlp")
    'layers..mlp'
    """
    return "".join(sign for sign in name if not sign.isdigit())


def no_match(argument: str, pattern: str, names: Sequence[str], what: str) -> str:
    """Word the error for a pattern that matches nothing.

    >>> no_match("ignore", "decoder.*", ["encoder", "head"], "module")
    "ignore: the pattern 'decoder.*' matches no module; near names: 'encoder'"
    """
    return f"{argument}: the pattern {pattern!r} matches no {what}; {_near_names(pattern, names)}"


def no_module(argument: str, name: str, names: Sequence[str]) -> str:
    """Word the error for a name, where no pattern will do, that is not that of a module.

    >>> no_module("twins", "encoder.*", ["encoder", "head"])
    "twins: 'encoder.*' matches no module; near names: 'encoder' (no patterns: a whole name)"
    """
    return f"{argument}: {name!r} matches no module; {_near_names(name, names)} (no patterns: a whole name)"


def _near_names(given: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5) or list(names[:8])
    return f"near names: {', '.join(map(repr, near)) or 'none'}"
