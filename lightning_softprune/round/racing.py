"""On how much validation data plans are told apart, and the race of the best on all of it.

What tells two plans apart is the *paired difference* of their scores: both see the same samples, so what is hard for
both cancels. How much a difference scatters is learnt from two plans, the module as it is and the same coefficient
everywhere, whose drop the search is to make smaller: both are scored on 8 disjoint *blocks* of batches, which together
are the smallest part that is allowed (8 batches and 1,000 samples). Of the 8 differences, ``d`` is the mean and ``s``
the standard deviation; on a fraction ``x`` of the data, with blocks that are each a fraction ``b``, a difference has

    standard error(x) = s * sqrt((1 - x) * b / x).

The part is the smallest with a standard error of at most a tenth of ``|d|``, for the score and for every metric with a
constraint. All data are used where that is more than half of them, where there are too few data or plans for a part to
pay, where the drop cannot be told from noise, and where the module as it is scores otherwise on the part than on all of
it by more than three standard errors: then the data are sorted.

On a part, metrics are *judged* after a shift: by what the module as it is has on all data and not on the part. So the
search and the constraints see an estimate of the whole. A sum over the data is scaled up to all of them before; where
the score or a metric with a constraint is one, all data are used unless `search_batches` says otherwise. What is
reported of such a trial is what was measured.

After the search, the best by part are scored on all data, best first: at most five, and none that lies further behind
the leader than two standard errors. Where none of them is feasible on all data, the next ones follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.round.latency import worth_timing
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.round.trials import WHOLE, ScoredOn, ScoredPlan
from lightning_softprune.search import NormBaseline, Plan, UniformBaseline
from lightning_softprune.trainer import Part
from lightning_softprune.utilities.arrays import FloatArray

_BLOCKS = 8
_LEAST_BATCHES, _LEAST_SAMPLES = 8, 1000
_LARGEST = 0.5
"""Parts above this fraction do not pay: finalists are scored on all data besides."""

_FEW_PLANS = 12
"""A strategy that may evaluate no more than so many plans works on all data."""

_OF_ONE_PLAN = (UniformBaseline, NormBaseline)

_PRECISION = 0.1
"""The standard error of a difference that is small enough, as a fraction of the drop of the uniform plan."""

_FINALISTS = 5

_Blocks = dict[str, FloatArray]


def choose_part(
    evaluator: Evaluator,
    settings: RoundSettings,
    before: Mapping[str, float],
    shown: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> ScoredOn:
    """Choose the part of the validation data that trials are scored on; with few data, all, and nothing is run.

    Args:
        evaluator: Scores the two plans that it takes.
        settings: What the user asked for.
        before: Metrics of the module as it is on all data.
        shown: Entered while something is run.
    """
    if settings.search_batches is not None:
        part = Part(most=settings.search_batches)
        with shown():
            return _anchored(evaluator, ScoredOn(part, evaluator.runner.share_of(part), noise=math.nan), before)
    largest = settings.search.max_evaluations
    if evaluator.runner.sums.keys() & set(evaluator.trials.objective.metrics):
        return WHOLE
    if type(settings.search) in _OF_ONE_PLAN or (largest is not None and largest <= _FEW_PLANS):
        return WHOLE
    sizes = [sizes for sizes in evaluator.runner.sizes() or [] if sizes]
    least = least_share(sizes)
    if least > _LARGEST:
        return WHOLE
    blocks = [Part(number * least / _BLOCKS, (number + 1) * least / _BLOCKS) for number in range(_BLOCKS)]
    if not all(block.of(len(own)) for block in blocks for own in sizes):
        return WHOLE  # a small loader beside large ones
    with shown():
        on = _part_by(blocks, evaluator, settings, before)
    if settings.verbose and on.share < 1.0:
        rank_zero_info(f"SoftPruning: plans are told apart on {on.share:.1%} of the validation batches")
    return on


def _part_by(
    blocks: Sequence[Part], evaluator: Evaluator, settings: RoundSettings, before: Mapping[str, float]
) -> ScoredOn:
    """The part that is large enough by what scores on the blocks scatter."""
    names, least = evaluator.trials.objective.metrics, blocks[-1].stop
    dense, uniform = evaluator.problem.unpruned_plan(), _uniform_plan(evaluator)
    before_blocks, after_blocks = (_on_blocks(evaluator, plan, blocks, names) for plan in (dense, uniform))
    differences = {name: after_blocks[name] - before_blocks[name] for name in names}
    share = max(least, *(_share_needed(values, least / _BLOCKS) for values in differences.values()))
    if not share <= _LARGEST:
        return WHOLE
    noise = _standard_error(differences[settings.monitor], least / _BLOCKS, share)
    part = Part(0.0, share)
    on = _anchored(evaluator, ScoredOn(part, evaluator.runner.share_of(part), noise=noise), before)
    for name in names:
        own = _standard_error(before_blocks[name], least / _BLOCKS, share)
        if abs(on.offsets.get(name, 0.0)) > 3 * own + 1e-6 * abs(before[name]):
            return WHOLE
    return on


def least_share(sizes: Sequence[Sequence[int]]) -> float:
    """The smallest part that trials may be scored on, as a fraction of each loader's batches; 1: all are needed.

    Args:
        sizes: Samples of each batch of each loader.

    >>> least_share([[100] * 80]), least_share([[10] * 1000]), least_share([[100] * 10])
    (0.2, 0.104, 1.0)
    """
    longest = max(map(len, sizes), default=0)
    for batches in range(_BLOCKS, longest, _BLOCKS):
        part = Part(0.0, batches / longest)
        chosen = [[own[index] for index in part.of(len(own))] for own in sizes]
        if sum(map(len, chosen)) >= _LEAST_BATCHES and sum(map(sum, chosen)) >= _LEAST_SAMPLES:
            return batches / longest
    return 1.0


def _uniform_plan(evaluator: Evaluator) -> Plan:
    """The plan with the same coefficient everywhere; without a target, halfway to the highest sparsity."""
    space = evaluator.trials.space
    space = space if evaluator.trials.target is not None else space.halfway()
    return evaluator.problem.plan_of(space.scale(np.ones(space.size)))


def _on_blocks(evaluator: Evaluator, plan: Plan, blocks: Sequence[Part], names: Sequence[str]) -> _Blocks:
    found = [evaluator.metrics_on(plan, block) for block in blocks]
    return {name: np.array([metrics.get(name, math.nan) for metrics in found]) for name in names}


def _share_needed(differences: FloatArray, block: float) -> float:
    """The fraction of the data on which a mean difference is known well enough; NaN if a difference is none."""
    spread = float(differences.std(ddof=1))
    wanted = _PRECISION * abs(float(differences.mean()))
    if spread == 0.0:
        return 0.0
    ratio = block * (spread / wanted) ** 2 if wanted else math.inf
    return 1.0 if ratio == math.inf else ratio / (1.0 + ratio)


def _standard_error(values: FloatArray, block: float, share: float) -> float:
    return float(values.std(ddof=1)) * math.sqrt((1.0 - share) * block / share)


def _anchored(evaluator: Evaluator, on: ScoredOn, before: Mapping[str, float]) -> ScoredOn:
    """The part with how metrics on it are judged; all data where it has not all metrics that count."""
    if on.share >= 1.0:
        return WHOLE
    found = evaluator.metrics_on(evaluator.problem.unpruned_plan(), on.part)
    sums = {name: loader for name, loader in evaluator.runner.sums.items() if name in found}
    on = replace(on, scales={name: 1.0 / evaluator.runner.share_of(on.part, of) for name, of in sums.items()})
    offsets = {name: before[name] - value for name, value in on.judged(found).items() if name in before}
    if not all(math.isfinite(offsets.get(name, math.nan)) for name in evaluator.trials.objective.metrics):
        return WHOLE
    return replace(on, offsets=offsets)


def finalists(evaluator: Evaluator) -> int:
    """How many plans the race is going to score on all data, at most as a rule; 0 where there is none."""
    if evaluator.on.share >= 1.0:
        return 0
    return 1 if evaluator.trials.target is None else _FINALISTS


def race(evaluator: Evaluator, settings: RoundSettings) -> None:
    """Score the best trials on all data, where the search has scored on a part; they become trials of their own.

    Args:
        evaluator: Has the trials, and scores.
        settings: What the user asked for.
    """
    if evaluator.on.share >= 1.0:
        return
    trials = evaluator.trials
    candidates, others = trials.scored_on_part()
    leader: ScoredPlan | None = None  # of those scored on all data, as it was on the part
    best: ScoredPlan | None = None
    for number, candidate in enumerate(candidates):
        if leader is not None and (
            trials.target is None
            or number >= _FINALISTS
            or (trials.reaches(leader) and not trials.reaches(candidate))
            or candidate.loss - leader.loss > 2 * evaluator.on.noise  # never, where the noise is not known
        ):
            break
        scored = evaluator.score_on_all(candidate)
        if scored.trial.feasible and (best is None or scored.is_better_than(best)):
            leader, best = candidate, scored
    if best is None:
        for candidate in others[:_FINALISTS]:
            if evaluator.score_on_all(candidate).trial.feasible:
                break
    elif "latency" in (settings.limits or {}):
        _race_for_speed(evaluator, candidates)


def _race_for_speed(evaluator: Evaluator, candidates: Sequence[ScoredPlan]) -> None:
    """Score also, best first, those that are going to be timed: the best may be too slow."""
    known = {scored.plan for scored in evaluator.trials.done if scored.trial.share == 1.0}
    for candidate in worth_timing(candidates, evaluator.problem):
        if candidate.plan not in known:
            evaluator.score_on_all(candidate)
