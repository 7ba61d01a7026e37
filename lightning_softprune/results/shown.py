"""A result on one screen of a notebook: a small table, and a bar per group for the channels that are kept."""

from __future__ import annotations

import html
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 64


def sparkline(shares: Sequence[float]) -> str:
    """One character per number between 0 and 1; of many, evenly chosen ones.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    step = max(1, -(-len(shares) // _MOST_BARS))
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares[::step])


def html_table(title: str, rows: Sequence[Sequence[str]], kept: Sequence[float]) -> str:
    """A table of what was before and is after; texts are escaped.

    Args:
        title: Stands above it.
        rows: Four cells each: what, before, after, change.
        kept: Per group, the share of its channels that is kept.
    """
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<table><caption>{html.escape(title)}</caption><tr><th></th><th>dense</th><th>pruned</th><th></th></tr>{cells}"
        f'<tr><td>channels kept</td><td colspan="3" title="one bar per group">{sparkline(kept)}</td></tr></table>'
    )
