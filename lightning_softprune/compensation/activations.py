"""The pointwise function that follows a layer, found by watching who reads the layer's outputs.

A BatchNorm in between, which in eval mode is a scale and a shift of each output, is part of it. So is a sum with
something else, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_softprune.graph import parts_called
from lightning_softprune.utilities.hooks import registered
from lightning_softprune.utilities.nested import tensors_in

_IN_PLACE_TOO = ("relu", "leaky_relu", "elu", "celu", "selu", "hardtanh", "sigmoid", "tanh")

_OTHERS = ("relu6", "gelu", "silu", "mish", "softplus", "hardswish", "hardsigmoid", "logsigmoid", "softsign")

SUMS = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__"])

POINTWISE = frozenset([*_IN_PLACE_TOO, *(f"{name}_" for name in _IN_PLACE_TOO), *_OTHERS])
"""Names of the functions that are followed, in whatever form they are called."""


@dataclass(frozen=True)
class FollowingActivation:
    """What becomes of a layer's outputs: ``function(scale * (y + added) + shift)``.

    Attributes:
        function: Pointwise; may change what it is given.
        scale: One per output, or ``None`` for the outputs as they are.
        shift: The same.
        is_summed: Whether the model adds something to the outputs.
        added: What that is, at the scale of the outputs, shape ``(observations, outputs)``.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    is_summed: bool = False
    added: torch.Tensor | None = None

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs of shape ``(observations, outputs)``, in their precision."""
        given = outputs
        if self.added is not None:
            outputs = outputs + self.added.to(outputs)
        if self.scale is not None and self.shift is not None:
            outputs = torch.addcmul(self.shift.to(outputs), outputs, self.scale.to(outputs))
        return self.function(outputs.clone() if outputs is given else outputs)

    def settled(self, outputs: torch.Tensor) -> FollowingActivation:
        """The same for outputs of this precision and on this device, with as little to do as can be each time."""
        scale, shift, added = (None if part is None else part.to(outputs) for part in self._parts())
        if added is not None and scale is not None and shift is not None:
            shift, added = torch.addcmul(shift, added, scale), None
        return replace(self, scale=scale, shift=shift, added=added)

    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.scale, self.shift, self.added

    def of(self, outputs: slice | torch.Tensor) -> FollowingActivation:
        """The same for some of the outputs."""
        places = outputs.cpu() if isinstance(outputs, torch.Tensor) else outputs
        scale, shift, added = (None if part is None else part[..., places] for part in self._parts())
        return replace(self, scale=scale, shift=shift, added=added)

    def at(self, observations: slice) -> FollowingActivation:
        """The same for some of the observations."""
        return self if self.added is None else replace(self, added=self.added[observations])


def find_following_activations(
    model: nn.Module, names: Sequence[str], step: Callable[[], Any]
) -> dict[str, FollowingActivation]:
    """The pointwise function that follows each layer; layers whose output anything else reads are left out.

    Args:
        model: The model.
        names: The layers.
        step: Runs the model once.
    """
    consumers = _Consumers()
    layers = {name: model.get_submodule(name) for name in names}
    hooks = (
        layer.register_forward_hook(lambda _, __, out, name=name: consumers.watch(name, out))
        for name, layer in layers.items()
    )
    with parts_called(model), registered(hooks), consumers, torch.no_grad():
        step()
    return {name: found for name, (found, *more) in consumers.found.items() if found is not None and not more}


class _Consumers(TorchFunctionMode):
    """Notes which functions read the watched tensors; ``None`` for one that is not pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[FollowingActivation | None]] = {}
        self.watched: list[tuple[torch.Tensor, str, FollowingActivation]] = []

    def watch(self, name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.watched.append((output, name, FollowingActivation(_nothing)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, (torch.Tensor, tuple, list)):  # not: a look at its shape
            read = {id(tensor) for tensor in tensors_in((args, kwargs))}
            normed: list[tuple[torch.Tensor, str, FollowingActivation]] = []
            for output, name, so_far in self.watched:
                if id(output) not in read:
                    continue
                after = _passed(func, output, args, kwargs, so_far)
                if after is not None and isinstance(result, torch.Tensor):
                    normed.append((result, name, after))
                else:
                    self.found.setdefault(name, []).append(_following(func, output, args, kwargs, so_far))
            self.watched = [one for one in self.watched if one[0] is not result] + normed  # changed in place: gone
        return result


def _nothing(outputs: torch.Tensor) -> torch.Tensor:
    return outputs


def _following(
    func: Any, output: torch.Tensor, args: Any, kwargs: Any, so_far: FollowingActivation
) -> FollowingActivation | None:
    alone = len(tensors_in((args, kwargs))) == 1 and bool(args) and args[0] is output
    if not alone or getattr(func, "__name__", "") not in POINTWISE:
        return None
    return replace(so_far, function=lambda values: func(values, *args[1:], **kwargs))


def addend_of(func: Any, output: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What is added to the outputs index by index; ``None`` if this is no such sum."""
    if getattr(func, "__name__", "") not in SUMS or len(args) != 2 or kwargs:
        return None
    others = [value for value in args if value is not output]
    if len(others) != 1 or not isinstance(others[0], torch.Tensor) or others[0].shape != output.shape:
        return None
    addend = others[0].detach()
    return addend.clone() if args[0] is others[0] else addend  # the sum may be written into it


Affine = tuple[torch.Tensor, torch.Tensor]


def scale_and_shift(func: Any, output: torch.Tensor, args: Any, kwargs: Any) -> Affine | None:
    """What a BatchNorm in eval mode makes of each of the outputs; ``None`` if the function is anything else."""
    if func is not F.batch_norm:
        return None
    given = inspect.signature(F.batch_norm).bind(*args, **kwargs)
    given.apply_defaults()
    norm = given.arguments
    if norm["training"] or norm["running_mean"] is None or norm["input"] is not output:
        return None
    scale = (norm["running_var"].detach().double() + norm["eps"]).rsqrt()
    if norm["weight"] is not None:
        scale = scale * norm["weight"].detach()
    shift = -scale * norm["running_mean"].detach()
    if norm["bias"] is not None:
        shift = shift + norm["bias"].detach()
    return scale, shift


def _passed(
    func: Any, output: torch.Tensor, args: Any, kwargs: Any, so_far: FollowingActivation
) -> FollowingActivation | None:
    """What the outputs are behind a BatchNorm in eval mode or their first sum; ``None`` behind anything else."""
    if not so_far.is_summed and addend_of(func, output, args, kwargs) is not None:
        return replace(so_far, is_summed=True)
    found = scale_and_shift(func, output, args, kwargs)
    if found is None:
        return None
    scale, shift = found
    if so_far.scale is not None and so_far.shift is not None:
        scale, shift = scale * so_far.scale, scale * so_far.shift + shift
    return replace(so_far, scale=scale, shift=shift)
