"""SoftPruning: the Trainer's hooks around a round.

The callback decides *when* a round runs and *what* it aims at, and tells people about it; :mod:`.round` does the work.
A round for epoch ``e`` runs at the start of that epoch's training: validation of the epoch before is over, and what
checkpoints, schedulers and EarlyStopping did with its metrics belongs to the weights those metrics came from.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_softprune.calibration import IMPORTANCES
from lightning_softprune.checkpoint import LoadHook, ModelShapes, is_recorded, keep_record, order_parameters, rounds_of
from lightning_softprune.compensation import COMPENSATIONS
from lightning_softprune.graph import COSTS, LayerSpec, check_layers, checked_layers, match_modules, register_layers
from lightning_softprune.report import (
    dense_checkpoints_stay,
    log_figures,
    log_values,
    print_round,
    rounds_never_reached,
    try_write_files,
)
from lightning_softprune.results import Costs, PruningResult
from lightning_softprune.round import (
    Goal,
    RoundSettings,
    checked_bounds,
    checked_epochs,
    checked_limits,
    checked_patterns,
    checked_targets,
    run_round,
)
from lightning_softprune.search import GradientSearch, SearchStrategy, parse_constraint
from lightning_softprune.trainer import (
    MisconfigurationException,
    averaged_copies,
    end_epoch_at_this_batch,
    finish_epoch_without_training,
    logging_step,
    refuse_schedule,
    refuse_sharded_optimizers,
    refuse_sharding,
    refuse_undeclared_twins,
    refuse_unsuited,
    reset_monitors,
    take_epoch_back,
    take_epoch_back_in,
    why_training_ended,
)
from lightning_softprune.utilities import checks
from lightning_softprune.utilities.libraries import of_both_libraries
from lightning_softprune.utilities.version import versions

_NO_ARGUMENTS = frozenset({"self", "__class__"})


@of_both_libraries
class SoftPruning(pl.Callback):
    """Make the network physically smaller while it trains, and keep its task metric.

    Args:
        monitor: The score of a plan: any metric the module logs while validating.
        mode: Whether a lower ("min") or a higher ("max") score is better.
        epochs: When to prune: with epoch ``e``, counted from 0, the search runs after the validation that closed epoch
            ``e - 1``, and the prune is in force when epoch ``e`` starts training; a list makes one round at each.
        target_sparsity: The fraction of the first dense model's parameters to remove: one number for the last round
            (earlier rounds follow a cubic schedule up to it), or one per round, never decreasing. ``None``: the highest
            sparsity that meets every constraint, to within `tolerance`. With five groups that takes about 40
            evaluations with `SensitivitySearch` and 50 with `GradientSearch`.
        tolerance: A plan is feasible when its sparsity is at most this far from the target.
        cost: What sparsity is measured in, "params" or "macs" (multiply-accumulate operations of the validation step).
        limits: Further budgets: the fraction of the dense model's `params`, `macs` or `latency` that may remain, as in
            ``{"macs": 0.5}``. Latency is the median time of the validation step's forward in eval mode on the training
            device, relative to the dense model in the same run. It is measured on up to 6 finalists, and is noisy,
            above all for small models and on a busy machine: leave it some room.
        constraints: Metric constraints such as ``"val_psnr >= 19.5"``, on any metric logged while validating; operators
            ``<=``, ``>=``, ``<``, ``>``.
        on_violation: What happens when no plan meets the constraints: "skip" leaves the model as it is and warns,
            "prune" prunes with the least violating plan and warns, "error" raises.
        search: How coefficients are searched; the callback works on a copy.
        granularity: What has a coefficient of its own: every group ("group"), or every component ("component"), whose
            coefficient all groups inside it share; groups that couple several components keep their own.
        components: Component name -> module-name patterns; ``None``: the top-level children of the module.
        ignore: Module-name patterns (fnmatch) that must keep their outputs and their inputs.
        layers: Layer types of your own, as for :func:`register_layer`; they are known from here on.
        twins: Module name -> the module it mirrors (target networks, EMA teachers, momentum encoders inside the
            module): a twin gets the same plan and has no coefficients of its own. What is not trained and looks like
            something that is has to be named here or in `ignore`.
        bounds: Pattern of group or component names -> ``[low, high]`` of their coefficients.
        importance: Which channels of a group go first: "magnitude", "activation", "taylor", "reconstruction" (greedy
            selection of the channels from which the consumers' outputs are best rebuilt) or "random".
        compensation: How consumers make up for removed channels: "none", "bias" (their means move into the bias) or
            "least_squares" (they are predicted from the kept channels). Closed form, no training.
        round_to: Kept channels are a multiple of it, unless a group is left whole.
        search_batches: Validation batches of each loader that plans are scored on while they are searched for;
            ``None``: as few as it takes to tell plans apart, but at least 8 and 1,000 samples. Finalists, and the plan
            that is committed, are scored on all.
        memory_limit: GiB that a round may hold beside the model: validation batches that do not fit are read again from
            the loader in each pass. ``None``: a quarter of the free memory.
        calibration_batches: Training batches that rankings and compensation look at.
        finetune_epochs: How many epochs to train after the last round, and then stop; ``None``: on to ``max_epochs``;
            0: stop with the pruned, validated, checkpointed model.
        reset_monitors: After a round, EarlyStopping, ReduceLROnPlateau and ModelCheckpoint's best start afresh.
        seed: A round depends on seed and epoch alone: same data and weights, same plan.
        report: Write ``result.json``, ``trials.csv`` and ``report.html`` under ``<log_dir>/softprune/epoch=<e>/``, and
            figures for the loggers that show any (with matplotlib).
        verbose: Show a progress bar and tables, on rank zero.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument is of the wrong type.

    Attributes:
        results: One :class:`PruningResult` per round.
        as_given: Whether a module that was pruned before is measured against itself as it is now, as `prune` does.

    >>> SoftPruning(target_sparsity=1.5)
    Traceback (most recent call last):
        ...
    ValueError: target_sparsity: 1.5 is not between 0 and 1 (both excluded)
    """

    def __init__(
        self,
        *,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        epochs: Union[int, list[int]] = 1,  # noqa: UP007 - the command line parser reads these annotations
        target_sparsity: Union[float, list[float], None] = 0.5,  # noqa: UP007
        tolerance: float = 0.02,
        cost: Literal["params", "macs"] = "params",
        limits: dict[str, float] | None = None,
        constraints: list[str] | None = None,
        on_violation: Literal["skip", "prune", "error"] = "skip",
        search: SearchStrategy = GradientSearch(),  # noqa: B008 - never changed, see `self.search`
        granularity: Literal["group", "component"] = "group",
        components: dict[str, list[str]] | None = None,
        ignore: list[str] | None = None,
        layers: list[LayerSpec] | None = None,
        twins: dict[str, str] | None = None,
        bounds: dict[str, list[float]] | None = None,
        importance: Literal["magnitude", "activation", "taylor", "reconstruction", "random"] = "activation",
        compensation: Literal["none", "bias", "least_squares"] = "least_squares",
        round_to: int = 1,
        search_batches: int | None = None,
        memory_limit: float | None = None,
        calibration_batches: int = 8,
        finetune_epochs: int | None = None,
        reset_monitors: bool = True,
        seed: int = 0,
        report: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self._configuration = {name: repr(value) for name, value in locals().items() if name not in _NO_ARGUMENTS}
        self.monitor = checks.instance_of("monitor", monitor, str)
        if not monitor:
            raise ValueError("monitor: '' is not the name of a metric that the module logs while validating")
        self.mode = checks.one_of("mode", mode, ("min", "max"))
        self.epochs = checked_epochs(epochs)
        self.targets = checked_targets(target_sparsity, len(self.epochs))
        self.tolerance = checks.number_between("tolerance", tolerance, 0.0, 1.0, low_included=True)
        self.cost = checks.one_of("cost", cost, COSTS)
        self.limits = checked_limits(limits)
        self.constraints = tuple(
            parse_constraint(text, f"constraints[{number}]")
            for number, text in enumerate(checks.strings("constraints", constraints))
        )
        self.on_violation = checks.one_of("on_violation", on_violation, ("skip", "prune", "error"))
        if target_sparsity is None and not self.constraints:
            raise ValueError(
                "target_sparsity: None asks for the highest sparsity that meets every metric constraint, and there are "
                'no constraints; give some, as in constraints=["val_psnr >= 19.5"], or a number'
            )
        if not isinstance(search, SearchStrategy):
            raise TypeError(f"search: {search!r} is not a SearchStrategy, for example GradientSearch()")
        self.search = copy.deepcopy(search)
        self.granularity = checks.one_of("granularity", granularity, ("group", "component"))
        self.components = checked_patterns("components", components)
        self.ignore = tuple(checks.strings("ignore", ignore))
        self.layers = checked_layers("layers", layers)
        register_layers(self.layers)
        self.twins: dict[str, str] | None = checks.mapping("twins", twins, partial(checks.instance_of, kind=str))
        self.bounds = checked_bounds(bounds)
        self.importance = checks.one_of("importance", importance, IMPORTANCES)
        self.compensation = checks.one_of("compensation", compensation, COMPENSATIONS)
        self.round_to = checks.whole_number("round_to", round_to, 1)
        self.search_batches = checks.optional_whole_number("search_batches", search_batches)
        self.memory_limit = checks.optional_positive("memory_limit", memory_limit)
        self.calibration_batches = checks.whole_number("calibration_batches", calibration_batches, 1)
        self.finetune_epochs = checks.optional_whole_number("finetune_epochs", finetune_epochs, 0)
        self.reset_monitors = checks.instance_of("reset_monitors", reset_monitors, bool)
        self.seed = checks.whole_number("seed", seed, 0)
        self.report = checks.instance_of("report", report, bool)
        self.verbose = checks.instance_of("verbose", verbose, bool)
        self.results: list[PruningResult] = []
        self._earlier: list[PruningResult] = []  # rounds of earlier fits, which the module remembers
        self.as_given = False  # whether such rounds count for nothing
        self._dense: Costs | None = None
        self._loading: LoadHook | None = None
        self._evaluating = False
        self._untrained: int | None = None  # the epoch that ended with the prune: nothing was trained in it

    @property
    def state_key(self) -> str:
        """One key for every configuration, so that a checkpoint is understood after an argument was changed."""
        return "SoftPruning"

    def state_dict(self) -> dict[str, Any]:
        """The rounds so far, in plain types; a dry run is none."""
        return {"results": [result.to_dict() for result in self._real_results()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rounds of a checkpoint: they are not repeated."""
        if self._evaluating and self.results:
            return  # validate, test and predict look at a checkpoint; what a fit has done stays on record
        self.results = [PruningResult.from_dict(result) for result in state_dict["results"]]
        self._dense = self.results[0].costs_before if self.results else None

    # ------------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before anything runs, what cannot work with this trainer."""
        register_layers(self.layers)  # in a process of its own, or after another callback's
        self._evaluating = stage != "fit"
        if self._evaluating:
            if stage == "validate":
                refuse_sharding(trainer)
            self._loading = LoadHook(pl_module)
            return
        self.results = self._real_results()
        others = [callback for callback in trainer.callbacks if isinstance(callback, SoftPruning)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise MisconfigurationException(
                f"callbacks: {len(others)} SoftPruning callbacks in one Trainer; one callback takes several `epochs`"
            )
        refuse_unsuited(trainer, pl_module)
        refuse_schedule(trainer, max(self.epochs), self.finetune_epochs)
        self._untrained = None
        progress = trainer.current_epoch > 0 or trainer.global_step > 0
        pruned = any(result.applied for result in self.results)
        if not progress or (pruned and not is_recorded(pl_module)):  # not a fit that goes on where one has stopped
            self.results, self._dense = [], None
        self._loading = LoadHook(pl_module, lambda: averaged_copies(trainer))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A fit that resumes has the history of its checkpoint, even if that is none."""
        if not self._evaluating:
            self.results, self._dense = [], None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave an epoch in which nothing was trained to whoever trains on from this checkpoint."""
        if self._untrained is not None:
            take_epoch_back_in(checkpoint, self._untrained)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hook for loading off the module."""
        self._end_loading()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hook for loading off the module."""
        self._end_loading()

    def _end_loading(self) -> dict[str, Any] | None:
        """Take the hook for loading off the module; return the record of the checkpoint that came, if any."""
        loading, self._loading, self._evaluating = self._loading, None, False
        if loading is None:
            return None
        loading.remove()
        return loading.record

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check names against the module, and ask it for the rounds of earlier fits."""
        order_parameters(pl_module, trainer.optimizers, self._end_loading())
        refuse_sharded_optimizers(trainer)
        self._check_names(pl_module)
        refuse_undeclared_twins(trainer, pl_module, self.twins or {}, self.ignore)
        self._remember(pl_module)

    def _remember(self, pl_module: pl.LightningModule) -> None:
        """Ask the module for the rounds of earlier fits: what these have removed is gone already."""
        self._earlier = [] if self.as_given else rounds_of(pl_module)
        own = [result.to_dict() for result in self._real_results()]
        if own and [result.to_dict() for result in self._earlier[-len(own) :]] == own:  # a fit that goes on
            self._earlier = self._earlier[: -len(own)]

    def _check_names(self, pl_module: pl.LightningModule) -> None:
        try:
            check_layers(pl_module)
            match_modules(pl_module, self.ignore, "ignore")
            match_modules(pl_module, [*(self.twins or {}), *(self.twins or {}).values()], "twins")
            for name, patterns in (self.components or {}).items():
                match_modules(pl_module, patterns, f"components[{name!r}]")
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train no further if the checkpoint is at the end of the fine-tuning that was asked for."""
        if self._finished(trainer.current_epoch):
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the rounds that are due."""
        self._run_due_rounds(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Run a round whose epoch start was skipped: resuming from an epoch's last step goes straight to batches."""
        rounds = len(self.results)
        self._run_due_rounds(trainer, pl_module)
        if self.finetune_epochs == 0 and len(self.results) > rounds and trainer.should_stop:
            end_epoch_at_this_batch()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the fine-tuning that was asked for; within `fast_dev_run`, rehearse the rounds to come."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._rehearse_last_round(trainer, pl_module)
        if self._finished(trainer.current_epoch + 1):
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Within `Trainer.validate`, try the next round and leave everything as it is: a dry run."""
        pending = self._pending()
        if trainer.state.fn != TrainerFn.VALIDATING or not pending:
            return
        self._check_names(pl_module)
        self._remember(pl_module)
        epoch, target = pending[0]
        result = self._search(trainer, pl_module, epoch=epoch, target=target, commit=False)
        self.results = [*self._real_results(), result]
        self._tell(result, trainer.log_dir or trainer.default_root_dir)

    def _real_results(self) -> list[PruningResult]:
        return [result for result in self.results if not result.is_dry_run]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not count an epoch in which nothing was trained."""
        if self._untrained is not None:
            take_epoch_back(trainer, self._untrained)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of rounds that training did not come to, whatever it was that ended it."""
        unreached = [epoch for epoch, _ in self._pending()]
        if unreached and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            why = why_training_ended(trainer)
            rank_zero_warn(rounds_never_reached(unreached, self.results, trainer.current_epoch, why))

    def _finished(self, epochs: int) -> bool:
        """Whether the fine-tuning that was asked for is over after so many epochs."""
        last = max(self.epochs)
        # with 0 epochs more, the round is yet to come
        pruned = any(result.epoch == last for result in self._real_results())
        return self.finetune_epochs is not None and pruned and epochs >= last + self.finetune_epochs

    # ------------------------------------------------------------------------------------------------------ rounds

    def _pending(self) -> list[tuple[int, float | None]]:
        """Epoch and target of the rounds that have not run."""
        done = {result.epoch for result in self._real_results()}
        rounds = zip(self.epochs, self.targets, strict=True)
        return [(epoch, target) for epoch, target in rounds if epoch not in done]

    def _run_due_rounds(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for epoch, target in self._pending():
            if epoch > trainer.current_epoch:
                return
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._rehearse_last_round(trainer, pl_module)
            else:
                self._run_round(trainer, pl_module, epoch, target)
            if epoch == max(self.epochs) and self.finetune_epochs == 0 and self._untrained is None:
                self._untrained = trainer.current_epoch
                finish_epoch_without_training(trainer)

    def _rehearse_last_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go through the last round once, with one plan and no file, and leave everything as it is."""
        pending = self._pending()
        if pending and len(self._real_results()) == len(self.results):  # once in a fit
            epoch, target = pending[-1]
            result = self._search(trainer, pl_module, epoch=epoch, target=target, commit=False, rehearse=True)
            self.results.append(result)
            self._tell(result, None)

    def _run_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, target: float | None) -> None:
        before = ModelShapes.of(pl_module)
        result = self._search(trainer, pl_module, epoch=epoch, target=target)
        self._dense = self._dense or result.costs_before
        self.results.append(result)
        if self._earlier or any(done.applied for done in self.results):
            keep_record(pl_module, before, self.results, self._earlier)
        dense = reset_monitors(trainer) if self.reset_monitors and result.applied else ()
        notes = dense_checkpoints_stay(dense)
        for note in notes:
            rank_zero_info(f"SoftPruning: {note}")
        self._tell(result, trainer.log_dir or trainer.default_root_dir, notes)  # a collective: asked for on every rank
        for logger in trainer.loggers:  # last: a logger's exception is the user's, and finds the round complete
            logger.log_metrics(log_values(result), step=logging_step(trainer))
        if self.report:
            log_figures(result, trainer.loggers, step=logging_step(trainer))

    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule, **goal: Any) -> PruningResult:
        applied = [result for result in (*self._earlier, *self.results) if result.applied]
        faster = [r.latency_after / r.latency_before for r in applied if r.latency_before and r.latency_after]
        dense = self._earlier[0].costs_before if self._earlier else self._dense
        aim = Goal(dense=dense, dense_latency_ratio=1.0 / math.prod(faster), pruned_before=bool(self._earlier), **goal)
        result = run_round(trainer, pl_module, self._settings(trainer), aim)
        return dataclasses.replace(result, configuration=self._configuration, versions=versions())

    @rank_zero_only
    def _tell(self, result: PruningResult, root: str | None, notes: Sequence[str] = ()) -> None:
        folder = try_write_files(result, Path(root)) if self.report and root is not None else None
        if self.verbose:
            print_round(result, folder=folder, notes=notes)

    def _settings(self, trainer: pl.Trainer) -> RoundSettings:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(RoundSettings)}
        return RoundSettings(**{**values, "verbose": self.verbose and trainer.is_global_zero})
