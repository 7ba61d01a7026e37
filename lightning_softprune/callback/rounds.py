"""What a fit has done and what is due: rounds by epoch, and one of them run, recorded, told and logged.

A round for epoch ``e`` runs at the start of that epoch's training: validation of the epoch before is over, and what
checkpoints, schedulers and EarlyStopping did with its metrics belongs to the weights those metrics came from.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lightning_softprune.checkpoint import LoadHook, ModelShapes, is_recorded, keep_record, rounds_of
from lightning_softprune.compensation import Teacher
from lightning_softprune.graph import LayerSpec, check_layers, check_twins, match_modules
from lightning_softprune.report import (
    dense_checkpoints_stay,
    log_figures,
    log_values,
    print_finetuned,
    print_round,
    try_write_files,
)
from lightning_softprune.results import Costs, Origin, PruningResult
from lightning_softprune.round import (
    Goal,
    RoundSettings,
    check_ahead,
    limits_on_the_way,
    look_outside,
    run_round,
)
from lightning_softprune.surgery import Sightings
from lightning_softprune.trainer import (
    LoadedBatch,
    MisconfigurationException,
    UntrainedCopies,
    ends_with_average,
    finish_epoch_without_training,
    logging_step,
    may_stop,
    mean_over_processes,
    reset_monitors,
)
from lightning_softprune.utilities.libraries import of_both_libraries
from lightning_softprune.utilities.version import versions


def new_identity() -> str:
    """What tells one run's files from another's; no seed decides it."""
    return secrets.token_hex(8)


@of_both_libraries
class Rounds(pl.Callback):
    """The rounds of a callback; its arguments are attributes of the same names, `SoftPruning` documents and sets them.

    Attributes:
        results: One :class:`PruningResult` per round.
        as_given: Whether a module that was pruned before is measured against itself as it is now, as `prune` does.
    """

    monitor: str
    epochs: list[int]
    targets: Sequence[float | None]
    limits: dict[str, float] | None
    ignore: tuple[str, ...]
    layers: tuple[LayerSpec, ...]
    twins: dict[str, str] | None
    components: dict[str, list[str]] | None
    teacher: float
    finetune_epochs: int | None
    seed: int
    reset_monitors: bool
    report: bool
    verbose: bool

    def __init__(self, configuration: dict[str, str]) -> None:
        super().__init__()
        self._configuration = configuration
        self._has_schedule = False  # whether earlier rounds follow one up to the last one's target and limits
        self.results: list[PruningResult] = []
        self._earlier: list[PruningResult] = []  # rounds of earlier fits, which the module remembers
        self.as_given = False  # whether such rounds count for nothing
        self._dense: Costs | None = None
        self._loading: LoadHook | None = None
        self._evaluating = False
        self._identity = new_identity()  # of this fit, by which its files are told from those of others
        self._began: int | None = None  # the epoch that the last round really ran before
        self._unwritten = False  # whether the files of the last round could not be written
        self._finetuned: int | None = None  # the round that this fit has validated after it
        self._looked_ahead = True
        self._teacher: Teacher | None = None  # the dense network of the last round of this fit, if it is to teach
        self._outside = Sightings()
        self._copies: UntrainedCopies | None = None
        self._lesson: LoadedBatch | None = None  # the training batch that the teacher is to be asked about
        self._untrained: int | None = None  # the epoch that ended with the prune: nothing was trained in it
        self._left_out: ExitStack | None = None  # hooks that are not called at its end

    def _real_results(self) -> list[PruningResult]:
        return [result for result in self.results if not result.is_dry_run]

    def _finished(self, epochs: int) -> bool:
        """Whether the fine-tuning that was asked for is over after so many epochs."""
        last = max(self.epochs)
        # with 0 epochs more, the round is yet to come
        pruned = any(result.epoch == last for result in self._real_results())
        began = last if self._began is None else self._began
        return self.finetune_epochs is not None and pruned and epochs >= began + self.finetune_epochs

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
            check_twins(pl_module, self.twins or {})
            for name, patterns in (self.components or {}).items():
                match_modules(pl_module, patterns, f"components[{name!r}]")
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

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
                # what `on_train_epoch_end` asks before it ends the training, so that an epoch is not half left out
                if not may_stop(trainer):
                    rank_zero_warn(
                        f"SoftPruning: finetune_epochs=0 would stop training at step {trainer.global_step}, which "
                        f"min_steps={trainer.min_steps} forbids; it stops once these are reached"
                    )
                    trainer.should_stop = True
                    continue
                self._untrained = trainer.current_epoch
                self._left_out = finish_epoch_without_training(trainer)
                self._tell_average(trainer, self.results[-1])

    def _tell_average(self, trainer: pl.Trainer, result: PruningResult) -> None:
        score = trainer.callback_metrics.get(self.monitor)
        if result.applied and score is not None and score.numel() == 1 and ends_with_average(trainer):
            rank_zero_warn(
                f"SoftPruning: the fit ends with averaged weights, whose {self.monitor} is {float(score):.4g}; "
                f"score_after, {result.score_after:.4g}, is that of the trained ones, which the round has looked at"
            )

    def _sight(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how averages and teachers outside of the model are, as long as they may have to follow it."""
        if self._pending():
            look_outside(trainer, pl_module, self._outside)

    def _rehearse_last_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go through the last round once, with one plan and no file, and leave everything as it is."""
        pending = self._pending()
        if pending and len(self._real_results()) == len(self.results):  # once in a fit
            epoch, target = pending[-1]
            result = self._search(trainer, pl_module, epoch=epoch, target=target, commit=False, rehearse=True)
            self.results.append(result)
            self._tell(result, None)

    def _run_round(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, target: float | None) -> None:
        before, judged = ModelShapes.of(pl_module), self._outside.judged(pl_module, trainer.global_step)
        if epoch < trainer.current_epoch:
            rank_zero_info(f"SoftPruning: the round of epochs={epoch} runs late, before epoch {trainer.current_epoch}")
        result = self._search(trainer, pl_module, epoch=epoch, target=target, judged=judged)
        self._began = trainer.current_epoch
        self._dense = self._dense or result.costs_before
        self._finetuned = None
        self.results = [*(dataclasses.replace(done, score_finetuned=None) for done in self.results), result]
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

    def _look_ahead(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: LoadedBatch) -> None:
        """Say before training what the rounds to come would say after it."""
        goals = [self._goal(epoch=epoch, target=target) for epoch, target in self._pending()]
        if goals:
            check_ahead(trainer, pl_module, self._settings(trainer), goals, batch)

    def _goal(self, **goal: Any) -> Goal:
        """What a round aims at, against the first dense model."""
        applied = [result for result in (*self._earlier, *self.results) if result.applied]
        faster = [r.latency_after / r.latency_before for r in applied if r.latency_before and r.latency_after]
        goal["dense"] = self._earlier[0].costs_before if self._earlier else self._dense
        goal["earlier"] = next((result for result in reversed(self._real_results()) if result.sensitivity), None)
        goal["take_teacher"] = self._take_teacher
        if self._has_schedule and self.limits is not None:
            goal["limits"] = limits_on_the_way(self.limits, goal["target"] / (self.targets[-1] or 1.0))
        goal["on_the_way"] = any(result.applied for result in self.results)
        return Goal(dense_latency_ratio=1.0 / math.prod(faster), pruned_before=bool(self._earlier), **goal)

    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule, **goal: Any) -> PruningResult:
        aim = self._goal(**goal)
        result = run_round(trainer, pl_module, self._settings(trainer), aim)
        root = str(trainer.log_dir or trainer.default_root_dir)
        identity = self._identity if aim.commit else new_identity()  # a dry run is a run of its own
        date = datetime.now().strftime("%Y-%m-%d %H:%M")
        origin = Origin(type(pl_module).__name__, root, date, identity)
        return dataclasses.replace(result, configuration=self._configuration, versions=versions(), origin=origin)

    def _take_teacher(self, teacher: Teacher) -> None:
        self._teacher = teacher

    @rank_zero_only
    def _tell(self, result: PruningResult, root: str | None, notes: Sequence[str] = ()) -> None:
        folder = try_write_files(result, Path(root)) if self.report and root is not None else None
        self._unwritten = folder is None and root is not None
        if self.verbose:
            print_round(result, folder=folder, notes=notes)

    # ------------------------------------------------------------------------------------------- the end of the fit

    def _keep_score(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the last round's result, and so every checkpoint from here on, know what a validation has found."""
        score = trainer.callback_metrics.get(self.monitor)
        numbers = [number for number, result in enumerate(self.results) if result.applied]
        if score is None or score.numel() != 1 or not numbers or self._untrained is not None:
            return
        mean = mean_over_processes(trainer, {self.monitor: float(score)})[self.monitor]
        self.results[numbers[-1]] = dataclasses.replace(self.results[numbers[-1]], score_finetuned=mean)
        self._finetuned = numbers[-1]
        if is_recorded(pl_module):
            keep_record(pl_module, ModelShapes.of(pl_module), self.results, self._earlier)

    def _finish(self, trainer: pl.Trainer) -> None:
        """Let the last round's files and the loggers know the score that fine-tuning has come to."""
        result = None if self._finetuned is None else self.results[self._finetuned]
        if result is None or result.score_finetuned is None:
            return
        self._tell_finetuned(result, trainer.log_dir or trainer.default_root_dir)
        for logger in trainer.loggers:
            logger.log_metrics({"softprune/score_finetuned": result.score_finetuned}, step=logging_step(trainer))

    @rank_zero_only
    def _tell_finetuned(self, result: PruningResult, root: str) -> None:
        if self.report and not self._unwritten:  # that has been said once
            try_write_files(result, Path(root))
        if self.verbose:
            print_finetuned(result, (*self._earlier, *self.results)[0].score_before)

    def _settings(self, trainer: pl.Trainer) -> RoundSettings:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(RoundSettings)}
        return RoundSettings(**{**values, "verbose": self.verbose and trainer.is_global_zero})
