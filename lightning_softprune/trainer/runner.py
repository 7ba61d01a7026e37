"""A module in mid-fit that can be run: its own steps and its validation, on real batches, with nothing left behind.

Steps are `validation_step` and `training_step`. Tracing, calibration and rehearsal run them; no example input is asked
for. Where several processes train together, every process runs its share, and all get the same numbers.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

from lightning_softprune.trainer.batches import training_batches
from lightning_softprune.trainer.isolation import (
    clone_inference_tensors_and_reset_metrics,
    isolated_rng,
    untouched,
)
from lightning_softprune.trainer.lightning_names import is_overridden
from lightning_softprune.trainer.module_steps import Step, Steps, head_of_batch, same_layer_calls
from lightning_softprune.trainer.processes import mean_over_processes
from lightning_softprune.trainer.scorer import ValidationScorer, time_validation_step
from lightning_softprune.trainer.steps import LoadedBatch, run_step, transfer

Value = TypeVar("Value")


class ModuleRunner:
    """Runs the module of a trainer, for one round.

    A context manager: entering reads the validation batches into memory, leaving drops them.

    Args:
        trainer: The trainer in charge.
        module: Its module.
        max_batches: Validation batches of every loader that a pass uses at most; `None`: as many as validation uses.
        seed: For whatever is random in data and steps.

    Raises:
        MisconfigurationException: On entering, see `ValidationScorer`.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, *, max_batches: int | None = None, seed: int = 0
    ) -> None:
        self.trainer, self.module, self.seed = trainer, module, seed
        self._scorer = ValidationScorer(trainer, module, max_batches=max_batches, seed=seed)

    def __enter__(self) -> ModuleRunner:
        self._scorer.__enter__()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scorer.__exit__(exception_type, exception, traceback)

    # ------------------------------------------------------------------------------------------------- validation

    @property
    def validation_batches(self) -> list[list[Any]]:
        """The validation batches in memory, a list for each loader, as the loaders yield them."""
        return self._scorer.batches

    @property
    def batch_size(self) -> int:
        """Samples in the first validation batch; 1 where that cannot be told."""
        return self._scorer.batch_size or 1

    def metrics(self) -> dict[str, float]:
        """One validation pass over the module as it is now: every metric by name, the mean over the processes.

        Raises:
            Exception: The user's own, as it is, with everything put back.
        """
        return mean_over_processes(self.trainer, self._scorer.metrics())

    def time(self, *, runs: int, seconds: float) -> float:
        """Median seconds of the module's `validation_step` on the first batch, the mean over the processes.

        Args:
            runs: How many runs at most.
            seconds: Roughly how long to measure at most.
        """
        measured = time_validation_step(self.trainer, self.module, self._scorer, runs=runs, seconds=seconds)
        return mean_over_processes(self.trainer, {"seconds": measured})["seconds"]

    # ------------------------------------------------------------------------------------------------------ steps

    def validation_step(self, samples: int | None = None) -> Step:
        """The module's `validation_step` on the first validation batch, in eval mode, leaving nothing behind.

        Args:
            samples: Only so many of the batch's samples.
        """

        def step() -> Any:
            with untouched(self.trainer, self.module):
                clone_inference_tensors_and_reset_metrics(self.module)
                self.module.eval()
                first = self._scorer.first_batch()
                batch = first._replace(data=head_of_batch(first.data, samples))
                return run_step(self.trainer, self.module, "validation_step", batch)

        return step

    def training_step(self, raw: Any, number: int = 0, samples: int | None = None) -> Step:
        """The module's `training_step` on one training batch, in eval mode, leaving nothing behind.

        Args:
            raw: The batch as the loader yields it.
            number: Its index.
            samples: Only so many of the batch's samples.
        """

        def step() -> Any:
            with untouched(self.trainer, self.module):
                clone_inference_tensors_and_reset_metrics(self.module)
                self.module.eval()
                batch = head_of_batch(transfer(self.trainer, self.module, raw, step="training_step"), samples)
                return run_step(self.trainer, self.module, "training_step", LoadedBatch(batch, number))

        return step

    @property
    def trains_by_itself(self) -> bool:
        """Whether `training_step` can be run alone: it is there, and optimization is automatic."""
        return self.module.automatic_optimization and is_overridden("training_step", self.module)

    def tracing(self, samples: int | None = None) -> Steps:
        """The steps that tracing runs: what validation runs, and what training runs where optimization is automatic."""
        steps: Steps = [self.validation_step(samples)]
        if self.trains_by_itself:
            steps += [self.training_step(batch, samples=samples) for batch in training_batches(self.trainer, 1)]
        return steps

    def probing(self, samples: int) -> Steps:
        """The steps that groups are probed by: on so many samples, where these run the same layers as whole batches."""
        whole, few = self.tracing(), self.tracing(samples)
        return few if self.all_agree(same_layer_calls(self.module, few, whole)) else whole

    def calibration(self, count: int) -> tuple[Steps, list[Any]]:
        """Training batches, and one step for each; where there are none, one validation batch's step.

        Every step has the same random numbers each time: dense and pruned inputs are compared sample by sample.
        """
        batches = training_batches(self.trainer, count) if self.trains_by_itself else []
        steps: Steps = [self.validation_step()]
        if batches:
            steps = [self.training_step(batch, number) for number, batch in enumerate(batches)]
        return [_repeatable(step, number) for number, step in enumerate(steps)], batches

    def rehearse(self) -> None:
        """Run the pruned module once as validation and as training will; the user's own exception goes on."""
        with isolated_rng(self.seed):
            with torch.no_grad():
                self.validation_step()()
            for raw in training_batches(self.trainer, 1) if self.trains_by_itself else ():
                with untouched(self.trainer, self.module), torch.enable_grad():
                    clone_inference_tensors_and_reset_metrics(self.module)
                    batch = transfer(self.trainer, self.module, raw, step="training_step")
                    run_step(self.trainer, self.module, "training_step", LoadedBatch(batch), autocast=True)

    # -------------------------------------------------------------------------------------------------- processes

    def broadcast(self, value: Value) -> Value:
        """Rank zero's value, on every process."""
        found: Value = self.trainer.strategy.broadcast(value)
        return found

    def all_agree(self, flag: bool) -> bool:
        """Whether the flag is set on every process."""
        return self.trainer.strategy.reduce_boolean_decision(flag, all=True)


def _repeatable(step: Step, seed: int) -> Step:
    def run() -> Any:
        with isolated_rng(seed):
            return step()

    return run
