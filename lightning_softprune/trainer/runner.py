"""A module in mid-fit that can be run: its own steps and its validation, on real batches, with nothing left behind.

Steps are `validation_step` and `training_step`. Tracing, calibration and rehearsal run them; no example input is asked
for. Where several processes train together, every process runs its share, and all get the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_softprune.trainer.batches import FirstBatches, read_training_batches
from lightning_softprune.trainer.isolation import (
    StillParameters,
    evaluating,
    is_fresh,
    isolated_rng,
    make_fresh,
    metrics_in,
    remembered,
    untouched,
)
from lightning_softprune.trainer.lightning_names import is_overridden
from lightning_softprune.trainer.module_steps import (
    GradientsWhereNeeded,
    Step,
    Steps,
    StepsOfAllKinds,
    attributes_of,
    batch_of,
    calls_as_often,
    code_in_training,
    head_of_batch,
    layer_calls,
    reads_its_mode,
    repeatable,
    run_steps,
    what_a_step_shows,
)
from lightning_softprune.trainer.processes import mean_over_processes
from lightning_softprune.trainer.scorer import ValidationScorer, time_validation_step
from lightning_softprune.trainer.steps import LoadedBatch, run_step, transfer
from lightning_softprune.trainer.validation_data import ALL, GIB, Part, samples_of
from lightning_softprune.utilities.nested import copy_batch
from lightning_softprune.utilities.snapshot import Snapshot

Value = TypeVar("Value")

_TRACED_BATCHES = 4
"""Training batches that are looked at for branches that the first one does not take."""


class ModuleRunner:
    """Runs the module of a trainer, for one round.

    A context manager: entering reads the validation batches and keeps those that fit into memory, leaving drops them.
    Training batches are read when they are first asked for, once, and are dropped with the others.

    Args:
        trainer: The trainer in charge.
        module: Its module.
        memory_limit: GiB that the round may hold beside the model; `None`: a quarter of the free memory.
        seed: For whatever is random in data and steps.
        calibration_batches: Training batches that are read at once; more only where more are asked for.
        only_batch: A training batch as `training_step` is about to get it: then this one alone, and the first of each
            validation loader, are looked at, no training loader is read, and every process is on its own.

    Attributes:
        left_alone: Modules that are no part of the network, neither pruned nor counted, with the reason: metrics.

    Raises:
        MisconfigurationException: On entering, see `ValidationScorer`.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        *,
        memory_limit: float | None = None,
        seed: int = 0,
        calibration_batches: int = 1,
        only_batch: LoadedBatch | None = None,
    ) -> None:
        self.trainer, self.module, self.seed = trainer, module, seed
        self.left_alone = metrics_in(module)
        self._read_at_once = calibration_batches
        self._first_batches: FirstBatches | None = None
        self._traced: StepsOfAllKinds | None = None
        self._memory: Snapshot | None = None
        self._is_fresh = False
        self._still_parameters = StillParameters()
        self._gradients = GradientsWhereNeeded()
        limit = None if memory_limit is None else memory_limit * GIB
        self._only_batch = only_batch
        most = None if only_batch is None else 1
        self._scorer = ValidationScorer(trainer, module, memory_limit=limit, seed=seed, most=most)

    def __enter__(self) -> ModuleRunner:
        self._scorer.__enter__()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._first_batches is not None:
                self._first_batches.close()
        finally:
            self._first_batches = self._traced = None
            self._scorer.__exit__(exception_type, exception, traceback)

    # ------------------------------------------------------------------------------------------------- validation

    @property
    def validation_batches(self) -> list[Sequence[Any]]:
        """The validation batches, a sequence for each loader, as the loaders yield them."""
        return self._scorer.batches

    @property
    def batch_size(self) -> int:
        """Samples in the first validation batch; 1 where that cannot be told."""
        return self._scorer.batch_size

    @property
    def memory_left(self) -> int:
        """Bytes that the round may still hold on the module's device, beside the validation batches, on rank zero."""
        return self.broadcast(self._scorer.data.memory_left)

    def sizes(self) -> list[list[int]] | None:
        """Samples of each validation batch of each loader, on rank zero; `None` where loaders are combined in rows."""
        data = self._scorer.data
        return self.broadcast(data.samples if data.in_turn else None)

    def share_of(self, part: Part, loader: int | None = None) -> float:
        """The fraction of the validation batches that a part has, of all or of one loader's; on rank zero."""
        data = self._scorer.data
        counted = slice(None) if loader is None else slice(loader, loader + 1)
        own, whole = (sum(map(len, data.ranges(each)[counted])) for each in (part, ALL))
        return self.broadcast(own / whole)

    def metrics(self, part: Part = ALL) -> dict[str, float]:
        """One validation pass over the module as it is now: every metric by name, the mean over the processes.

        Args:
            part: Which batches it uses.

        Raises:
            Exception: The user's own, as it is, with everything put back; on all processes, if it is raised on one.
        """
        if self.trainer.world_size == 1 or self._only_batch is not None:
            return self._scorer.metrics(part)
        metrics, failure = {}, None
        try:
            metrics = self._scorer.metrics(part)
        except Exception as error:
            failure = error
        if not self.all_agree(failure is None):
            raise failure or RuntimeError("another process has failed in this validation pass")
        return mean_over_processes(self.trainer, metrics)

    def takes_batch_of(self, samples: int) -> bool:
        """Whether a batch of so many samples can be made of the first validation batch."""
        return self.all_agree(batch_of(self._scorer.first_batch().data, samples)[1])

    @property
    def directions(self) -> dict[str, bool]:
        """Whether higher is better, of the metrics that the last pass has logged as torchmetrics objects, by name."""
        return self._scorer.directions

    @property
    def sums(self) -> dict[str, int | None]:
        """The metrics that the last pass has added up over the data, by name; of which loader, `None` for all."""
        return self._scorer.sums

    def time(self, *, runs: int, seconds: float, samples: int | None = None) -> float:
        """Median seconds of the module's `validation_step` on the first batch, the mean over the processes.

        Args:
            runs: How many runs at most.
            seconds: Roughly how long to measure at most.
            samples: How many samples the batch is to have, if that can be made; `None`: as many as it has.
        """
        how: dict[str, Any] = {"runs": runs, "seconds": seconds, "samples": samples}
        measured = time_validation_step(self.trainer, self.module, self._scorer, **how)
        return mean_over_processes(self.trainer, {"seconds": measured})["seconds"]

    # --------------------------------------------------------------------------------------------------- training

    def training_batches(self, n: int) -> list[Any]:
        """The first training batches, as the loaders yield them, in memory: who changes one works on a copy.

        They are the same ones throughout the round, whoever asks: the loaders are read once, from the random state that
        the seed gives, beside the running epoch.

        Args:
            n: How many; there are fewer where an epoch has fewer, and none in a `Trainer.validate` without any. After
                `calibration` there are no more than it gave.

        Raises:
            MisconfigurationException: A loader can be read only once.
        """
        if self._only_batch is not None:
            return [self._only_batch.data]
        if self._first_batches is None:
            self._first_batches = FirstBatches(self.trainer, self.seed)
        self._first_batches.take(max(n, self._read_at_once))
        return self._first_batches.found[:n]

    @property
    def training_batch_size(self) -> int:
        """Samples in the first training batch; 0 where there is none."""
        return next(map(samples_of, self.training_batches(1)), 0)

    def further_training_batches(self, n: int) -> Generator[Any]:
        """The same, as many as are asked for, and none kept in memory; they go on into further epochs.

        Close it if it is not read to its end.
        """
        return read_training_batches(self.trainer, n, self.seed)

    # ------------------------------------------------------------------------------------------------------ steps

    def teaching_step(self, raw: Any, number: int) -> Step:
        """The module's step on one training batch, to be differentiated: in the trainer's precision.

        `training_step`; where that optimizes by itself, `validation_step`. The mode and what the step leaves behind are
        the caller's business (`undisturbed`). Every call has the same batch and the same random numbers.

        Args:
            raw: The batch as the loader yields it; with `only_batch`, as `training_step` gets it.
            number: Its index.
        """
        name = "training_step" if self.trains_by_itself else "validation_step"
        seed = self.seed + 1 + number * self.trainer.world_size + self.trainer.global_rank
        with isolated_rng(seed):
            batch = raw if self._only_batch is not None else transfer(self.trainer, self.module, raw, step=name)

        def step() -> Any:
            with isolated_rng(seed):
                loaded = LoadedBatch(copy_batch(batch), number)
                return run_step(self.trainer, self.module, name, loaded, autocast=True).returned

        return step

    @contextmanager
    def undisturbed(self) -> Iterator[Callable[[], None]]:
        """What steps change around the parameters is put back; gradients are set aside.

        Yields:
            Makes all of it as it was when the block began, for another step; metrics start afresh.
        """
        memory = remembered(self.trainer, self.module)

        def again() -> None:
            memory.restore()
            memory.take_gradients()
            make_fresh(self.module)

        with untouched(self.trainer, self.module, memory):
            yield again

    def evaluating(self) -> AbstractContextManager[None]:
        """See `trainer.isolation.evaluating`."""
        return evaluating(self.module)

    @property
    def scales_losses(self) -> bool:
        """Whether gradients would be too small for the trainer's precision without a factor on the loss."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss as the trainer's precision scales it before it is differentiated."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return loss if scaler is None else scaler.scale(loss)

    def validation_step(self, samples: int | None = None, loader: int | None = None, shown: bool = False) -> Step:
        """The module's `validation_step` on the first validation batch, in eval mode, leaving nothing behind.

        Args:
            samples: Only so many of the batch's samples.
            loader: The loader whose first batch it is; `None`: the first that gives any.
            shown: Whether it returns all that the step shows, by name, and not what the step returns.
        """
        return lambda: self._ran("validation_step", partial(self._scorer.first_batch, loader), samples, shown)

    def training_step(
        self, raw: Any, number: int = 0, samples: int | None = None, shown: bool = False, trains: bool = False
    ) -> Step:
        """The module's `training_step` on one training batch, in eval mode, leaving nothing behind.

        Args:
            raw: The batch as the loader yields it.
            number: Its index.
            samples: Only so many of the batch's samples.
            shown: Whether it returns all that the step shows, by name, and not what the step returns.
            trains: Whether code of the user's own is told that it trains.
        """

        def loaded() -> LoadedBatch:
            if self._only_batch is not None:
                return LoadedBatch(copy_batch(raw), number)
            return LoadedBatch(transfer(self.trainer, self.module, raw, step="training_step"), number)

        mode = code_in_training if trains else nn.Module.eval
        return lambda: self._gradients(partial(self._ran, "training_step", loaded, samples, shown, mode))

    def predicting(self) -> Step | None:
        """The module's own `predict_step` on the first validation batch; `None` without one. It may not take it."""
        if not is_overridden("predict_step", self.module):
            return None
        return lambda: self._ran("predict_step", self._scorer.first_batch, None, False)

    def _ran(
        self,
        name: str,
        loaded: Callable[[], LoadedBatch],
        samples: int | None,
        shown: bool,
        mode: Callable[[nn.Module], object] = nn.Module.eval,
    ) -> Any:
        """Run a step: what it returns, or all that it shows."""
        batch = loaded()
        still = StillParameters() if mode is code_in_training else self._still_parameters  # which may move others
        kept = still(self.module) if name == "training_step" else nullcontext()
        with kept, untouched(self.trainer, self.module, self._memory):
            if not self._is_fresh:
                make_fresh(self.module)
            mode(self.module)
            batch = batch._replace(data=head_of_batch(batch.data, samples))
            before = attributes_of(self.module) if shown else {}
            returned, logged = run_step(self.trainer, self.module, name, batch)
            return what_a_step_shows(self.module, name, returned, logged, before) if shown else returned

    @contextmanager
    def steady(self) -> Iterator[Callable[[torch.Tensor], None]]:
        """Steps that run inside leave the module as it is now, which is remembered once for all of them.

        Of value where many are run. Whatever else changes inside and is no parameter's value is put back with them.

        Yields:
            To be told of a tensor of the module that has been changed, and is to stay as it is.
        """
        memory = self._memory = remembered(self.trainer, self.module)
        self._is_fresh = is_fresh(self.module)  # as every step finds it
        try:
            yield memory.accept
        finally:
            self._memory, self._is_fresh = None, False

    @property
    def trains_by_itself(self) -> bool:
        """Whether `training_step` can be run alone: it is there, and optimization is automatic."""
        return self.module.automatic_optimization and is_overridden("training_step", self.module)

    def tracing(self, samples: int | None = None) -> Steps:
        """The steps that tracing runs: what validation runs, and what training runs where optimization is automatic.

        They are the first batch of validation and of training, and of the other loaders and the next training batches
        those that use a part of the module that the ones before have not used. Where code of the user's own asks
        whether it trains, the last one tells it so; that one is on a whole batch.
        """
        return [*self._of_all_kinds.steps(samples), *(self._in_training() if samples is None else ())]

    def _in_training(self) -> Steps:
        batches = self.training_batches(1) if self.trains_by_itself and reads_its_mode(self.module) else []
        return [self.training_step(raw, shown=True, trains=True) for raw in batches]

    @property
    def _of_all_kinds(self) -> StepsOfAllKinds:
        if self._traced is None:
            batches = self.training_batches(_TRACED_BATCHES) if self.trains_by_itself else []
            validation = [partial(self.validation_step, loader=loader) for loader in self._scorer.loaders]
            training = [partial(self.training_step, raw, number) for number, raw in enumerate(batches)]
            self._traced = StepsOfAllKinds(self.module, (validation, training), self.all_agree)
        return self._traced

    def probing(self, samples: int) -> Steps:
        """The steps that groups are probed by: on so many samples, where these run the same layers as whole batches."""
        return self._of_all_kinds.on_few(samples)

    def calibration(self, count: int, share: float = 1.0) -> tuple[Steps, list[Any]]:
        """Training batches, and one step for each; where there are none, one validation batch's step.

        Every step has the same random numbers each time: dense and pruned inputs are compared sample by sample.

        Args:
            count: How many batches.
            share: Of an epoch, where it is longer: they are no more than this fraction, or than are read at once.
        """
        batches = self.training_batches(1) if self.trains_by_itself else []
        if self._first_batches is not None:
            if self._first_batches.in_epoch is not None:
                count = min(count, max(self._read_at_once, int(share * self._first_batches.in_epoch)))
            batches = self.training_batches(self.broadcast(count))
            self._first_batches.close()
        steps: Steps = [self.validation_step()]
        if batches:
            steps = [self.training_step(batch, number) for number, batch in enumerate(batches)]
        return [repeatable(step, number) for number, step in enumerate(steps)], batches

    def few(self, batches: Sequence[Any], samples: int) -> Step:
        """The step of the first of these training batches, or else of a validation batch.

        It runs on so many of the batch's samples, where these run the same layers as all of them, and has the same
        random numbers each time.
        """
        make = partial(self.training_step, batches[0]) if batches else self.validation_step
        whole, few = make(samples=None), make(samples=samples)
        calls = self._of_all_kinds.calls_of_first(training=bool(batches))
        if calls is None:
            with layer_calls(self.module) as calls:
                run_steps([whole])
        return repeatable(few if self.all_agree(calls_as_often(self.module, [few], calls)) else whole, 0)

    def rehearse(self) -> None:
        """Run the pruned module once as training will; the user's own exception goes on.

        Validation need not be rehearsed: every plan has been scored by it.
        """
        with isolated_rng(self.seed):
            for raw in self.training_batches(1) if self.trains_by_itself else ():
                with StillParameters()(self.module), untouched(self.trainer, self.module), torch.enable_grad():
                    make_fresh(self.module)
                    batch = transfer(self.trainer, self.module, raw, step="training_step")
                    run_step(self.trainer, self.module, "training_step", LoadedBatch(batch), autocast=True)

    # -------------------------------------------------------------------------------------------------- processes

    def broadcast(self, value: Value) -> Value:
        """Rank zero's value, on every process."""
        if self._only_batch is not None:
            return value
        found: Value = self.trainer.strategy.broadcast(value)
        return found

    def all_agree(self, flag: bool) -> bool:
        """Whether the flag is set on every process."""
        return flag if self._only_batch is not None else self.trainer.strategy.reduce_boolean_decision(flag, all=True)
