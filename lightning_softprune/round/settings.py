"""What the user asked of a round, as checked values: no names are looked up and nothing is run here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_softprune.graph import COSTS
from lightning_softprune.search import Constraint, SearchStrategy
from lightning_softprune.utilities.checks import _mapping, _number, _strings, _whole


@dataclass(frozen=True)
class RoundSettings:
    """What the user asked for; the fields are SoftPruning's arguments of the same names."""

    monitor: str
    mode: str
    tolerance: float
    search: SearchStrategy
    components: dict[str, list[str]] | None
    ignore: tuple[str, ...]
    twins: dict[str, str] | None
    bounds: dict[str, list[float]] | None
    importance: str
    compensation: str
    round_to: int
    search_batches: int | None
    calibration_batches: int
    seed: int
    verbose: bool
    cost: str = "params"
    limits: dict[str, float] | None = None
    constraints: tuple[Constraint, ...] = ()
    on_violation: str = "skip"
    granularity: str = "group"


LIMITS = (*COSTS, "latency")
"""What can be limited."""


def cubic_schedule(target: float, rounds: int) -> list[float]:
    """Sparsity of each round on the way to the last one's: ``s * (1 - (1 - k / n)^3)`` (arXiv 1710.01878, eq. 1).

    >>> [round(sparsity, 4) for sparsity in cubic_schedule(0.7, 3)]
    [0.4926, 0.6741, 0.7]
    """
    return [target * (1.0 - (1.0 - k / rounds) ** 3) for k in range(1, rounds + 1)]


def _epochs(value: Any) -> list[int]:
    if not isinstance(value, (int, list, tuple)):
        raise TypeError(f"epochs: {value!r} is not a whole number or a list of them")
    epochs = [_whole("epochs", epoch, 0) for epoch in (value if isinstance(value, (list, tuple)) else [value])]
    if not epochs:
        raise ValueError("epochs: an empty list; give at least one epoch")
    if sorted(set(epochs)) != epochs:
        raise ValueError(f"epochs: {value} is not a strictly increasing list")
    return epochs


def _targets(value: Any, rounds: int) -> Sequence[float | None]:
    if value is None:
        return [None] * rounds
    if not isinstance(value, (int, float, list, tuple)):
        raise TypeError(f"target_sparsity: {value!r} is not a number, a list of numbers or None")
    if not isinstance(value, (list, tuple)):
        return cubic_schedule(_number("target_sparsity", value, 0.0, 1.0), rounds)
    targets = [_number("target_sparsity", target, 0.0, 1.0) for target in value]
    if len(targets) != rounds:
        raise ValueError(
            f"target_sparsity: {len(targets)} values for {rounds} epochs; give one value, or one per epoch"
        )
    if any(later < earlier for earlier, later in itertools.pairwise(targets)):
        raise ValueError(f"target_sparsity: {value} decreases; removed channels do not come back")
    return targets


def _limits(value: Any) -> dict[str, float] | None:
    def read(name: str, share: Any) -> float:
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"{name}: {share!r} is not a number")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"{name}: {share} is not a fraction of the dense model in (0, 1]")
        return float(share)

    found: dict[str, float] | None = _mapping("limits", value, read)
    for name in found or {}:
        if name not in LIMITS:
            raise ValueError(f"limits: {name!r} is not one of {', '.join(map(repr, LIMITS))}")
    return found


def _patterns(name: str, value: Any) -> dict[str, list[str]] | None:
    found: dict[str, list[str]] | None = _mapping(name, value, _strings)
    return found


def _bounds(value: Any) -> dict[str, list[float]] | None:
    def read(name: str, pair: Any) -> list[float]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"{name}: {pair!r} is not a pair [low, high]")
        if any(isinstance(end, bool) or not isinstance(end, (int, float)) or math.isnan(end) for end in pair):
            raise TypeError(f"{name}: {pair!r} is not a pair of numbers")
        low, high = (float(end) for end in pair)
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"{name}: {pair!r} is not 0 <= low <= high <= 1")
        return [low, high]

    found: dict[str, list[float]] | None = _mapping("bounds", value, read)
    return found
