"""What the user asked of a round, as checked values: no names are looked up and nothing is run here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lightning_softprune.calibration import LEAST_BATCHES, Importance
from lightning_softprune.compensation import Teacher
from lightning_softprune.results import Costs, PruningResult
from lightning_softprune.search import COSTS, Constraint, Objective, SearchStrategy
from lightning_softprune.surgery import Judgement
from lightning_softprune.utilities import checks


@dataclass(frozen=True)
class RoundSettings:
    """What the user asked for; the fields are SoftPruning's arguments of the same names.

    A round finds its `mode` out where that is "auto" (`feasibility.py`).
    """

    monitor: str
    mode: str
    tolerance: float
    search: SearchStrategy
    components: dict[str, list[str]] | None
    ignore: tuple[str, ...]
    twins: dict[str, str] | None
    bounds: dict[str, list[float]] | None
    importance: str | Importance | None
    compensation: str
    round_to: int
    search_batches: int | None
    calibration_batches: int | None
    seed: int
    verbose: bool
    cost: str = "params"
    limits: dict[str, float] | None = None
    constraints: tuple[Constraint, ...] = ()
    on_violation: str = "skip"
    granularity: str = "group"
    memory_limit: float | None = None
    healing: int = 0
    teacher: float = 0.0
    latency_batch: int | None = None

    @property
    def objective(self) -> Objective:
        """What plans are judged by, with the mode as it was asked for."""
        return Objective(self.monitor, self.mode, self.constraints)

    @property
    def ranking(self) -> str | Importance | None:
        """The criterion: elimination makes up for what goes by least squares, which is of no use to who does not."""
        by_default = self.importance is None and self.compensation != "least_squares"
        return "activation" if by_default else self.importance

    @property
    def least_calibration_batches(self) -> int:
        """Those that a round reads before it knows whether more are wanted."""
        return LEAST_BATCHES if self.calibration_batches is None else self.calibration_batches


@dataclass(frozen=True)
class Goal:
    """What one round aims at.

    Attributes:
        epoch: The epoch before which the round runs; with the seed, all that the round's random numbers depend on.
        target: Sparsity to reach, against the first dense model; ``None``: the highest that meets the constraints.
        dense: Costs of the first dense model; ``None``: the module as it is.
        dense_latency_ratio: How many times as long as the module now is the first dense model takes; of use for a
            latency limit.
        commit: Whether to prune; ``False`` searches only and leaves the module as it is.
        rehearse: Whether to go through a whole round with a single plan, commit included, for the sake of the errors
            it may find. Give it with ``commit=False``: all of it is taken back, and no file is written.
        earlier: The round of this fit before this one; where its curves lie, tells where to look first.
        take_teacher: Is given the dense network after a commit, where the settings ask for a teacher.
        pruned_before: Whether an earlier fit has pruned the module: what it has removed is not removed again.
        on_the_way: Whether a round of this fit has.
        limits: What may remain of each cost in this round; ``None``: what the settings say.
        judged: What becomes of modules outside of the model that look like parts of it, by identity.
    """

    epoch: int
    target: float | None
    dense: Costs | None = None
    dense_latency_ratio: float = 1.0
    commit: bool = True
    rehearse: bool = False
    pruned_before: bool = False
    on_the_way: bool = False
    earlier: PruningResult | None = None
    take_teacher: Callable[[Teacher], None] | None = None
    limits: dict[str, float] | None = None
    judged: Mapping[int, Judgement] = field(default_factory=dict)

    def asked(self, settings: RoundSettings) -> RoundSettings:
        """The settings with what this round alone is asked for."""
        return settings if self.limits is None else replace(settings, limits=self.limits)

    def asks_no_more(self, sparsity: float, tolerance: float) -> bool:
        """Whether an earlier fit has made a module as sparse as this round is to make it."""
        return self.pruned_before and self.target is not None and sparsity >= self.target - tolerance


LIMITS = (*COSTS, "latency")
"""What can be limited."""


def cubic_schedule(target: float, rounds: int) -> list[float]:
    """Sparsity of each round on the way to the last one's: ``s * (1 - (1 - k / n)^3)`` (arXiv 1710.01878, eq. 1).

    >>> [round(sparsity, 4) for sparsity in cubic_schedule(0.7, 3)]
    [0.4926, 0.6741, 0.7]
    """
    return [target * (1.0 - (1.0 - k / rounds) ** 3) for k in range(1, rounds + 1)]


def limits_on_the_way(limits: Mapping[str, float], share: float) -> dict[str, float]:
    """Limits of a round that aims at a share of the last target: as much of what they take away, of counted costs.

    >>> limits_on_the_way({"macs": 0.4, "latency": 0.8}, 0.5), limits_on_the_way({"macs": 0.4}, 1.0)
    ({'macs': 0.7, 'latency': 0.8}, {'macs': 0.4})
    """
    return {
        name: limit if share == 1.0 or name not in COSTS else round(1.0 - (1.0 - limit) * share, 4)
        for name, limit in limits.items()
    }


def checked_epochs(value: Any) -> list[int]:
    """The epochs of the rounds, ascending."""
    if not checks.is_whole_number(value) and not isinstance(value, (list, tuple)):
        raise TypeError(f"epochs: {value!r} is not a whole number or a list of them")
    epochs = [
        checks.whole_number("epochs", epoch, 0) for epoch in (value if isinstance(value, (list, tuple)) else [value])
    ]
    if not epochs:
        raise ValueError("epochs: an empty list; give at least one epoch")
    if sorted(set(epochs)) != epochs:
        raise ValueError(f"epochs: {value} is not a strictly increasing list")
    return epochs


def checked_targets(value: Any, rounds: int) -> Sequence[float | None]:
    """The sparsity that each round aims at; ``None`` for the highest."""
    if value is None:
        return [None] * rounds
    if not checks.is_number(value) and not isinstance(value, (list, tuple)):
        raise TypeError(f"target_sparsity: {value!r} is not a number, a list of numbers or None")
    if not isinstance(value, (list, tuple)):
        return cubic_schedule(checks.number_between("target_sparsity", value, 0.0, 1.0), rounds)
    targets = [checks.number_between("target_sparsity", target, 0.0, 1.0) for target in value]
    if len(targets) != rounds:
        raise ValueError(
            f"target_sparsity: {len(targets)} values for {rounds} epochs; give one value, or one per epoch"
        )
    if any(later < earlier for earlier, later in itertools.pairwise(targets)):
        raise ValueError(f"target_sparsity: {value} decreases; removed channels do not come back")
    return targets


def checked_limits(value: Any) -> dict[str, float] | None:
    """What may remain of each cost."""
    found = checks.mapping("limits", value, partial(checks.fraction, of="the dense model"))
    for name in found or {}:
        checks.one_of("limits", name, LIMITS)
    return found


def checked_patterns(name: str, value: Any) -> dict[str, list[str]] | None:
    """Lists of patterns by name."""
    return checks.mapping(name, value, checks.strings)


def checked_bounds(value: Any) -> dict[str, list[float]] | None:
    """Lowest and highest coefficient by pattern."""
    return checks.mapping("bounds", value, checks.ordered_pair)
