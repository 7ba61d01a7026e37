"""Steps that are run again and again, each time a little further: what their layers computed before is kept.

The refit runs each calibration step once per reader, and nothing that runs before a reader has changed since the last
time. So the outputs of layers are kept, and given out again in place of a computation. The user's code runs as it does
without, with its hooks; only those layers of PyTorch's own are spared that have weights and no parts, since they depend
on nothing else. An output is computed again where the layer's weights have changed since, where it is given something
else than the last time (a few elements tell), or where its place in the step is another layer's now: then all that came
later in the step is forgotten too. Results of functions between layers are not kept: memory that is new to the process
takes longer to get than they take to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import getattr_static
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import nn

from lightning_softprune.graph import tensor_at

_ALONG = 5
"""Elements of an input that are compared, along each dimension."""

_BY_SAMPLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""What computes each sample by itself: the output for a batch has the shape of that for one, but for the length."""


@dataclass
class _Kept:
    """What a layer computed, and what of.

    Attributes:
        layer: The layer.
        weights: Its parameters and buffers, as of then.
        shape: Of its input.
        some: A few elements of its input.
        output: What it computed.
        version: Of the output: in-place functions raise it.
        is_copied: Whether it is copied whenever it is given out, since the model changes it in place.
    """

    layer: nn.Module
    weights: list[tuple[int, int]]
    shape: torch.Size
    some: torch.Tensor
    output: torch.Tensor
    version: int
    is_copied: bool

    def is_of(self, layer: nn.Module, source: torch.Tensor) -> bool:
        """Whether the layer would compute the same now."""
        same = self.layer is layer and self.shape == source.shape and self.weights == _weights(layer)
        return same and self.some.dtype == source.dtype and torch.equal(self.some, _some(source))


class Replay:
    """Keeps what layers compute in several steps.

    Args:
        model: The model; layers in training mode are computed each time.
        budget: Bytes that outputs may take; those for which there is no room are computed each time. `None`: no limit.
    """

    def __init__(self, model: nn.Module, budget: float | None = None) -> None:
        self.layers = [layer for layer in model.modules() if _is_known(layer)]
        self.left = float("inf") if budget is None else budget
        self._steps: dict[int, dict[int, _Kept]] = {}
        self._known: dict[int, _Kept] | None = None
        self._place = 0
        self._changed: set[int] = set()  # places of outputs that the model changes in place, in whatever step
        self._spared: nn.Module | None = None
        self._stand_ins: list[torch.Tensor] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """While this lasts, a step of this number is run, always in the same way."""
        known = self._steps.setdefault(number, {})
        self._known, self._place, self._spared, self._stand_ins = known, 0, None, []
        try:
            for layer in self.layers:
                vars(layer)["forward"] = self._replacing(layer)
            yield
        finally:
            self._known = None
            self._changed.update(place for place, kept in known.items() if kept.output._version != kept.version)
            for layer in self.layers:
                vars(layer).pop("forward", None)

    def stop(self) -> None:
        """What follows in this step will be something else the next time: it is forgotten, and not kept."""
        if self._known is not None:
            self._forget_from(self._known, self._place)
        self._known = None

    def spare(self, layer: nn.Module) -> None:
        """The layer, which is about to run, need not compute: what follows in this step does not depend on its output.

        It gives out zeros, if it is a layer of PyTorch's own that computes each sample by itself.
        """
        if isinstance(layer, _BY_SAMPLE) and "forward" in vars(layer):
            self._spared = layer
        else:
            self.stop()

    def _replacing(self, layer: nn.Module) -> Callable[..., Any]:
        own = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            source = args[0] if args else next(iter(kwargs.values()), None)
            spared = self._spared is layer
            if spared:
                self._spared = None
            if layer.training or not _is_plain(source) or (self._known is None and not spared):
                return own(*args, **kwargs)
            known, place = self._known, self._place
            self._place += 1
            if spared and _is_batched(layer, source):
                self._stand_ins.append(self._stand_in(own, source))
                return self._stand_ins[-1]
            if known is None:
                return own(*args, **kwargs)
            if any(source is stand_in for stand_in in self._stand_ins):
                self._stand_ins.append(own(*args, **kwargs))
                return self._stand_ins[-1]
            with torch._C.DisableTorchFunction():  # modes that watch the model have no business here
                kept = known.get(place)
                same = kept is not None and kept.is_of(layer, source)
                unchanged = same and kept is not None and kept.output._version == kept.version
            if kept is not None and unchanged:
                return kept.output.clone() if kept.is_copied else kept.output
            if kept is not None and not same:
                self._forget_from(known, place)
            output = own(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                self._keep(known, place, (layer, source, output), changes=same or place in self._changed)
            return output

        return forward

    def _stand_in(self, own: Callable[..., Any], source: torch.Tensor) -> torch.Tensor:
        """Zeros of the shape that a layer's output would have."""
        with torch._C.DisableTorchFunction():
            one: torch.Tensor = own(source[:1])
            return one.new_zeros(len(source), *one.shape[1:])

    def _keep(
        self, known: dict[int, _Kept], place: int, call: tuple[nn.Module, torch.Tensor, Any], *, changes: bool
    ) -> None:
        """Keep an output, if there is room; a copy, if the last one was changed in place."""
        layer, source, output = call
        old = known.pop(place, None)
        self.left += 0 if old is None else _size(old.output)
        if not _is_plain(output) or output.requires_grad or _size(output) > self.left:
            return
        self.left -= _size(output)
        kept = output.clone() if changes else output
        known[place] = _Kept(layer, _weights(layer), source.shape, _some(source), kept, kept._version, changes)

    def _forget_from(self, known: dict[int, _Kept], place: int) -> None:
        for later in [one for one in known if one >= place]:
            self.left += _size(known.pop(later).output)


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer computes by PyTorch's own code, from its weights and its input alone, and changes nothing."""
    forward = getattr_static(layer, "forward", None)  # TorchScript's cannot be asked for on the class
    own = isinstance(forward, FunctionType) and str(forward.__module__).startswith("torch.nn.modules.")
    own = own and "forward" not in vars(layer)
    weights = [*layer._parameters.values(), *layer._buffers.values()]
    return own and not layer._modules and any(one is not None for one in weights)


def _is_plain(value: Any) -> TypeGuard[torch.Tensor]:
    return type(value) is torch.Tensor and value.layout is torch.strided and not value.is_inference()


def _is_batched(layer: nn.Module, source: torch.Tensor) -> bool:
    weight = tensor_at(layer, "weight")  # no parameter where a hook computes it, as of weight norm
    return weight is not None and source.ndim >= weight.ndim


def _weights(layer: nn.Module) -> list[tuple[int, int]]:
    weights = (one for held in (layer._parameters, layer._buffers) for one in held.values() if one is not None)
    return [(id(one), -1 if one.is_inference() else one._version) for one in weights]


def _some(source: torch.Tensor) -> torch.Tensor:
    every: Any = tuple(slice(None, None, max(size // _ALONG, 1)) for size in source.shape)
    return source.detach()[every].clone()


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
