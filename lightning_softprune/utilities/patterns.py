"""Names that a user's pattern may mean."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def no_match(argument: str, pattern: str, names: Sequence[str], what: str) -> str:
    """Word the error for a pattern that matches nothing.

    >>> no_match("ignore", "decoder.*", ["encoder", "head"], "module")
    "ignore: the pattern 'decoder.*' matches no module; near names: 'encoder'"
    """
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5) or list(names[:8])
    return f"{argument}: the pattern {pattern!r} matches no {what}; near names: {', '.join(map(repr, near)) or 'none'}"
