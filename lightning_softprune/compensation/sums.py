"""Residual sums: what a model adds to a layer's outputs, found by watching who reads them.

Where the outputs ``y`` are read by nothing but a sum ``r + y``, the sum is what the rest of the model sees. An error
that earlier layers left in ``r`` can then be made up for by ``y``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_softprune.utilities.hooks import registered
from lightning_softprune.utilities.nested import tensors_in

_SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__")

See = Callable[[str, torch.Tensor | None], None]


@contextmanager
def watch_sums(model: nn.Module, names: Sequence[str], see: See) -> Iterator[None]:
    """Call ``see(name, addend)`` for each function that reads outputs of the named layers in this block.

    The addend is what is added to the outputs, of their shape; ``None`` where they are read by anything but such a sum.
    """
    readers = _Readers(see)
    layers = {name: model.get_submodule(name) for name in names}
    hooks = (
        layer.register_forward_hook(lambda _, __, out, name=name: readers.watch(name, out))
        for name, layer in layers.items()
    )
    with registered(hooks), readers:
        yield


class _Readers(TorchFunctionMode):
    """Tells of the functions that read the watched tensors."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self.see = see
        self.watched: list[tuple[torch.Tensor, str]] = []

    def watch(self, name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.watched = [one for one in self.watched if one[1] != name] + [(output, name)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.watched:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        read = [(output, name) for output, name in self.watched if any(output is tensor for tensor in given)]
        addends = [_addend(func, output, args, kwargs) for output, _ in read]
        result = func(*args, **kwargs)
        idle = isinstance(result, torch.Tensor) and _is_idle_dropout(func, args, kwargs)
        if idle:
            self.watched += [(result, name) for output, name in read if output is not result]
        elif isinstance(result, (torch.Tensor, tuple, list)):  # not: a look at its shape
            for (_, name), addend in zip(read, addends, strict=True):
                self.see(name, addend)
        return result


def _addend(func: Any, output: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What is added to the outputs index by index; ``None`` if this is no such sum."""
    if getattr(func, "__name__", "") not in _SUMS or len(args) != 2 or kwargs:
        return None
    others = [value for value in args if value is not output]
    if len(others) != 1 or not isinstance(others[0], torch.Tensor) or others[0].shape != output.shape:
        return None
    return others[0].detach().clone()  # the sum may be written into it


def _is_idle_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    if getattr(func, "__name__", "") != "dropout":
        return False
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return training is False
