"""One round: from a trained module to a smaller one with its score, or to the module as it was.

A round traces the module, ranks the channels of every group, searches the coefficients and commits the best feasible
plan. It knows nothing of epochs, schedules and files; those are the callback's. Whatever fails before the commit, or in
it, the module and its optimizers are rolled back and the user's own exception goes on.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_softprune.coefficients import build_rounding, build_space
from lightning_softprune.costs import CostModel, Positions, record_macs
from lightning_softprune.groups import PruningGroup, assign_components, trace_groups
from lightning_softprune.importance import norms, rank
from lightning_softprune.plan import Plan, Rounding
from lightning_softprune.progress import SearchProgress
from lightning_softprune.results import Costs, GroupResult, PruningResult, Trial
from lightning_softprune.scoring import (
    ValidationScorer,
    isolated_rng,
    run_step,
    training_batches,
    transfer,
    untouched,
)
from lightning_softprune.search import SearchSpace, SearchStrategy, run_search
from lightning_softprune.surgery import (
    OptimizerTransaction,
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
    bounds: dict[str, list[float]] | None
    importance: str
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
    rng = np.random.default_rng(seed)
    optimizers = list(trainer.optimizers)
    optimizers_before = OptimizerTransaction(optimizers)
    with (
        isolated_rng(seed),
        torch.inference_mode(False),
        Transaction(module) as transaction,
        ValidationScorer(trainer, module, max_batches=settings.search_batches, seed=seed) as scorer,
    ):
        before = scorer.metrics()
        score_before = _monitored(before, settings.monitor)
        network = _Network.examine(trainer, module, scorer, settings, rng)
        costs_before = network.costs_of(np.zeros((1, len(network.groups)), dtype=np.int64))
        dense = dense or costs_before
        space = build_space(
            network.rounding,
            network.costs,
            dense=dense.params,
            target=target,
            tolerance=settings.tolerance,
            norms=network.norms,
        )
        _check_reachable(space)
        trials = _Trials(module, scorer, settings, network, space)
        strategy = copy.deepcopy(settings.search)
        try:
            strategy.check(space)
        except ValueError as error:
            raise MisconfigurationException(f"search: {error}") from error
        cache = {space.key(space.clip(np.zeros(space.size))): _loss(score_before, settings.mode)}
        cache = cache if not any(next(iter(cache))) else {}  # bounds may forbid the dense model
        with SearchProgress(
            strategy.max_evaluations, settings.monitor, settings.mode, settings.verbose, trainer=trainer
        ) as bar:
            outcome = run_search(strategy, space, trials.evaluate_with(bar), seed=seed, cache=cache)
        best = trials.best()
        reason = "" if best is not None else trials.why_none(target)
        after, score_after, costs_after = before, score_before, costs_before
        counts: tuple[int, ...] = (0,) * len(network.groups)
        coefficients: tuple[float, ...] = (0.0,) * len(network.groups)
        if best is not None:
            trial, counts = best
            after, score_after, coefficients = trial.metrics, trial.score, trial.coefficients
            costs_after = network.costs_of(np.array([counts]))
            if commit:
                transaction.rollback()  # also what the user's hooks may have done to parameter values meanwhile
                plan = Plan.from_counts(counts, network.rankings)
                try:
                    surgery = apply_plan(module, network.groups, plan)
                    repair_optimizers(optimizers, surgery)
                    _rehearse(trainer, module, scorer, seed)
                except BaseException:
                    optimizers_before.rollback()
                    raise
                transaction.commit()
        elif commit:
            rank_zero_warn(f"SoftPruning: the model is left as it is: {reason}")
        groups = tuple(
            GroupResult(group.name, group.component, group.kind, group.num_channels, group.num_channels - n, c)
            for group, n, c in zip(network.groups, counts, coefficients, strict=True)
        )
        return PruningResult(
            epoch=epoch,
            sparsity=1.0 - costs_after.params / dense.params,
            target_sparsity=target,
            score_before=score_before,
            score_after=score_after,
            metrics_before=before,
            metrics_after=after,
            costs_before=costs_before,
            costs_after=costs_after,
            groups=groups,
            evaluations=outcome.evaluations + 1,
            seconds=time.monotonic() - started,
            strategy=type(strategy).__name__,
            stop_reason=outcome.stop_reason,
            applied=commit and best is not None,
            trials=tuple(trials.done),
            monitor=settings.monitor,
            mode=settings.mode,
            reason=reason,
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
    samples: int

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
        found = prepare_groups(module, steps, settings.components, settings.ignore)
        groups = [group for group in found if group.prunable]
        if not groups:
            raise MisconfigurationException(nothing_prunable(found))
        calibration = _calibration(trainer, module, scorer, settings)
        rankings = rank(settings.importance, module, groups, calibration, rng)
        positions: dict[str, Positions]
        with record_macs(module) as positions:
            _validation(trainer, module, scorer)()
        samples = scorer.batch_size or 1
        return cls(
            groups=groups,
            rankings=rankings,
            norms=norms(module, groups),
            rounding=build_rounding(groups, settings.bounds, settings.round_to),
            costs=CostModel.build(module, groups, rankings, positions),
            samples=samples,
        )

    def costs_of(self, counts: Any) -> Costs:
        """Costs of one plan, given as removed channels per group, shape ``(1, groups)``."""
        params, macs = (int(self.costs.count(what, counts)[0]) for what in ("params", "macs"))
        return Costs(params, round(macs / self.samples))


def prepare_groups(
    model: nn.Module, steps: Steps, components: dict[str, list[str]] | None, ignore: Sequence[str]
) -> list[PruningGroup]:
    """Trace, name components and probe: the groups as the user sees them."""

    def run() -> None:
        with torch.no_grad():
            for step in steps:
                step()

    traced = trace_groups(model, steps, ignore)
    return probe(model, assign_components(model, traced, components), run)


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
) -> Steps:
    """One step per calibration batch: `training_step`; the validation batch where optimization is manual."""
    automatic = module.automatic_optimization and is_overridden("training_step", module)
    batches = training_batches(trainer, settings.calibration_batches) if automatic else []
    if not batches:
        return [_validation(trainer, module, scorer)]
    return [_training(trainer, module, batch, number) for number, batch in enumerate(batches)]


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


class _Trials:
    """Scores plans and keeps every one."""

    def __init__(
        self,
        module: pl.LightningModule,
        scorer: ValidationScorer,
        settings: RoundSettings,
        network: _Network,
        space: SearchSpace,
    ) -> None:
        self.module, self.scorer, self.settings, self.network, self.space = module, scorer, settings, network, space
        self.done: list[Trial] = []
        self.counts: list[tuple[int, ...]] = []

    def evaluate_with(self, bar: SearchProgress) -> Callable[[Any], float]:
        """Return the function that the search calls: coefficients in, loss out."""

        def evaluate(coefficients: Any) -> float:
            started = time.monotonic()
            counts = self.space.realise(coefficients[None])[0]
            metrics = self._score(Plan.from_counts(counts, self.network.rankings))
            score = _monitored(metrics, self.settings.monitor)
            sparsity = float(self.space.sparsity(counts[None])[0])
            on_target = bool(self.space.within(np.array([sparsity]))[0])
            soft = self.network.rounding.soft(coefficients, counts)
            self.done.append(
                Trial(
                    coefficients=tuple(float(c) for c in soft),
                    sparsity=sparsity,
                    score=score,
                    metrics=metrics,
                    feasible=on_target and math.isfinite(score),
                    seconds=time.monotonic() - started,
                )
            )
            self.counts.append(tuple(int(n) for n in counts))
            best = self.best()
            bar.advance(score, best[0].score if best else math.nan)
            return _loss(score, self.settings.mode)

        return evaluate

    def _score(self, plan: Plan) -> dict[str, float]:
        with _applied(self.module, self.network.groups, plan):
            return self.scorer.metrics()

    def best(self) -> tuple[Trial, tuple[int, ...]] | None:
        """The best feasible trial with its removed channels; the earliest of equals."""
        pairs = [pair for pair in zip(self.done, self.counts, strict=True) if pair[0].feasible]
        return min(pairs, key=lambda pair: _loss(pair[0].score, self.settings.mode)) if pairs else None

    def why_none(self, target: float) -> str:
        """Say why no trial is feasible."""
        if self.done and all(math.isnan(trial.score) for trial in self.done):
            return f"{self.settings.monitor} is nan for each of the {len(self.done)} plans that were scored"
        return (
            f"none of the {len(self.done)} plans that were scored has a finite {self.settings.monitor} at {target:.1%}"
        )


@contextmanager
def _applied(module: nn.Module, groups: Sequence[PruningGroup], plan: Plan) -> Iterator[None]:
    surgery = apply_plan(module, groups, plan)
    try:
        yield
    finally:
        surgery.undo()


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
    ...     print(group.name, group.num_channels, group.prunable, group.reason)
    0 8 True
    2 2 False 2 produces an output of the network
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
