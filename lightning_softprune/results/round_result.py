"""What a round found: plain frozen dataclasses, and their form for files and checkpoints.

`PruningResult.to_dict` yields only `dict`, `list`, `str`, `int`, `float`, `bool` and `None`, so that both `json` and
`torch.load(weights_only=True)` take it. JSON has no NaN and no infinity: in that form they are the strings `"nan"`,
`"inf"` and `"-inf"`, which `PruningResult.from_dict` turns back into floats.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lightning_softprune.results.fronts import MODES, format_change, pareto_front
from lightning_softprune.results.parts import (
    DRY_RUN,
    Costs,
    GroupResult,
    Healing,
    LayerShapes,
    LeftOut,
    Origin,
    Outcome,
    Sensitivity,
    Trial,
    not_negative,
)
from lightning_softprune.results.shown import html_table
from lightning_softprune.search import (
    COSTS,
    Known,
    OutOfReachError,
    Question,
    SearchNumbers,
    SensitivityCurve,
    Solution,
    carried_over,
    modelled_increases,
    solve,
)
from lightning_softprune.utilities.checks import fraction, mapping, number_between, one_of, ordered_pair
from lightning_softprune.utilities.plain_types import from_plain, to_plain
from lightning_softprune.utilities.wording import counted


@dataclass(frozen=True, repr=False)
class PruningResult:
    """One round: what it found, what it cost, and what became of the model.

    Attributes:
        epoch: The epoch before which the round was to run, one of `epochs`; a fit that goes on from a later epoch runs it
            before its first one.
        sparsity: 1 - cost(pruned) / cost(dense), against the first dense model.
        target_sparsity: What the round aimed at; `None`: the highest sparsity that meets the constraints.
        score_before: The monitored metric before the round.
        score_after: The monitored metric after it.
        metrics_before: Every metric logged while validating, before the round.
        metrics_after: The same after it.
        costs_before: Costs before the round.
        costs_after: Costs after it.
        groups: The prunable groups.
        evaluations: Plans really scored, sensitivity and the dense model included, cache hits excluded; with all of the
            validation batches, each is one pass. Where a killed search was continued, those of the run that was killed
            count too.
        seconds: The whole round, trace to commit.
        strategy: Name of the search strategy.
        stop_reason: Why the search ended.
        applied: Whether the model was pruned.
        trials: Every plan scored, in order.
        monitor: Name of the monitored metric.
        mode: `"min"` or `"max"`.
        sensitivity: One curve per group, where the strategy took them.
        reason: Why nothing was applied, or why less is removed than was asked for; empty otherwise.
        chosen: Index of the trial that the pruned model is, or that a dry run would have applied; `None`: there is none.
        tolerance: How far from the target a feasible plan may lie.
        cost: What sparsity is measured in, `"params"` or `"macs"`.
        limits: Further budgets: the fraction of the dense model's `params`, `macs` or `latency` that may remain.
        constraints: Metric constraints, as they were given.
        latency_before: Median time of a validation step's forward before the round, in seconds; `None`: not measured.
        latency_after: The same after it.
        latency_spread: How far the ratio of the two scattered while they were measured in turns, as a fraction.
        shares: What remains after the round of the first dense model's `params`, `macs` and, where it was measured,
            `latency`: a fraction of each.
        left_out: Everything that takes no part in the search, and why.
        phases: What the phases of the round took, in seconds: baseline, tracing, measuring, choosing a part, searching,
            finalists, timing, refitting, healing.
        score_compensated: The monitored metric of the chosen plan before healing; `None` where nothing was applied.
        healing: What healing has done; `None`: there was none.
        coverage: How much of the model takes part, as one sentence.
        configuration: The callback's arguments, as text.
        versions: Library -> version.
        passes: Validation passes that these took together, those on a part of the batches as fractions, with those that
            told which part will do and with the finalists on all; default: `evaluations`.
        outcome: One of :class:`Outcome`; default: what `applied` and `reason` say.
        score_finetuned: The monitored metric of the fit's latest validation since the round; `None` before one, where
            nothing was trained after the round, and for rounds before the last one. No part of a comparison of two
            results: a checkpoint from before the end has the same round.
        device: What latency was measured on; `""`: it was not measured.
        latency_batch: Samples of the batch that it was measured with.
        layers: The layers whose tensors the round has made smaller, with their shapes.
        origin: Model, run and date; no part of a comparison of two results.
        numbers: What was searched, in plain types, which other targets are solved from; `None`: a result of a version
            that did not store it.

    Raises:
        ValueError: If `mode` or `outcome` is unknown, `outcome` contradicts `applied`, a number is negative that cannot
            be, a trial has not one coefficient per group, or `numbers` are of other groups, curves or coefficients.

    >>> costs = Costs(params=1000, macs=2000), Costs(params=300, macs=500)
    >>> group = GroupResult("encoder.0", "encoder", "intra", channels_before=64, channels_after=20, coefficient=0.69)
    >>> trial = Trial((0.69,), sparsity=0.7, score=0.12, metrics={"val_loss": 0.12}, feasible=True, seconds=0.1)
    >>> result = PruningResult(
    ...     epoch=3, sparsity=0.7, target_sparsity=0.7, score_before=0.1, score_after=0.12,
    ...     metrics_before={"val_loss": 0.1}, metrics_after={"val_loss": 0.12},
    ...     costs_before=costs[0], costs_after=costs[1], groups=(group,), evaluations=2, seconds=0.4,
    ...     strategy="UniformBaseline", stop_reason="exhausted", applied=True, trials=(trial,),
    ...     monitor="val_loss", mode="min",
    ... )
    >>> result.summary
    'epoch 3: 1,000 -> 300 parameters (-70.0 %), val_loss 0.1 -> 0.12 after 2 evaluations in 0.4 s (UniformBaseline: exhausted)'
    >>> import json
    >>> PruningResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    True
    """  # noqa: E501

    epoch: int
    sparsity: float
    target_sparsity: float | None
    score_before: float
    score_after: float
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]
    costs_before: Costs
    costs_after: Costs
    groups: tuple[GroupResult, ...]
    evaluations: int
    seconds: float
    strategy: str
    stop_reason: str
    applied: bool
    trials: tuple[Trial, ...]
    monitor: str
    mode: str
    sensitivity: tuple[Sensitivity, ...] = ()
    reason: str = ""
    chosen: int | None = None
    tolerance: float = 0.0
    cost: str = "params"
    limits: dict[str, float] = field(default_factory=dict)
    constraints: tuple[str, ...] = ()
    latency_before: float | None = None
    latency_after: float | None = None
    latency_spread: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    configuration: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    outcome: str = ""
    coverage: str = ""
    numbers: SearchNumbers | None = None
    passes: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    score_compensated: float | None = None
    healing: Healing | None = None
    score_finetuned: float | None = field(default=None, compare=False)
    device: str = ""
    latency_batch: int | None = None
    layers: tuple[LayerShapes, ...] = ()
    origin: Origin = field(default_factory=Origin, compare=False)

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        outcome = one_of("outcome", str(self.outcome or self._outcome_of_0_1_0()), tuple(map(str, Outcome)))
        if (outcome == Outcome.APPLIED) != self.applied:
            raise ValueError(f"outcome: {outcome!r} contradicts applied={self.applied}")
        object.__setattr__(self, "outcome", outcome)
        for name in ("evaluations", "seconds", "passes", "latency_before", "latency_after", "latency_batch"):
            not_negative(name, getattr(self, name))
        object.__setattr__(self, "passes", self.passes or float(self.evaluations))
        for index, trial in enumerate(self.trials):
            if len(trial.coefficients) != len(self.groups):
                raise ValueError(
                    f"trials[{index}]: {len(trial.coefficients)} coefficients for {len(self.groups)} groups"
                )
        if self.numbers is not None:
            self._check_numbers(self.numbers)

    def _check_numbers(self, numbers: SearchNumbers) -> None:
        """Refuse what cannot be solved anew because the parts are not of one search."""
        one_of("cost", self.cost, COSTS)
        if [group.name for group in numbers.groups] != [group.name for group in self.groups]:
            raise ValueError("numbers: their groups are not those of the result")
        names = [one.group for one in self.sensitivity]
        if len(set(names)) < len(names) or not set(names) <= set(numbers.coefficients):
            raise ValueError(f"sensitivity: {names} are not curves of {', '.join(numbers.coefficients)}, one of each")
        for one in self.sensitivity:
            if not one.coefficients:
                raise ValueError(f"sensitivity: the curve of {one.group!r} has no point")
        for index, trial in enumerate(self.trials):
            if not all(-1e-9 <= coefficient <= 1.0 + 1e-9 for coefficient in trial.coefficients):
                raise ValueError(f"trials[{index}]: its coefficients are not in [0, 1]")

    def _outcome_of_0_1_0(self) -> Outcome:
        """The outcome of a result that was written before there were outcomes: then the reason said it, in prose."""
        if self.applied:
            return Outcome.APPLIED
        return Outcome.DRY_RUN if self.reason.startswith(DRY_RUN) else Outcome.SKIPPED

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing was to be applied in the first place."""
        return self.outcome == Outcome.DRY_RUN

    @property
    def pareto(self) -> tuple[Trial, ...]:
        """The trials that no other trial beats in sparsity and score, by ascending sparsity (see `pareto_front`).

        Of those on all validation batches: scores of a part are not compared with them.
        """
        whole = [trial for trial in self.trials if trial.share == 1.0]
        front = pareto_front([t.sparsity for t in whole], [t.score for t in whole], self.mode)
        return tuple(whole[index] for index in front)

    @property
    def latency_change(self) -> str:
        """How latency has changed, as text, with no sign where the spread of the measurement does not support one."""
        if not self.latency_before or self.latency_after is None:  # a clock may be too coarse for the dense one
            return ""
        if abs(self.latency_after / self.latency_before - 1.0) <= (self.latency_spread or 0.0):
            return "about the same"
        change = format_change(self.latency_before, self.latency_after)
        return change if self.latency_spread is None else f"{change} (spread {100 * self.latency_spread:.1f} %)"

    @property
    def measured_on(self) -> str:
        """What latency was measured on and with, as text; empty where that is not known."""
        batch = "" if self.latency_batch is None else f"batch of {self.latency_batch:,}"
        return ", ".join(filter(None, (self.device, batch)))

    @property
    def score_in_the_end(self) -> float:
        """The score after fine-tuning, or after the round where there was none yet."""
        return self.score_after if self.score_finetuned is None else self.score_finetuned

    @property
    def summary(self) -> str:
        """The round in one line."""
        epoch = f"epoch {self.epoch}"
        if not self.applied:
            epoch += f", not applied ({self.reason})" if self.reason else ", not applied"
        before, after = self.costs_before.params, self.costs_after.params
        evaluations = counted(self.evaluations, "evaluation")
        if abs(self.passes - self.evaluations) >= 0.05:
            evaluations += f" ({self.passes:.1f} passes)"
        return (
            f"{epoch}: {before:,} -> {after:,} parameters ({format_change(before, after)}), "
            f"{self.monitor} {self.score_before:.4g} -> {self.score_after:.4g}{self._healed} "
            f"after {evaluations} in {self.seconds:.1f} s ({self.strategy}: {self.stop_reason})"
            f"{'' if self.score_finetuned is None else f', {self.score_finetuned:.4g} after fine-tuning'}"
            f"{f'; {self.reason}' if self.applied and self.reason else ''}"
        )

    def solve(
        self,
        target_sparsity: float | None = None,
        *,
        limits: Mapping[str, float] | None = None,
        bounds: Mapping[str, Sequence[float]] | None = None,
        tolerance: float | None = None,
        cost: str | None = None,
    ) -> Solution:
        """What this round's measurements say of another target: the best plan, and the score it should have.

        Nothing is run. The round's sensitivity curves are combined anew under the new budget, and corrected by the
        plans that were scored (`search/solving.py`). A plan that was scored has its own score, and `measured` says so.

        Args:
            target_sparsity: Sparsity to reach, against the first dense model; default: the round's.
            limits: Further budgets, as in `SoftPruning`; default: the round's. A limit on latency cannot be solved for.
            bounds: Pattern of group or component names -> `[low, high]`, in the place of the round's; default: these.
            tolerance: How far above the target the plan may lie, or below it where no plan from the target up is found
                (then `Solution.is_below`); default: the round's.
            cost: What sparsity is measured in; default: as in the round.

        Raises:
            ValueError: The round measured no curves, an argument is not allowed, or the target is out of reach.
        """
        if self.numbers is None or not self.sensitivity:
            raise ValueError(
                f"this result cannot be solved anew: {self.strategy} measured no sensitivity curves"
                if self.numbers is not None
                else "this result cannot be solved anew: it does not hold what was searched (an older version's)"
            )
        if len(self.sensitivity) < len(self.numbers.coefficients):
            missing = sorted({*self.numbers.coefficients} - {one.group for one in self.sensitivity})
            raise ValueError(f"this result cannot be solved anew: it has no sensitivity curve of {', '.join(missing)}")
        aim = self.target_sparsity if target_sparsity is None else fraction("target_sparsity", target_sparsity)
        asked = mapping("limits", limits, fraction)
        if asked is None:
            asked = {name: limit for name, limit in self.limits.items() if name in COSTS}
        for name in asked:
            one_of("limits", name, COSTS)
        if tolerance is not None:
            tolerance = number_between("tolerance", tolerance, 0.0, 1.0, low_included=True)
        question = Question(
            target=self.sparsity if aim is None else aim,
            tolerance=self.tolerance if tolerance is None else tolerance,
            cost=one_of("cost", self.cost if cost is None else cost, COSTS),
            limits=asked,
            bounds=mapping("bounds", bounds, ordered_pair),
        )
        found = solve(self.numbers, self._known(self.numbers), question)
        return replace(found, score=self._signed(found.score))

    def _signed(self, score: float) -> float:
        return score if self.mode == "min" else -score

    def _known(self, numbers: SearchNumbers) -> Known:
        """What was measured, as losses."""
        place, shapes = {name: n for n, name in enumerate(numbers.coefficients)}, numbers.shapes()
        curves = [
            SensitivityCurve(n, one.coefficients, tuple(map(self._signed, one.scores)), shapes[n])
            for n, one in sorted((place[one.group], one) for one in self.sensitivity)
        ]
        owners = [group.owner for group in numbers.groups]
        first = [owners.index(n) for n in range(len(numbers.coefficients))]
        scored = [trial for trial in self.trials if math.isfinite(trial.score) and trial.share == 1.0]
        points = np.array([[trial.coefficients[n] for n in first] for trial in scored]).reshape(len(scored), len(first))
        counted = numbers.costs.count(self.cost, numbers.realisation().counts_of(points)) if scored else np.zeros(0)
        # what is reported of a shared coefficient may stand for another plan than the one that was scored
        same = np.isclose(1.0 - counted / numbers.dense[self.cost], [trial.sparsity for trial in scored], atol=1e-9)
        losses = np.array([self._signed(trial.score) for trial in scored])
        lowest = curves[0].losses[0]
        dense = lowest if math.isfinite(lowest) else self._signed(self.score_before)
        return Known(tuple(curves), points[same], losses[same], dense)

    def modelled_sensitivity(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """What curves are taken for between and beyond their points, where errors were expected: group -> line."""
        if self.numbers is None or self.numbers.errors is None or not self.sensitivity:
            return {}
        curves = self._known(self.numbers).curves
        values = [np.linspace(curve.coefficients[0], 1.0, 41)[:-1] for curve in curves]
        increases = modelled_increases(curves, values)
        return {
            self.numbers.coefficients[curve.index]: tuple(
                (float(x), self._signed(curve.losses[0] + float(y))) for x, y in zip(value, increase, strict=True)
            )
            for curve, value, increase in zip(curves, values, increases, strict=True)
        }

    def expected_curves(self, names: Sequence[str]) -> tuple[SensitivityCurve, ...]:
        """What a later round may expect of its coefficients' curves, going by this one's and what it has removed.

        Args:
            names: The later round's coefficients.

        Returns:
            One curve per name, in losses; nothing where this round knows none of one of them.
        """
        if self.numbers is None or {one.group for one in self.sensitivity} != set(names):
            return ()
        known = {self.numbers.coefficients[curve.index]: curve for curve in self._known(self.numbers).curves}
        before, after = np.zeros(len(names)), np.zeros(len(names))
        for group, stored in zip(self.groups, self.numbers.groups, strict=True):
            place = list(names).index(self.numbers.coefficients[stored.owner])
            before[place] += group.channels_before
            after[place] += group.channels_after
        gone = (1.0 - after / before).tolist()
        return carried_over([known[name] for name in names], gone)

    def solve_targets(self, targets: Sequence[float], **question: Any) -> tuple[Solution, ...]:
        """`solve` for several targets, without those out of reach: how score and size are traded.

        Args:
            targets: Sparsities.
            question: Further arguments of `solve`.
        """
        found: list[Solution] = []
        for target in targets:
            with contextlib.suppress(OutOfReachError):
                found.append(self.solve(target, **question))
        return tuple(found)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {self.summary}>"

    @property
    def _finetuned(self) -> str:
        return "" if self.score_finetuned is None else f"{self.score_finetuned:.4g} after fine-tuning"

    @property
    def _healed(self) -> str:
        if self.healing is None or self.score_compensated is None:
            return ""
        back = "" if self.healing.kept else ", taken back"
        return f" (compensated {self.score_compensated:.4g}, healed {self.healing.score:.4g}{back})"

    def _repr_html_(self) -> str:
        before, after = self.costs_before, self.costs_after
        rows = [
            ("parameters", f"{before.params:,}", f"{after.params:,}", format_change(before.params, after.params)),
            ("MACs", f"{before.macs:,}", f"{after.macs:,}", format_change(before.macs, after.macs)),
            (self.monitor, f"{self.score_before:.4g}", f"{self.score_after:.4g}", self._finetuned),
        ]
        if self.latency_before is not None and self.latency_after is not None:
            dense, pruned = (f"{1000 * seconds:.4g} ms" for seconds in (self.latency_before, self.latency_after))
            measured = f"latency ({self.measured_on})" if self.measured_on else "latency"
            rows.insert(2, (measured, dense, pruned, self.latency_change))
        kept = [group.channels_after / max(group.channels_before, 1) for group in self.groups]
        return html_table(f"SoftPruning, epoch {self.epoch}{'' if self.applied else ', not applied'}", rows, kept)

    def to_dict(self) -> dict[str, Any]:
        """The result in plain types; NaN and infinities become `"nan"`, `"inf"` and `"-inf"`.

        NumPy and torch scalars become Python's numbers.
        """
        return to_plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningResult:
        """The result that `to_dict` described.

        Keys it does not know (a newer version's) are ignored.

        Args:
            data: What `to_dict` returned, also after a round trip through a JSON file or a checkpoint.

        Raises:
            ValueError: If something is missing or of the wrong type; the message says where.
        """
        result: PruningResult = from_plain(cls, data, "a pruning result")
        return result
