"""What the user asked of a round, as checked values: no names are looked up and nothing is run here."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_softprune.search import Constraint, SearchStrategy

__all__ = ["RoundSettings"]


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
