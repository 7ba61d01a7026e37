"""Residual sums: what a model adds to a layer's outputs, found by watching who reads them.

Where the outputs ``y`` are read by nothing but a sum ``r + y``, the sum is what the rest of the model sees. An error
that earlier layers left in ``r`` can then be made up for by ``y``. A BatchNorm in between, which in eval mode makes
``s y + t`` of them, is looked through: to the outputs themselves ``r / s`` is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_softprune.compensation.activations import addend_of, scale_and_shift
from lightning_softprune.utilities.hooks import registered
from lightning_softprune.utilities.nested import tensors_in

LEAST_SCALE = 1e-3
"""Where a BatchNorm makes an output vanish next to its others, nothing can be made up for: it is not looked through."""

See = Callable[[str, torch.Tensor | None], None]


@contextmanager
def watch_sums(model: nn.Module, names: Sequence[str], see: See) -> Iterator[None]:
    """Call ``see(name, addend)`` for each function that reads outputs of the named layers in this block.

    The addend is what is added to the outputs, of their shape and, where a BatchNorm follows, at their scale; ``None``
    where they are read by anything but such a sum.
    """
    readers = _Readers(see)
    layers = {name: model.get_submodule(name) for name in names}
    hooks = (
        layer.register_forward_hook(lambda _, __, out, name=name: readers.watch(name, out))
        for name, layer in layers.items()
    )
    with registered(hooks), readers if layers else nullcontext():  # a mode is asked about every function
        yield


@dataclass(frozen=True)
class _Watched:
    """A layer's outputs, or what a BatchNorm has made of them; the scale is one per channel, before further ones."""

    outputs: torch.Tensor
    name: str
    scale: torch.Tensor | None = None


class _Readers(TorchFunctionMode):
    """Tells of the functions that read the watched tensors."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self.see = see
        self.watched: list[_Watched] = []

    def watch(self, name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.watched = [one for one in self.watched if one.name != name] + [_Watched(output, name)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.watched:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        read = [one for one in self.watched if any(one.outputs is tensor for tensor in given)]
        addends = [addend_of(func, one.outputs, args, kwargs) for one in read]
        result = func(*args, **kwargs)
        for one, addend in zip(read, addends, strict=True):
            scale = _scale(func, one.outputs, args, kwargs)
            if isinstance(result, torch.Tensor) and scale is not None:
                if one.outputs is not result:
                    self.watched.append(_Watched(result, one.name, scale if one.scale is None else scale * one.scale))
            elif isinstance(result, (torch.Tensor, tuple, list)):  # not: a look at its shape
                self.see(one.name, addend if addend is None or one.scale is None else addend / one.scale)
        return result


def _scale(func: Any, outputs: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What multiplies the outputs, if the function does nothing else with them but add a constant."""
    if _is_idle_dropout(func, args, kwargs):
        return outputs.new_ones(())
    found = scale_and_shift(func, outputs, args, kwargs)
    if found is None or not bool(found[0].abs().min() > LEAST_SCALE * found[0].abs().max()):
        return None
    return found[0].to(outputs).reshape(-1, *[1] * (outputs.ndim - 2))


def _is_idle_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    if getattr(func, "__name__", "") != "dropout":
        return False
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return training is False
