"""One step of the module by itself: a batch is brought to the device, the step runs, nothing is logged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_softprune.trainer.isolation import attributes_replaced
from lightning_softprune.trainer.lightning_names import is_overridden
from lightning_softprune.utilities.checks import one_of
from lightning_softprune.utilities.libraries import counterpart, counterparts, of_both_libraries
from lightning_softprune.utilities.nested import copy_batch

_STAGES = {
    "validation_step": RunningStage.VALIDATING,
    "training_step": RunningStage.TRAINING,
    "predict_step": RunningStage.PREDICTING,
}


class LoadedBatch(NamedTuple):
    """A batch with its place.

    Attributes:
        data: The batch itself.
        batch_idx: Its index.
        dataloader_idx: Its loader's index.
    """

    data: Any
    batch_idx: int = 0
    dataloader_idx: int = 0


class Ran(NamedTuple):
    """What came of a step.

    Attributes:
        returned: What it returned.
        logged: What it logged, by name.
    """

    returned: Any
    logged: dict[str, Any]


_watchers: list[Callable[[], None]] = []


@contextmanager
def watched(call: Callable[[], None]) -> Iterator[None]:
    """Call a function after every batch that a step of a module is run on, in validation passes too."""
    _watchers.append(call)
    try:
        yield
    finally:
        _watchers.remove(call)


def a_batch_is_done() -> None:
    """Tell those who watch."""
    for call in _watchers:
        call()


def _stage(trainer: pl.Trainer, step: str) -> RunningStage:
    return counterpart(RunningStage, trainer)(_STAGES[one_of("step", step, tuple(_STAGES))].value)


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
    stage = _stage(trainer, step)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        attributes_replaced(trainer.state, stage=stage),
        attributes_replaced(trainer, profiler=PassThroughProfiler()),
        attributes_replaced(pl_module, _current_fx_name=pl_module._current_fx_name),
    ):
        batch = trainer.precision_plugin.convert_input(copy_batch(batch))
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def is_moved_once(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether a validation batch can be brought to the device before the passes over it, and stay there.

    Not where the user's code works on it before that (`on_before_batch_transfer`), which belongs to every pass, and not
    where the step takes batches from an iterator.
    """
    before = _owner_of_hook(trainer, pl_module, "on_before_batch_transfer")
    if is_overridden("on_before_batch_transfer", before):
        return False
    return not is_param_in_hook_signature(pl_module.validation_step, "dataloader_iter", explicit=True)


def move(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Brings a copy of a batch to the device, and no further: `on_after_batch_transfer` may use the module's layers.

    Also where `moved_already` holds, as within a pass that comes to a batch for the first time.
    """
    mover = _owner_of_hook(trainer, pl_module, "transfer_batch_to_device")
    skipped = getattr(mover.transfer_batch_to_device, "skipped", None)
    own = {} if skipped is None else {"transfer_batch_to_device": skipped}
    with attributes_replaced(mover, **own), _without_hook(trainer, pl_module, "on_after_batch_transfer"):
        return transfer(trainer, pl_module, batch, dataloader_idx)


def moved_already(trainer: pl.Trainer, pl_module: pl.LightningModule) -> AbstractContextManager[None]:
    """Batches are where `move` has brought them: the user's `transfer_batch_to_device` is not called again."""
    return _without_hook(trainer, pl_module, "transfer_batch_to_device")


@contextmanager
def _without_hook(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Iterator[None]:
    owner = _owner_of_hook(trainer, pl_module, name)
    if not is_overridden(name, owner):  # Lightning's own does nothing to a batch that is there
        yield
        return

    def skip(batch: Any, *_: Any, **__: Any) -> Any:
        return batch

    skip.skipped = getattr(owner, name)  # type: ignore[attr-defined]
    with attributes_replaced(owner, **{name: skip}):
        yield


def _owner_of_hook(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Any:
    """Whose hook Lightning calls: the data module's where that has one of its own."""
    datamodule = getattr(trainer, "datamodule", None)
    return pl_module if datamodule is None or not is_overridden(name, datamodule) else datamodule


@of_both_libraries
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
        own = isinstance(self._logger, (*counterparts(CSVLogger), *counterparts(TensorBoardLogger)))
        return self._logger.log_dir if own else self._logger.save_dir  # type: ignore[no-any-return]

    @property
    def log_dir(self) -> str | None:
        return getattr(self._logger, "log_dir", None)

    @property
    def root_dir(self) -> str | None:
        return getattr(self._logger, "root_dir", None)


def compiler_off() -> AbstractContextManager[Any]:
    """Compiled modules run eagerly: every trial has other shapes, and torch gives up compiling after a few.

    Where the compiler was never loaded, nothing is compiled, and it is not loaded for this.
    """
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()


@contextmanager
def loggers_silenced(trainer: pl.Trainer) -> Iterator[None]:
    """No row in the user's loggers and profiler."""
    quiet = [_QuietLogger(logger) for logger in trainer.loggers]
    with attributes_replaced(trainer, _loggers=quiet, profiler=PassThroughProfiler()):
        yield


def run_step(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    step: str,
    batch: LoadedBatch,
    *,
    autocast: bool = False,
    begin: bool = True,
) -> Ran:
    """Runs one step of the module by itself, with nothing logged. Takes what `ready_to_run` takes."""
    with ready_to_run(trainer, pl_module, step, batch, autocast=autocast, begin=begin) as run:
        return run()


@contextmanager
def ready_to_run(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    step: str,
    batch: LoadedBatch,
    *,
    autocast: bool = False,
    begin: bool = True,
) -> Iterator[Callable[[], Ran]]:
    """Makes one step of the module ready to be run by itself, with nothing logged.

    The mode (`train()`, `eval()`, gradients) is the caller's choice. What the step changes on the module stays changed:
    wrap it in `untouched` and `isolated_rng`. Steps may need what the module's hooks make at the start of an epoch, so
    these are called first: validation's, and training's as long as this fit has trained on no batch.

    Args:
        trainer: The trainer in charge.
        pl_module: Its module.
        step: `"validation_step"`, `"training_step"` or `"predict_step"`.
        batch: A batch that is on the device already, see `transfer`. Its index is left out where the step takes none,
            its loader's where Lightning would leave it out.
        autocast: Whether mixed precision applies. Precisions that change the module itself (`"bf16-true"`) always do.
        begin: Whether to call those hooks.

    Yields:
        Runs it: what the step returns, and what it logs.

    Raises:
        ValueError: `step` is none of these.
    """
    stage = _stage(trainer, step)
    function = getattr(pl_module, step)
    arguments = _arguments(trainer, function, step, batch)

    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        logged[name] = value

    def log_dict(dictionary: Any, *_: Any, **__: Any) -> None:
        logged.update(dictionary.items())

    plugin = trainer.precision_plugin
    with ExitStack() as stack:
        stack.enter_context(attributes_replaced(trainer.state, stage=stage))
        stack.enter_context(loggers_silenced(trainer))
        stack.enter_context(attributes_replaced(pl_module, log=log, log_dict=log_dict, _current_fx_name=step))
        stack.enter_context(compiler_off())
        if autocast or not isinstance(plugin, counterparts(MixedPrecision)):
            stack.enter_context(plugin.train_step_context() if step == "training_step" else plugin.val_step_context())
        if begin and step == "validation_step":
            pl_module.on_validation_start()
            pl_module.on_validation_epoch_start()
        elif begin and step == "training_step" and not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            pl_module.on_train_epoch_start()
        yield lambda: Ran(function(*arguments), logged)
    a_batch_is_done()


def _arguments(trainer: pl.Trainer, function: Callable[..., Any], step: str, batch: LoadedBatch) -> tuple[Any, ...]:
    """What Lightning would call the step with."""
    if is_param_in_hook_signature(function, "dataloader_iter", explicit=True):
        return (iter([tuple(batch)]),)
    arguments: tuple[Any, ...] = (batch.data,)
    if is_param_in_hook_signature(function, "batch_idx", min_args=2):
        arguments = (*arguments, batch.batch_idx)
    if step == "validation_step" and _passes_dataloader_idx(trainer, function):
        arguments = (*arguments, batch.dataloader_idx)
    return arguments


def _passes_dataloader_idx(trainer: pl.Trainer, function: Callable[..., Any]) -> bool:
    combined = validation_loop(trainer)._combined_loader
    if combined is None:  # not set up yet; a step that has the argument may have it without a default
        return is_param_in_hook_signature(function, "dataloader_idx")
    return combined._mode == "sequential" and len(combined.flattened) > 1


def validation_loop(trainer: pl.Trainer) -> _EvaluationLoop:
    """The loop that validates now: that of a fit, or that of `Trainer.validate`."""
    return trainer.validate_loop if trainer.state.fn == TrainerFn.VALIDATING else trainer.fit_loop.epoch_loop.val_loop
