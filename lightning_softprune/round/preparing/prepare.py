"""Getting to know a module: it is traced, its inputs are measured, its channels ranked, its costs counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from lightning_softprune.calibration import (
    MOST_OF_EPOCH,
    InputStatistics,
    Reader,
    ReadPositions,
    Wanted,
    batches_wanted,
    collect_statistics,
    find_read_positions,
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
    find_intercepts,
    find_logit_fits,
    kinds_of_readers,
)
from lightning_softprune.graph import Applications, PruningGroup
from lightning_softprune.report import Phases
from lightning_softprune.round.journal import digest
from lightning_softprune.round.preparing.problem import PruningProblem
from lightning_softprune.round.preparing.tracing import PROBE_SAMPLES, traced
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.search import Coefficients, Realisation, Rounding, build_rounding
from lightning_softprune.surgery import one_can_go
from lightning_softprune.trainer import MisconfigurationException, ModuleRunner, Steps, run_steps
from lightning_softprune.utilities.arrays import IntArray

ERROR_SAMPLES = 64  # on which outputs of pruned networks are compared


def prepare_problem(
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
        found, applications = traced(runner, settings, judged)
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
        problem = PruningProblem.counted(runner, (found, applications), realisation, compensation, judged)
        problem = replace(problem, calibration=calibration, identity=identity, dense=dense)
        if settings.compensation == "least_squares" and settings.search.wants_errors:
            errors = problem.expected_errors(runner, judged, runner.few(batches, ERROR_SAMPLES))
            problem = replace(problem, errors=runner.broadcast(errors))
        return problem


def sketch_problem(runner: ModuleRunner, settings: RoundSettings, judged: Set[str]) -> PruningProblem:
    """What can be known at little cost: channels go in their order, nothing makes up for them, one group is tried.

    Args:
        runner: Runs the module.
        settings: What the user asked for.
        judged: Names of the parameters that validation uses.

    Raises:
        MisconfigurationException: As for `prepare_problem`.
    """
    found, applications = traced(runner, settings, judged, probed=False)
    if not one_can_go(runner.module, found, settings.round_to, lambda: run_steps(runner.tracing(PROBE_SAMPLES))):
        found, applications = traced(runner, settings, judged)
    groups = [group for group in found if group.prunable]
    rankings = [np.arange(group.num_channels, dtype=np.int64) for group in groups]
    if callable(settings.importance):  # the user's own, which may be wrong
        rankings = rank(settings.importance, runner.module, groups, (), {}, np.random.default_rng(0))
    nothing = Compensation("none", runner.module, groups, rankings, {})
    coefficients = Coefficients.of(groups, settings.granularity)
    realisation = Realisation(coefficients, _rounding(groups, settings), tuple(rankings))
    return PruningProblem.counted(runner, (found, applications), realisation, nothing, judged)


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
