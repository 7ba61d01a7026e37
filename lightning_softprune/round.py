"""One round: from a trained module to a smaller one with its score, or to the module as it was.

A round traces the module, ranks the channels of every group, searches the coefficients and commits the best feasible
plan. It knows nothing of epochs, schedules and files; those are the callback's. Whatever fails before the commit, or in
it, the module and its optimizers are rolled back and the user's own exception goes on.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_softprune.calibration import collect_statistics, find_readers
from lightning_softprune.coefficients import build_rounding, build_space
from lightning_softprune.compensation import Compensation, DenseInputs, refine
from lightning_softprune.costs import CostModel, Positions, record_macs
from lightning_softprune.groups import PruningGroup, assign_components, mirror_twins, trace_groups
from lightning_softprune.importance import norms, rank
from lightning_softprune.journal import BASELINE, Journal, Key, digest, open_journal
from lightning_softprune.neighbours import averaged_copies, forget_compiled
from lightning_softprune.plan import Plan, Rounding
from lightning_softprune.progress import SearchProgress
from lightning_softprune.results import Costs, GroupResult, PruningResult, Sensitivity, Trial
from lightning_softprune.scoring import (
    ValidationScorer,
    isolated_rng,
    over_processes,
    run_step,
    training_batches,
    transfer,
    untouched,
    wrap_again,
)
from lightning_softprune.search import SearchOutcome, SearchSpace, SearchStrategy, run_search
from lightning_softprune.surgery import (
    OptimizerTransaction,
    Surgery,
    Transaction,
    apply_plan,
    probe,
    repair_optimizers,
)

__all__ = ["RoundSettings", "find_groups", "run_round"]

Steps = list[Callable[[], Any]]


@dataclass(frozen=True)
class RoundSettings:
    """What the user asked for; the fields are SoftPruning's arguments of the same names."""

    monitor: str
    mode: str
    tolerance: float
    search: SearchStrategy
    components: dict[str, list[str]] | None
    ignore: tuple[str, ...]
    twins: dict[str, str] | None
    bounds: dict[str, list[float]] | None
    importance: str
    compensation: str
    round_to: int
    search_batches: int | None
    calibration_batches: int
    seed: int
    verbose: bool


def run_round(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    settings: RoundSettings,
    *,
    epoch: int,
    target: float,
    dense: Costs | None = None,
    commit: bool = True,
) -> PruningResult:
    """Search, and prune the module in place.

    Args:
        trainer: The trainer in charge; its validation data score the trials.
        module: Its module.
        settings: What the user asked for.
        epoch: The epoch before which the round runs; with the seed, all that the round's random numbers depend on.
        target: Sparsity to reach, against the first dense model.
        dense: Costs of the first dense model; ``None``: the module as it is.
        commit: Whether to prune; ``False`` searches only and leaves the module as it is.

    Returns:
        What was found; ``applied`` says whether the module was pruned.

    Raises:
        MisconfigurationException: The monitor is not logged, nothing is prunable, or the target is out of reach.
        Exception: The user's own, with everything rolled back.
    """
    started = time.monotonic()
    seed = int(np.random.SeedSequence([settings.seed, epoch]).generate_state(1)[0])
    optimizers = list(trainer.optimizers)
    optimizers_before = OptimizerTransaction(optimizers)
    copies = averaged_copies(trainer)
    with (
        isolated_rng(seed),
        torch.inference_mode(False),
        Transaction(module, *copies) as transaction,
        ValidationScorer(trainer, module, max_batches=settings.search_batches, seed=seed) as scorer,
        open_journal(trainer, module, settings, scorer.batches, epoch=epoch, target=target) as journal,
    ):
        before = journal.scored(BASELINE, lambda: over_processes(trainer, scorer.metrics())).metrics
        score_before = _monitored(before, settings.monitor)
        network = _Network.examine(trainer, module, scorer, settings, np.random.default_rng(seed))
        costs_before = network.costs_of((0,) * len(network.groups))
        dense = dense or costs_before
        space = build_space(
            network.rounding,
            network.costs,
            dense=dense.params,
            target=target,
            tolerance=settings.tolerance,
            norms=network.norms,
        )
        trials = _Trials(trainer, module, scorer, settings, network, space, journal)
        strategy, outcome = _search(trainer, settings, space, trials, seed, before)
        best = _agreed(trainer, trials.best())
        if best is None:
            best = trials.unpruned(before)
            reason = trials.why_none(target)
            if commit:
                rank_zero_warn(f"SoftPruning: the model is left as it is: {reason}")
        else:
            reason = "" if commit else "this was a dry run"
        if commit and not reason:
            transaction.rollback()  # also what the user's hooks may have done to parameter values meanwhile
            try:
                best = _commit(trainer, module, copies, scorer, settings, network, trials, best, seed)
            except BaseException:
                optimizers_before.rollback()
                raise
            transaction.commit()
        costs_after = network.costs_of(best.counts)
        return PruningResult(
            epoch=epoch,
            sparsity=1.0 - costs_after.params / dense.params,
            target_sparsity=target,
            score_before=score_before,
            score_after=best.trial.score,
            metrics_before=before,
            metrics_after=best.trial.metrics,
            costs_before=costs_before,
            costs_after=costs_after,
            groups=tuple(
                GroupResult(group.name, group.component, group.kind, group.num_channels, group.num_channels - n, c)
                for group, n, c in zip(network.groups, best.counts, best.trial.coefficients, strict=True)
            ),
            evaluations=1 + len(trials.done) - trials.recalled,
            seconds=time.monotonic() - started,
            strategy=type(strategy).__name__,
            stop_reason=outcome.stop_reason,
            applied=commit and not reason,
            trials=tuple(scored.trial for scored in trials.done),
            monitor=settings.monitor,
            mode=settings.mode,
            sensitivity=_sensitivity(strategy, network, settings.mode),
            reason=reason,
        )


def _agreed(trainer: pl.Trainer, best: _Scored | None) -> _Scored | None:
    """Make sure that every process is about to commit the same plan: rank zero's."""
    counts = None if best is None else best.counts
    same = trainer.strategy.broadcast(counts) == counts
    if not trainer.strategy.reduce_boolean_decision(same, all=True):
        raise RuntimeError(
            "the processes found different plans, so nothing was pruned; a metric or a hook that depends on the rank "
            "in an unsynchronised way may be the cause"
        )
    return best


def _search(
    trainer: pl.Trainer,
    settings: RoundSettings,
    space: SearchSpace,
    trials: _Trials,
    seed: int,
    before: dict[str, float],
) -> tuple[SearchStrategy, SearchOutcome]:
    _check_reachable(space)
    strategy = copy.deepcopy(settings.search)
    strategy.is_global_zero = trainer.is_global_zero
    try:
        strategy.check(space)
    except ValueError as error:
        raise MisconfigurationException(f"search: {error}") from error
    dense = space.key(np.zeros(space.size))
    # bounds may forbid the dense model
    cache = {} if any(dense) else {dense: _loss(_monitored(before, settings.monitor), settings.mode)}
    with SearchProgress(
        strategy.max_evaluations, settings.monitor, settings.mode, settings.verbose, trainer=trainer
    ) as bar:
        outcome = run_search(
            strategy,
            space,
            trials.evaluate_with(bar),
            seed=seed,
            cache=cache,
            on_asked=lambda x, *_: trials.recall_unpruned(x, before),
        )
        return strategy, outcome


def _commit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    copies: Sequence[nn.Module],
    scorer: ValidationScorer,
    settings: RoundSettings,
    network: _Network,
    trials: _Trials,
    best: _Scored,
    seed: int,
) -> _Scored:
    """Prune for good, and refine the compensation where that helps; the model's own score decides.

    Returns:
        The trial that the model now is.
    """
    dense = None
    if settings.compensation == "least_squares":
        dense = DenseInputs(module, network.compensation, network.calibration)
    plan = Plan.from_counts(best.counts, network.rankings)
    for averaged in copies:
        network.prune(averaged, plan)
    surgery = network.prune(module, plan)
    repair_optimizers(trainer.optimizers, surgery)
    if dense is not None:
        values = [(new, new.detach().clone()) for _, new, _ in surgery.parameters]
        values += [(bias, bias.detach().clone()) for _, _, bias in surgery.created]
        refine(module, surgery, network.compensation, dense)
        refined = trials.score_as_it_is(best)
        if refined.trial.feasible and refined.better_than(best, settings.mode):
            best = refined
        else:
            with torch.no_grad():
                for parameter, value in values:
                    parameter.copy_(value)
    _rehearse(trainer, module, scorer, seed)
    forget_compiled()
    wrap_again(trainer, module)  # last: the dense wrapper serves until nothing can fail any more
    return best


def _sensitivity(strategy: SearchStrategy, network: _Network, mode: str) -> tuple[Sensitivity, ...]:
    sign = 1.0 if mode == "min" else -1.0
    return tuple(
        Sensitivity(
            network.groups[curve.index].name, tuple(curve.coefficients), tuple(sign * loss for loss in curve.losses)
        )
        for curve in strategy.sensitivity
    )


# ------------------------------------------------------------------------------------------------------ the network


@dataclass(frozen=True)
class _Network:
    """What a round knows of the module once it has been traced and ranked."""

    groups: list[PruningGroup]
    rankings: list[Any]
    norms: Any
    rounding: Rounding
    costs: CostModel
    compensation: Compensation
    calibration: Steps
    samples: int
    identity: str

    @classmethod
    def examine(
        cls,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        scorer: ValidationScorer,
        settings: RoundSettings,
        rng: np.random.Generator,
    ) -> _Network:
        steps = module_steps(trainer, module, scorer)
        found = prepare_groups(module, steps, settings.components, settings.ignore, settings.twins)
        found = trainer.strategy.broadcast(found)  # a probe may fail on one process's batch only
        groups = [group for group in found if group.prunable]
        if not groups:
            raise MisconfigurationException(nothing_prunable(found))
        calibration, batches = _calibration(trainer, module, scorer, settings)
        statistics = collect_statistics(module, find_readers(module, groups), calibration)
        rankings = rank(settings.importance, module, groups, calibration, statistics, rng)
        rankings = trainer.strategy.broadcast(rankings)
        for twin, original in (settings.twins or {}).items():  # a twin that did not run sees what its original sees
            inside = {name: known for name, known in statistics.items() if name.startswith(f"{original}.")}
            statistics = {twin + name[len(original) :]: known for name, known in inside.items()} | statistics
        compensation = Compensation(settings.compensation, module, groups, rankings, statistics)
        positions: dict[str, Positions]
        with record_macs(module) as positions:
            _validation(trainer, module, scorer)()
        positions, samples = trainer.strategy.broadcast((positions, scorer.batch_size or 1))
        return cls(
            groups=groups,
            rankings=rankings,
            norms=norms(module, groups),
            rounding=build_rounding(groups, settings.bounds, settings.round_to),
            costs=CostModel.build(module, groups, rankings, positions, compensation.new_biases),
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


def prepare_groups(
    model: nn.Module,
    steps: Steps,
    components: dict[str, list[str]] | None,
    ignore: Sequence[str],
    twins: dict[str, str] | None = None,
) -> list[PruningGroup]:
    """Trace, name components and probe: the groups as the user sees them."""

    def run(seed: int = 0) -> None:
        with isolated_rng(seed), torch.no_grad():
            for step in steps:
                step()

    traced = mirror_twins(model, trace_groups(model, steps, ignore), twins or {})
    return probe(model, assign_components(model, traced, components), run, lambda: run(1))


def nothing_prunable(groups: Sequence[PruningGroup]) -> str:
    """Word the error for a model in which every group is refused."""
    reasons = "; ".join(f"{group.name}: {group.reason}" for group in groups[:8])
    more = f"; and {len(groups) - 8} more" if len(groups) > 8 else ""
    return f"SoftPruning found nothing that can be pruned in this model. {reasons}{more}"


def _validation(trainer: pl.Trainer, module: pl.LightningModule, scorer: ValidationScorer) -> Callable[[], Any]:
    """The module's `validation_step` on the first validation batch, in eval mode, leaving nothing behind."""

    def step() -> Any:
        with untouched(trainer, module):
            module.eval()
            batch, batch_idx, dataloader_idx = scorer.first_batch()
            return run_step(trainer, module, "validation_step", batch, batch_idx, dataloader_idx)

    return step


def _training(trainer: pl.Trainer, module: pl.LightningModule, raw: Any, number: int) -> Callable[[], Any]:
    """The module's `training_step` on one training batch, in eval mode, leaving nothing behind."""

    def step() -> Any:
        with untouched(trainer, module):
            module.eval()
            batch = transfer(trainer, module, raw, step="training_step")
            return run_step(trainer, module, "training_step", batch, number)

    return step


def module_steps(trainer: pl.Trainer, module: pl.LightningModule, scorer: ValidationScorer) -> Steps:
    """The steps that tracing runs: what validation runs, and what training runs where optimization is automatic."""
    steps: Steps = [_validation(trainer, module, scorer)]
    if module.automatic_optimization and is_overridden("training_step", module):
        steps += [_training(trainer, module, batch, 0) for batch in training_batches(trainer, 1)]
    return steps


def _calibration(
    trainer: pl.Trainer, module: pl.LightningModule, scorer: ValidationScorer, settings: RoundSettings
) -> tuple[Steps, list[Any]]:
    """Training batches, and one step for each: `training_step`; where there is none, one validation batch's step."""
    automatic = module.automatic_optimization and is_overridden("training_step", module)
    batches = training_batches(trainer, settings.calibration_batches) if automatic else []
    steps: Steps = [_validation(trainer, module, scorer)]
    if batches:
        steps = [_training(trainer, module, batch, number) for number, batch in enumerate(batches)]
    return [_repeatable(step, number) for number, step in enumerate(steps)], batches


def _repeatable(step: Callable[[], Any], seed: int) -> Callable[[], Any]:
    """The step with the same random numbers each time: dense and pruned inputs are compared sample by sample."""

    def run() -> Any:
        with isolated_rng(seed):
            return step()

    return run


def _rehearse(trainer: pl.Trainer, module: pl.LightningModule, scorer: ValidationScorer, seed: int) -> None:
    """Run the pruned module once as validation and as training will; the user's own exception goes on."""
    with isolated_rng(seed):
        with torch.no_grad():
            _validation(trainer, module, scorer)()
        if module.automatic_optimization and is_overridden("training_step", module):
            for raw in training_batches(trainer, 1):
                with untouched(trainer, module), torch.enable_grad():
                    batch = transfer(trainer, module, raw, step="training_step")
                    run_step(trainer, module, "training_step", batch, 0, autocast=True)


# ----------------------------------------------------------------------------------------------------------- trials


@dataclass(frozen=True)
class _Scored:
    """A trial with the channels it removes from each group."""

    trial: Trial
    counts: tuple[int, ...]

    def better_than(self, other: _Scored, mode: str) -> bool:
        return _loss(self.trial.score, mode) < _loss(other.trial.score, mode)


class _Trials:
    """Scores plans and keeps every one."""

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        scorer: ValidationScorer,
        settings: RoundSettings,
        network: _Network,
        space: SearchSpace,
        journal: Journal,
    ) -> None:
        self.trainer, self.journal = trainer, journal
        self.module, self.scorer, self.settings, self.network, self.space = module, scorer, settings, network, space
        self.done: list[_Scored] = []
        self.recalled = 0  # trials whose score was known before the search

    def evaluate_with(self, bar: SearchProgress) -> Callable[[Any], float]:
        """Return the function that the search calls: coefficients in, loss out."""

        def evaluate(coefficients: Any) -> float:
            counts = tuple(int(n) for n in self.space.realise(coefficients[None])[0])
            soft = tuple(float(c) for c in self.network.rounding.soft(coefficients, np.array(counts)))
            scored = self._score("trial", lambda: self._pruned_metrics(counts), soft, counts)
            best = self.best()
            bar.advance(scored.trial.score, best.trial.score if best else math.nan)
            return _loss(scored.trial.score, self.settings.mode)

        return evaluate

    def score_as_it_is(self, plan: _Scored) -> _Scored:
        """Score the module as it is now, pruned by this plan in another way."""
        return self._score("refined", self._metrics, plan.trial.coefficients, plan.counts)

    def _metrics(self) -> dict[str, float]:
        return over_processes(self.trainer, self.scorer.metrics())

    def _pruned_metrics(self, counts: tuple[int, ...]) -> dict[str, float]:
        surgery = self.network.prune(self.module, Plan.from_counts(counts, self.network.rankings))
        try:
            return self._metrics()
        finally:
            surgery.undo()

    def _score(
        self,
        kind: str,
        score: Callable[[], dict[str, float]],
        coefficients: tuple[float, ...],
        counts: tuple[int, ...],
    ) -> _Scored:
        key = Key(kind, counts, self.network.identity)
        sparsity = float(self.space.sparsity(np.array([counts]))[0])
        found = self.journal.scored(key, score, coefficients=coefficients, sparsity=sparsity)
        return self._keep(found.metrics, coefficients, counts, found.seconds)

    def _keep(
        self, metrics: dict[str, float], coefficients: tuple[float, ...], counts: tuple[int, ...], seconds: float
    ) -> _Scored:
        score = _monitored(metrics, self.settings.monitor)
        sparsity = float(self.space.sparsity(np.array([counts]))[0])
        feasible = bool(self.space.within(np.array([sparsity]))[0]) and math.isfinite(score)
        trial = Trial(coefficients, sparsity, score, metrics, feasible, seconds)
        self.done.append(_Scored(trial, counts))
        return self.done[-1]

    def best(self) -> _Scored | None:
        """The best feasible trial; the earliest of equals."""
        feasible = [scored for scored in self.done if scored.trial.feasible]
        return min(feasible, key=lambda scored: _loss(scored.trial.score, self.settings.mode)) if feasible else None

    def recall_unpruned(self, coefficients: Any, metrics: dict[str, float]) -> None:
        """Where a strategy asks for the model as it is and that is on target already, it is a trial like any other."""
        known = any(not any(scored.counts) for scored in self.done)
        if not known and not any(self.space.key(coefficients)) and self.space.on_target(coefficients):
            groups = len(self.network.groups)
            self.recalled += 1
            self._keep(metrics, (0.0,) * groups, (0,) * groups, 0.0)

    def unpruned(self, metrics: dict[str, float]) -> _Scored:
        """The module as it was, in the shape of a trial."""
        groups = len(self.network.groups)
        counts = (0,) * groups
        sparsity = float(self.space.sparsity(np.array([counts]))[0])
        return _Scored(Trial((0.0,) * groups, sparsity, metrics[self.settings.monitor], metrics, False, 0.0), counts)

    def why_none(self, target: float) -> str:
        """Say why no trial is feasible."""
        scores = [scored.trial.score for scored in self.done]
        if scores and all(math.isnan(score) for score in scores):
            return f"{self.settings.monitor} is nan for each of the {len(scores)} plans that were scored"
        return f"none of the {len(scores)} scored plans has a finite {self.settings.monitor} at {target:.1%}"


def _monitored(metrics: dict[str, float], monitor: str) -> float:
    if monitor not in metrics:
        logged = ", ".join(map(repr, sorted(metrics))) or "nothing"
        raise MisconfigurationException(f"monitor={monitor!r} is not logged while validating; logged are: {logged}")
    return metrics[monitor]


def _loss(score: float, mode: str) -> float:
    if not math.isfinite(score):
        return math.nan
    return score if mode == "min" else -score


def _check_reachable(space: SearchSpace) -> None:
    nearest = space.nearest()
    if not space.within(np.array([nearest]))[0]:
        raise MisconfigurationException(
            f"target_sparsity={space.target:g} with tolerance={space.tolerance:g} is out of reach: "
            f"the nearest reachable sparsity is {nearest:.4f}"
        )


# ------------------------------------------------------------------------------------------------- without a trainer


def find_groups(
    model: nn.Module,
    batch: Any = None,
    *,
    components: dict[str, list[str]] | None = None,
    ignore: Sequence[str] | None = None,
) -> list[PruningGroup]:
    """List the pruning groups of a model, and everything that is left alone with the reason.

    Args:
        model: A LightningModule, or any ``nn.Module``. It is run, and is unchanged afterwards.
        batch: For a LightningModule, a batch as its loaders yield it, on the module's device: its `validation_step` is
            run (and `training_step`, where optimization is automatic). For another module, its input, or a tuple of
            inputs. ``None``: the LightningModule's `example_input_array`.
        components: Component name -> module-name patterns.
        ignore: Patterns of modules that must keep their outputs and inputs.

    Returns:
        The groups in the order in which the model runs them.

    Raises:
        ValueError: No batch and no `example_input_array`; or a pattern that matches nothing.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> for group in find_groups(model, torch.zeros(1, 4)):
    ...     print(group.name, group.num_channels, group.reason or "prunable")
    0 8 prunable
    2 2 2 produces an output of the network
    """
    steps: Steps = []
    if isinstance(model, pl.LightningModule) and batch is not None:
        names = ["validation_step"] if is_overridden("validation_step", model) else []
        if model.automatic_optimization and is_overridden("training_step", model):
            names.append("training_step")
        steps = [_plain_step(model, name, batch) for name in names]
    elif batch is None:
        batch = getattr(model, "example_input_array", None)
        if batch is None:
            raise ValueError("batch: None, and the model has no example_input_array; pass a batch to run the model on")
    if not steps:
        steps = [lambda: model(*batch) if isinstance(batch, tuple) else model(batch)]

    def quietly(step: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with Transaction(model):
                model.eval()
                return step()

        return run

    with isolated_rng(0), torch.inference_mode(False):
        return prepare_groups(model, [quietly(step) for step in steps], components, ignore or ())


def _plain_step(model: pl.LightningModule, name: str, batch: Any) -> Callable[[], Any]:
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

    function = getattr(model, name)
    takes_index = is_param_in_hook_signature(function, "batch_idx", min_args=2)

    def step() -> Any:
        model.__dict__.update(log=lambda *_, **__: None, log_dict=lambda *_, **__: None)
        try:
            return function(batch, 0) if takes_index else function(batch)
        finally:
            del model.__dict__["log"], model.__dict__["log_dict"]

    return step
