"""Which hook of the Trainer does what: rounds that are due, and the state of a fit around them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_softprune.callback.rounds import Rounds, new_identity
from lightning_softprune.checkpoint import LoadHook, is_recorded, name_parameters, order_parameters
from lightning_softprune.graph import register_layers
from lightning_softprune.report import rounds_never_reached
from lightning_softprune.results import PruningResult
from lightning_softprune.surgery import Sightings
from lightning_softprune.trainer import (
    LoadedBatch,
    MisconfigurationException,
    ModuleRunner,
    UntrainedCopies,
    averaged_copies,
    callbacks_of,
    end_epoch_at_this_batch,
    refuse_schedule,
    refuse_sharded_optimizers,
    refuse_sharding,
    refuse_teacher,
    refuse_undeclared_twins,
    refuse_unsuited,
    seed_from,
    take_epoch_back,
    take_epoch_back_in,
    why_training_ended,
)
from lightning_softprune.utilities.nested import copy_batch


class PruningHooks(Rounds):
    """Called by the Trainer."""

    @property
    def state_key(self) -> str:
        """One key for every configuration, so that a checkpoint is understood after an argument was changed."""
        return "SoftPruning"

    def state_dict(self) -> dict[str, Any]:
        """The rounds so far, in plain types; a dry run is none."""
        results = [result.to_dict() for result in self._real_results()]
        return {"results": results, "run": self._identity, "began": self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rounds of a checkpoint: they are not repeated."""
        if self._evaluating and self.results:
            return  # validate, test and predict look at a checkpoint; what a fit has done stays on record
        self.results = [PruningResult.from_dict(result) for result in state_dict["results"]]
        self._dense = self.results[0].costs_before if self.results else None
        self._identity = state_dict.get("run") or self._identity
        self._began = state_dict.get("began")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before anything runs, what cannot work with this trainer."""
        register_layers(self.layers)  # in a process of its own, or after another callback's
        self._evaluating = stage != "fit"
        if self._evaluating:
            if stage == "validate":
                refuse_sharding(trainer)
            self._loading = LoadHook(pl_module, lambda: averaged_copies(trainer))
            return
        self.results = self._real_results()
        others = [callback for callback in callbacks_of(trainer) if isinstance(callback, PruningHooks)]
        if len(others) > 1:
            raise MisconfigurationException(
                f"callbacks: {len(others)} SoftPruning callbacks in one Trainer; one callback takes several `epochs`"
            )
        refuse_unsuited(trainer, pl_module)
        refuse_schedule(trainer, max(self.epochs), self.finetune_epochs)
        self._untrained = self._finetuned = self._teacher = self._lesson = None
        self._outside = Sightings()
        progress = trainer.current_epoch > 0 or trainer.global_step > 0
        pruned = any(result.applied for result in self.results)
        if not progress or (pruned and not is_recorded(pl_module)):  # not a fit that goes on where one has stopped
            self.results, self._dense, self._began, self._identity = [], None, None, new_identity()
        self._loading = LoadHook(pl_module, lambda: averaged_copies(trainer))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A fit that resumes has the history of its checkpoint, even if that is none."""
        if not self._evaluating:
            self.results, self._dense, self._began = [], None, None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave an epoch in which nothing was trained to whoever trains on from this checkpoint; begin the record."""
        name_parameters(checkpoint, pl_module, trainer.optimizers)
        if self._untrained is not None:
            take_epoch_back_in(checkpoint, self._untrained)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hook for loading off the module, and let the teacher go."""
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hook for loading off the module, and let the teacher go."""
        self._let_go()

    def _let_go(self) -> None:
        self._end_loading()
        self._teacher, self._lesson, self._outside, self._copies = None, None, Sightings(), None
        self._put_hooks_back()

    def _put_hooks_back(self) -> None:
        """What was left out of an epoch without training belongs to other epochs."""
        left_out, self._left_out = self._left_out, None
        if left_out is not None:
            left_out.close()

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
        if self.teacher > 0.0:
            refuse_teacher(trainer, pl_module)
        self._check_names(pl_module)
        refuse_undeclared_twins(trainer, pl_module, self.twins or {}, self.ignore)
        self._copies = UntrainedCopies(trainer, pl_module, self.twins or {}, self.ignore)
        self._remember(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train no further if the checkpoint is at the end of the fine-tuning that was asked for."""
        self._looked_ahead = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # which rehearses the round
        if self._finished(trainer.current_epoch):
            trainer.should_stop = True
        elif self.teacher > 0.0 and any(result.applied for result in self._real_results()):
            rank_zero_warn(
                f"SoftPruning: teacher={self.teacher}: the dense network is in no checkpoint; this fit goes on from a "
                "pruned model, without a teacher"
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the rounds that are due."""
        self._sight(trainer, pl_module)
        self._run_due_rounds(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Run a round whose epoch start was skipped: resuming from an epoch's last step goes straight to batches.

        Before the first batch of a fit, find what would be wrong with the rounds to come.
        """
        if not self._looked_ahead:
            self._sight(trainer, pl_module)
        rounds = len(self.results)
        self._run_due_rounds(trainer, pl_module)
        if self._untrained is not None and len(self.results) > rounds:
            end_epoch_at_this_batch()
        if not self._looked_ahead:
            self._looked_ahead = True
            self._look_ahead(trainer, pl_module, LoadedBatch(batch, batch_idx))
        if self._teacher is not None:  # a copy: steps may change their batch
            self._lesson = LoadedBatch(copy_batch(batch), batch_idx)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add what the teacher says of this batch to the gradients of the module's own loss."""
        if self._copies is not None:
            self._copies.note_gradients()
        if self._teacher is None or self._lesson is None:
            return
        seed = seed_from(self.seed, trainer.current_epoch)  # other random numbers in every epoch
        runner = ModuleRunner(trainer, pl_module, seed=seed, only_batch=self._lesson)
        trained = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        weight = self.teacher / trainer.accumulate_grad_batches  # as losses are
        self._teacher.add_gradients(runner, self._lesson, weight, trained)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the batch go; refuse copies that turn out not to be trained."""
        self._lesson = None
        if self._copies is not None:
            self._copies.refuse(ends_epoch=trainer.is_last_batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after the fine-tuning that was asked for; within `fast_dev_run`, rehearse the rounds to come."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._rehearse_last_round(trainer, pl_module)
        if self._finished(trainer.current_epoch + 1):
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Within `Trainer.validate`, try the next round and leave everything as it is: a dry run."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._keep_score(trainer, pl_module)
        pending = self._pending()
        if trainer.state.fn != TrainerFn.VALIDATING or not pending:
            return
        self._check_names(pl_module)
        self._remember(pl_module)
        epoch, target = pending[0]
        result = self._search(trainer, pl_module, epoch=epoch, target=target, commit=False)
        self.results = [*self._real_results(), result]
        self._tell(result, trainer.log_dir or trainer.default_root_dir)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell what fine-tuning has come to, and do not count an epoch in which nothing was trained."""
        self._put_hooks_back()
        self._finish(trainer)
        if self._untrained is not None:
            take_epoch_back(trainer, self._untrained)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of rounds that training did not come to, whatever it was that ended it; `prune` says it itself."""
        unreached = [epoch for epoch, _ in self._pending()]
        if unreached and not self.as_given and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            why = why_training_ended(trainer)
            rank_zero_warn(rounds_never_reached(unreached, self.results, trainer.current_epoch, why))
