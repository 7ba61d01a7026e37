"""The parts of a result: costs, groups, what was left out, trials, curves, and what became of the round."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

DRY_RUN = "this was a dry run"
"""What the reason of a round begins with that was only to be looked at; for people, :class:`Outcome` is for code."""


def not_negative(name: str, value: float | None) -> None:
    """Refuse a number below zero where there can be none.

    Raises:
        ValueError: It is one; the message begins with the name.
    """
    if value is not None and value < 0:
        raise ValueError(f"{name}: {value} is less than 0")


class Outcome(str, Enum):
    """What became of a round."""

    APPLIED = "applied"
    """The model was pruned."""
    SKIPPED = "skipped"
    """No plan was feasible, and the model was left as it is."""
    DRY_RUN = "dry run"
    """It was only to be looked at."""

    def __str__(self) -> str:
        """The string that files hold."""
        return self.value


@dataclass(frozen=True)
class Costs:
    """What a model costs.

    Attributes:
        params: Number of parameters, tied weights counted once.
        macs: Multiply-accumulate operations of one forward pass.
    """

    params: int
    macs: int

    def __post_init__(self) -> None:
        for name in ("params", "macs"):
            not_negative(name, getattr(self, name))


@dataclass(frozen=True)
class GroupResult:
    """What a round did to one group.

    Attributes:
        name: The group's unique name.
        component: The named sub-network the group belongs to.
        kind: `"intra"` (all members in one component) or `"inter"` (it couples several).
        channels_before: Channels before the round.
        channels_after: Channels after it.
        coefficient: The soft coefficient, in [0, 1]; at most one channel away from what was removed.
        low: The smallest coefficient that its bounds allow.
        high: The largest one.
        params: Parameters that go when this group alone is pruned as far as its bounds allow.
        macs: Multiply-accumulate operations that go with them.
        outputs: Components that give its channels to other code, `""` being the module's `forward`, with the width of
            what they give before the round.
    """

    name: str
    component: str
    kind: str
    channels_before: int
    channels_after: int
    coefficient: float
    low: float = 0.0
    high: float = 1.0
    params: int = 0
    macs: int = 0
    outputs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        not_negative(f"channels_before of group {self.name!r}", self.channels_before)
        if not 0 <= self.channels_after <= self.channels_before:
            raise ValueError(
                f"channels_after of group {self.name!r}: {self.channels_after} is not between 0 and "
                f"{self.channels_before}, which were there before"
            )


@dataclass(frozen=True)
class LayerShapes:
    """The tensors of one layer, as the dense and as the pruned model have them.

    Attributes:
        name: The layer's name in the module.
        kind: Its class.
        before: Parameter -> its shape before the round.
        after: The same after it, or of the plan that a dry run would have applied; biases that compensation creates are
            not among them.
    """

    name: str
    kind: str
    before: dict[str, tuple[int, ...]]
    after: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Origin:
    """Where a result comes from.

    Attributes:
        model: Class of the module.
        run: The folder of the run, as its files and logs have it.
        date: When the round ended, as `2026-01-31 14:05`, local time.
        identity: Tells runs in one folder apart; a fit that goes on from a checkpoint has the first one's.
    """

    model: str = ""
    run: str = ""
    date: str = ""
    identity: str = ""


@dataclass(frozen=True)
class LeftOut:
    """What the package leaves alone.

    Attributes:
        name: The group's name, or that of a module or parameter.
        component: The named sub-network it belongs to.
        channels: Its channels; 0 where they are not known.
        reason: Why it is not pruned.
    """

    name: str
    component: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Trial:
    """One scored plan.

    Attributes:
        coefficients: One soft coefficient per group, in the order of `PruningResult.groups`.
        sparsity: 1 - cost(pruned) / cost(dense).
        score: The monitored metric of the plan; NaN if the user's metric was.
        metrics: Every metric logged while the plan was scored.
        feasible: Whether tolerance, limits and constraints are all met.
        seconds: Time taken to score the plan.
        reason: Why there is no score: what the user's own code said to this plan. Empty where there is one.
        share: The fraction of the validation batches that the plan was scored on: 1 for all. Below 1, score and metrics
            are those of these batches; whether the trial is feasible is then judged by an estimate for all of them.
    """

    coefficients: tuple[float, ...]
    sparsity: float
    score: float
    metrics: dict[str, float]
    feasible: bool
    seconds: float
    reason: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class Healing:
    """How the committed plan was trained to compute what the dense network computes.

    Attributes:
        score: The score with what was learned, on all validation data.
        kept: Whether it was better than without, and stayed.
        errors: On each training batch, before it was learned from, the fraction that the pruned network missed of the
            variance of what steps use, and of what blocks give.
    """

    score: float
    kept: bool
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The score as one group alone is pruned.

    Attributes:
        group: The group's name.
        coefficients: The coefficients tried.
        scores: The score at each of them; an estimate for all validation batches where plans were scored on a part.
    """

    group: str
    coefficients: tuple[float, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.coefficients) != len(self.scores):
            raise ValueError(
                f"scores: {len(self.scores)} of group {self.group!r} for {len(self.coefficients)} coefficients"
            )
