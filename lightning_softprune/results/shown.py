"""A result on one screen of a notebook: a small table, and a bar per group for the channels that are kept."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from lightning_softprune.results.fronts import format_change

if TYPE_CHECKING:
    from lightning_softprune.results.round_result import PruningResult

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 64


def sparkline(shares: list[float]) -> str:
    """One character per number between 0 and 1; of many, evenly chosen ones.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    step = max(1, -(-len(shares) // _MOST_BARS))
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares[::step])


def as_html(result: PruningResult) -> str:
    """The table; what stands in it of the user's is escaped."""
    before, after = result.costs_before, result.costs_after
    rows = [
        ("parameters", f"{before.params:,}", f"{after.params:,}", format_change(before.params, after.params)),
        ("MACs", f"{before.macs:,}", f"{after.macs:,}", format_change(before.macs, after.macs)),
        (result.monitor, f"{result.score_before:.4g}", f"{result.score_after:.4g}", ""),
    ]
    if result.latency_before is not None and result.latency_after is not None:
        dense, pruned = (f"{1000 * seconds:.4g} ms" for seconds in (result.latency_before, result.latency_after))
        rows.insert(2, ("latency", dense, pruned, result.latency_change))
    kept = [group.channels_after / max(group.channels_before, 1) for group in result.groups]
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    state = "" if result.applied else ", not applied"
    return (
        f"<table><caption>SoftPruning, epoch {result.epoch}{state}</caption>"
        f"<tr><th></th><th>dense</th><th>pruned</th><th></th></tr>{cells}"
        f'<tr><td>channels kept</td><td colspan="3" title="one bar per group">{sparkline(kept)}</td></tr></table>'
    )
