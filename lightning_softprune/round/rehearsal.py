"""The rehearsal: a plan is applied, refined and healed as for good, and the module is run as it is then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

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
from lightning_softprune.round.holders import all_optimizers
from lightning_softprune.round.settings import RoundSettings
from lightning_softprune.round.trials import ScoredPlan
from lightning_softprune.surgery import Surgery, repair_optimizers
from lightning_softprune.trainer import ModuleRunner


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
