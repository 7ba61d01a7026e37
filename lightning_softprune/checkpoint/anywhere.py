"""Pruned modules in files of anybody's own format: their record, and loading that resizes first.

A *record* says in plain types what shape a pruned module has; it can stand beside weights in any format. Where another
library builds a module and loads its weights in one call, :func:`resizing` steps in between the two.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_softprune.checkpoint.asking import asked, asking, patched
from lightning_softprune.checkpoint.load import resizing_class
from lightning_softprune.checkpoint.parts import form_of_part
from lightning_softprune.checkpoint.reading import read_record, tensor_shapes
from lightning_softprune.checkpoint.record import SaveHook, save_hook
from lightning_softprune.checkpoint.resize_plan import plan_resize, resize_together
from lightning_softprune.checkpoint.shapes import RECORD, ModelShapes
from lightning_softprune.utilities.libraries import counterparts


def record(module: nn.Module) -> dict[str, Any]:
    """The record of a module, to keep beside weights in a format of one's own; `resize(module, record)` reads it back.

    It is what the checkpoints of a pruned LightningModule hold. A part of one (a network that is saved by itself), and
    a module that was never pruned, have a record too: it tells the shape, and knows of no rounds.

    Args:
        module: Any module.

    Returns:
        The record in plain types (JSON takes them), and pruned tensors that the module's `state_dict` has not; it is a
        copy.

    >>> record(nn.Linear(4, 3))["shapes"]
    {'weight': [3, 4], 'bias': [3]}
    """
    hook = save_hook(module)
    if hook is None:
        hook = SaveHook(cast(pl.LightningModule, module), form_of_part(module), [])
    silent = copy.copy(hook)
    silent.before = lambda _: None  # nobody saves a checkpoint: the module's own hook is not called
    checkpoint: dict[str, Any] = {}
    silent(checkpoint)
    found: dict[str, Any] = copy.deepcopy(checkpoint[RECORD])
    return found


@contextmanager
def resizing(record: Mapping[str, Any] | None = None) -> Iterator[None]:
    """While this lasts, modules take the shape of the weights that they are given to load.

    It works inside of other libraries' own functions, as far as they end in `load_state_dict`; with Lightning's
    `load_from_checkpoint` the record in the file counts too. The `from_pretrained` of transformers (which has to be
    imported by then) compares sizes by itself: it builds the model in the shape of the record. What other threads load
    is not resized. Optimizers have to be built afterwards.

    Args:
        record: The record of the module that is loaded, for what shapes do not tell (heads of attention). It is used
            where a module is given weights of the shapes that are in it. ``None``: shapes have to do.

    Raises:
        ValueError: The record is damaged; the message names the field. Or, from within the block, the weights are not
            of the module's architecture; the message names the module. See :func:`resize`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pruned = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).state_dict()
    >>> with resizing():
    ...     model.load_state_dict(pruned)
    <All keys matched successfully>
    """
    if record is not None:
        read_record(record, {})
    with ExitStack() as stack:
        for lightning_module in counterparts(pl.LightningModule):
            stack.enter_context(resizing_class(lightning_module))
        stack.enter_context(patched([nn.Module], "load_state_dict", _resizing_first))
        stack.enter_context(patched(_pretrained(), "_load_pretrained_model", _built_first))
        stack.enter_context(patched(_pretrained(), "_initialize_missing_keys", _initialized_as_built))
        stack.enter_context(asking(records=record))
        yield


def _pretrained() -> list[type]:
    """The class whose `from_pretrained` loads weights, if transformers was imported."""
    found = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    return [found] if isinstance(found, type) else []


def _built_first(original: staticmethod[..., Any]) -> Any:
    """Of transformers: what fills a model, which was built from its configuration, with the weights in files."""

    @functools.wraps(original.__func__)
    def load(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _resize_as_recorded(model)
        return original.__func__(model, *args, **kwargs)

    return staticmethod(load)


def _initialized_as_built(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of transformers: what computes the buffers that no file has, from the configuration, and so in its shapes."""

    @functools.wraps(original)
    def initialize(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        pruned: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for name, (shape, value) in _AS_BUILT.pop(self, {}).items():
            path, _, attribute = name.rpartition(".")
            module = self.get_submodule(path)
            if (buffer := module._buffers.get(attribute)) is not None:
                pruned.append((module._buffers, attribute, value.to(buffer, copy=True)))
                module._buffers[attribute] = buffer if shape is None else buffer.new_empty(shape)
            elif isinstance(kept := vars(module).get(attribute), torch.Tensor) and kept.is_meta:
                device = next((tensor.device for tensor in self.parameters()), value.device)
                pruned.append((vars(module), attribute, value.to(device, copy=True)))
        try:
            return original(self, *args, **kwargs)
        finally:
            for held, attribute, value in pruned:
                held[attribute] = value

    return initialize


_AS_BUILT: WeakKeyDictionary[nn.Module, dict[str, tuple[torch.Size | None, torch.Tensor]]] = WeakKeyDictionary()
"""Models that are being loaded -> pruned tensors of no state dict: a buffer's shape before, and the values."""


def _resize_as_recorded(model: nn.Module) -> None:
    """Give a model the shape of the innermost record that names its tensors; the files are read later."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for given in reversed(asked().records):
        if given is not None and names <= (form := ModelShapes.from_dict(given)).shapes.keys():
            built = {name: buffer.shape for name, buffer in model.named_buffers(remove_duplicate=False)}
            resize_together([plan_resize(model, given, strict=True)])
            _AS_BUILT[model] = {name: (built.get(name), value) for name, value in form.unsaved.items()}
            return


def _resizing_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        problem = _resize_for(self, state_dict) if asked().records else None
        try:
            return original(self, state_dict, *args, **kwargs)
        except RuntimeError as error:
            if problem is None:
                raise
            raise problem from error  # tensors do not fit: why the module was not resized says more

    return load_state_dict


def _resize_for(module: nn.Module, state: Mapping[str, Any]) -> ValueError | None:
    """Resize a module for a state dict; or say why it was not.

    It may fit all the same: modules can change what they are given before they load it (older names, a larger
    vocabulary).
    """
    shapes = tensor_shapes(state)
    if not shapes:
        return None
    source: Mapping[str, Any] = state
    for given in reversed(asked().records):
        if given is not None and shapes.items() <= ModelShapes.from_dict(given).shapes.items():
            source = {"state_dict": state, RECORD: given}
            break
    try:
        resize_together([plan_resize(module, source, strict=False)])
    except ValueError as error:
        return error
    return None
