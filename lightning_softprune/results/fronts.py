"""What beats what, and by how much: Pareto fronts and relative changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_softprune.utilities.checks import one_of

MODES = ("min", "max")


def pareto_front(sparsities: Sequence[float], scores: Sequence[float], mode: str) -> tuple[int, ...]:
    """Indices of the points that no other point beats, by ascending sparsity.

    A point is beaten by another that is at least as good in sparsity and score and better in one of them; equal points
    do not beat each other. A point with a NaN is never on the front and beats none.

    Args:
        sparsities: Higher is better.
        scores: One per sparsity.
        mode: `"min"` if a lower score is better, `"max"` if a higher one is.

    Returns:
        Indices into the arguments.

    Raises:
        ValueError: If `mode` is neither.

    >>> pareto_front([0.5, 0.6, 0.7, 0.7], [20.0, 20.5, 19.0, 18.0], mode="max")
    (1, 2)
    """
    sign = 1.0 if one_of("mode", mode, MODES) == "max" else -1.0
    points = [
        (sparsity, sign * score, index)
        for index, (sparsity, score) in enumerate(zip(sparsities, scores, strict=True))
        if not (math.isnan(sparsity) or math.isnan(score))
    ]
    points.sort(key=lambda point: (-point[0], -point[1], -point[2]))  # the index: ties come out in trial order
    front: list[int] = []
    last: tuple[float, float] | None = None
    for sparsity, score, index in points:
        if last is None or score > last[1] or (sparsity, score) == last:
            front.append(index)
            last = (sparsity, score)
    return tuple(reversed(front))


def format_change(before: float, after: float) -> str:
    """The relative change in percent.

    >>> format_change(1000, 298)
    '-70.2 %'
    >>> format_change(1000, 1000)
    '0.0 %'
    """
    change = 100.0 * (after / before - 1.0) if before else 0.0
    return f"{change:+.1f} %" if abs(change) >= 0.05 else "0.0 %"
