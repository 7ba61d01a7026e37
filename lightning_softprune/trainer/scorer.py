"""Scores the live module as `Trainer.validate` would, in the middle of a fit, and leaves nothing behind.

A *pass* is one run of Lightning's validation loop over the batches in memory; it yields the metrics of one trial.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace, TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops import evaluation_loop
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _extract_batch_size

from lightning_softprune.trainer.batches import MemoryLoader, copy_batch
from lightning_softprune.trainer.isolation import (
    attributes_replaced,
    clone_inference_tensors_and_reset_metrics,
    isolated_rng,
    untouched,
)
from lightning_softprune.trainer.lightning_names import MisconfigurationException, is_overridden
from lightning_softprune.trainer.loaders import loaders_beside
from lightning_softprune.trainer.steps import (
    LoadedBatch,
    compiler_off,
    loggers_silenced,
    run_step,
    transfer,
    validation_loop,
)
from lightning_softprune.utilities.checks import optional_whole_number
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


class ValidationScorer:
    """Scores the live module as `Trainer.validate` would, and leaves nothing behind.

    A context manager for one round: entering reads the validation batches into memory, once; leaving drops them. In
    between, `metrics` runs the module's own `validation_step` over them as often as wanted. Every pass starts from the
    same random state, so the same weights get the same score.

    Works inside `Trainer.fit` and inside `Trainer.validate`. With several processes each one scores its own shard;
    averaging the score is the caller's business, since metrics logged with `sync_dist` are equal already.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        max_batches: At most so many batches of every loader; `None`: as many as validation uses.
        seed: For data that are random (a shuffled validation loader, dropout left on).

    Raises:
        MisconfigurationException: On entering: no `validation_step`, no validation data, or data that can be read only
            once.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, max_batches: int | None = None, seed: int = 0
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._max_batches = optional_whole_number("max_batches", max_batches)
        self._seed = seed
        self._loader: CombinedLoader | None = None
        self.batches: list[list[Any]] = []
        """The batches in memory, a list for each loader, as the loaders yield them."""

    def __enter__(self) -> ValidationScorer:
        loop = self._loop_with_data()
        combined = loop._combined_loader
        if combined is None:
            raise MisconfigurationException(f"val_dataloaders: there are none, {_SCORED_ON}")
        with torch.inference_mode(False), torch.no_grad(), isolated_rng(self._seed):
            self.batches = self._read(combined, loop._max_batches)
        if not any(self.batches):
            raise MisconfigurationException(f"val_dataloaders: they yield no batch, {_SCORED_ON}")
        self._loader = copy(combined)
        self._loader._iterator = None
        self._loader.flattened = [
            MemoryLoader(batches, loader) for batches, loader in zip(self.batches, combined.flattened, strict=True)
        ]
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.batches = []
        self._loader = None

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

    def _read(self, combined: CombinedLoader, limits: list[int | float]) -> list[list[Any]]:
        most = sys.maxsize if self._max_batches is None else self._max_batches

        def head(loader: Any, limit: int | float) -> Iterator[Any]:
            return map(copy_batch, itertools.islice(loader, int(min(limit, most))))

        with loaders_beside(self._trainer, list(combined.flattened), "val_dataloaders") as loaders:
            if combined._mode != "min_size":
                return [list(head(*pair)) for pair in zip(loaders, limits, strict=True)]
            # row by row: what goes on beyond the end of the shortest may have no end itself
            rows = list(zip(*map(head, loaders, limits), strict=False))
            return [[row[i] for row in rows] for i in range(len(loaders))]

    def _opened(self) -> CombinedLoader:
        if self._loader is None:
            raise RuntimeError("`ValidationScorer` holds its batches inside a `with` block only.")
        return self._loader

    @property
    def batch_size(self) -> int | None:
        """Number of samples in the first batch, or `None` where it cannot be told."""
        try:
            return next((size for size in _extract_batch_size(self._first()) if size is not None), None)
        except (RecursionError, TypeError):
            return None

    @property
    def loaders(self) -> list[int]:
        """The loaders that give batches of their own; the first alone where Lightning combines their batches."""
        given = [number for number, batches in enumerate(self.batches) if batches]
        return given if self._opened()._mode == "sequential" else given[:1]

    def _first(self) -> Any:
        batch, _, _ = next(iter(copy(self._opened())))
        return batch

    def first_batch(self, loader: int | None = None) -> LoadedBatch:
        """A fresh copy of the first validation batch on the module's device: of all, or of one of the `loaders`."""
        if loader is None or len(self.loaders) == 1:
            return LoadedBatch(transfer(self._trainer, self._module, self._first()))
        return LoadedBatch(transfer(self._trainer, self._module, self.batches[loader][0], loader), 0, loader)

    def metrics(self) -> dict[str, float]:
        """Runs one pass over the live module as it is now.

        Returns:
            Every metric that callbacks would see after this validation, by name. Metrics that are not single numbers
            are left out.

        Raises:
            Exception: The user's own, as it is, with everything put back.
        """
        trainer, module = self._trainer, self._module
        loader = copy(self._opened())
        parent = trainer if trainer.state.fn == TrainerFn.VALIDATING else trainer.fit_loop.epoch_loop
        name = "validate_loop" if parent is trainer else "val_loop"
        stage = counterpart(RunningStage, trainer).VALIDATING
        kind = counterpart(_EvaluationLoop, trainer)
        loop = kind(trainer, getattr(parent, name)._trainer_fn, stage, verbose=False, inference_mode=False)
        vars(loop)["setup_data"] = lambda: None  # the data are there; Lightning would ask for the user's loaders again
        loop._combined_loader = loader
        loop._data_source = getattr(parent, name)._data_source
        loop._max_batches = [len(batches) for batches in self.batches]
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
        ):
            clone_inference_tensors_and_reset_metrics(module)
            loop.run()
            return {key: float(value) for key, value in seen.logged.items() if torch.as_tensor(value).numel() == 1}


def time_validation_step(
    trainer: pl.Trainer, pl_module: pl.LightningModule, scorer: ValidationScorer, *, runs: int, seconds: float
) -> float:
    """Times the module's `validation_step` on the first validation batch, leaving nothing behind.

    In eval mode, without gradients. Each run has a batch of its own, on the device already: steps may change theirs.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        scorer: Has the batch.
        runs: How many runs at most, after a warm-up of one and a third as many.
        seconds: Roughly how long to measure at most; there is one run in any case.

    Returns:
        The median of the runs, in seconds.
    """

    def wait() -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)

    def run(begin: bool = False) -> float:
        batch = scorer.first_batch()
        wait()
        started = time.perf_counter()
        run_step(trainer, pl_module, "validation_step", batch, autocast=True, begin=begin)
        wait()
        return time.perf_counter() - started

    with untouched(trainer, pl_module), isolated_rng(0), torch.no_grad():
        clone_inference_tensors_and_reset_metrics(pl_module)
        pl_module.eval()
        run(begin=True)
        runs = max(1, min(runs, int(seconds / run())))
        for _ in range(runs // 3):
            run()
        return statistics.median(run() for _ in range(runs))
