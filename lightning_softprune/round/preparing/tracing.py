"""The groups of a module: traced by running its own steps, named by components, and probed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from lightning_softprune.graph import (
    Applications,
    Component,
    Grouping,
    Place,
    PruningGroup,
    assign_components,
    find_yardsticks,
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
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.surgery import Candidates, best_reading, forget_weights, probe_with_counts
from lightning_softprune.trainer import ModuleRunner, Step, Steps, run_steps
from lightning_softprune.utilities.names import is_inside
from lightning_softprune.utilities.threads import are_tiny, one_thread

PROBE_SAMPLES = 4
"""Samples of a batch on which groups are probed, and positions first looked for; tracing, calibration and rehearsal run
whole batches."""


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


def leave_yardsticks_alone(runner: ModuleRunner, settings: RoundSettings) -> None:
    """Find the frozen networks that validation only measures by: they are no part of the network, as metrics are not.

    What the user has a word for, in `twins` or `ignore`, is what that says.
    """
    twins = settings.twins or {}
    named = Component("named", (*twins, *settings.ignore))
    held = {id(one) for each in runner.trainer.optimizers for group in each.param_groups for one in group["params"]}
    parameters = runner.module.named_parameters(remove_duplicate=False)
    trained = {name for name, one in parameters if one.requires_grad and (not held or id(one) in held)}
    found = find_yardsticks(runner.module, runner.validation_step(), runner.left_alone, trained)
    found = {
        name: reason
        for name, reason in found.items()
        if not named.contains(name) and not any(is_inside(twin, name) for twin in twins)
    }
    runner.left_alone.update(runner.broadcast(found))


Traced = tuple[Sequence[PruningGroup], Mapping[str, Applications]]
"""A module's groups, and how often the first validation step applies each layer's weights."""


def traced(runner: ModuleRunner, settings: RoundSettings, judged: Set[str], probed: bool = True) -> Traced:
    """What tracing finds, the same on every process: a probe may fail on one process's batch only."""
    probing = partial(runner.probing, PROBE_SAMPLES) if probed else None
    (validating, *others), predicting, outside = runner.tracing(), runner.predicting(), runner.left_alone
    validating, applications = with_macs_recorded(runner.module, validating, outside)
    steps = [validating, *others]
    how = StepsToTrace(steps, judged, outside, probing, settings.round_to, probed, predicting, runner.steady)
    groups = prepare_groups(runner.module, how, settings.components, settings.ignore, settings.twins)
    return runner.broadcast((groups, applications))
