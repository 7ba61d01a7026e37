"""The commit: a plan is applied for good, refined, rehearsed and healed, with the optimizers and averaged copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_softprune.checkpoint import ModelShapes, keep_dense
from lightning_softprune.compensation import (
    DenseNetwork,
    DenseRun,
    Teacher,
    changeable,
    layers_in_eval_mode,
    learning_in,
    refit_readers,
    run_dense,
    teach,
    teaching_bytes,
)
from lightning_softprune.report import Phases
from lightning_softprune.results import Healing
from lightning_softprune.round.evaluation import Evaluator
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.round.trials import ScoredPlan
from lightning_softprune.surgery import (
    Judgement,
    References,
    Sightings,
    Surgery,
    Transaction,
    inner_optimizers,
    repair_optimizers,
)
from lightning_softprune.trainer import (
    ModuleRunner,
    averaged_copies,
    forget_compiled,
    record_new_parameters,
    users_callbacks,
    wrap_again,
)


@dataclass(frozen=True)
class Rehearsed:
    """A plan that was applied, and runs.

    Attributes:
        plan: The trial that the model now is.
        surgery: What was done to the module.
        compensated: The score before healing.
        healing: What healing has done; ``None``: there was none.
        teacher: What the module was, where it is to teach further.
    """

    plan: ScoredPlan
    surgery: Surgery
    compensated: float
    healing: Healing | None = None
    teacher: Teacher | None = None


def rehearse_plan(
    evaluator: Evaluator,
    settings: RoundSettings,
    copies: Sequence[nn.Module],
    best: ScoredPlan,
    judged: Set[str],
    phases: Phases,
) -> Rehearsed:
    """Prune; refine the compensation and heal where the model's own score is better for it; see that all of it runs.

    Args:
        evaluator: Scores the refined model.
        settings: What the user asked for.
        copies: Averaged copies of the module, which are pruned alike.
        best: The plan.
        judged: Names of the parameters that validation runs.
        phases: Shows what is done, and keeps the time.
    """
    runner, problem = evaluator.runner, evaluator.problem
    trainer, module = runner.trainer, runner.module
    heals = settings.healing > 0 and _has_room(runner, "healing")
    taught = settings.teacher > 0.0 and (heals or _has_room(runner, "teacher"))
    with phases("refitting"):
        dense = None
        if settings.compensation == "least_squares":
            room = runner.memory_left - (teaching_bytes(module, heals) if heals or taught else 0)
            if problem.dense is not None:
                dense = problem.dense.fit_into(room, runner.steady)
            else:
                dense = run_dense(module, problem.compensation, problem.calibration, room, runner.steady)
        for averaged in copies:
            problem.prune(averaged, best.plan)
        surgery = problem.prune(module, best.plan)
        beside = DenseNetwork(module, surgery, everything=taught) if heals or taught else None
        repair_optimizers(all_optimizers(trainer, module), surgery)
        if dense is not None:
            with _averages_follow(module, copies):
                best = _refined(evaluator, surgery, dense, best)
        runner.rehearse()
    teacher = Teacher(beside, judged) if beside is not None and taught else None
    rehearsed = Rehearsed(best, surgery, best.trial.score, teacher=teacher)
    if beside is None or not heals or (settings.healing > 1 and _has_lost_nothing(evaluator, best)):
        return rehearsed  # one batch, which is all that a dry run heals on, shows what could fail
    with phases.counted("healing", settings.healing) as advance:
        before = [(tensor, tensor.detach().clone()) for tensor in changeable(module)]
        with _averages_follow(module, copies):
            errors = teach(runner, beside, judged, settings.healing, advance)
            if not errors:
                _tell_nothing_to_learn(bool(learning_in(module, beside, judged)))
                return rehearsed
            return _if_better(evaluator, rehearsed, before, errors)


@contextmanager
def _averages_follow(module: nn.Module, copies: Sequence[nn.Module]) -> Iterator[None]:
    """What is changed in the module meanwhile is changed by as much in its averaged copies.

    They are sums of what the module was: what is added to each of these is added to the sum.
    """
    before = {name: tensor.detach().clone() for name, tensor in _numbers_of(module)} if copies else {}
    yield
    after = dict(_numbers_of(module))
    for averaged in copies:
        for name, tensor in _numbers_of(averaged):
            if name in before and before[name].shape == tensor.shape:
                old, new = before[name].to(tensor.device), after[name].detach().to(tensor.device)
                moved = tensor.detach() + (new - old)
                if name.endswith("running_var"):  # which healing may make smaller by more than there is
                    moved = torch.maximum(moved, torch.minimum(tensor.detach(), new))
                _put_back([(tensor, torch.where(new == old, tensor.detach(), moved))])  # infinite masks stay


def _numbers_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point() or tensor.is_complex()]


HEALED_ON_TRIAL = 4
"""Plans that are healed to see whether they will meet the constraints, at most."""

SHARE_ON_TRIAL = 4
"""Each of them gets one part in so many of the batches of healing."""


def plans_to_be_healed(
    evaluator: Evaluator,
    settings: RoundSettings,
    chosen: ScoredPlan | None,
    rehearse: Callable[[ScoredPlan, RoundSettings], Rehearsed],
) -> list[ScoredPlan]:
    """Plans that miss the constraints, and meet them once healed for a few batches; the best first.

    Looked for among the trials: without a target by bisection among those of smaller models than the chosen one's, and
    otherwise, where none was chosen, at the nearest to feasible. What a few batches reach, all of them are expected to.
    Together that costs at most the batches of one healing, and a refit and two passes for each plan.

    Args:
        evaluator: Has the trials.
        settings: What the user asked for.
        chosen: The best plan that meets the constraints as it is; ``None``: there is none.
        rehearse: Makes the module what a plan says, with the batches of healing that the settings ask for.
    """
    target = evaluator.trials.target
    if not settings.healing or not settings.constraints or "latency" in (settings.limits or {}):
        return []
    if target is not None and chosen is not None:
        return []
    least = -math.inf if chosen is None else chosen.trial.sparsity
    candidates = [s for s in evaluator.trials.done if _misses_constraints_alone(s) and s.trial.sparsity > least]
    few = replace(settings, healing=max(settings.healing // SHARE_ON_TRIAL, 1), teacher=0.0)
    if target is not None:
        return sorted(candidates, key=lambda scored: scored.violation)[:1]
    front: list[ScoredPlan] = []  # the more goes, the more is missed
    for scored in sorted(candidates, key=lambda scored: (-scored.trial.sparsity, scored.violation)):
        if not front or scored.violation < front[-1].violation:
            front.append(scored)
    found: list[ScoredPlan] = []
    for _ in range(HEALED_ON_TRIAL):
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


def commit(
    runner: ModuleRunner,
    copies: Sequence[nn.Module],
    transaction: Transaction,
    surgery: Surgery,
    dense: ModelShapes,
    judged: Mapping[int, Judgement],
) -> None:
    """Keep what was rehearsed; whatever else points at parameters follows.

    Args:
        runner: Has the trainer and the module.
        copies: Averaged copies of the module, which were pruned alike.
        transaction: Is committed.
        surgery: What was done to the module.
        dense: The shapes of the module before that.
        judged: What becomes of modules outside of it that look like parts of it, by identity.
    """
    trainer, module = runner.trainer, runner.module
    references = References(module, surgery, dense.shapes, copies)
    listeners = [module, *users_callbacks(trainer)]
    holders = _holders(trainer, module)
    references.apart, references.judged = {id(holder) for _, holder in holders}, judged
    try:
        references.carry_hooks()
        for name, holder in holders:
            references.carry(name, holder, companions=not hasattr(holder, "on_softprune"))
        _warn_of(references.left)
        if references.doubtful:
            rank_zero_warn(
                f"SoftPruning: {', '.join(references.doubtful[:8])}: outside of the model, with the names and shapes "
                "of a part of it, and pruned like that part, as an average of it has to be. If it is a teacher that "
                "shall stay whole, make it a submodule and name it in `ignore`"
            )
        for listener in listeners:
            if callable(hook := getattr(listener, "on_softprune", None)):
                hook(surgery)
        _warn_of(references.left_by_listeners())
        keep_dense(module, dense, {name: before for name, (before, _) in surgery.counts.items()}, surgery.unsaved)
        forget_compiled()
        wrap_again(trainer, module)  # last: the dense wrapper serves until nothing can fail any more
    except BaseException:
        references.undo()
        raise
    record_new_parameters(trainer, [bias for _, _, bias in surgery.created])
    transaction.commit()


def _warn_of(left: Sequence[str]) -> None:
    """Name what does not follow the parameters."""
    if left:
        rank_zero_warn(
            f"SoftPruning: {', '.join(list(dict.fromkeys(left))[:8])}: of the shape of a pruned parameter, and cannot "
            "follow it by itself; give its owner (the module or a callback) a method `on_softprune(self, surgery)`"
        )


def look_outside(trainer: pl.Trainer, module: pl.LightningModule, sightings: Sightings) -> None:
    """Note how the modules outside of the model are that look like parts of it."""
    sightings.look(module, _holders(trainer, module), averaged_copies(trainer), trainer.global_step)


def _holders(trainer: pl.Trainer, module: pl.LightningModule) -> list[tuple[str, object]]:
    """All that may point at parameters, by the names that people give it."""
    others = (*users_callbacks(trainer), *all_optimizers(trainer, module))
    return [("self", module), *((type(holder).__name__, holder) for holder in others)]


def all_optimizers(trainer: pl.Trainer, module: nn.Module) -> list[Optimizer]:
    """The trainer's optimizers, those inside of them, and those that the module and callbacks keep."""
    return [*trainer.optimizers, *inner_optimizers(trainer.optimizers, [module, *users_callbacks(trainer)])]


def _refined(evaluator: Evaluator, surgery: Surgery, dense: DenseRun, best: ScoredPlan) -> ScoredPlan:
    """Refit the readers, and take it back where the score is not better for it."""
    values = [(new, new.detach().clone()) for _, new, _ in surgery.parameters]
    values += [(bias, bias.detach().clone()) for _, _, bias in surgery.created]
    means = [(mean, mean.clone()) for mean, _ in surgery.shifted.values()]
    refit_readers(evaluator.runner.module, surgery, evaluator.problem.compensation, dense)
    refined = evaluator.score_as_it_is(best, "refined")
    if refined.is_better_than(best):
        return refined
    _put_back([*values, *means])
    return best


def _has_lost_nothing(evaluator: Evaluator, plan: ScoredPlan) -> bool:
    """Whether a plan meets the constraints and scores no worse than the dense network: nothing shows what to heal."""
    objective = evaluator.trials.objective
    if plan.violation > 0.0 or not objective.loss(plan.judged) <= objective.loss(evaluator.before):
        return False
    rank_zero_info("SoftPruning: no healing: the pruned network scores no worse than the dense one")
    return True


def _if_better(
    evaluator: Evaluator,
    rehearsed: Rehearsed,
    before: Sequence[tuple[torch.Tensor, torch.Tensor]],
    errors: Sequence[float],
) -> Rehearsed:
    """Keep what was learned where the score is better for it, and else put back what was before."""
    resting = layers_in_eval_mode(evaluator.runner.module)
    healed = evaluator.score_as_it_is(rehearsed.plan, f"healed on {len(errors)} batches")
    kept = healed.is_better_than(rehearsed.plan)
    if not kept:
        _put_back(before)
        if resting:
            rank_zero_warn(
                f"SoftPruning: healing was taken back, since it did not better the score; {resting} layers that keep "
                "statistics, as BatchNorm does, are in eval mode, where networks heal badly: if that is not meant, "
                "call `module.train()` before the fit, which leaves modes as they are"
            )
    healing = Healing(healed.trial.score, kept, tuple(errors))
    return replace(rehearsed, plan=healed if kept else rehearsed.plan, healing=healing)


def _tell_nothing_to_learn(something_learns: bool) -> None:
    if not something_learns:
        rank_zero_warn(
            "SoftPruning: healing has nothing to train: no parameter that validation runs requires a gradient"
        )
        return
    rank_zero_warn(
        "SoftPruning: healing has nothing to learn from: there are no training batches, or no output that the "
        "module's steps use and that the dense and the pruned network have in common"
    )


def _has_room(runner: ModuleRunner, name: Literal["healing", "teacher"]) -> bool:
    """Whether healing, or a teacher alone, may hold what it needs; says so where not."""
    wanted, left = teaching_bytes(runner.module, name == "healing"), runner.memory_left
    if wanted > left:
        rank_zero_warn(
            f"SoftPruning: no {name}: it would hold {wanted / 2**30:.2g} GiB beside the model, and of `memory_limit` "
            f"{left / 2**30:.2g} GiB are left"
        )
    return wanted <= left


def _put_back(values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, value in values:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)
