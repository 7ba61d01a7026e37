"""Scores the live module as `Trainer.validate` would, in the middle of a fit, and leaves nothing behind.

Everything this library takes from Lightning's private interface is in this module, and in no other.

Words used here:

- *pass*: one run of Lightning's validation loop over the batches in memory; it yields the metrics of one trial.
- *untouched*: what was saved before and put back after, the same objects with the same values.
"""

import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from types import SimpleNamespace, TracebackType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops import evaluation_loop
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.data import _extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric, MetricCollection

from lightning_softprune.utilities.snapshot import ATOMS, RNGS, Memory

__all__ = ["ValidationScorer", "isolated_rng", "run_step", "training_batches", "transfer", "untouched"]

_STAGES = {"validation_step": RunningStage.VALIDATING, "training_step": RunningStage.TRAINING}
# Objects with a life of their own: kept by reference, their insides are left alone.
_OPAQUE = (Dataset, DataLoader, Sampler, Optimizer, pl.Trainer, pl.LightningDataModule, pl.Callback, Logger)


# ----------------------------------------------------------------------------------------------------------------------
# What is put back


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Puts the random state of Python, NumPy, torch and every CUDA device back on exit, also after an exception.

    Args:
        seed: If given, all of them are seeded with it on entry.

    Yields:
        Nothing.
    """
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is the one users' code draws from
    # Asking an idle CUDA for its state would start it on every device.
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if started else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            # torch.manual_seed would also queue a seed for a CUDA that starts later, and that cannot be taken back.
            torch.default_generator.manual_seed(seed)
            if cuda_states is not None:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def untouched(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Puts back, on exit, everything around the module's parameters that the user's own code may change.

    That is: the schedulers' state and the optimizers' hyperparameters; the trainer's metrics, stage, `should_stop` and
    loggers; of the module and all its submodules the buffers, metric states, `training` and `requires_grad` flags, and
    whatever plain data they keep as attributes. Objects stay the same objects, also when an exception passes through.

    Pending gradients are set aside meanwhile (inside, every `parameter.grad` starts as `None`, as in Lightning's
    validation) and come back untouched. Parameter values and the optimizers' state are not looked after, so a change
    that should last (the final prune) belongs outside.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.

    Yields:
        Nothing.
    """
    memory = Memory(_OPAQUE)
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            memory.ignore(group["params"])
        memory.contents(optimizer.param_groups)
    for config in trainer.lr_scheduler_configs:
        memory.contents(vars(config.scheduler))
    for name in ("should_stop", "_last_val_time", "callbacks", "_loggers", "profiler", "_logger_connector"):
        memory.attribute(trainer, name)
    memory.contents(vars(trainer._logger_connector), vars(trainer.state), trainer.loggers)
    memory.contents(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
    memory.attribute(trainer.strategy, "_model")
    memory.attributes(getattr(trainer, "datamodule", None))
    memory.contents(pl_module)
    try:
        memory.take_gradients()
        yield
    finally:
        memory.restore()


@contextmanager
def _swapped(owner: object, **values: object) -> Iterator[None]:
    """Gives an object other attributes for a while."""
    missing = object()
    mapping = vars(owner)
    before = {name: mapping.get(name, missing) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def _fresh(batch: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a batch: what a step does in place (`x.sub_(mean)`, `batch.pop("y")`) does not reach the original.

    `copy.deepcopy` would copy the whole storage behind a view, so only objects of unknown type are left to it.
    """
    memo = {} if memo is None else memo
    if type(batch) in ATOMS:
        return batch
    if id(batch) in memo:  # an input that is also the target stays one tensor
        return memo[id(batch)]
    result: Any
    if isinstance(batch, Tensor):
        result = batch.detach().clone().requires_grad_(batch.requires_grad)
    elif isinstance(batch, np.ndarray):
        result = batch.copy()
    elif type(batch) in (list, tuple):
        result = type(batch)([_fresh(item, memo) for item in batch])
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        result = type(batch)(*(_fresh(item, memo) for item in batch))
    elif isinstance(batch, dict):
        result = copy(batch)  # keeps the type and its extras (a default factory)
        for key, value in batch.items():
            result[key] = _fresh(value, memo)
    elif is_dataclass(batch) and not isinstance(batch, type):
        result = copy(batch)
        for field in fields(batch):
            if hasattr(batch, field.name):  # past a frozen dataclass's guard
                object.__setattr__(result, field.name, _fresh(getattr(batch, field.name), memo))
    else:
        try:
            result = deepcopy(batch)
        except Exception:  # a handle or another thing that cannot be copied: as it is
            result = batch
    memo[id(batch)] = result
    return result


class _MemoryLoader:
    """Serves batches from memory, a fresh copy each time; otherwise looks like the user's loader."""

    # Lightning announces each epoch to `sampler`; the user's sampler must not hear of it.
    sampler = None
    batch_sampler = None

    def __init__(self, batches: list[Any], loader: object) -> None:
        self._batches = batches
        self._loader = loader

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return (_fresh(batch) for batch in self._batches)

    def __getattr__(self, name: str) -> Any:
        # `_iterator` belongs to the user's own workers
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def _private(loader: Any, argument: str, depth: int = 2) -> Any:
    """A shallow copy of a loader that can be read while the loader itself, its iterator and its workers go on.

    The copy starts workers of its own where the loader has some: `worker_init_fn` is honoured, and the dataset is
    changed in their processes and not in this one.
    """
    if isinstance(loader, DataLoader):
        result = copy(loader)
        # not setattr, which DataLoader refuses once it is made
        vars(result).update(persistent_workers=False, pin_memory=False, _iterator=None)
        return result
    mapping = getattr(loader, "__dict__", None)
    if mapping is None or not isinstance(mapping, dict):
        if isinstance(loader, Iterator):
            raise MisconfigurationException(
                f"`{argument}` holds a {type(loader).__name__}, which can be read only once, so the search would take"
                " batches away from the run. Pass an object that can be iterated again: a DataLoader, a list or a class"
                " with `__iter__`."
            )
        return loader
    try:
        result = copy(loader)
    except Exception:
        return loader
    for name, value in mapping.items():
        if depth and isinstance(value, DataLoader):
            vars(result)[name] = _private(value, argument, depth - 1)
    return result


@contextmanager
def _undisturbed(loaders: Iterable[Any]) -> Iterator[None]:
    """Puts back the samplers, the datasets' attributes and every random generator that reading these loaders moves.

    The generators are seeded from torch's global one, so that what is read depends on the caller's seed alone.
    """
    memory = Memory(_OPAQUE)
    generators: list[Any] = []
    seen: set[int] = set()
    level = [loader for loader in loaders if not isinstance(loader, Tensor)]
    for _ in range(6):  # loader -> batch_sampler -> sampler -> generator; loader -> dataset -> transform -> generator
        below: list[Any] = []
        for value in level:
            if type(value) in ATOMS or id(value) in seen or isinstance(value, (Tensor, np.ndarray, nn.Module)):
                continue
            seen.add(id(value))
            if isinstance(value, RNGS):
                generators.append(value)
            elif isinstance(value, (list, tuple)):
                below.extend(value[:64])
            elif isinstance(value, dict):
                below.extend(itertools.islice(value.values(), 64))
            elif isinstance(mapping := getattr(value, "__dict__", None), dict) and not isinstance(value, pl.Trainer):
                if isinstance(value, DataLoader):
                    memory.ignore(value.dataset)  # a plain list of samples would be copied as a sampler's contents
                elif isinstance(value, Sampler):
                    memory.contents(mapping)
                else:
                    memory.attributes(value)
                below.extend(item for name, item in mapping.items() if name != "_iterator")  # the user's workers
        level = below
    memory.contents(*generators)
    seed = int(torch.empty((), dtype=torch.int64).random_(2**31))
    try:
        for generator in generators:
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = type(generator.bit_generator)(seed).state
            else:
                generator.seed(seed)
        yield
    finally:
        memory.restore()


def training_batches(trainer: pl.Trainer, n: int) -> list[Any]:
    """Reads training batches beside the running epoch, whose order, workers and random state stay as they are.

    Args:
        trainer: The trainer in charge.
        n: How many batches; there are fewer when the loaders (or `limit_train_batches`) give fewer.

    Returns:
        Batches as the fit loop hands them out, before any transfer: with several loaders, combined in their mode. Which
        ones depends on torch's random state, so seed it (`isolated_rng`) for reproducible batches. Empty where there is
        no training data, as in `Trainer.validate` with loaders only.

    Raises:
        MisconfigurationException: A loader can be read only once.
    """
    with torch.inference_mode(False), torch.no_grad(), isolated_rng():
        combined = _training_loader(trainer)
        if combined is None:
            return []
        loaders = list(combined.flattened)
        beside = copy(combined)
        beside._iterator = None
        beside.flattened = [_private(loader, "train_dataloaders") for loader in loaders]
        with _undisturbed(loaders):
            if trainer.state.fn == TrainerFn.FITTING:
                for loader in beside.flattened:
                    _set_sampler_epoch(loader, trainer.current_epoch)
            iterator = iter(beside)
            try:
                limit = min(n, _length(beside))
                return [_fresh(batch) for batch, _, _ in itertools.islice(iterator, limit)]
            finally:
                beside._iterator = None  # lets go of the workers it started


def _training_loader(trainer: pl.Trainer) -> CombinedLoader | None:
    loop = trainer.fit_loop
    if loop._combined_loader is not None:
        return loop._combined_loader
    source = loop._data_source
    if source.instance is None or not source.is_defined():
        return None
    try:
        loaders = _request_dataloader(source)
    except Exception as error:
        if trainer.state.fn == TrainerFn.FITTING:
            raise
        rank_zero_warn(f"`train_dataloader` gives no training data outside of `fit` ({type(error).__name__}: {error}).")
        return None
    return loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")


def _length(combined: CombinedLoader) -> int:
    length = len(combined)  # may be infinite, whatever the annotation says
    return length if length < sys.maxsize else sys.maxsize


def transfer(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    dataloader_idx: int = 0,
    *,
    step: str = "validation_step",
) -> Any:
    """Brings a copy of a batch to the module's device as Lightning would: precision, then the transfer hooks.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        batch: A batch as a loader yields it; it stays as it is.
        dataloader_idx: The loader it comes from.
        step: The step it is meant for: hooks that ask for `trainer.training` get the right answer.

    Returns:
        The batch as the step receives it.
    """
    stage = _stage(step)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _swapped(trainer.state, stage=stage),
        _swapped(trainer, profiler=PassThroughProfiler()),
        _swapped(pl_module, _current_fx_name=pl_module._current_fx_name),
    ):
        batch = trainer.precision_plugin.convert_input(_fresh(batch))
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


# ----------------------------------------------------------------------------------------------------------------------
# Running the user's steps


def _stage(step: str) -> RunningStage:
    if step not in _STAGES:
        raise ValueError(f"`step` must be one of {sorted(_STAGES)}, got {step!r}.")
    return _STAGES[step]


class _QuietLogger(DummyLogger):
    """Stands in for one of the user's loggers: tells where that one writes, and writes nothing."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    @property
    def name(self) -> str | None:  # type: ignore[override]
        return self._logger.name  # type: ignore[no-any-return]

    @property
    def version(self) -> int | str | None:  # type: ignore[override]
        return self._logger.version  # type: ignore[no-any-return]

    @property
    def save_dir(self) -> str | None:
        # `Trainer.log_dir` asks these two for `log_dir` and all others for `save_dir`
        own = isinstance(self._logger, (CSVLogger, TensorBoardLogger))
        return self._logger.log_dir if own else self._logger.save_dir  # type: ignore[no-any-return]

    @property
    def log_dir(self) -> str | None:
        return getattr(self._logger, "log_dir", None)

    @property
    def root_dir(self) -> str | None:
        return getattr(self._logger, "root_dir", None)


def _eager() -> AbstractContextManager[Any]:
    """Compiled modules run eagerly: every trial has other shapes, and torch gives up compiling after a few.

    Where the compiler was never loaded, nothing is compiled, and it is not loaded for this.
    """
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()


@contextmanager
def _quiet(trainer: pl.Trainer) -> Iterator[None]:
    """No row in the user's loggers and profiler."""
    quiet = [_QuietLogger(logger) for logger in trainer.loggers]
    with _swapped(trainer, _loggers=quiet, profiler=PassThroughProfiler()):
        yield


def run_step(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    step: str,
    batch: Any,
    batch_idx: int = 0,
    dataloader_idx: int = 0,
    *,
    autocast: bool = False,
    begin: bool = True,
) -> Any:
    """Runs one step of the module by itself, with nothing logged.

    The mode (`train()`, `eval()`, gradients) is the caller's choice. What the step changes on the module stays changed:
    wrap it in `untouched` and `isolated_rng`. Steps may need what the module's hooks make at the start of an epoch, so
    these are called first: validation's, and training's as long as this fit has trained on no batch.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        step: `"validation_step"` or `"training_step"`.
        batch: A batch that is on the device already, see `transfer`.
        batch_idx: Its index; left out where the step takes none.
        dataloader_idx: Its loader; left out where Lightning would.
        autocast: Whether mixed precision applies. Precisions that change the module itself (`"bf16-true"`) always do.
        begin: Whether to call those hooks.

    Returns:
        What the step returns.

    Raises:
        ValueError: `step` is neither of the two.
    """
    stage = _stage(step)
    function = getattr(pl_module, step)
    arguments: tuple[Any, ...] = (batch,)
    if is_param_in_hook_signature(function, "dataloader_iter", explicit=True):
        arguments = (iter([(batch, batch_idx, dataloader_idx)]),)
    else:
        if is_param_in_hook_signature(function, "batch_idx", min_args=2):
            arguments = (*arguments, batch_idx)
        if step == "validation_step" and _passes_dataloader_idx(trainer, function):
            arguments = (*arguments, dataloader_idx)

    def log_nothing(*args: Any, **kwargs: Any) -> None:
        """Takes whatever `self.log` and `self.log_dict` take."""

    plugin = trainer.precision_plugin
    with ExitStack() as stack:
        stack.enter_context(_swapped(trainer.state, stage=stage))
        stack.enter_context(_quiet(trainer))
        stack.enter_context(_swapped(pl_module, log=log_nothing, log_dict=log_nothing, _current_fx_name=step))
        stack.enter_context(_eager())
        if autocast or not isinstance(plugin, MixedPrecision):
            stack.enter_context(plugin.train_step_context() if step == "training_step" else plugin.val_step_context())
        if begin and step == "validation_step":
            pl_module.on_validation_start()
            pl_module.on_validation_epoch_start()
        elif begin and not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            pl_module.on_train_epoch_start()
        return function(*arguments)


def _passes_dataloader_idx(trainer: pl.Trainer, function: Callable[..., Any]) -> bool:
    combined = _validation_loop(trainer)._combined_loader
    if combined is None:  # not set up yet; a step that has the argument may have it without a default
        return is_param_in_hook_signature(function, "dataloader_idx")
    return combined._mode == "sequential" and len(combined.flattened) > 1


def _validation_loop(trainer: pl.Trainer) -> _EvaluationLoop:
    return trainer.validate_loop if trainer.state.fn == TrainerFn.VALIDATING else trainer.fit_loop.epoch_loop.val_loop


class _PassLoop(_EvaluationLoop):
    """Lightning's validation loop with data that are there already."""

    def setup_data(self) -> None:
        """Does nothing; Lightning would ask for the user's loaders again."""


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
            call._call_callback_hooks(of, *args, **kwargs)

    functions = {name: value for name, value in vars(call).items() if not name.startswith("__")}
    functions["_call_callback_hooks"] = call_callback_hooks
    with _swapped(evaluation_loop, call=SimpleNamespace(**functions)):
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
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"`max_batches` must be at least 1 or None, got {max_batches}.")
        self._trainer = trainer
        self._module = pl_module
        self._max_batches = max_batches
        self._seed = seed
        self._loader: CombinedLoader | None = None
        self.batches: list[list[Any]] = []
        """The batches in memory, a list for each loader, as the loaders yield them."""

    def __enter__(self) -> "ValidationScorer":
        loop = self._loop_with_data()
        combined = loop._combined_loader
        if combined is None:
            raise MisconfigurationException("There are no validation data, which every trial of a search is scored on.")
        with torch.inference_mode(False), torch.no_grad(), isolated_rng(self._seed):
            self.batches = self._read(list(combined.flattened), loop._max_batches)
        if not any(self.batches):
            raise MisconfigurationException("The validation loaders yield no batch, which every trial is scored on.")
        self._loader = copy(combined)
        self._loader._iterator = None
        self._loader.flattened = [
            _MemoryLoader(batches, loader) for batches, loader in zip(self.batches, combined.flattened, strict=True)
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
                f"`{type(self._module).__name__}` has no `validation_step`, which scores every trial of a search."
            )
        if trainer.limit_val_batches == 0:
            raise MisconfigurationException("`limit_val_batches=0` leaves no validation batch to score a trial on.")
        loop = _validation_loop(trainer)
        if loop._combined_loader is not None:
            return loop
        # At epoch 0 without sanity check Lightning has not asked for the data yet. It will, as if we had not.
        source = loop._data_source
        if source.instance is None or not source.is_defined():
            raise MisconfigurationException(
                "There is no `val_dataloader` (or `val_dataloaders`), which every trial is scored on."
            )
        own = _EvaluationLoop(trainer, loop._trainer_fn, RunningStage.VALIDATING, verbose=False, inference_mode=False)
        own._data_source = source
        with isolated_rng(), _swapped(trainer.state, stage=RunningStage.VALIDATING):
            own.setup_data()
        return own

    def _read(self, loaders: list[Any], limits: list[int | float]) -> list[list[Any]]:
        batches = []
        with _undisturbed(loaders):
            for loader, limit in zip(loaders, limits, strict=True):
                if self._trainer.state.fn == TrainerFn.FITTING:
                    _set_sampler_epoch(loader, self._trainer.current_epoch)
                limit = min(limit, sys.maxsize if self._max_batches is None else self._max_batches)
                iterator = itertools.islice(_private(loader, "val_dataloaders"), int(min(limit, sys.maxsize)))
                batches.append([_fresh(batch) for batch in iterator])
        return batches

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

    def _first(self) -> Any:
        batch, _, _ = next(iter(copy(self._opened())))
        return batch

    def first_batch(self) -> tuple[Any, int, int]:
        """A fresh copy of the first validation batch on the module's device, its index and its loader's index."""
        return transfer(self._trainer, self._module, self._first()), 0, 0

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
        loop = _PassLoop(
            trainer, getattr(parent, name)._trainer_fn, RunningStage.VALIDATING, verbose=False, inference_mode=False
        )
        loop._combined_loader = loader
        loop._data_source = getattr(parent, name)._data_source
        loop._max_batches = [len(batches) for batches in self.batches]
        connector = _LoggerConnector(trainer)
        connector._callback_metrics = seen = _LoggedMetrics(trainer._logger_connector._callback_metrics)
        with (
            untouched(trainer, module),
            _swapped(parent, **{name: loop}),
            _swapped(trainer, _logger_connector=connector),
            _swapped(trainer.state, stage=RunningStage.VALIDATING),
            # the module itself, not its DistributedDataParallel wrapper, which knows the dense shapes
            _swapped(trainer.strategy, _model=module),
            _quiet(trainer),
            _without_callbacks(trainer),
            _eager(),
            isolated_rng(self._seed),
        ):
            leave_inference(module)
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
        run_step(trainer, pl_module, "validation_step", *batch, autocast=True, begin=begin)
        wait()
        return time.perf_counter() - started

    with untouched(trainer, pl_module), isolated_rng(0), torch.no_grad():
        leave_inference(pl_module)
        pl_module.eval()
        run(begin=True)
        runs = max(1, min(runs, int(seconds / run())))
        for _ in range(runs // 3):
            run()
        return statistics.median(run() for _ in range(runs))


def leave_inference(module: nn.Module) -> None:
    """Replace the module's tensors that were made in inference mode by ordinary ones.

    `Trainer.validate` runs in that mode. Outside of it torch neither changes such tensors in place nor lets gradients
    pass by them. Metrics start afresh. Wrap it in `untouched`, which puts the originals back.
    """
    _reset_metrics(module)
    for child in module.modules():
        for holder in (child._buffers, vars(child)):
            for name, value in holder.items():
                if isinstance(value, Tensor) and value.is_inference():
                    holder[name] = value.clone()


def has_inference_tensors(module: nn.Module) -> bool:
    """Whether a `Trainer.validate` left buffers or metric states that a fit cannot use."""
    holders = (holder for child in module.modules() for holder in (child._buffers, vars(child)))
    return any(isinstance(v, Tensor) and v.is_inference() for holder in holders for v in holder.values())


def _reset_metrics(module: nn.Module) -> None:
    collections: list[MetricCollection] = []
    for child in module.modules():
        if isinstance(child, MetricCollection):
            collections.append(child)
        elif isinstance(child, Metric):
            child.reset()
    for collection in collections:  # after their members, whose shared states they tie together again
        collection.reset()


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def over_processes(trainer: pl.Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each metric over the processes, each of which scored its own share of the validation data.

    Metrics that were logged with `sync_dist`, or come from torchmetrics objects, are equal already.
    """
    if trainer.world_size == 1 or not metrics:
        return metrics
    names = sorted(metrics)
    values = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=trainer.strategy.root_device)
    means = trainer.strategy.reduce(values, reduce_op="mean")
    return dict(zip(names, torch.as_tensor(means).tolist(), strict=True))


def wrap_again(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Wrap the pruned module for distributed training anew; the old wrapper would reduce parameters that are gone.

    The new wrapper also copies rank zero's weights to all processes, as it does when a fit starts.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = pl_module
        strategy.configure_ddp()


# ----------------------------------------------------------------------------------------------------------------------
# The fit loop


def logging_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning itself would write a row into the loggers now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def finish_epoch_without_training(trainer: pl.Trainer) -> None:
    """At the start of a training epoch: validate for real and let the fit end after this epoch, with no batch run.

    Checkpoints, metrics and loggers then belong to the model as it is now. ModelCheckpoint saves once per step only, so
    it is told that this step has no checkpoint yet.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = -1
    loop = trainer.fit_loop.epoch_loop
    trainer.validating = True
    try:
        loop.val_loop.run()
    finally:
        trainer.training = True
    trainer.should_stop = True


def take_epoch_back(trainer: pl.Trainer, epoch: int) -> None:
    """Once training is over: an epoch that ended without training is still to come.

    Lightning counts every epoch that was begun. A fit that goes on from there would train one epoch less than asked.
    """
    for counter in (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current):
        counter.load_state_dict(dict.fromkeys(vars(counter), epoch))


def take_epoch_back_in(checkpoint: dict[str, Any], epoch: int) -> None:
    """The same in a checkpoint, whenever it was saved since: it is one from between two epochs."""
    state = checkpoint["loops"]["fit_loop"]
    trained = state["epoch_loop.batch_progress"]
    for counts, count in (
        *((counts, epoch) for counts in state["epoch_progress"].values()),
        (trained["total"], trained["total"]["completed"]),
        (trained["current"], 0),
    ):
        counts.update(dict.fromkeys(counts, count))
    trained["is_last_batch"] = False
