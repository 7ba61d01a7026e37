"""What one run of a model computes, in a few numbers per layer, so that two runs can be compared.

A *fingerprint* of a tensor changes with the order of its elements; a *sum* does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from lightning_softprune.graph import Layout, layout_of
from lightning_softprune.utilities.hooks import forward_hook, registered
from lightning_softprune.utilities.nested import is_transformed, tensors_in


@dataclass
class Seen:
    """What one run computes.

    Attributes:
        layers: Fingerprint and scale of the outputs of layers that mix channels, call by call.
        sums: The same, blind to the order of the elements, for the outputs of all modules.
        shown: The same as for layers, for what the steps return and log.
    """

    layers: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    sums: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    shown: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def parts(self) -> tuple[tuple[dict[str, list[tuple[float, float]]], float], ...]:
        """Each with its tolerance."""
        return (self.layers, 1e-3), (self.shown, 1e-4), (self.sums, 1e-3)


_LITTLE = 30
"""A change by such a fraction of what is tolerated is much for one of the last digits alone."""


@dataclass
class Dense:
    """What the runs of a model compute before anything goes.

    Attributes:
        seen: What was computed.
        steady: For each of its parts, the names of what does not depend on random numbers.
    """

    seen: Seen
    steady: tuple[set[str], ...]
    _wavering: set[str] | None = field(default=None, init=False)

    def wavering(self, model: nn.Module, run: Callable[[], Any]) -> set[str]:
        """The modules whose outputs change by more than they may where parameters change by no more than rounding.

        That is so inside of a solver with steps of its own choice: what it computes at the end is the same.
        """
        if self._wavering is None:
            with _rounded_otherwise(model):
                other = look_at(model, run)
            pairs = zip(self.seen.parts(), other.parts(), strict=True)
            layers, _, sums = (
                {name for name in ours if not is_alike(ours[name], theirs.get(name, []), tolerance / _LITTLE)}
                for (ours, tolerance), (theirs, _) in pairs
            )
            self._wavering = layers | sums
        return self._wavering


@contextmanager
def _rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """While this lasts, parameters differ in their last digits; not those of half precision, where that is much."""
    found = [p for p in model.parameters() if not is_lazy(p) and p.dtype in (torch.float32, torch.float64)]
    values = [parameter.detach().clone() for parameter in found]
    try:
        with torch.no_grad():
            for number, parameter in enumerate(found):
                parameter.mul_(1 + (-1) ** number * 2 * torch.finfo(parameter.dtype).eps)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(found, values, strict=True):
                parameter.copy_(before)


def look_at_dense(model: nn.Module, run: Callable[[], Any], run_otherwise: Callable[[], Any] | None = None) -> Dense:
    """Run the model as it is; see `probe_groups`."""
    seen = look_at(model, run)
    other = seen if run_otherwise is None else look_at(model, run_otherwise)
    steady = (
        {name for name in ours if name in theirs and is_alike(ours[name], theirs[name], tolerance)}
        for (ours, tolerance), (theirs, _) in zip(seen.parts(), other.parts(), strict=True)
    )
    return Dense(seen, tuple(steady))


def look_at(model: nn.Module, run: Callable[[], Any]) -> Seen:
    """Run the model, and note what it computes."""
    seen = Seen()
    last: list[Any] = [None, None]

    def hook_for(name: str, mixes: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if mixes and isinstance(first, torch.Tensor) and first.is_floating_point() and _is_number(first):
                seen.layers.setdefault(name, []).append(_fingerprint(first))
            if output is not last[0]:  # a container that only hands on what its last part has made
                last[:] = output, [_sums(tensor) for tensor in tensors_in(output) if _is_number(tensor)]
            seen.sums.setdefault(name, []).extend(last[1])

        return hook

    def mixes(module: nn.Module) -> bool:
        return isinstance(layout := layout_of(module), Layout) and "out" in layout.slots

    hooks = (forward_hook(module, hook_for(name, mixes(module))) for name, module in model.named_modules())
    with registered(hooks), _indices_checked():
        result = run()
    for name, value in _named(result):
        seen.shown.setdefault(name, []).extend(_fingerprint(t) for t in _numbers(value))
    return seen


@contextmanager
def _indices_checked() -> Iterator[None]:
    """While this lasts, the one operator that writes beyond its memory where indices exceed a size raises instead.

    A size may be an attribute that is tried as a count of channels. Other operators look at their indices themselves.
    """
    original = torch._convert_indices_from_coo_to_csr

    def checked(input: torch.Tensor, size: int, **options: Any) -> torch.Tensor:
        if input.numel() and int(input.max()) >= size:
            raise IndexError(f"index {int(input.max())} is out of bounds for a size of {size}")
        return original(input, size, **options)

    torch._convert_indices_from_coo_to_csr = checked
    try:
        yield
    finally:
        torch._convert_indices_from_coo_to_csr = original


def _named(result: Any) -> Iterator[tuple[str, Any]]:
    """The parts of what a run returned, by name."""
    for part in result if isinstance(result, list) else [result]:
        if isinstance(part, dict) and all(isinstance(name, str) for name in part):
            yield from part.items()
        else:
            yield "what it returns", part


def _numbers(value: Any) -> list[torch.Tensor]:
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(float(value))]
    return [tensor for tensor in tensors_in(value) if _is_number(tensor)]


def _is_number(tensor: torch.Tensor) -> bool:
    if is_transformed(tensor) or tensor.is_nested or tensor.is_complex() or tensor.is_meta:
        return False
    return tensor.layout is torch.strided


def _coarseness(tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point():
        return 1.0
    return min(max(torch.finfo(tensor.dtype).eps / torch.finfo(torch.float32).eps, 1.0), 64.0)  # half precision


def _fingerprint(tensor: torch.Tensor) -> tuple[float, float]:
    """A sum with weights between -1 and 1 that hardly any reordering leaves as it is; and the norm."""
    values = tensor.detach().flatten().float()
    norm = float(values.norm()) * _coarseness(tensor)
    width = min(len(values), 65537)  # a prime, so that rows do not fall in step with channels

    if not width:
        return 0.0, norm
    rows = F.pad(values, (0, -len(values) % width)).reshape(-1, width)
    across, along = _weights(len(rows), 1.1803399, values.device), _weights(width, 2.3999632, values.device)
    return float(across @ (rows @ along)), norm


def forget_weights() -> None:
    """Let go of what fingerprints of many sizes share: probing is over."""
    _weights.cache_clear()


@lru_cache(maxsize=64)
def _weights(size: int, pace: float, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.cos(torch.arange(size, dtype=torch.float32, device=device) * pace)


def _sums(tensor: torch.Tensor) -> tuple[float, float]:
    """A sum of ``v + 0.7 v^2 - 0.4 v^3`` over the elements, which no reordering changes, and a bound of its size."""
    values = tensor.detach().flatten().float()
    scale = float(torch.stack(values.aminmax()).abs().max()) if len(values) else 0.0
    if not scale or not np.isfinite(scale):
        return scale, scale
    values = values / scale
    square = values.square()
    sums = [values.sum(), square.sum(), torch.dot(square, values), values.abs().sum()]
    first, second, third, size = torch.stack(sums).tolist()
    return (first + 0.7 * second - 0.4 * third) * scale, (size + 1.1 * second) * scale * _coarseness(tensor)


def is_alike(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], tolerance: float) -> bool:
    """Whether two outputs' fingerprints agree within a tolerance relative to their scales."""
    return len(one) == len(other) and all(
        abs(a - b) <= tolerance * max(scale, other_scale) + 1e-6 or (a != a and b != b)
        for (a, scale), (b, other_scale) in zip(one, other, strict=True)
    )
