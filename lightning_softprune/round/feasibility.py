"""What can be met at all, and what is said where it cannot.

Most of it can be known before training. `check_ahead` looks at one batch of everything, and at all that a round would
look at only where that has found a mistake: so it costs little, and says nothing that the round would not say.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_softprune.graph import record_usage
from lightning_softprune.round.preparing import PruningProblem, leave_yardsticks_alone, prepare_problem, sketch_problem
from lightning_softprune.round.settings import Goal, RoundSettings
from lightning_softprune.search import Objective, SearchSpace, mode_of
from lightning_softprune.surgery import Transaction
from lightning_softprune.trainer import (
    LoadedBatch,
    MisconfigurationException,
    ModuleRunner,
    as_if_at_epoch,
    averaged_copies,
    isolated_rng,
    may_log,
    seed_from,
)
from lightning_softprune.utilities.checks import near_miss
from lightning_softprune.utilities.ownership import is_raised_by_us
from lightning_softprune.utilities.wording import counted


def monitored(metrics: Mapping[str, float], objective: Objective) -> float:
    """The score among the metrics.

    Raises:
        MisconfigurationException: The score, or a metric with a constraint, is not among them.
    """
    missing = objective.unlogged(metrics)
    if missing is not None:
        logged = ", ".join(map(repr, sorted(metrics))) or "nothing"
        argument, name = missing
        what = "" if argument.startswith("monitor") else f": {name!r}"
        if apart := _by_loader(name, metrics):
            names = ", ".join(map(repr, apart))
            raise MisconfigurationException(
                f"{argument}{what} is logged for each validation loader apart; name one of {names}"
            )
        raise MisconfigurationException(
            f"{argument}{what} is not logged while validating; logged are: {logged}{near_miss(name, metrics)}"
        )
    return metrics[objective.monitor]


def _by_loader(name: str, metrics: Mapping[str, float]) -> list[str]:
    """What Lightning makes of a metric's name where there are several loaders."""
    return [logged for logged in metrics if re.fullmatch(rf"{re.escape(name)}/dataloader_idx_\d+", logged)]


def objective_of(settings: RoundSettings, before: Mapping[str, float], directions: Mapping[str, bool]) -> Objective:
    """What plans are judged by, with the mode found out.

    Args:
        settings: What the user asked for.
        before: Metrics of the module as it is.
        directions: Whether higher is better, of the metrics that know.

    Raises:
        MisconfigurationException: A metric is not logged, or the mode is wrong or cannot be told.
    """
    scale = monitored(before, settings.objective)
    try:
        mode = mode_of(settings.monitor, settings.mode, directions.get(settings.monitor))
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    return replace(settings.objective, scale=scale, mode=mode)


def check_prunable(problem: PruningProblem, goal: Goal) -> None:
    """Refuse a model in which nothing can be pruned, unless that is so because a round has pruned it."""
    if not problem.groups and not (goal.pruned_before or goal.on_the_way):
        raise MisconfigurationException(
            f"SoftPruning found nothing that can be pruned in this model. {problem.why_left_out()}"
        )


def check_reachable(problem: PruningProblem, space: SearchSpace, settings: RoundSettings, target: float | None) -> None:
    """Refuse budgets that no plan meets, and say how near plans come, and what is in the way."""
    names = [name for name in settings.limits or {} if name != "latency"]
    least = [] if space.shares is None else space.shares(space.realise(space.high[None]))[0].tolist()
    for name, limit, share in zip(names, space.limits, least, strict=True):
        if share > limit:
            raise MisconfigurationException(
                f"limits[{name!r}]={limit:g} is out of reach: a share of {share:.4f} of the {name} remains when every "
                "group is pruned as far as its bounds allow"
            )
    if target is None:
        return
    nearest = space.nearest_point()
    if space.on_target(nearest):
        return
    asked = f"target_sparsity={target:g} with tolerance={space.tolerance:g}"
    if not names:
        raise MisconfigurationException(
            f"{asked} is out of reach: the nearest reachable sparsity is {space.sparsity_of(nearest):.4f} "
            f"({_kept_whole(problem, settings.round_to)}{problem.coverage})"
        )
    ways = [f"within the limits, the nearest reachable sparsity is {space.sparsity_of(nearest):.4f}"]
    for number, name in enumerate(names):
        share = space.least_share(number)
        others = " and within the other limits" if len(names) > 1 else ""
        ways.append(
            f"at that sparsity{others}, the smallest limit on {name} that was found to work is {share:.4f}"
            if math.isfinite(share)
            else f"a looser limit on {name} alone does not help"
        )
    raise MisconfigurationException(
        f"{asked} (of the {settings.cost}) and limits={settings.limits} cannot be met together: {'; '.join(ways)}"
    )


def _kept_whole(problem: PruningProblem, round_to: int) -> str:
    """How many groups are too narrow to lose anything, where kept channels are a multiple of a number."""
    narrow = sum(group.num_channels <= round_to for group in problem.groups) if round_to > 1 else 0
    return f"round_to={round_to} keeps {counted(narrow, 'group')} whole; " if narrow else ""


# ------------------------------------------------------------------------------------------------- before training


def check_ahead(
    trainer: pl.Trainer, module: pl.LightningModule, settings: RoundSettings, goals: Sequence[Goal], batch: LoadedBatch
) -> None:
    """Say now what the next round would say after all the training before it. The run goes on as if nothing were.

    Where the user's own code fails, nothing is said: it may work once the module is trained.

    Args:
        trainer: The trainer in charge.
        module: Its module.
        settings: What the user asked for.
        goals: What the rounds to come aim at, the next one first.
        batch: The training batch that is about to be trained on.

    Raises:
        MisconfigurationException: What the round would raise.
    """
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return  # they would be made now, from other random numbers than later
    looked = _Look(trainer, module, settings, goals)
    if trainer.strategy.reduce_boolean_decision(looked.finds_nothing(batch), all=True):
        return
    for epoch in (None, goals[0].epoch):  # some metrics are logged at some epochs only
        if looked.finds_nothing(None, epoch):
            return
    if looked.error is not None:
        raise looked.error
    rank_zero_warn(f"SoftPruning: {looked.doubt}; if it is not logged at epoch {goals[0].epoch}, the round will fail")


class _Look:
    """Looks for mistakes without doing anything.

    Attributes:
        error: What is wrong.
        doubt: What may be.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, settings: RoundSettings, goals: Sequence[Goal]
    ) -> None:
        self.trainer, self.module, self.settings, self.goals = trainer, module, settings, goals
        self.error: MisconfigurationException | None = None
        self.doubt = ""

    def finds_nothing(self, batch: LoadedBatch | None, epoch: int | None = None) -> bool:
        """Look once; at one batch, or at all that a round looks at, and perhaps as if it were another epoch."""
        self.error, self.doubt = None, ""
        try:
            with nullcontext() if epoch is None else as_if_at_epoch(self.trainer, epoch), self._runner(batch) as runner:
                self._look(runner, whole=batch is None)
        except MisconfigurationException as error:
            self.error = error
        except Exception as error:
            if not is_raised_by_us(error):  # the user's own
                return True
            self.error = MisconfigurationException(str(error))
            self.error.__cause__ = error.__cause__ or error
        return self.error is None and not self.doubt

    @contextmanager
    def _runner(self, batch: LoadedBatch | None) -> Iterator[ModuleRunner]:
        settings, seed = self.settings, seed_from(self.settings.seed)
        limit, batches = settings.memory_limit, settings.least_calibration_batches
        runner = ModuleRunner(
            self.trainer, self.module, memory_limit=limit, seed=seed, calibration_batches=batches, only_batch=batch
        )
        with (
            isolated_rng(seed),
            torch.inference_mode(False),
            Transaction(self.module, *averaged_copies(self.trainer), optimizers=self.trainer.optimizers),
            runner,
        ):
            yield runner

    def _look(self, runner: ModuleRunner, whole: bool) -> None:
        """Raises what is wrong, and notes what may be."""
        goal, last = self.goals[0], self.goals[-1]
        settings = goal.asked(self.settings)
        leave_yardsticks_alone(runner, settings)
        with record_usage(self.module, runner.left_alone) as judged:
            metrics = runner.metrics()
        missing = settings.objective.unlogged(metrics)
        if missing is not None and may_log(self.module, missing[1]) and not _by_loader(missing[1], metrics):
            self.doubt = f"{missing[0]}: {missing[1]!r} is not logged in a validation before training"
        else:
            objective_of(settings, metrics, runner.directions)
        if whole:
            rng = np.random.default_rng(settings.seed)
            problem = prepare_problem(runner, settings, rng, judged.parameters)
        else:
            problem = sketch_problem(runner, settings, judged.parameters)
        check_prunable(problem, goal)
        dense = goal.dense or problem.costs_of(problem.unpruned_plan())
        space = problem.space(settings, dense, goal.target)
        sparsity = float(space.sparsity(np.array([problem.unpruned_plan().counts]))[0])
        if not problem.groups or goal.asks_no_more(sparsity, space.tolerance):
            return  # it is left as it is
        check_reachable(problem, space, settings, goal.target)
        check_strategy(space, settings, goal.target)
        if last.target is not None and not settings.bounds:  # a round may go as far as its bounds, the next one further
            settings = last.asked(self.settings)
            space = problem.space(settings, dense, last.target)
            if space.sparsity_of(space.high) < space.floor:
                check_reachable(problem, space, settings, last.target)


def check_strategy(space: SearchSpace, settings: RoundSettings, target: float | None) -> None:
    """Ask a strategy whether it could search here; without a target, at one halfway that no plan need be on.

    Raises:
        MisconfigurationException: It could not.
    """
    at = space if target is not None else replace(space.halfway(), tolerance=0.0)
    strategy = copy.deepcopy(settings.search)
    strategy.is_global_zero = False  # which opens no storage
    with refusals():
        strategy.check(at)
        if target is not None:
            strategy.check_target(space)


@contextmanager
def refusals() -> Iterator[None]:
    """What a strategy refuses, by a `ValueError`, is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"search: {error}") from error
