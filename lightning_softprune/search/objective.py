"""What makes one trial better than another: its score, and the constraints on its metrics.

A *constraint* bounds one logged metric: ``val_psnr >= 19.5``. Its *violation* is how far a trial falls short of it,
relative to the bound; 0 where it is met, infinite where the metric is not a number. The *loss* is what a search
minimises: the score, turned so that lower is better, and a penalty on violations, so that a search for the best score
is drawn to where the constraints hold. Which trials are feasible is decided on the violations alone.

The *mode* says which scores are better, "min" or "max". With "auto" the metric tells: a torchmetrics object knows
whether higher is better, and some names say that they are losses or errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_OPERATORS = ("<=", ">=", "<", ">")

_METRIC = re.compile(r"\s*([^<>=!~\s](?:[^<>=!~]*[^<>=!~\s])?)\s*")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

_SHOWN = 100  # characters of a constraint on either side of a mistake, in the message

_PENALTY = 10.0  # a shortfall of 1 % of the bound weighs like a loss that is 10 % higher


AUTO = "auto"
"""The mode that is found out."""

_LOW_IS_GOOD = frozenset(
    {"loss", "losses", "error", "errors", "err", "mae", "mse", "rmse", "nmse", "nrmse", "mape", "smape", "wape", "mase"}
    | {"msle", "rmsle", "nll", "bce", "ce", "crossentropy", "logloss", "perplexity", "ppl", "wer", "cer", "mer", "ter"}
    | {"fid", "kid", "lpips", "kl", "kld", "brier", "ece", "epe", "mpjpe"}
)
"""Words that say that less is better."""

_TURNED = frozenset({"neg", "negative", "negated", "minus", "inverse", "inverted"})
"""Words that turn the meaning of those around."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def mode_of_name(monitor: str) -> str | None:
    """``"min"`` for the name of a loss or an error; ``None`` for one that says neither.

    >>> mode_of_name("val/recon_loss"), mode_of_name("validRMSE"), mode_of_name("val_acc"), mode_of_name("lossless")
    ('min', 'min', None, None)
    """
    words = {word.lower() for word in _WORD.findall(monitor)}
    return "min" if words & _LOW_IS_GOOD and not words & _TURNED else None


def mode_of(monitor: str, mode: str, higher_is_better: bool | None) -> str:
    """``"min"`` or ``"max"``: what was asked for, or else what the metric says.

    Args:
        monitor: The metric's name.
        mode: ``"min"``, ``"max"`` or ``"auto"``.
        higher_is_better: What the torchmetrics object says that was logged; ``None``: there is none, or it says nothing.

    Raises:
        ValueError: The two contradict each other, or nothing says which.

    >>> mode_of("val_loss", "auto", None), mode_of("val_f1", "auto", True)
    ('min', 'max')
    >>> mode_of("val_acc", "auto", None)
    Traceback (most recent call last):
        ...
    ValueError: mode='auto': neither the name of monitor='val_acc' nor what is logged says whether a higher or a lower value is better; give mode="max" or mode="min"
    """  # noqa: E501
    said = {True: "max", False: "min", None: None}[higher_is_better]
    if mode == AUTO:
        found = said or mode_of_name(monitor)
        if found is None:
            raise ValueError(
                f"mode='auto': neither the name of monitor={monitor!r} nor what is logged says whether a higher or a "
                'lower value is better; give mode="max" or mode="min"'
            )
        return found
    if said is not None and said != mode:
        raise ValueError(
            f"mode={mode!r}: monitor={monitor!r} is logged by a torchmetrics object for which higher_is_better is "
            f'{higher_is_better}; leave mode out, or say mode="{said}"'
        )
    return mode


def better(score: float, other: float, mode: str) -> bool:
    """Whether a score is better than another; NaN is better than none, and none is better than NaN.

    Args:
        score: One.
        other: The other.
        mode: ``"min"`` or ``"max"``.

    >>> better(20.1, 19.9, "max"), better(0.2, 0.1, "min"), better(math.nan, 0.1, "min")
    (True, False, False)
    """
    return score > other if mode == "max" else score < other


@dataclass(frozen=True)
class Constraint:
    """A bound on one metric.

    Attributes:
        metric: Name of a metric that the module logs while validating.
        operator: ``"<="``, ``">="``, ``"<"`` or ``">"``.
        bound: What the metric is compared with.
        text: The constraint as it was given.
    """

    metric: str
    operator: str
    bound: float
    text: str

    def is_met(self, value: float) -> bool:
        """Whether a value of the metric meets the constraint; NaN never does."""
        if self.operator == "<=":
            return value <= self.bound
        if self.operator == ">=":
            return value >= self.bound
        return value < self.bound if self.operator == "<" else value > self.bound

    def violation(self, value: float) -> float:
        """How far a value falls short, relative to the bound: 0 where the constraint is met, infinite for NaN.

        >>> parse_constraint("val_psnr >= 20", "constraints[0]").violation(19.0)
        0.05
        """
        if self.is_met(value):
            return 0.0
        if math.isnan(value):
            return math.inf
        return max(abs(value - self.bound) / (abs(self.bound) or 1.0), 1e-12)  # on a strict bound the gap is 0


def parse_constraint(text: str, where: str) -> Constraint:
    """Read ``"metric operator number"``.

    Args:
        text: What the user wrote.
        where: The argument it belongs to, for the message.

    Raises:
        ValueError: It cannot be read; the message shows the character where reading stopped.

    >>> parse_constraint("val_psnr >= 19.5", "constraints[0]").bound
    19.5
    >>> parse_constraint("val_psnr => 19.5", "constraints[0]")
    Traceback (most recent call last):
        ...
    ValueError: constraints[0]: expected one of <=, >=, <, > at character 10:
        val_psnr => 19.5
                 ^
    """

    def fail(expected: str, at: int) -> ValueError:
        first = max(0, at - _SHOWN)
        shown = "".join(c if c.isprintable() else " " for c in text[first : at + _SHOWN])
        return ValueError(
            f"{where}: expected {expected} at character {at + 1}:\n    {shown}\n    {' ' * (at - first)}^"
        )

    metric = _METRIC.match(text)
    if metric is None:
        raise fail('the name of a metric, as in "val_psnr >= 19.5",', len(text) - len(text.lstrip()))
    at = metric.end()
    operator = next((candidate for candidate in _OPERATORS if text.startswith(candidate, at)), None)
    if operator is None:
        raise fail(f"one of {', '.join(_OPERATORS)}", at)
    at += len(operator)
    at += len(text[at:]) - len(text[at:].lstrip())
    number = _NUMBER.match(text, at)
    if number is None:
        raise fail("a number", at)
    bound = float(number.group())
    if not math.isfinite(bound):
        raise fail("a finite number", at)
    rest = text[number.end() :]
    if rest.strip():
        raise fail("nothing more (one constraint per string)", number.end() + len(rest) - len(rest.lstrip()))
    return Constraint(metric.group(1), operator, bound, text.strip())


@dataclass(frozen=True)
class Objective:
    """The monitored metric and the constraints.

    Attributes:
        monitor: The metric that is the score.
        mode: ``"min"`` or ``"max"``.
        constraints: On any logged metric.
        scale: Size of the score, which penalties are measured in; that of the dense model will do.
    """

    monitor: str
    mode: str
    constraints: tuple[Constraint, ...] = ()
    scale: float = 1.0

    @property
    def metrics(self) -> list[str]:
        """The score, and the metrics with constraints; each once."""
        return list(dict.fromkeys([self.monitor, *(constraint.metric for constraint in self.constraints)]))

    def unlogged(self, metrics: Mapping[str, float]) -> tuple[str, str] | None:
        """The first (argument, metric) that is asked for and not logged."""
        wanted = [(f"monitor={self.monitor!r}", self.monitor)]
        wanted += [(f"constraints[{i}]={c.text!r}", c.metric) for i, c in enumerate(self.constraints)]
        return next(((argument, name) for argument, name in wanted if name not in metrics), None)

    def signed(self, score: float) -> float:
        """The score turned so that lower is better; NaN if it is not finite."""
        if not math.isfinite(score):
            return math.nan
        return score if self.mode == "min" else -score

    def violation(self, metrics: Mapping[str, float]) -> float:
        """The sum of the constraints' violations; a metric that was not logged counts as NaN."""
        return sum(constraint.violation(metrics.get(constraint.metric, math.nan)) for constraint in self.constraints)

    def loss(self, metrics: Mapping[str, float]) -> float:
        """What a search minimises; NaN where the score or a constrained metric is none.

        Constraints that ask for a better score add nothing: that is what is searched for anyway.

        >>> objective = Objective("loss", "min", (parse_constraint("acc >= 0.8", ""),), scale=2.0)
        >>> objective.loss({"loss": 1.0, "acc": 0.9}), round(objective.loss({"loss": 1.0, "acc": 0.72}), 9)
        (1.0, 3.0)
        """
        better = "<" if self.mode == "min" else ">"
        others = [c for c in self.constraints if c.metric != self.monitor or c.operator[0] != better]
        penalty = sum(constraint.violation(metrics.get(constraint.metric, math.nan)) for constraint in others)
        loss = self.signed(metrics[self.monitor]) + _PENALTY * (abs(self.scale) or 1.0) * penalty
        return loss if math.isfinite(loss) else math.nan

    def shortfalls(self, metrics: Mapping[str, float]) -> list[str]:
        """The constraints that are not met, each with the value, for messages.

        >>> Objective("acc", "max", (parse_constraint("acc >= 0.8", ""),)).shortfalls({"acc": 0.72})
        ['acc >= 0.8 (it is 0.72)']
        """
        values = [(constraint, metrics.get(constraint.metric, math.nan)) for constraint in self.constraints]
        return [f"{c.text} (it is {value:.6g})" for c, value in values if not c.is_met(value)]
