"""The decision: which plan is to be committed, and what is wrong with it; or none, and why.

Only plans that were scored on all validation data are chosen from. The reason is data (:class:`Verdict`), with a
sentence for people beside it. Plans that will meet the constraints once they are healed are told by trial.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_softprune.round.latency import Stopwatch, worth_timing
from lightning_softprune.round.preparing import PruningProblem
from lightning_softprune.round.rehearsal import Rehearsed
from lightning_softprune.round.settings import Goal, RoundSettings
from lightning_softprune.round.trials import ScoredPlan, Trials
from lightning_softprune.search import Plan
from lightning_softprune.trainer import ModuleRunner


class Verdict(enum.Enum):
    """What the trials of a round come to."""

    FEASIBLE = enum.auto()
    NOTHING_SCORED = enum.auto()
    MISSED_BUDGETS = enum.auto()
    NOT_A_NUMBER = enum.auto()
    UNMET_CONSTRAINTS = enum.auto()
    TOO_SLOW = enum.auto()
    PRUNED_ALREADY = enum.auto()


@dataclass(frozen=True)
class Decision:
    """What is to become of the model.

    Attributes:
        plan: The plan to commit; ``None`` to leave the model as it is.
        verdict: Whether a plan is feasible, and why none is.
        sentence: The verdict in words; empty where a plan is feasible.
    """

    plan: ScoredPlan | None
    verdict: Verdict
    sentence: str = ""


def decide(
    runner: ModuleRunner,
    settings: RoundSettings,
    problem: PruningProblem,
    trials: Trials,
    before: Mapping[str, float],
    stopwatch: Stopwatch,
) -> Decision:
    """Choose the best feasible plan; where there is none, what `on_violation` says.

    Args:
        runner: Knows the other processes.
        settings: What the user asked for.
        problem: What plans cost.
        trials: What was scored.
        before: The metrics of the module as it is.
        stopwatch: Times plans, where there is a limit on latency.

    Raises:
        RuntimeError: The processes have found different plans.
    """
    limit = (settings.limits or {}).get("latency")
    ranked = trials.ranked()
    decision = Decision(ranked[0], Verdict.FEASIBLE) if ranked else _explain_infeasible(trials, before)
    if decision.plan is not None and limit is not None:
        decision = _first_within(limit, ranked, problem, stopwatch)
    if decision.plan is None and settings.on_violation == "prune":
        plan = ranked[0] if ranked else trials.least_violating()
        decision = Decision(plan, decision.verdict, decision.sentence)
    check_agreement(runner, None if decision.plan is None else decision.plan.plan)
    return decision


def pruned_already(problem: PruningProblem, trials: Trials, before: Mapping[str, float], goal: Goal) -> Decision | None:
    """The decision to leave a module as it is that is as sparse as was asked for, or as can be; else ``None``."""
    sparsity = trials.unpruned(problem.unpruned_plan(), before).trial.sparsity
    if goal.asks_no_more(sparsity, trials.space.tolerance):
        why = f"target_sparsity={goal.target:g} asks for no more"
    elif problem.groups:
        return None
    else:
        why = f"nothing is left that can be pruned. {problem.why_left_out()}"
    sentence = f"it was pruned before, {sparsity:.1%} of the first dense model are gone, and {why}"
    return Decision(None, Verdict.PRUNED_ALREADY, sentence)


def check_agreement(runner: ModuleRunner, plan: Plan | None) -> None:
    """Make sure that every process is about to commit the same plan.

    Raises:
        RuntimeError: Some process has another one than rank zero.
    """
    if not runner.all_agree(runner.broadcast(plan) == plan):
        raise RuntimeError(
            "the processes found different plans, so nothing was pruned; a metric or a hook that depends on the rank "
            "in an unsynchronised way may be the cause"
        )


_HEALED_ON_TRIAL = 4
"""Plans that are healed to see whether they will meet the constraints, at most."""

_SHARE_ON_TRIAL = 4
"""Each of them gets one part in so many of the batches of healing."""


def plans_to_be_healed(
    trials: Trials,
    settings: RoundSettings,
    chosen: ScoredPlan | None,
    rehearse: Callable[[ScoredPlan, RoundSettings], Rehearsed],
) -> list[ScoredPlan]:
    """Plans that miss the constraints, and meet them once healed for a few batches; the best first.

    Looked for among the trials: without a target by bisection among those of smaller models than the chosen one's, and
    otherwise, where none was chosen, at the nearest to feasible. What a few batches reach, all of them are expected to.
    Together that costs at most the batches of one healing, and a refit and two passes for each plan.

    Args:
        trials: What was scored.
        settings: What the user asked for.
        chosen: The best plan that meets the constraints as it is; ``None``: there is none.
        rehearse: Makes the module what a plan says, with the batches of healing that the settings ask for.
    """
    if not settings.healing or not settings.constraints or "latency" in (settings.limits or {}):
        return []
    if trials.target is not None and chosen is not None:
        return []
    least = -math.inf if chosen is None else chosen.trial.sparsity
    candidates = [s for s in trials.done if _misses_constraints_alone(s) and s.trial.sparsity > least]
    few = replace(settings, healing=max(settings.healing // _SHARE_ON_TRIAL, 1), teacher=0.0)
    if trials.target is not None:
        return sorted(candidates, key=lambda scored: scored.violation)[:1]
    front: list[ScoredPlan] = []  # the more goes, the more is missed
    for scored in sorted(candidates, key=lambda scored: (-scored.trial.sparsity, scored.violation)):
        if not front or scored.violation < front[-1].violation:
            front.append(scored)
    found: list[ScoredPlan] = []
    for _ in range(_HEALED_ON_TRIAL):
        if not front:
            break
        middle = len(front) // 2
        if rehearse(front[middle], few).plan.violation == 0.0:
            found.insert(0, front[middle])
            front = front[:middle]
        else:
            front = front[middle + 1 :]
    return found


def _misses_constraints_alone(scored: ScoredPlan) -> bool:
    return scored.budget_gap == 0.0 < scored.violation < math.inf and not scored.plan.is_empty()


def _first_within(
    limit: float, ranked: Sequence[ScoredPlan], problem: PruningProblem, stopwatch: Stopwatch
) -> Decision:
    """The best of the plans that is fast enough."""
    shares = []
    for scored in worth_timing(ranked, problem):
        shares.append(stopwatch.share_of_dense(scored.plan, runs=50, seconds=0.5))
        if shares[-1] <= limit:
            return Decision(scored, Verdict.FEASIBLE)
    sentence = (
        f"limits['latency']={limit:g}: the fastest of the {len(shares)} plans that were timed takes {min(shares):.3f} "
        "of the dense model's time"
    )
    return Decision(None, Verdict.TOO_SLOW, sentence)


def _explain_infeasible(trials: Trials, before: Mapping[str, float]) -> Decision:
    """Say why no trial is feasible."""
    if not trials.done:
        sentence = "there was no plan to score: within bounds and limits, nothing was found that removes channels"
        return Decision(None, Verdict.NOTHING_SCORED, sentence)
    monitor, number = trials.objective.monitor, f"the {trials.plans()} scored plans"
    at = "" if trials.target is None else f" at {trials.target:.1%}"
    if all(math.isnan(scored.trial.score) for scored in trials.done):
        so_before = ", and was so before anything was pruned" if math.isnan(before[monitor]) else ""
        return Decision(None, Verdict.NOT_A_NUMBER, f"{monitor} is nan for each of {number}{so_before}")
    if all(scored.budget_gap for scored in trials.done):
        return Decision(None, Verdict.MISSED_BUDGETS, _missed(trials))
    nearest = trials.least_violating()
    if nearest is not None and nearest.violation:
        missed = ", ".join(trials.objective.shortfalls(nearest.trial.metrics))
        sentence = (
            f"none of {number} meets the constraints{at}; the nearest, of sparsity {nearest.trial.sparsity:.4f}, "
            f"misses {missed}"
        )
        return Decision(None, Verdict.UNMET_CONSTRAINTS, sentence)
    return Decision(None, Verdict.NOT_A_NUMBER, f"none of {number} has a finite {monitor}{at}")


def _missed(trials: Trials) -> str:
    """Say how near the plans have come to target and limits, where some plan meets them and none was found."""
    sparsity = min(trials.done, key=lambda scored: scored.budget_gap).trial.sparsity
    asked = ["meets the limits"] if len(trials.space.limits) else []
    if trials.target is not None:
        asked.insert(0, f"is within {trials.space.tolerance:g} of a sparsity of {trials.target:g}")
    return (
        f"none of the {trials.plans()} scored plans {' and '.join(asked)}; the nearest has {sparsity:.4f}. Where "
        "single channels weigh much, some searches step over the target: a larger tolerance, or another search, helps"
    )
