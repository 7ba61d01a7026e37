"""Names that a user's pattern, or a name with a mistake, may mean."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


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
