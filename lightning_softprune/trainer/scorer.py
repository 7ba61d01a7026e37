"""Scores the live module as `Trainer.validate` would, in the middle of a fit, and leaves nothing behind.

A *pass* is one run of Lightning's validation loop over the round's batches, or over a part of them; it yields the
metrics of one trial.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from types import SimpleNamespace, TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops import evaluation_loop
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torchmetrics import SumMetric

from lightning_softprune.trainer.isolation import (
    attributes_replaced,
    isolated_rng,
    make_fresh,
    untouched,
)
from lightning_softprune.trainer.lightning_names import MisconfigurationException, is_overridden
from lightning_softprune.trainer.module_steps import batch_of
from lightning_softprune.trainer.steps import (
    LoadedBatch,
    a_batch_is_done,
    compiler_off,
    loggers_silenced,
    moved_already,
    ready_to_run,
    transfer,
    validation_loop,
)
from lightning_softprune.trainer.validation_data import ALL, Part, ValidationData
from lightning_softprune.utilities.libraries import counterpart

_SCORED_ON = "and every trial of a search is scored on validation data"


class _LoggedMetrics(dict[str, Any]):
    """The metrics callbacks see: those from before the pass too, for users' hooks; `logged` has the pass's own."""

    def __init__(self, before: Mapping[str, Any]) -> None:
        super().__init__(before)
        self.logged: dict[str, Any] = {}

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's only way to write here."""
        self.logged.update(*args, **kwargs)
        super().update(*args, **kwargs)


def _results_that_stay(trainer: pl.Trainer) -> Any:
    """Where a pass keeps what is logged, as Lightning does, which moves all of it to the device at every `self.log`.

    It looks through everything that a result holds for it, which in small networks takes longer than their forward
    pass. Here, results are moved when they are elsewhere.
    """

    class Results(counterpart(_ResultCollection, trainer)):  # type: ignore[misc]
        def __setitem__(self, key: str, value: Any) -> None:
            moved = value.to

            def to(device: Any, **more: Any) -> Any:
                there = getattr(getattr(value, "value", None), "device", None) == device
                return value if there else moved(device, **more)

            vars(value)["to"] = to
            super().__setitem__(key, value)

    return Results(training=False)


@contextmanager
def _without_callbacks(trainer: pl.Trainer) -> Iterator[None]:
    """Lets the evaluation loop call the module's hooks and not the callbacks'.

    An empty `trainer.callbacks` would do the same, but a module may look there itself (`trainer.checkpoint_callback`).
    """

    def call_callback_hooks(of: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if of is not trainer:
            own._call_callback_hooks(of, *args, **kwargs)

    own = counterpart(call, trainer)
    functions = {name: value for name, value in vars(own).items() if not name.startswith("__")}
    functions["_call_callback_hooks"] = call_callback_hooks
    with attributes_replaced(counterpart(evaluation_loop, trainer), call=SimpleNamespace(**functions)):
        yield


def _directions(loop: _EvaluationLoop) -> dict[str, bool]:
    """Whether higher is better, of the metrics that a loop has logged as objects, under the names callbacks see."""
    found: dict[str, bool] = {}
    for entry in loop._results.result_metrics:
        better = None if entry.is_tensor else getattr(entry.value, "higher_is_better", None)
        if better is not None:
            found.update(dict.fromkeys(_names(loop, entry.meta), bool(better)))
    return found


def _sums(loop: _EvaluationLoop) -> dict[str, int | None]:
    """What a loop has added up over the data, under the names callbacks see; of which loader, `None` for all."""
    found: dict[str, int | None] = {}
    for entry in loop._results.result_metrics:
        if entry.meta.is_sum_reduction if entry.is_tensor else isinstance(entry.value, SumMetric):
            found.update(dict.fromkeys(_names(loop, entry.meta), entry.meta.dataloader_idx))
    return found


def _names(loop: _EvaluationLoop, meta: Any) -> list[str]:
    index = meta.dataloader_idx if meta.add_dataloader_idx else None
    suffix = "" if index is None else loop._results.DATALOADER_SUFFIX.format(index)
    return [f"{meta.name}{fork}{suffix}" for fork in ("", "_step", "_epoch")]


class _LoaderOfPart:
    """Serves some of the batches of a loader; otherwise looks like the user's own."""

    # Lightning announces each epoch to `sampler`; the user's sampler must not hear of it.
    sampler = None
    batch_sampler = None

    def __init__(self, data: ValidationData, number: int, which: range, loader: object) -> None:
        self._data, self._number, self._which = data, number, which
        self._loader = loader

    def __len__(self) -> int:
        return len(self._which)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data.batches(self._number, self._which):
            yield batch
            a_batch_is_done()

    def __getattr__(self, name: str) -> Any:
        # `_iterator` belongs to the user's own workers
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


class ValidationScorer:
    """Scores the live module as `Trainer.validate` would, and leaves nothing behind.

    A context manager for one round: entering reads the validation batches and keeps those that fit into memory; leaving
    drops them. In between, `metrics` runs the module's own `validation_step` over them as often as wanted. Every pass
    starts from the same random state and sees the same batches, so the same weights get the same score.

    Works inside `Trainer.fit` and inside `Trainer.validate`. With several processes each one scores its own shard;
    averaging the score is the caller's business, since metrics logged with `sync_dist` are equal already.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        memory_limit: Bytes that batches may take; `None`: a quarter of the free memory.
        seed: For data that are random (a shuffled validation loader, dropout left on).
        most: Only so many batches of each loader; `None`: as many as validation uses.

    Attributes:
        directions: Of the last pass: name of a metric that was logged as a torchmetrics object -> whether higher is
            better; only of those that know.
        sums: Of the last pass: name of a metric that is added up over the data -> the number of the loader whose data
            these are; `None` for all data.

    Raises:
        MisconfigurationException: On entering: no `validation_step`, no validation data, or data that can be read only
            once.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *,
        memory_limit: float | None = None,
        seed: int = 0,
        most: int | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._memory_limit = memory_limit
        self._seed, self._most_batches = seed, most
        self.directions: dict[str, bool] = {}
        self.sums: dict[str, int | None] = {}
        self._combined: CombinedLoader | None = None
        self._data: ValidationData | None = None

    def __enter__(self) -> ValidationScorer:
        loop = self._loop_with_data()
        combined = loop._combined_loader
        if combined is None:
            raise MisconfigurationException(f"val_dataloaders: there are none, {_SCORED_ON}")
        data = ValidationData(self._trainer, self._module, self._memory_limit, self._seed)
        with data.reading():
            most = math.inf if self._most_batches is None else self._most_batches
            data.read(combined, [min(limit, most) for limit in loop._max_batches])
        if not any(data.counts):
            raise MisconfigurationException(f"val_dataloaders: they yield no batch, {_SCORED_ON}")
        self._combined, self._data = combined, data
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._data is not None:
            self._data.drop()
        self._data = self._combined = None

    def _loop_with_data(self) -> _EvaluationLoop:
        trainer = self._trainer
        if not is_overridden("validation_step", self._module):
            raise MisconfigurationException(
                f"validation_step: {type(self._module).__name__} has none, and it scores every trial of a search"
            )
        if trainer.limit_val_batches == 0:
            raise MisconfigurationException(f"limit_val_batches: 0 leaves no batch, {_SCORED_ON}")
        loop = validation_loop(trainer)
        if loop._combined_loader is not None:
            return loop
        # At epoch 0 without sanity check Lightning has not asked for the data yet. It will, as if we had not.
        source = loop._data_source
        if source.instance is None or not source.is_defined():
            raise MisconfigurationException(f"val_dataloaders: None, and there is no `val_dataloader`, {_SCORED_ON}")
        stage = counterpart(RunningStage, trainer).VALIDATING
        kind = counterpart(_EvaluationLoop, trainer)
        own = kind(trainer, loop._trainer_fn, stage, verbose=False, inference_mode=False)
        own._data_source = source
        with isolated_rng(), attributes_replaced(trainer.state, stage=stage):
            own.setup_data()
        return own

    @property
    def data(self) -> ValidationData:
        """The batches."""
        if self._data is None:
            raise RuntimeError("`ValidationScorer` holds its batches inside a `with` block only.")
        return self._data

    @property
    def batches(self) -> list[Sequence[Any]]:
        """The batches, a sequence for each loader, as the loaders yield them; outside of the block there are none."""
        return [] if self._data is None else self._data.raw()

    def _opened(self, part: Part) -> CombinedLoader:
        data, combined = self.data, self._combined
        assert combined is not None
        loader = copy(combined)
        loader._iterator = None
        loader.flattened = [
            _LoaderOfPart(data, number, which, own)
            for number, (which, own) in enumerate(zip(data.ranges(part), combined.flattened, strict=True))
        ]
        return loader

    @property
    def batch_size(self) -> int:
        """Number of samples in the first batch; 1 where it cannot be told."""
        return next(sizes[0] for sizes in self.data.samples if sizes)

    @property
    def loaders(self) -> list[int]:
        """The loaders that give batches of their own; the first alone where Lightning combines their batches."""
        given = [number for number, count in enumerate(self.data.counts) if count]
        return given if self.data.in_turn else given[:1]

    def first_batch(self, loader: int | None = None) -> LoadedBatch:
        """A fresh copy of the first validation batch on the module's device: of all, or of one of the `loaders`."""
        data = self.data
        if not data.in_turn:
            batch, _, _ = next(iter(self._opened(ALL)))
            return LoadedBatch(transfer(self._trainer, self._module, batch))
        loader = self.loaders[0] if loader is None else loader
        with moved_already(self._trainer, self._module) if data.moves else nullcontext():
            return LoadedBatch(transfer(self._trainer, self._module, data.batch(loader, 0), loader), 0, loader)

    def metrics(self, part: Part = ALL) -> dict[str, float]:
        """Runs one pass over the live module as it is now.

        Args:
            part: Which batches it uses.

        Returns:
            Every metric that callbacks would see after this validation, by name. Metrics that are not single numbers
            are left out.

        Raises:
            Exception: The user's own, as it is, with everything put back.
        """
        trainer, module, data = self._trainer, self._module, self.data
        loader = self._opened(part)
        parent = trainer if trainer.state.fn == TrainerFn.VALIDATING else trainer.fit_loop.epoch_loop
        name = "validate_loop" if parent is trainer else "val_loop"
        stage = counterpart(RunningStage, trainer).VALIDATING
        kind = counterpart(_EvaluationLoop, trainer)
        loop = kind(trainer, getattr(parent, name)._trainer_fn, stage, verbose=False, inference_mode=False)
        vars(loop)["setup_data"] = lambda: None  # the data are there; Lightning would ask for the user's loaders again
        loop._combined_loader = loader
        loop._data_source = getattr(parent, name)._data_source
        loop._results = _results_that_stay(trainer)
        loop._max_batches = [len(which) for which in data.ranges(part)]
        connector = counterpart(_LoggerConnector, trainer)(trainer)
        connector._callback_metrics = seen = _LoggedMetrics(trainer._logger_connector._callback_metrics)
        with (
            untouched(trainer, module),
            attributes_replaced(parent, **{name: loop}),
            attributes_replaced(trainer, _logger_connector=connector),
            attributes_replaced(trainer.state, stage=stage),
            # the module itself, not its DistributedDataParallel wrapper, which knows the dense shapes
            attributes_replaced(trainer.strategy, _model=module),
            loggers_silenced(trainer),
            _without_callbacks(trainer),
            compiler_off(),
            isolated_rng(self._seed),
            moved_already(trainer, module) if data.moves else nullcontext(),
            data.reading(),
        ):
            make_fresh(module)
            loop.run()
            self.directions, self.sums = _directions(loop), _sums(loop)
            return {key: float(value) for key, value in seen.logged.items() if torch.as_tensor(value).numel() == 1}


def time_validation_step(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    scorer: ValidationScorer,
    *,
    runs: int,
    seconds: float,
    samples: int | None = None,
) -> float:
    """Times the module's `validation_step` on the first validation batch, leaving nothing behind.

    In eval mode, without gradients. Each run has a batch of its own, on the device already: steps may change theirs.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        scorer: Has the batch.
        runs: How many runs at most, after a warm-up of one; where there are more than two, of one and a third as many.
        seconds: Roughly how long to measure at most; a step that takes longer is run once, without a warm-up where it
            has the whole batch, which passes have run before.
        samples: How many samples the batch is to have, where it can be made so; `None`: as it is.

    Returns:
        The median of the runs, in seconds.
    """

    def wait() -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)

    def run(begin: bool = False) -> float:
        batch = scorer.first_batch()
        if samples is not None:
            batch = batch._replace(data=batch_of(batch.data, samples)[0])
        with ready_to_run(trainer, pl_module, "validation_step", batch, autocast=True, begin=begin) as step:
            wait()
            started = time.perf_counter()
            step()
            wait()
            return time.perf_counter() - started

    with untouched(trainer, pl_module), isolated_rng(0), torch.no_grad():
        make_fresh(pl_module)
        pl_module.eval()
        first = run(begin=True)
        if samples is None and first > seconds:
            return first
        once = run()
        runs = min(runs, int(seconds / once))
        if runs < 3:  # too long to warm up any further
            return statistics.median([once, *(run() for _ in range(1, runs))])
        for _ in range(runs // 3):
            run()
        return statistics.median(run() for _ in range(runs))
