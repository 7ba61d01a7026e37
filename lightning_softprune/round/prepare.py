"""What a round knows of a module: its groups, their rankings, and what plans cost and do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_softprune.calibration import collect_statistics, find_readers, norms, rank
from lightning_softprune.compensation import Compensation
from lightning_softprune.graph import (
    Applications,
    CostModel,
    PruningGroup,
    assign_components,
    mirror_twins,
    record_macs,
    trace_groups,
)
from lightning_softprune.results import Costs, GroupResult, LeftOut
from lightning_softprune.round.fingerprint import digest
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.search import Coefficients, Plan, Rounding, SearchSpace, build_rounding, build_space
from lightning_softprune.surgery import Surgery, apply_plan, probe_groups
from lightning_softprune.trainer import (
    Steps,
    ValidationScorer,
    calibration_steps,
    run_steps,
    same_layer_calls,
    tracing_steps,
    validation_step,
)

PROBE_SAMPLES = 32
"""Samples of a batch on which groups are probed; tracing, calibration and rehearsal run whole batches."""


@dataclass(frozen=True)
class PruningProblem:
    """What a round knows of the module once it has been traced and ranked."""

    groups: list[PruningGroup]
    left_out: tuple[LeftOut, ...]
    rankings: list[Any]
    norms: Any
    coefficients: Coefficients
    rounding: Rounding
    costs: CostModel
    compensation: Compensation
    calibration: Steps
    samples: int
    identity: str

    @classmethod
    def prepare(
        cls,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        scorer: ValidationScorer,
        settings: RoundSettings,
        rng: np.random.Generator,
    ) -> PruningProblem:
        """Trace, rank, and prepare costs and compensation.

        Raises:
            MisconfigurationException: Nothing is prunable, or a name in the bounds is unknown.
        """
        steps = tracing_steps(trainer, module, scorer)
        few = tracing_steps(trainer, module, scorer, PROBE_SAMPLES)
        same = trainer.strategy.reduce_boolean_decision(same_layer_calls(module, few, steps), all=True)
        found = prepare_groups(
            module, steps, settings.components, settings.ignore, settings.twins, probing=few if same else steps
        )
        found = trainer.strategy.broadcast(found)  # a probe may fail on one process's batch only
        groups = [group for group in found if group.prunable]
        if not groups:
            raise MisconfigurationException(nothing_prunable(found))
        try:
            rounding = build_rounding(groups, settings.bounds, settings.round_to)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        calibration, batches = calibration_steps(trainer, module, scorer, settings.calibration_batches)
        statistics = collect_statistics(
            module, find_readers(module, groups), calibration, with_unfolded=settings.compensation != "none"
        )
        rankings = rank(settings.importance, module, groups, calibration, statistics, rng)
        rankings = trainer.strategy.broadcast(rankings)
        for twin, original in (settings.twins or {}).items():  # a twin that did not run sees what its original sees
            inside = {name: known for name, known in statistics.items() if name.startswith(f"{original}.")}
            statistics = {twin + name[len(original) :]: known for name, known in inside.items()} | statistics
        compensation = Compensation(settings.compensation, module, groups, rankings, statistics)
        applications: dict[str, Applications]
        with record_macs(module) as applications:
            validation_step(trainer, module, scorer)()
        applications, samples = trainer.strategy.broadcast((applications, scorer.batch_size or 1))
        return cls(
            groups=groups,
            left_out=tuple(
                LeftOut(group.name, group.component, group.num_channels, group.reason)
                for group in found
                if not group.prunable
            ),
            rankings=rankings,
            norms=norms(module, groups),
            coefficients=Coefficients.of(groups, settings.granularity),
            rounding=rounding,
            costs=CostModel.build(module, groups, rankings, applications, compensation.new_biases),
            compensation=compensation,
            calibration=calibration,
            samples=samples,
            identity=trainer.strategy.broadcast(
                digest([(group.name, group.num_channels) for group in groups], rankings, batches)
            ),
        )

    def prune(self, module: nn.Module, plan: Plan) -> Surgery:
        """Apply a plan with its compensation."""
        surgery = apply_plan(module, self.groups, plan)
        try:
            self.compensation.apply(module, surgery)
        except BaseException:
            surgery.undo()
            raise
        return surgery

    def costs_of(self, counts: Sequence[int]) -> Costs:
        """Costs of the plan that removes so many channels from each group."""
        params, macs = (int(self.costs.count(what, np.array([counts]))[0]) for what in ("params", "macs"))
        return Costs(params, round(macs / self.samples))

    def space(self, settings: RoundSettings, dense: Costs, target: float | None) -> SearchSpace:
        """What a strategy searches. Without a target, it is the business of the search to set one."""
        limits = {name: limit for name, limit in (settings.limits or {}).items() if name != "latency"}
        costs = {"params": dense.params, "macs": dense.macs * self.samples}  # as counted: for the whole batch
        if not dense.macs and "macs" in (settings.cost, *limits):
            raise MisconfigurationException(
                f"cost={settings.cost!r}, limits={settings.limits}: this model runs no layer whose MACs are counted"
            )
        return build_space(
            self.coefficients,
            self.rounding,
            self.costs,
            dense=costs,
            target=1.0 if target is None else target,
            tolerance=settings.tolerance,
            norms=self.norms,
            cost=settings.cost,
            limits=limits,
        )

    def group_results(self, counts: Sequence[int], coefficients: Sequence[float]) -> tuple[GroupResult, ...]:
        """The groups, with what a plan of these removed channels and soft coefficients does to them."""
        none = np.zeros((1, len(self.groups)), dtype=np.int64)
        low, high = self.rounding.low, self.rounding.high
        alone = np.eye(len(self.groups)) * high
        params, macs = (
            self.costs.count(what, none)[0] - self.costs.count(what, self.rounding.counts(alone) * (alone > 0))
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
            )
            for i, group in enumerate(self.groups)
        )


def prepare_groups(
    model: nn.Module,
    steps: Steps,
    components: dict[str, list[str]] | None,
    ignore: Sequence[str],
    twins: dict[str, str] | None = None,
    probing: Steps | None = None,
) -> list[PruningGroup]:
    """Trace, name components and probe: the groups as the user sees them."""

    def run(seed: int = 0) -> None:
        run_steps(probing or steps, seed)

    traced = mirror_twins(model, trace_groups(model, steps, ignore), twins or {})
    return probe_groups(model, assign_components(model, traced, components, twins or ()), run, lambda: run(1))


def nothing_prunable(groups: Sequence[PruningGroup]) -> str:
    """Word the error for a model in which every group is refused."""
    reasons = "; ".join(f"{group.name}: {group.reason}" for group in groups[:8])
    more = f"; and {len(groups) - 8} more" if len(groups) > 8 else ""
    return f"SoftPruning found nothing that can be pruned in this model. {reasons}{more}"
