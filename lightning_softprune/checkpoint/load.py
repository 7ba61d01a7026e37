"""Modules that take the shape of the checkpoint they load, with a trainer and without."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_softprune.checkpoint.asking import asked, asking, patched
from lightning_softprune.checkpoint.record import InstanceHook, is_marked
from lightning_softprune.checkpoint.resize_plan import plan_resize, resize_together
from lightning_softprune.checkpoint.shapes import RECORD, ModelShapes, tensor_sites
from lightning_softprune.graph import Shape
from lightning_softprune.utilities.libraries import counterparts, in_both_libraries

Module = TypeVar("Module", bound=pl.LightningModule)


class LoadHook(InstanceHook):
    """A module's `on_load_checkpoint` while a checkpoint may come: takes the file's shape, then calls the user's own.

    Attributes:
        record: The record of the checkpoint that came, if it had one.

    Args:
        module: The module; the hook is an attribute of the instance until :meth:`remove`.
        copies: Lists the module's averaged copies, which take the same shape.
    """

    name = "on_load_checkpoint"

    def __init__(self, module: pl.LightningModule, copies: Callable[[], Iterable[nn.Module]] = tuple) -> None:
        self.module, self.copies = module, copies
        self.record: dict[str, Any] | None = None
        before = module.__dict__.get(self.name)
        self.before: Callable[[dict[str, Any]], None] | None
        self.before = before.before if isinstance(before, LoadHook) else before
        module.__dict__[self.name] = self

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Resize, and call what was there before."""
        self.record = None
        own = partial(self.call_before, checkpoint)
        if RECORD in checkpoint:
            _resize_around(self.module, checkpoint, own, self.copies())
            self.record = checkpoint[RECORD]
            return
        _resize_around(self.module, checkpoint, own)
        for averaged in self.copies():
            with suppress(ValueError):  # as for the module, which has passed
                resize_together([plan_resize(averaged, checkpoint, strict=False)])


def _resize_around(
    module: pl.LightningModule,
    checkpoint: dict[str, Any],
    own: Callable[[], None],
    copies: Iterable[nn.Module] = (),
) -> None:
    """Resize the module and its copies, all or none; then call the user's own hook.

    Where there is no record, the user's hook may be what makes a checkpoint fit (an older class's names, a larger
    vocabulary): it has its turn before anything is refused.
    """
    problem: ValueError | None = None
    before = ModelShapes.of(module).shapes
    try:
        resize_together([plan_resize(model, checkpoint, strict=False) for model in (module, *copies)])
    except ValueError as error:
        if RECORD in checkpoint:
            raise
        problem = error
    own()
    if problem is not None:
        shapes = ModelShapes.of(module).shapes
        for name, value in checkpoint.get("state_dict", {}).items():
            if isinstance(value, torch.Tensor) and shapes.get(name, tuple(value.shape)) != tuple(value.shape):
                raise problem
    _warn_of_missing_values(module, before, checkpoint)


def _warn_of_missing_values(
    module: pl.LightningModule, before: Mapping[str, Shape], checkpoint: Mapping[str, Any]
) -> None:
    """Name parameters that have another shape than before, and no values in the checkpoint: they are made up.

    That of a state dict with names of its own, which the module translates when it loads it, nobody knows.
    """
    state, record = checkpoint.get("state_dict", {}), checkpoint.get(RECORD, {})
    sites = list(tensor_sites(module))
    if not isinstance(state, Mapping) or not state or not {site.name for site in sites}.issuperset(state):
        return
    valued = {id(site.tensor) for site in sites if site.name in state or site.name in record.get("left_out", ())}
    missing = [
        site.name
        for site in sites
        if site.is_parameter
        and not site.lazy
        and id(site.tensor) not in valued
        and tuple(site.tensor.shape) != before.get(site.name)
    ]
    if missing:
        rank_zero_warn(
            f"SoftPruning: {', '.join(missing[:8])}: the checkpoint has no values of these, and they have another "
            "shape there than in this module; load their values too, or this is another network"
        )


_Hook = Callable[[Any, dict[str, Any]], None]


def _resize_once(module: Any, checkpoint: dict[str, Any], original: _Hook) -> None:
    """Resize a module and call its own hook, which may call those of its base classes and of its parts."""
    if asked().is_loading(module, checkpoint):
        original(module, checkpoint)
        return
    with asking(loading=(module, checkpoint)):
        _resize_around(module, checkpoint, lambda: original(module, checkpoint))


def _resizing_where_asked(original: _Hook) -> _Hook:
    @functools.wraps(original)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        if isinstance(self, asked().classes):
            _resize_once(self, checkpoint, original)
        else:
            original(self, checkpoint)

    return on_load_checkpoint


@contextmanager
def resizing_class(module_class: type[pl.LightningModule]) -> Iterator[None]:
    """While this lasts, modules of this class and of its subclasses take the shape of the checkpoint they load.

    Lightning builds the module and loads its weights in one call; between the two it calls the module's
    `on_load_checkpoint`, and which subclass it builds may be written in the checkpoint. What other threads load is not
    resized.

    Args:
        module_class: The LightningModule's class.
    """
    classes = [module_class]
    for cls in classes:
        classes += [sub for sub in cls.__subclasses__() if sub not in classes]
    owners = {next(base for base in cls.__mro__ if LoadHook.name in vars(base)) for cls in classes}
    with asking(classes=module_class), patched(owners, LoadHook.name, _resizing_where_asked):
        yield


# ------------------------------------------------------------------------------------------ loaded by somebody else

_ADVICE = "this checkpoint was pruned by SoftPruning: add the callback, use load_from_checkpoint or resizing()"


def _explain_misfits(module_class: type[pl.LightningModule]) -> None:
    """Let modules say what to do where the weights of a pruned one do not fit; else they load as ever.

    Without the callback nobody else is asked: Lightning builds the dense module, and PyTorch compares sizes.
    """

    @functools.wraps(nn.Module.load_state_dict)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super(module_class, self).load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            if is_marked(state_dict):
                raise RuntimeError(f"{_ADVICE} (of lightning_softprune)\n{error}") from error
            raise

    if "load_state_dict" not in vars(module_class):
        module_class.load_state_dict = load_state_dict  # type: ignore[method-assign]


in_both_libraries(pl.LightningModule, _explain_misfits)


_FOREIGN = (AttributeError, KeyError, TypeError)

_DAMAGED = (EOFError, OSError, RuntimeError, UnpicklingError, struct.error)


@contextmanager
def _naming(path: Any) -> Iterator[None]:
    """Say so if a file is not a Lightning checkpoint; Lightning stumbles over a missing key or over its bytes."""
    try:
        yield
    except (*_FOREIGN, *_DAMAGED) as error:
        if isinstance(path, (str, Path)) and Path(path).is_file():
            content: Any = None
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except UnpicklingError as unpickling:
                if "GLOBAL" in str(unpickling):  # a whole file with other objects in it: the error above says which
                    raise error from None
            except Exception:  # whatever a damaged file raises
                raise ValueError(f"{path}: this file cannot be read as a checkpoint ({error})") from error
            keys = content.keys() if isinstance(content, Mapping) else set()
            if not {"state_dict", "pytorch-lightning_version"} <= keys:
                raise ValueError(f"{path}: this file is not a Lightning checkpoint") from error
        raise


def load_from_checkpoint(module_class: type[Module], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Module:
    """Load a module from a checkpoint, pruned or dense: no trainer and no callback are needed.

    Args:
        module_class: The LightningModule's class.
        checkpoint_path: Path, URL or file object.
        args: See `LightningModule.load_from_checkpoint`.
        kwargs: As there: `map_location`, `hparams_file`, `strict`, `weights_only`, and hyperparameters to override.

    Returns:
        The module, in the checkpoint's shape, with its weights.

    Raises:
        ValueError: The file is no Lightning checkpoint, or does not fit the class; the message names the file or the
            module.
    """
    with resizing_class(module_class), _naming(checkpoint_path):
        return module_class.load_from_checkpoint(checkpoint_path, *args, **kwargs)


def _resizing_hook(original: _Hook) -> _Hook:
    """A module's `on_load_checkpoint` after the module has taken the checkpoint's shape."""

    @functools.wraps(original)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        _refuse_to_train_on(self, checkpoint)
        _resize_once(self, checkpoint, original)

    return on_load_checkpoint


def _refuse_to_train_on(module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a fit from a pruned checkpoint whose optimizers only the callback brings into order.

    Raises:
        ValueError: There are biases in it that the class does not make, and the module has not its shape.
    """
    record = checkpoint.get(RECORD)
    if not isinstance(record, Mapping) or not record.get("created_biases"):
        return
    try:
        fitting = module.trainer.state.fn == TrainerFn.FITTING
    except RuntimeError:  # it has no trainer
        return
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if fitting and not names.issuperset(record["created_biases"]):
        raise ValueError(f"{_ADVICE} (to train on, the callback is needed: the optimizers have biases that it made)")


class PrunedCheckpointMixin:
    """Makes a LightningModule understand pruned checkpoints, with no callback.

    `load_from_checkpoint` gives a module of the checkpoint's shape, and so do the `validate`, `test` and `predict` of a
    Trainer with ``ckpt_path``. To be named first: ``class Net(PrunedCheckpointMixin, LightningModule)``. The arguments
    stay the same.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A hook of the subclass's own comes after the module has its shape."""
        super().__init_subclass__(**kwargs)
        if LoadHook.name in vars(cls):
            setattr(cls, LoadHook.name, _resizing_hook(vars(cls)[LoadHook.name]))

    @_resizing_hook
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called by Lightning before weights are loaded."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a module from a checkpoint, pruned or dense; see `LightningModule.load_from_checkpoint`."""
        if not issubclass(cls, counterparts(pl.LightningModule)):
            raise TypeError(f"{cls.__name__} is not a LightningModule")
        with _naming(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[misc]
