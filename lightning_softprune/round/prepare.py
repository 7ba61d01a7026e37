"""What a round knows of a module: its groups, their rankings, and what plans cost and do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_softprune.calibration import (
    MOST_OF_EPOCH,
    InputStatistics,
    Reader,
    ReadPositions,
    Wanted,
    batches_wanted,
    collect_statistics,
    find_read_positions,
    norms,
    rank,
    readers_that_lose,
    seen_by_twins,
    statistics_bytes,
    unfolded_readers,
)
from lightning_softprune.compensation import (
    Compensation,
    DenseRun,
    Intercepts,
    errors_of_outputs,
    errors_of_readers,
    find_intercepts,
    find_logit_fits,
    kinds_of_readers,
    watch_outputs,
)
from lightning_softprune.graph import (
    Applications,
    CostModel,
    Grouping,
    Place,
    PruningGroup,
    assign_components,
    coverage,
    groups_of,
    mirror_counts,
    mirror_twins,
    record_usage,
    refuse_unjudged,
    refuse_unseen_readers,
    trace_model,
    with_macs_recorded,
    with_outputs_of,
)
from lightning_softprune.report import Phases
from lightning_softprune.results import Costs, GroupResult, LeftOut
from lightning_softprune.round.journal import digest
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.search import (
    COSTS,
    Budgets,
    Coefficients,
    ExpectedErrors,
    Plan,
    Realisation,
    Rounding,
    SearchNumbers,
    SearchSpace,
    build_rounding,
    build_space,
)
from lightning_softprune.surgery import (
    Candidates,
    Surgery,
    apply_plan,
    best_reading,
    forget_weights,
    one_can_go,
    probe_with_counts,
)
from lightning_softprune.trainer import MisconfigurationException, ModuleRunner, Step, Steps, run_steps
from lightning_softprune.utilities.arrays import FloatArray, IntArray
from lightning_softprune.utilities.threads import are_tiny, one_thread

PROBE_SAMPLES = 4
"""Samples of a batch on which groups are probed, and positions first looked for; tracing, calibration and rehearsal run
whole batches."""

ERROR_SAMPLES = 64  # on which outputs of pruned networks are compared


@dataclass(frozen=True)
class PruningProblem:
    """What a round knows of the module once it has been traced and ranked.

    Attributes:
        groups: The prunable groups; there may be none.
        left_out: Everything else, with the reason.
        coverage: How much of the model is in prunable groups, as a sentence.
        realisation: From vectors of coefficients to plans.
        norms: Mean weight norm of each group.
        costs: Counts what plans cost.
        compensation: What readers do to make up for a plan.
        samples: Samples of the batch that costs were counted on.
        calibration: One step per calibration batch.
        identity: Digest of groups, rankings and calibration data.
        errors: What is known of plans before any is scored.
        dense: What the readers did while they were measured, if there was room to watch it.
    """

    groups: list[PruningGroup]
    left_out: tuple[LeftOut, ...]
    coverage: str
    realisation: Realisation
    norms: FloatArray
    costs: CostModel
    compensation: Compensation
    samples: int
    calibration: Steps = field(default_factory=list)
    identity: str = ""
    errors: ExpectedErrors | None = None
    dense: DenseRun | None = None

    @classmethod
    def prepare(
        cls,
        runner: ModuleRunner,
        settings: RoundSettings,
        rng: np.random.Generator,
        judged: Set[str],
        phases: Phases | None = None,
    ) -> PruningProblem:
        """Trace, rank, and prepare costs and compensation.

        Args:
            runner: Runs the module.
            settings: What the user asked for.
            rng: For what is random in rankings.
            judged: Names of the parameters that validation uses: only they are counted.
            phases: Shows what is done, and keeps the time.

        Raises:
            MisconfigurationException: A name in the bounds is unknown.
        """
        module, judged = runner.module, runner.broadcast(judged)
        phases = phases or Phases("none")
        with phases("tracing"):
            found, applications = _traced(runner, settings, judged)
        groups = [group for group in found if group.prunable]
        rounding = _rounding(groups, settings)
        readers = readers_that_lose(module, groups, rounding.high)
        calibration, batches = _calibration(runner, settings, readers, applications)
        with phases("measuring"):
            positions, statistics, dense = _measured(runner, settings, readers, calibration, batches)
            rankings: list[IntArray] = runner.broadcast(
                rank(settings.ranking, module, groups, calibration, statistics, rng)
            )
            statistics = seen_by_twins(statistics, settings.twins or {})
            intercepts = _intercepts(runner, settings, groups)
            compensation = Compensation(settings.compensation, module, groups, rankings, statistics, intercepts)
            compensation.positions = positions
            if settings.compensation == "least_squares":
                compensation.logits = find_logit_fits(module, groups, calibration)
            identity = runner.broadcast(digest([(g.name, g.num_channels) for g in groups], rankings, batches))
            realisation = Realisation(Coefficients.of(groups, settings.granularity), rounding, tuple(rankings))
            problem = cls._counted(runner, (found, applications), realisation, compensation, judged)
            problem = replace(problem, calibration=calibration, identity=identity, dense=dense)
            if settings.compensation == "least_squares" and settings.search.wants_errors:
                errors = problem.expected_errors(runner, judged, runner.few(batches, ERROR_SAMPLES))
                problem = replace(problem, errors=runner.broadcast(errors))
            return problem

    @classmethod
    def sketch(cls, runner: ModuleRunner, settings: RoundSettings, judged: Set[str]) -> PruningProblem:
        """What can be known at little cost: channels go in their order, nothing makes up for them, one group is tried.

        Args:
            runner: Runs the module.
            settings: What the user asked for.
            judged: Names of the parameters that validation uses.

        Raises:
            MisconfigurationException: As for `prepare`.
        """
        found, applications = _traced(runner, settings, judged, probed=False)
        if not one_can_go(runner.module, found, settings.round_to, lambda: run_steps(runner.tracing(PROBE_SAMPLES))):
            found, applications = _traced(runner, settings, judged)
        groups = [group for group in found if group.prunable]
        rankings = [np.arange(group.num_channels, dtype=np.int64) for group in groups]
        if callable(settings.importance):  # the user's own, which may be wrong
            rankings = rank(settings.importance, runner.module, groups, (), {}, np.random.default_rng(0))
        nothing = Compensation("none", runner.module, groups, rankings, {})
        coefficients = Coefficients.of(groups, settings.granularity)
        realisation = Realisation(coefficients, _rounding(groups, settings), tuple(rankings))
        return cls._counted(runner, (found, applications), realisation, nothing, judged)

    @classmethod
    def _counted(
        cls,
        runner: ModuleRunner,
        traced: _Traced,
        realisation: Realisation,
        compensation: Compensation,
        judged: Set[str],
    ) -> PruningProblem:
        """The problem with its costs, from the groups and what is known of them."""
        found, applications = traced
        module, groups = runner.module, [group for group in found if group.prunable]
        return cls(
            groups=groups,
            coverage=str(coverage(module, found)),
            left_out=tuple(LeftOut(g.name, g.component, g.num_channels, g.reason) for g in found if not g.prunable),
            realisation=realisation,
            norms=norms(module, groups),
            costs=CostModel.build(module, groups, realisation.rankings, applications, compensation.new_biases, judged),
            compensation=compensation,
            samples=runner.broadcast(runner.batch_size),
        )

    def plan_of(self, x: FloatArray) -> Plan:
        """The plan that a vector of coefficients stands for."""
        return self.realisation.plan_of(x)

    def unpruned_plan(self) -> Plan:
        """The plan that removes nothing."""
        return Plan(((),) * len(self.groups))

    def emptied(self, plan: Plan) -> str:
        """A layer all of whose channels at one side a plan removes, as groups may that share it; empty without one."""
        return self.costs.emptied(np.array([plan.counts]))

    def why_left_out(self) -> str:
        """The reasons why groups are not prunable, in a sentence that stays short."""
        reasons = "; ".join(f"{left.name}: {left.reason}" for left in self.left_out[:8])
        reasons = reasons or "It has no parameters outside of twins."
        return reasons + (f"; and {len(self.left_out) - 8} more" if len(self.left_out) > 8 else "")

    def prune(self, module: nn.Module, plan: Plan) -> Surgery:
        """Apply a plan with its compensation."""
        surgery = apply_plan(module, self.groups, plan)
        try:
            self.compensation.apply(module, surgery)
        except BaseException:
            surgery.undo()
            raise
        return surgery

    def expected_errors(self, runner: ModuleRunner, judged: Set[str], step: Step) -> ExpectedErrors | None:
        """What can be known of plans before any is scored, by running a step with groups pruned alone."""
        module, rounding, rankings = runner.module, self.realisation.rounding, self.realisation.rankings

        def run(group: int, count: int) -> Mapping[Any, Any]:
            counts = [count if other == group else 0 for other in range(len(self.groups))]
            surgery = self.prune(module, self.realisation.plan_that_removes(counts))
            try:
                with watch_outputs(module, judged, blocks=False) as found, torch.no_grad():
                    step()
                return {place: output.detach() for place, output in found.items()}
            finally:
                surgery.undo()

        # steps may wait for those of other processes: all have to run as many
        of_readers = runner.broadcast(errors_of_readers(module, self.groups, rankings, self.compensation))
        most = rounding.counts(rounding.high)
        return ExpectedErrors.of(errors_of_outputs(of_readers, most.tolist(), run), rounding.channels, most)

    def costs_of(self, plan: Plan) -> Costs:
        """Costs of the model with a plan's channels gone."""
        counts = np.array([plan.counts])
        params, macs = (int(self.costs.count(what, counts)[0]) for what in COSTS)
        return Costs(params, round(macs / self.samples))

    def space(self, settings: RoundSettings, dense: Costs, target: float | None) -> SearchSpace:
        """What a strategy searches. Without a target, it is the business of the search to set one."""
        limits = {name: limit for name, limit in (settings.limits or {}).items() if name != "latency"}
        costs = {"params": dense.params, "macs": dense.macs * self.samples}  # as counted: for the whole batch
        if not dense.macs and "macs" in (settings.cost, *limits):
            raise MisconfigurationException(
                f"cost={settings.cost!r}, limits={settings.limits}: this model runs no layer whose MACs are counted"
            )
        target = 1.0 if target is None else target
        budgets = Budgets(costs, target, settings.tolerance, settings.cost, limits)
        return build_space(self.realisation, self.costs, budgets, self.norms, self.errors)

    def numbers(self, dense: Costs) -> SearchNumbers:
        """What was searched, for files: other targets are solved from it later."""
        counted = {"params": float(dense.params), "macs": float(dense.macs * self.samples)}
        more: dict[str, Any] = {"dense": counted, "samples": self.samples, "errors": self.errors}
        return SearchNumbers.of(self.realisation, self.groups, self.costs.stored, **more)

    def group_results(self, plan: Plan, coefficients: Sequence[float]) -> tuple[GroupResult, ...]:
        """The groups, with what a plan of these soft coefficients does to them."""
        none = np.zeros((1, len(self.groups)), dtype=np.int64)
        rounding, counts = self.realisation.rounding, plan.counts
        low, high = rounding.low, rounding.high
        alone = np.eye(len(self.groups)) * high
        params, macs = (
            self.costs.count(what, none)[0] - self.costs.count(what, rounding.counts(alone) * (alone > 0))
            for what in ("params", "macs")
        )
        return tuple(
            GroupResult(
                group.name,
                group.component,
                group.kind,
                group.num_channels,
                group.num_channels - counts[i],
                coefficients[i],
                float(low[i]),
                float(high[i]),
                int(params[i]),
                round(int(macs[i]) / self.samples),
                dict(group.outputs),
            )
            for i, group in enumerate(self.groups)
        )


@dataclass(frozen=True)
class StepsToTrace:
    """How a model is run to find its groups.

    Attributes:
        steps: Run it; all that they run is traced.
        judged: Names of the parameters that validation uses.
        outside: Modules that are left alone with all that is in them -> why.
        probing: Asked for once they have been run: the same on fewer samples, for probes; None: the steps themselves.
        round_to: Kept channels are a multiple of it.
        probed: Whether groups are tried; else they are what the trace says.
        predicting: The module's own `predict_step`, whose outputs are looked at; `None` without one.
        steady: While it lasts, steps share one memory of what they are to put back.
    """

    steps: Steps
    judged: Set[str]
    outside: Mapping[str, str] = field(default_factory=dict)
    probing: Callable[[], Steps] | None = None
    round_to: int = 1
    probed: bool = True
    predicting: Step | None = None
    steady: Callable[[], AbstractContextManager[Any]] = nullcontext


def prepare_groups(
    model: nn.Module,
    how: StepsToTrace,
    components: dict[str, list[str]] | None,
    ignore: Sequence[str],
    twins: dict[str, str] | None = None,
) -> list[PruningGroup]:
    """Trace, name components and probe: the groups as the user sees them."""
    twins = twins or {}
    with record_usage(model) as used:
        trace = trace_model(model, how.steps, how.outside)
    probing = how.probing() if how.probing else how.steps

    def run(seed: int = 0) -> list[Any]:
        with how.steady():
            return run_steps(probing, seed)

    def read(
        choices: Mapping[str, int], united: Sequence[tuple[Place, Place]], in_steps: bool
    ) -> tuple[list[PruningGroup], Grouping]:
        grouping = groups_of(trace, ignore, choices, united, tuple(twins))
        groups = refuse_unjudged(mirror_twins(model, grouping.groups, twins), how.judged)
        groups = refuse_unseen_readers(model, groups, used.parameters, (*twins, *how.outside))
        groups = assign_components(model, groups, components, twins)
        if not how.probed:
            return groups, grouping
        counts = {name: mirror_counts(model, found, twins) for name, found in grouping.counts.items()}
        candidates = Candidates(counts, grouping.chosen, grouping.averaged, in_steps)
        return probe_with_counts(model, groups, candidates, run, lambda: run(1), how.round_to), grouping

    with one_thread(are_tiny(trace.tape.shapes)):
        try:
            return with_outputs_of(how.predicting, "predict_step", best_reading(read), trace)
        finally:
            forget_weights()


_Traced = tuple[Sequence[PruningGroup], Mapping[str, Applications]]
"""A module's groups, and how often the first validation step applies each layer's weights."""


def _traced(runner: ModuleRunner, settings: RoundSettings, judged: Set[str], probed: bool = True) -> _Traced:
    """What tracing finds, the same on every process: a probe may fail on one process's batch only."""
    probing = partial(runner.probing, PROBE_SAMPLES) if probed else None
    (validating, *others), predicting, outside = runner.tracing(), runner.predicting(), runner.left_alone
    validating, applications = with_macs_recorded(runner.module, validating, outside)
    steps = [validating, *others]
    how = StepsToTrace(steps, judged, outside, probing, settings.round_to, probed, predicting, runner.steady)
    groups = prepare_groups(runner.module, how, settings.components, settings.ignore, settings.twins)
    return runner.broadcast((groups, applications))


def _calibration(
    runner: ModuleRunner, settings: RoundSettings, readers: Sequence[Reader], applications: Mapping[str, Applications]
) -> tuple[Steps, list[Any]]:
    """The training batches that a round looks at, and a step for each: as many as asked for, or as layers need."""
    if settings.calibration_batches is not None or settings.compensation != "least_squares":
        return runner.calibration(settings.least_calibration_batches)
    applied = {name: seen.applied for name, seen in applications.items()}
    trained = runner.training_batch_size if runner.trains_by_itself else 0
    samples = runner.broadcast((runner.batch_size, trained))
    return runner.calibration(batches_wanted(runner.module, readers, applied, samples), MOST_OF_EPOCH)


def _measured(
    runner: ModuleRunner, settings: RoundSettings, readers: Sequence[Reader], steps: Steps, batches: list[Any]
) -> tuple[ReadPositions, dict[str, InputStatistics], DenseRun | None]:
    """What readers see on the calibration batches, and where; and what they do, for the refit, where there is room."""
    module, left = runner.module, runner.memory_left
    wanted = Wanted.by(settings.ranking, settings.compensation)
    if wanted is None:
        return ReadPositions(), {}, None
    few_samples = cache(partial(runner.few, batches, PROBE_SAMPLES))
    positions = find_read_positions(module, [reader.name for reader in readers], steps, few_samples)
    dense = None
    if settings.compensation == "least_squares":
        unfolded = unfolded_readers(module, readers, wanted, left)
        kinds, taken = kinds_of_readers(module, readers, unfolded), statistics_bytes(module, readers, unfolded)
        dense = DenseRun.that_fits(module, kinds, steps, positions, left - taken)
    watched = steps if dense is None else dense.watched()
    statistics = collect_statistics(module, readers, watched, wanted=wanted, budget=left, positions=positions)
    if dense is not None:
        dense.finish(few_samples())
    return positions, statistics, dense


def _rounding(groups: Sequence[PruningGroup], settings: RoundSettings) -> Rounding:
    try:
        return build_rounding(groups, settings.bounds, settings.round_to)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def _intercepts(runner: ModuleRunner, settings: RoundSettings, groups: Sequence[PruningGroup]) -> Intercepts:
    """Where readers without a bias put what compensation adds to their outputs."""
    if settings.compensation == "none":
        return Intercepts()
    found = find_intercepts(
        runner.module, groups, runner.probing(PROBE_SAMPLES), runner.trainer.optimizers, settings.twins
    )
    return runner.broadcast(found)
