"""What a round knows of a module: its groups, their rankings, and what plans cost and do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_softprune.calibration import norms
from lightning_softprune.compensation import (
    Compensation,
    DenseRun,
    errors_of_outputs,
    errors_of_readers,
    watch_outputs,
)
from lightning_softprune.graph import CostModel, PruningGroup, coverage
from lightning_softprune.results import Costs, GroupResult, LeftOut
from lightning_softprune.round.preparing.tracing import Traced
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.search import (
    COSTS,
    Budgets,
    ExpectedErrors,
    Plan,
    Realisation,
    SearchNumbers,
    SearchSpace,
    build_space,
)
from lightning_softprune.surgery import Surgery, apply_plan
from lightning_softprune.trainer import MisconfigurationException, ModuleRunner, Step, Steps
from lightning_softprune.utilities.arrays import FloatArray


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
    def counted(
        cls,
        runner: ModuleRunner,
        traced: Traced,
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
