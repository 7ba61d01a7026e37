"""Words of messages."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "round"), counted(1200, "trial")
    ('1 round', '1,200 trials')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
